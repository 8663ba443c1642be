"""The memory that a process may use, read from /proc and /sys trees of machines and containers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jdpo.training.fit.host_memory import host_memory

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712
V2_MOUNT = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "36 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


class Machine:
    """Writes a tree with 16 GiB of memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal:       {16 * GIB // 1024} kB\nMemFree:        1 kB\n")

    def write(self, path: str, content: object) -> None:
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{content}\n")

    def groups(self, *lines: str) -> None:
        self.write("proc/self/cgroup", "\n".join(lines))

    def mounts(self, *lines: str) -> None:
        self.write("proc/self/mountinfo", "\n".join(["22 1 8:1 / / rw - ext4 /dev/sda1 rw", *lines]))

    def memory(self, **limits: int) -> tuple[int, str]:
        return tuple(host_memory(self.root, limits))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_control_groups_it_is_the_machines(machine: Machine) -> None:
    assert machine.memory() == (16 * GIB, "")
    machine.groups("garbage", "0:", "")
    machine.mounts("", "36 31 0:32 / - cgroup", "a b c - cgroup2")
    assert machine.memory() == (16 * GIB, "")


@pytest.mark.parametrize("at", ["", "/kubepods", "/kubepods/pod1", "/kubepods/pod1/job"])
@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_any_group_on_the_way_up_limits_version_2(machine: Machine, at: str, name: str) -> None:
    machine.groups("0::/kubepods/pod1/job")
    machine.mounts(V2_MOUNT)
    for group in ("/kubepods", "/kubepods/pod1", "/kubepods/pod1/job"):
        machine.write(f"/sys/fs/cgroup{group}/memory.max", "max")
    machine.write(f"/sys/fs/cgroup{at}/{name}", 3 * GIB)
    machine.write("/sys/fs/cgroup/kubepods/other/memory.max", GIB)  # of another process
    assert machine.memory() == (3 * GIB, f"the control group {at or '/'}")


@pytest.mark.parametrize("at", ["/slurm", "/slurm/uid_0", "/slurm/uid_0/job_7/step_0"])
def test_any_group_on_the_way_up_limits_version_1(machine: Machine, at: str) -> None:
    machine.groups(
        "9:cpu,cpuacct:/elsewhere", "4:memory:/slurm/uid_0/job_7/step_0", "1:name=systemd:/init.scope", "0::/"
    )
    machine.mounts(V1_MOUNT, "37 31 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw")
    for group in ("", "/slurm", "/slurm/uid_0", "/slurm/uid_0/job_7", "/slurm/uid_0/job_7/step_0"):
        machine.write(f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes", NO_LIMIT_V1)
    machine.write(f"/sys/fs/cgroup/memory{at}/memory.limit_in_bytes", 3 * GIB)
    machine.write("/sys/fs/cgroup/memory/elsewhere/memory.limit_in_bytes", GIB)
    assert machine.memory() == (3 * GIB, f"the control group {at}")


def test_a_group_of_version_1_that_does_not_count_what_is_below_it_is_no_limit(machine: Machine) -> None:
    machine.groups("4:memory:/flat/job")
    machine.mounts(V1_MOUNT)
    machine.write("/sys/fs/cgroup/memory/flat/memory.limit_in_bytes", GIB)
    machine.write("/sys/fs/cgroup/memory/flat/memory.use_hierarchy", 0)
    machine.write("/sys/fs/cgroup/memory/flat/job/memory.limit_in_bytes", 2 * GIB)
    machine.write("/sys/fs/cgroup/memory/flat/job/memory.use_hierarchy", 0)
    assert machine.memory() == (2 * GIB, "the control group /flat/job")


def test_groups_of_version_1_that_cannot_be_seen_count_through_their_sum(machine: Machine) -> None:
    machine.groups("4:memory:/docker/1a2b")
    machine.mounts("36 31 0:32 /docker/1a2b /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory")
    machine.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", NO_LIMIT_V1)
    machine.write("/sys/fs/cgroup/memory/memory.stat", f"cache 5\nhierarchical_memory_limit {5 * GIB}\nrss 6")
    assert machine.memory() == (5 * GIB, "the control group /")


@pytest.mark.parametrize(
    ("group", "top", "at"),
    [
        ("/docker/1a2b", "/docker/1a2b", ""),  # the container's own group is the top of its mount
        ("/docker/1a2b/inner", "/docker/1a2b", "/inner"),
        ("/docker/1a2b", "/", ""),  # the mount shows the container's group and hides what is above
        ("/../../job", "/", ""),  # a group outside the namespace
        ("/docker/1a2bc", "/docker/1a2b", ""),  # not below it, despite its name
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_containers(machine: Machine, group: str, top: str, at: str, version: int) -> None:
    if version == 1:
        machine.groups(f"4:memory:{group}")
        machine.mounts(f"36 31 0:32 {top} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory")
        machine.write(f"/sys/fs/cgroup/memory{at}/memory.limit_in_bytes", 2 * GIB)
    else:
        machine.groups(f"0::{group}")
        machine.mounts(f"36 31 0:32 {top} /sys/fs/cgroup ro - cgroup2 cgroup rw")
        machine.write(f"/sys/fs/cgroup{at}/memory.max", 2 * GIB)
    assert machine.memory()[0] == 2 * GIB


def test_a_container_that_hides_proc_is_read_at_the_usual_place(machine: Machine) -> None:
    machine.write("/sys/fs/cgroup/memory.max", 2 * GIB)
    assert machine.memory() == (2 * GIB, "the control group /")
    machine.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", GIB)
    assert machine.memory()[0] == GIB


def test_unusual_mounts(machine: Machine) -> None:
    machine.groups("3:cpu,memory:/a job", "0::/")
    machine.mounts(r"36 31 0:32 / /mnt/my\040groups rw - cgroup cgroup rw,cpu,memory")
    machine.write("/mnt/my groups/a job/memory.limit_in_bytes", 2 * GIB)
    assert machine.memory() == (2 * GIB, "the control group /a job")


def test_limits_of_the_process_count_addresses(machine: Machine) -> None:
    machine.write("proc/self/status", f"VmSize:\t{3 * GIB // 1024} kB\nVmRSS:\t{GIB // 1024} kB\nVmData:\t10 kB\n")
    assert machine.memory(v=8 * GIB) == (6 * GIB, f"ulimit -v {8 * GIB // 1024}")
    assert machine.memory(d=8 * GIB) == (8 * GIB, f"ulimit -d {8 * GIB // 1024}")
    assert machine.memory(v=32 * GIB) == (16 * GIB, "")
    assert machine.memory(v=GIB)[0] == 1, "there is less than nothing left"


def test_the_smallest_limit_counts(machine: Machine) -> None:
    machine.groups("4:memory:/a", "0::/b")
    machine.mounts(V1_MOUNT, V2_MOUNT)
    machine.write("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", 4 * GIB)
    machine.write("/sys/fs/cgroup/b/memory.max", 3 * GIB)
    assert machine.memory(v=5 * GIB) == (3 * GIB, "the control group /b")
    assert machine.memory(v=2 * GIB)[0] == 2 * GIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_has_memory() -> None:
    assert 2**28 < host_memory().size < 2**50
