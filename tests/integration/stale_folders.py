"""A folder that behaves as one over NFS does, for processes that are started with an environment; see stale_disk.c."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "stale_disk.c"


@contextlib.contextmanager
def stale_folder(folder: Path, *, seconds: float = 20) -> Iterator[dict[str, str]]:
    """Yields the environment; `stale.log` in the folder gets the names of files that are there and were not shown.

    Args:
      seconds: for which a process answers from memory.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = folder / "stale_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    yield {
        "LD_PRELOAD": str(library),
        "STALE_FOLDER": str(folder),
        "STALE_SECONDS": str(seconds),
        "STALE_LOG": str(folder / "stale.log"),
    }
