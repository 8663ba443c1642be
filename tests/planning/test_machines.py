"""The table of machines: chips, hosts, the names that clouds give them, and near names for wrong ones."""

from __future__ import annotations

import pytest

from jdpo.planning.machines import machine_names, machine_of


# Chips, devices, hosts, and devices per host: the pages of each version in Google's documentation count VMs like this.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e-1", (1, 1, 1, 1)),
        ("v5e-8", (8, 8, 1, 8)),
        ("v5e-16", (16, 16, 4, 4)),
        ("v5e-256", (256, 256, 64, 4)),
        ("v5p-8", (4, 4, 1, 4)),
        ("v5p-64", (32, 32, 8, 4)),
        ("v6e-8", (8, 8, 1, 8)),
        ("v6e-16", (16, 16, 4, 4)),
        ("tpu7x-8", (4, 8, 1, 8)),
        ("tpu7x-32", (16, 32, 4, 8)),
        ("2xv5e-16", (32, 32, 8, 4)),
        ("h100", (1, 1, 1, 1)),
        ("h100x16", (16, 16, 2, 8)),
    ],
)
def test_hosts(name: str, expected: tuple[int, ...]) -> None:
    machine = machine_of(name)
    assert (machine.chips, machine.num_devices, machine.num_hosts, machine.devices_per_host) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e-16", ("v5litepod-16", "tpu-v5-lite-podslice", "4x4")),
        ("2xv5e-16", ("v5litepod-16", "tpu-v5-lite-podslice", "4x4")),
        ("v5p-64", ("v5p-64", "tpu-v5p-slice", "2x4x4")),
        ("v6e-8", ("v6e-8", "tpu-v6e-slice", "2x4")),
        ("tpu7x-8", (None, "tpu7x", "2x2x1")),
        ("h200x8", (None, "nvidia-h200-141gb", None)),
    ],
)
def test_names_in_clouds(name: str, expected: tuple[str | None, ...]) -> None:
    machine = machine_of(name)
    assert (machine.gcloud_type, machine.gke_accelerator, machine.gke_topology) == expected


def test_hosts_divide_every_machine() -> None:
    for name in machine_names():
        machine = machine_of(name)
        assert machine.num_hosts * machine.devices_per_host == machine.num_devices, name
        assert machine.num_hosts * machine.chips_per_host == machine.chips, name
        assert name.startswith(machine.version)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("v5litepod-16", "v5e-16"),
        ("v5e16", "v5e-16"),
        ("V5P-64", "v5p-64"),
        ("v5e-24", "v5e-32"),
        ("2xv5e-24", "2xv5e-32"),
        ("tpu-v5p-slice", "v5p-8"),
        ("tpu7x", "tpu7x-8"),
        ("trillium-16", "v6e-16"),
        ("H100:8", "h100x8"),
        ("8xh100", "h100x8"),
        ("a100x8", "h100x8"),
        ("h100x12", "h100x16"),
        ("nvidia-h100-80gb:8", "h100x8"),
    ],
)
def test_a_wrong_name_lists_near_ones(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean {near}\?"):
        machine_of(wrong)


@pytest.mark.parametrize("wrong", ["h100x80000000000", "5000xv5e-16", "v5e-99999999999999999999", "h100x8200"])
def test_a_number_that_is_too_large(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"at most 1,024") as caught:
        machine_of(wrong)
    assert f"did you mean {wrong}" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["cray", "", "0", "x", "-", "v5e-", "5x", "\x1b[31m", "h100x0", "0xv5e-16", "ü"])
def test_nonsense_lists_machines(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"expected one of .*h100x16"):
        machine_of(wrong)
