"""The memory that this process may use: the machine's, or less in a container or a job, or under `ulimit`.

Linux keeps the limits of containers and jobs in control groups, of which there are two versions that may both be
mounted. A process is in a group (/proc/self/cgroup), groups are nested, and the limits of all groups up to the root of
the mount apply.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_UNESCAPED = re.compile(r"\\([0-7]{3})")
_V1_ROOT, _V2_ROOT = PurePosixPath("/sys/fs/cgroup/memory"), PurePosixPath("/sys/fs/cgroup")


class HostMemory(NamedTuple):
    """An amount of memory.

    Attributes:
      size: bytes.
      bound: what limits it, such as "the control group /job"; "" if it is the whole machine's.
    """

    size: int
    bound: str = ""


def host_memory(root: Path = Path("/"), limits: Mapping[str, int] | None = None) -> HostMemory:
    """Finds the memory that this process may use.

    Args:
      root: where /proc and /sys are.
      limits: soft limits of the process in bytes, by the letter of `ulimit` (v: address space, d: data); None: its own.
    """
    found = [
        HostMemory(_total(root)),
        *_of_groups(root),
        *_of_process(root, _own_limits() if limits is None else limits),
    ]
    # The tightest limit is the one that kills the process.
    return min(found, key=lambda memory: memory.size)


def _total(root: Path) -> int:
    kilobytes = _field(root / "proc/meminfo", "MemTotal")
    return kilobytes * 1024 if kilobytes else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- control groups


def _of_groups(root: Path) -> Iterator[HostMemory]:
    """The limit of every control group that this process is in, directly or further up."""
    for version, mounted, group in _places(root):
        # A group cannot have more than the groups around it.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mounted):
                break
            here = root / folder.relative_to("/")
            name = "/" if folder == mounted else f"/{folder.relative_to(mounted)}"
            for size in _limits_in(here, version, own=folder == group):
                yield HostMemory(size, f"the control group {name}")


def _limits_in(folder: Path, version: int, *, own: bool) -> Iterator[int]:
    """Limits of one group, in bytes.

    Args:
      own: True for the group of the process, False for one further up.
    """
    if version == 2:
        names = ["memory.max", "memory.high"]  # over `high` a process is not killed, but hardly runs
    elif own or _text(folder / "memory.use_hierarchy").strip() != "0":
        names = ["memory.limit_in_bytes"]
    else:
        names = []  # a group of version 1 that does not count what is below it
    texts = [_text(folder / name).strip() for name in names]
    if version == 1 and own:  # counts groups that are not visible from here
        texts += re.findall(r"^hierarchical_memory_limit (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    for text in texts:
        if text.isdecimal() and int(text) > 0:  # else "max"
            yield int(text)


def _places(root: Path) -> Iterator[tuple[int, PurePosixPath, PurePosixPath]]:
    """(version, where the control groups are mounted, the group of this process there)."""
    groups = dict(_groups(root))
    yield 1, _V1_ROOT, _V1_ROOT  # of a container, which may hide the rest
    yield 2, _V2_ROOT, _V2_ROOT
    for version, top, mounted in _mounts(root):
        if version in groups:
            group = groups[version]
            inside = group.is_relative_to(top) and ".." not in group.parts
            yield version, mounted, mounted / group.relative_to(top) if inside else mounted


def _groups(root: Path) -> Iterator[tuple[int, PurePosixPath]]:
    """(version, path) of the groups of this process that count memory."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/") and (number == "0" or "memory" in controllers.split(",")):
            yield (2 if number == "0" else 1), PurePosixPath(path)


def _mounts(root: Path) -> Iterator[tuple[int, PurePosixPath, PurePosixPath]]:
    """(version, the group at the top of a mount, where it is mounted) for those that count memory."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        # Optional fields, any number of them, end at the lone hyphen; what follows it has fixed places (man 5 proc).
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kinds) < 3:
            continue
        # The kernel writes spaces in paths as \040.
        top, mounted = (PurePosixPath(_UNESCAPED.sub(lambda code: chr(int(code[1], 8)), text)) for text in fields[3:5])
        if not mounted.is_absolute():
            continue
        if kinds[0] == "cgroup2":
            yield 2, top, mounted
        elif kinds[0] == "cgroup" and "memory" in kinds[2].split(","):
            yield 1, top, mounted


# --- limits of the process


def _own_limits() -> dict[str, int]:
    try:
        import resource
    except ImportError:  # not on Windows
        return {}
    kinds = {"v": resource.RLIMIT_AS, "d": resource.RLIMIT_DATA}
    softs = {letter: resource.getrlimit(kind)[0] for letter, kind in kinds.items()}
    return {letter: soft for letter, soft in softs.items() if soft != resource.RLIM_INFINITY}


def _of_process(root: Path, limits: Mapping[str, int]) -> Iterator[HostMemory]:
    """The memory within `ulimit`, which counts addresses, also those without memory: of stacks and mapped files."""
    status = root / "proc/self/status"
    resident = _field(status, "VmRSS")
    for letter, soft in limits.items():
        reserved = max(_field(status, {"v": "VmSize", "d": "VmData"}[letter]) - resident, 0) * 1024
        yield HostMemory(max(soft - reserved, 1), f"ulimit -{letter} {soft // 1024}")


# --- files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(path: Path, name: str) -> int:
    """A number of a file with lines such as `MemTotal:  16308740 kB`; 0 if it is missing."""
    found = re.search(rf"^{name}:\s*(\d+)", _text(path), re.MULTILINE)
    return int(found[1]) if found else 0
