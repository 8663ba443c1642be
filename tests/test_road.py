"""Traces the calls from the command line to the jitted step, and the code that one step runs.

`pytest -s tests/test_road.py` prints both lists.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import pytest

import jdpo
from jdpo.cli.main import main
from jdpo.config import DPOConfig, load_config
from jdpo.training.fit.assembly import assemble
from jdpo.training.setup.batches import make_batches
from jdpo.training.setup.numerics import numerics, resolve_dtype
from jdpo.training.setup.run_setup import build
from jdpo.training.step.train_step import train_step

ROOT = Path(jdpo.__file__).parent
MOST_CALLS, MOST_FILES_OF_CALLS = 5, 4
MOST_FILES_OF_STEP, MOST_LINES = 9, 350

LEFT_OUT = ("models/", "types.py", "devices.py", "training/step/optimizer.py", "training/step/offload.py")
"""The model, the values that travel between packages, the kind of devices, and the formulas of optimizers."""
BINDING = "losses/catalogue.py"
"""Modules that run no code in a step, but bind names of losses to functions."""


class _Found(Exception):
    """Ends a run at the jitted step."""


def calls_to_jit(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the jdpo functions between the command line and `jax.jit` of the training step, as file:function."""
    found: list[str] = []
    jit = jax.jit

    def jit_and_look(*args: Any, **options: Any) -> Any:
        if args and isinstance(args[0], functools.partial) and args[0].func is train_step:
            found.extend(_stack(sys._getframe(1)))
            raise _Found
        return jit(*args, **options)

    monkeypatch.setattr(jax, "jit", jit_and_look)
    with pytest.raises(_Found):
        main(words)
    return found


def _stack(frame: FrameType | None) -> list[str]:
    names: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        # In Python 3.11 a comprehension has its own frame; to a reader it is part of its function.
        if path.is_relative_to(ROOT) and not frame.f_code.co_name.startswith("<"):
            names.insert(0, f"{path.relative_to(ROOT)}:{frame.f_code.co_name}")
        frame = frame.f_back
    return names


def files_of_step(words: list[str]) -> dict[str, int]:
    """Returns the jdpo files that run while one packed sigmoid step is traced, with their numbers of lines."""
    config = resolve_dtype(load_config(DPOConfig, None, words))
    files: set[str] = {BINDING}
    depth = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        if frame.f_code is train_step.__code__:
            depth += {"call": 1, "return": -1}.get(event, 0)
        path = frame.f_code.co_filename
        if depth and event == "call" and path.startswith(str(ROOT)):
            files.add(str(Path(path).relative_to(ROOT)))

    with numerics(config):
        setup = build(config, lambda text: None)
        assembly = assemble(setup, reference="live", remat="none")
        rows = setup.row_plan.step(0)
        batch = make_batches(setup, setup.train_data, [rows], max_tokens_per_device=4096, cache=None).like(rows)
        with _profiled(watch):
            assembly.lower_step(batch)
    return {
        name: len((ROOT / name).read_text().splitlines()) for name in sorted(files) if not name.startswith(LEFT_OUT)
    }


@contextmanager
def _profiled(watch: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


@pytest.fixture
def words(run_words: Callable[..., list[str]]) -> list[str]:
    return run_words(packing=True, reference="live", loss_type="sigmoid")


def test_the_road_from_the_command_to_the_jitted_step_is_short(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_to_jit(["dpo", *words], monkeypatch)
    print("", *calls, "jax.jit", sep="\n  ")
    assert calls[0] == "cli/main.py:main"
    assert len(calls) <= MOST_CALLS, calls  # the last of them calls jax.jit
    assert len({call.partition(":")[0] for call in calls}) <= MOST_FILES_OF_CALLS, calls


def test_few_files_say_what_a_packed_sigmoid_step_computes(words: list[str]) -> None:
    files = files_of_step(words)
    print("", *(f"{lines:4} {name}" for name, lines in files.items()), sep="\n  ")
    assert "training/step/train_step.py" in files
    assert len(files) <= MOST_FILES_OF_STEP, files
    assert max(files.values()) <= MOST_LINES, files
