from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.checkpoint.hf_export import export_model
from jdpo.models.families import read_model_config
from jdpo.models.weights.loading import load_params
from tests.golden_models import GOLDEN_MODELS

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    """A byte-level tokenizer of 40 tokens trained on the spot: <|eos|> 0, <|end|> 1, <|pad|> 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|eos|>", "<|end|>", "<|pad|>"]
    bpe.train_from_iterator(
        ["abc abd abc user assistant"] * 4, trainers.BpeTrainer(vocab_size=40, special_tokens=special)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|eos|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    assert len(fast) <= 40
    return fast


@pytest.fixture
def export(tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that exports golden folder `case` (or `source`) to tmp_path/model with the given options."""

    def run(case: str = "llama", *, source: Path | None = None, params: Any = None, **options: Any) -> Path:
        source = source or GOLDEN_MODELS / case
        config = read_model_config(source)
        out = options.pop("out", tmp_path / "model")
        export_model(
            load_params(source, config) if params is None else params,
            options.pop("config", config),
            out,
            source_folder=source,
            tokenizer=tokenizer,
            end_token_ids=options.pop("end_token_ids", [1]),
            **options,
        )
        return out

    return run
