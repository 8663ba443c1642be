"""The estimate of a step's time: each rule of the model on a program by hand, and links between devices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jdpo.planning.attention_kernels import AttentionWork
from jdpo.planning.hlo.collectives import Collective
from jdpo.planning.hlo.hlo_text import parse
from jdpo.planning.links import Links, Place, link_seconds
from jdpo.planning.machines import machine_of
from jdpo.planning.roofline import Roofline, Seconds, Speeds


def roofline_of(text: str, **options: Any) -> Roofline:
    """A device with 1000 FLOP/s, 100 bytes/s of memory and 10 bytes/s on links."""
    return Roofline(
        parse(text),
        speeds=Speeds({"bfloat16": 1000.0, "float32": 500.0}, 100.0),
        num_devices=2,
        link_seconds=lambda collective: collective.wire_bytes / 10,
        **options,
    )


def seconds_of(text: str, **options: Any) -> Seconds:
    return roofline_of(text, **options).seconds()


HEAD = """
ENTRY %main (x: bf16[10,10], y: bf16[10]) -> bf16[10,10] {
  %x = bf16[10,10] parameter(0)
  %y = bf16[10] parameter(1)
"""
DOT = "dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"  # 2000 FLOPs, 600 bytes: 2 s or 6 s


def test_the_slower_of_products_and_memory_counts() -> None:
    found = seconds_of(f"{HEAD}  ROOT %d = bf16[10,10] {DOT}\n}}")
    assert found == Seconds(memory=6.0, busy_memory=6.0, flops=True)
    near = HEAD.replace("%x = bf16[10,10]", "%x = bf16[10,10]{1,0:S(1)}")
    found = seconds_of(f"{near}  ROOT %d = bf16[10,10]{{1,0:S(1)}} {DOT}\n}}")
    assert found == Seconds(matrix=2.0, flops=True)


def test_an_asynchronous_copy_uses_the_memory_while_it_is_idle() -> None:
    near = HEAD.replace("%x = bf16[10,10]", "%x = bf16[10,10]{1,0:S(1)}").replace("bf16[10]", "bf16[SIZE]")
    text = near + (
        "  %s = (bf16[SIZE]{0:S(1)}, bf16[SIZE], u32[]) copy-start(%y)\n"
        f"  %d = bf16[10,10]{{1,0:S(1)}} {DOT}\n"
        "  %e = bf16[SIZE]{0:S(1)} copy-done(%s)\n"
        "  ROOT %r = bf16[10,10] bitcast(%d)\n}"
    )
    # 160 bytes take 1.6 s of the product's 2 s; 500 bytes take 3 s more.
    assert seconds_of(text.replace("SIZE", "80")).total == pytest.approx(2.0)
    assert seconds_of(text.replace("SIZE", "250")) == Seconds(matrix=2.0, copies=3.0, busy_memory=5.0, flops=True)


@pytest.mark.parametrize(("between", "hidden"), [(DOT, True), ("add(%x, %x)", False)])
def test_a_collective_is_hidden_by_products_alone(between: str, hidden: bool) -> None:
    text = (
        f"{HEAD}  %s = (bf16[10], bf16[20]) all-gather-start(%y), replica_groups={{{{0,1}}}}\n"
        f"  %d = bf16[10,10] {between}\n"
        "  %g = bf16[20] all-gather-done(%s)\n"
        "  ROOT %r = bf16[10,10] bitcast(%d)\n}"
    )
    found = seconds_of(text)
    assert found.busy_links == pytest.approx(2.0)
    assert found.collectives == pytest.approx(0.0 if hidden else 2.0)
    (only,) = roofline_of(text).communications()
    assert (only.hidden, only.times) == (hidden, 1)


LOOP = """
%body (s: (s32[], bf16[10,10])) -> (s32[], bf16[10,10]) {
  %s = (s32[], bf16[10,10]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[10,10] get-tuple-element(%s), index=1
  %d = bf16[10,10] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], bf16[10,10]) tuple(%i, %d)
}
%condition (s: (s32[], bf16[10,10])) -> pred[] {
  %s = (s32[], bf16[10,10]) parameter(0)
  ROOT %t = pred[] constant(true)
}
ENTRY %main (x: (s32[], bf16[10,10])) -> (s32[], bf16[10,10]) {
  %x = (s32[], bf16[10,10]) parameter(0)
  ROOT %w = (s32[], bf16[10,10]) while(%x), condition=%condition, body=%body, KNOWN
}
"""


def test_loops_count_with_their_turns_or_are_named() -> None:
    known = roofline_of(LOOP.replace("KNOWN", 'backend_config={"known_trip_count":{"n":"5"}}'))
    assert known.seconds().total == pytest.approx(5 * 6.0)
    assert sum(each.times * sum(each.cost.flops.values()) for each in known.executed()) == 5 * 2000
    assert known.loops_counted_once == []
    unknown = roofline_of(LOOP.replace(", KNOWN", ""))
    assert unknown.seconds().total == pytest.approx(6.0)
    assert unknown.loops_counted_once == ["w"]


def test_kernels_of_attention_count_by_their_formula_at_the_peak() -> None:
    attention = AttentionWork("splash", 300.0, "bfloat16")

    def kernel(name: str, more: str = "") -> float:
        return seconds_of(
            f'{HEAD}  ROOT %{name}.1 = bf16[10,10] custom-call(%x), custom_call_target="tpu_custom_call"{more}\n}}',
            attention=attention,
        ).matrix

    assert kernel("splash_mha_fwd_residuals") == pytest.approx(0.6)
    assert kernel("splash_mha_dkv_no_residuals") == pytest.approx(1.2)
    assert kernel("splash_mha_dq_no_residuals") == pytest.approx(0.9)
    assert kernel("splash_mha_dkv", ', a="{\\"use_fused_bwd_kernel\\": true}"') == pytest.approx(1.5)
    assert kernel("another_kernel") == 0
    cudnn = AttentionWork("cudnn", 300.0, "bfloat16")
    text = f'{HEAD}  ROOT %c = bf16[10,10] custom-call(%x), custom_call_target="__cudnn$fmhaSoftmaxBackward"\n}}'
    assert seconds_of(text, attention=cudnn).matrix == pytest.approx(1.5)


# --- links


def carried(kind: str, groups: list[list[int]]) -> Collective:
    return Collective(kind, "bf16", 1600.0, np.array(groups), "", 0, 0)


SQUARE = [Place(0, (x, y)) for y in range(2) for x in range(4)]  # 4 x 2 chips of one slice


@pytest.mark.parametrize(
    ("kind", "group", "wraps", "seconds"),
    [
        ("all-gather", [0, 1, 2, 3], (False, False), 1600 * 3 / 4 / 10),  # along one axis, in one direction
        ("all-gather", [0, 1, 2, 3], (True, False), 1600 * 3 / 4 / 20),  # a ring carries both ways
        ("all-gather", [0, 1, 2, 3, 4, 5, 6, 7], (False, False), 1600 * 7 / 8 / 20),  # both axes
        ("all-reduce", [0, 4], (False, False), 2 * 1600 / 2 / 10),
    ],
)
def test_a_group_uses_the_links_of_the_axes_that_it_spans(
    kind: str, group: list[int], wraps: tuple[bool, bool], seconds: float
) -> None:
    assert link_seconds(carried(kind, [group]), SQUARE, Links(10, 1, wraps)) == pytest.approx(seconds)


def test_between_slices_each_device_sends_its_share() -> None:
    places = [Place(index // 4, (index % 4,)) for index in range(8)]
    found = link_seconds(carried("all-gather", [list(range(8))]), places, Links(10, 1, (False,)))
    assert found == pytest.approx(1600 * 3 / 4 / 10 + 1600 / 2 / 4 / 1)
    crossing = carried("collective-permute", [[0, 1], [3, 4]])
    assert link_seconds(crossing, places, Links(10, 1, (False,))) == 1600
    assert link_seconds(crossing._replace(groups=np.array([[0, 1]])), places, Links(10, 1, (False,))) == 160


def test_gpus_of_a_node_are_linked_to_each_other() -> None:
    places = [Place(0, ()) for _ in range(8)]
    found = link_seconds(carried("all-gather", [list(range(8))]), places, Links(10, 1, (False,)))
    assert found == pytest.approx(1600 * 7 / 8 / 10)


# --- machines


@pytest.mark.parametrize(
    ("name", "topology", "devices", "wraps"),
    [
        ("v5e-8", "v5e:2x4", 8, (False, False)),
        ("v5e-256", "v5e:16x16", 256, (True, True)),
        ("v5p-64", "v5p:2x4x4", 32, (False, False, False)),
        ("v5p-256", "v5p:4x4x8", 128, (True, True, True)),
        ("v6e-64", "v6e:8x8", 64, (False, False)),
        ("tpu7x-8", "tpu7x:2x2x1", 8, (False, False, False)),
        ("2xv5e-16", "v5e:4x4", 32, (False, False)),
        ("h100x8", "1x1x8", 8, None),
        ("h100x16", "1x2x8", 16, None),
        ("h200", "1x1x1", 1, None),
    ],
)
def test_names_of_machines(name: str, topology: str, devices: int, wraps: tuple[bool, ...] | None) -> None:
    machine = machine_of(name)
    assert (machine.topology, machine.num_devices) == (topology, devices)
    assert math.isfinite(machine.chip.link + machine.chip.hbm_bandwidth + machine.chip.hbm_bytes)
    assert machine.is_gpu == (wraps is None)
    if wraps is not None:
        assert machine.wraps == wraps


@pytest.mark.parametrize(
    ("name", "near"),
    [("v5e-63", "v5e-64"), ("v5p-65", "v5p-64"), ("h300x8", "h200x8"), ("v7e-8", "v6e-8"), ("h100x12", "h100x")],
)
def test_unknown_machines_name_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=near):
        machine_of(name)
