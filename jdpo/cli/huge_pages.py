"""Huge pages for the arrays of a run on CPU."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
"""Read by the C library when a process starts, and not again."""

TUNABLE = "glibc.malloc.hugetlb"
"""1: malloc asks Linux for huge pages (madvise), where they are given to those who ask."""

SINCE = (2, 35)
"""The first glibc that has it."""

_ACCELERATORS = ("nvidia0", "dxg", "kfd", "accel*", "vfio/[0-9]*")


def restart_with_huge_pages() -> None:
    """Replaces this process by the same one with huge pages, if it is to run on a CPU and would not get them.

    A step's temporary memory is one block, which malloc returns to Linux after the step. Each step touches all of it
    again, which costs a fault per page: 72,000 pages of 4 KiB for a model of 22 M parameters, or hundreds of 2 MiB.
    """
    environment = with_huge_pages(os.environ, libc=_libc())
    # A program that was read from standard input, or given with -c, cannot be read again, or should not run twice.
    program = getattr(sys.modules["__main__"], "__file__", None) or ""
    if environment is None or not sys.executable or not os.path.isfile(program):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def with_huge_pages(environment: Mapping[str, str], root: Path = Path("/"), *, libc: str) -> dict[str, str] | None:
    """Returns the environment in which malloc asks for huge pages; None where that is decided, or would not help.

    Args:
      root: the folder that contains `dev` and `sys`.
      libc: name and version, such as "glibc 2.36".

    >>> with_huge_pages({}, libc="musl 1.2") is None
    True
    """
    version = re.match(r"glibc (\d+)\.(\d+)", libc)
    if version is None or tuple(map(int, version.groups())) < SINCE:
        return None
    tunables = environment.get(VARIABLE, "")
    if TUNABLE in tunables or _has_accelerator(environment, root):
        return None
    try:
        policy = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    # With [always] there is nothing to ask for, and with [never] nothing to get.
    if "[madvise]" not in policy:
        return None
    return {**environment, VARIABLE: ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))}


def _has_accelerator(environment: Mapping[str, str], root: Path) -> bool:
    if environment.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(any((root / "dev").glob(name)) for name in _ACCELERATORS)


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # not Linux, or another C library
        return ""
