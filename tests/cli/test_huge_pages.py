"""A run on CPU starts again with huge pages, where Linux gives them to those who ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jdpo.cli.huge_pages import VARIABLE, with_huge_pages

LIBC = "glibc 2.36"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine without accelerators, with huge pages for those who ask."""
    policy(tmp_path, "always [madvise] never")
    (tmp_path / "dev/vfio").mkdir(parents=True)
    return tmp_path


def policy(root: Path, text: str) -> None:
    folder = root / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "enabled").write_text(text + "\n")


def test_settings_of_the_user_stay(machine: Path) -> None:
    assert with_huge_pages({"HOME": "/h"}, machine, libc=LIBC) == {"HOME": "/h", VARIABLE: "glibc.malloc.hugetlb=1"}
    other = {VARIABLE: "glibc.malloc.check=1"}
    found = with_huge_pages(other, machine, libc=LIBC)
    assert found == {VARIABLE: "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}
    assert other == {VARIABLE: "glibc.malloc.check=1"}
    # What is returned is enough: the process that starts with it does not start again.
    assert with_huge_pages(found, machine, libc=LIBC) is None
    assert with_huge_pages({VARIABLE: "glibc.malloc.hugetlb=0"}, machine, libc=LIBC) is None


@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]", "é"])
def test_nothing_changes_under_other_policies(machine: Path, text: str) -> None:
    policy(machine, text)
    assert with_huge_pages({}, machine, libc=LIBC) is None


@pytest.mark.parametrize("libc", ["", "glibc 2.34", "musl 1.2"])
def test_nothing_changes_with_another_c_library(machine: Path, tmp_path: Path, libc: str) -> None:
    assert with_huge_pages({}, machine, libc=libc) is None
    assert with_huge_pages({}, tmp_path / "elsewhere", libc=LIBC) is None


@pytest.mark.parametrize("name", ["nvidia0", "accel3", "vfio/0"])
def test_nothing_changes_for_an_accelerator(machine: Path, name: str) -> None:
    (machine / "dev" / name).touch()
    assert with_huge_pages({}, machine, libc=LIBC) is None
    assert with_huge_pages({"JAX_PLATFORMS": "cpu"}, machine, libc=LIBC) is not None


CODE = f"""
import os, sys
from jdpo.cli.huge_pages import restart_with_huge_pages
restart_with_huge_pages()
print(os.getpid(), sys.argv[1:], os.environ.get("{VARIABLE}"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own files")
@pytest.mark.parametrize("from_file", [True, False])
def test_the_process_that_starts_again_is_the_same(tmp_path: Path, from_file: bool) -> None:
    (tmp_path / "program.py").write_text(CODE)
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(tmp_path / "program.py") if from_file else "-", "a b", "--c=1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        output, _ = process.communicate(CODE)
    expected = with_huge_pages(environment, libc=os.confstr("CS_GNU_LIBC_VERSION") or "") or {}
    # A program that came from standard input is there no more.
    setting = expected.get(VARIABLE) if from_file else None
    assert output.strip() == f"{process.pid} ['a b', '--c=1'] {setting}"
    assert process.returncode == 0
