"""A loop's settings with small files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.config import load_config
from jdpo.iteration.loop_settings import LoopSettings
from tests.conftest import write_jsonl


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """Twenty prompts, each with the right answer in a column."""
    rows = [{"prompt": [{"role": "user", "content": f"What is {n} + 1?"}], "answer": str(n + 1)} for n in range(20)]
    return write_jsonl(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def make_loop(prompts_file: Path, tmp_path: Path) -> Callable[..., LoopSettings]:
    """Returns settings of a loop of three rounds; keyword arguments replace them, with `__` for dots."""

    def make(**changes: Any) -> LoopSettings:
        values = {
            "model_name_or_path": "MODEL",
            "prompts": prompts_file,
            "output_dir": tmp_path / "loop",
            "score.by": "exact:answer",
            "compare.by": "judge:http://localhost:1/v1",
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        return load_config(LoopSettings, None, [f"{name}={value}" for name, value in values.items() if value != ""])

    return make
