"""The process of one part: `part_worker.py PART FOLDER` reads FOLDER/request.json and writes FOLDER/result.json."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULES = {
    "machine": "machine_part",
    "parity": "parity_part",
    "resume": "resume_part",
    "full": "speed_part",
    "lora": "speed_part",
    "compare": "compare_part",
}
"""part -> the module whose `run(name, request, save)` measures it; only that one is loaded."""

Save = Callable[[dict[str, Any]], None]
"""Takes the result so far; what was saved last is kept if the part then fails or is stopped."""


def main(name: str, folder: Path) -> None:
    """Runs a part."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))

    def save(result: dict[str, Any]) -> None:
        unfinished = folder / "result.json.part"
        unfinished.write_text(json.dumps(result), encoding="utf-8")
        unfinished.replace(folder / "result.json")

    check_platform(request["on"], tiny=request["tiny"])
    importlib.import_module(MODULES[name]).run(name, request, save)


def check_platform(asked: str | None, *, tiny: bool) -> None:
    """Checks that JAX has the device that is to be measured: where it finds no accelerator, it takes the CPU.

    Raises:
      ValueError: it has another one, or a model of true size would run on a CPU that nobody asked for.
    """
    import jax

    found = jax.default_backend()
    if found != asked and (asked is not None or (found == "cpu" and not tiny)):
        raise ValueError(
            f"expected {asked or 'an accelerator'}, but JAX finds {found} devices only: install .[cuda] or "
            ".[tpu], and see that nvidia-smi lists a GPU; or try the script with --on cpu --tiny"
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
