"""The usage snippet of a model card runs as it is printed."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from jdpo.config import DPOConfig, load_config
from jdpo.training.run import train


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft calls it
@pytest.mark.parametrize("lora", ["false", "true"])
def test_the_snippet_of_a_card_asks_the_model(
    run_words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str
) -> None:
    train(load_config(DPOConfig, None, run_words(max_steps=1, lora=lora)))
    model = tmp_path / "run" / "model"
    (code,) = re.findall(r"^```python\n(.*?)^```$", (model / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(model)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code.replace("max_new_tokens=200", "max_new_tokens=5"), {})
    assert shown.getvalue().strip()
