"""The model made from scratch: reproducible, readable by other libraries, with a chat format."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, make_apply_fn
from jdpo.models.weights.loading import load_params
from jdpo.quickstart.tiny_llama import random_model, write_model

TEXTS = ["Dublin is Irish.", "Cork is Irish.", "Dublin and Cork"]


def test_same_arguments_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_model(tmp_path / name, TEXTS, hidden_size=64, num_layers=1, seed=seed)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    contents = {name: [(tmp_path / name / file).read_bytes() for file in files] for name in "abc"}
    assert contents["a"] == contents["b"]
    differing = [file for file, a, c in zip(files, contents["a"], contents["c"], strict=True) if a != c]
    assert differing == ["model.safetensors"]


def test_words_that_come_twice_are_one_token_and_text_survives(tmp_path: Path) -> None:
    write_model(tmp_path, TEXTS, hidden_size=64, num_layers=1, seed=0)
    tokenizer = load_tokenizer(tmp_path, chat_template=None)
    dublin, unknown = tokenizer.encode(["Dublin", "Zürich, 東京"])
    assert len(dublin) == 1
    assert tokenizer.hf.decode(unknown) == "Zürich, 東京"


def test_chat_format_ends_every_turn_with_the_end_token(tmp_path: Path) -> None:
    write_model(tmp_path, TEXTS, hidden_size=64, num_layers=1, seed=0)
    tokenizer = load_tokenizer(tmp_path, chat_template=None)
    text = tokenizer.render([{"role": "user", "content": "Cork?"}], add_generation_prompt=True)
    assert text == "<|im_start|>user\nCork?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.hf.convert_ids_to_tokens(list(tokenizer.end_token_ids)) == ["<|im_end|>"]
    assert tokenizer.encode(["<|im_end|>"]) == [[tokenizer.eos_token_id]]


def test_weights_load_and_give_nearly_even_predictions(tmp_path: Path) -> None:
    write_model(tmp_path, TEXTS, hidden_size=64, num_layers=2, seed=0)
    config = read_model_config(tmp_path)
    model = Transformer(config)
    tokens = jnp.arange(8)[None]
    logits = make_apply_fn(model)(load_params(tmp_path, model), tokens, jnp.ones((1, 8), bool))
    assert np.isfinite(logits).all()
    probabilities = np.asarray(nn.softmax(logits))
    entropy = -(probabilities * np.log(probabilities)).sum(-1)
    assert entropy.min() > 0.8 * np.log(config.vocab_size)


def test_a_width_that_does_not_fit_the_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden_size is 100"):
        write_model(tmp_path, TEXTS, hidden_size=100, num_layers=1, seed=0)


def test_a_random_model_may_be_made_again_but_replaces_nothing_else(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "toy", TEXTS, num_layers=1)
    first = (folder / "model.safetensors").read_bytes()
    assert (random_model(folder, TEXTS, num_layers=1, seed=1) / "model.safetensors").read_bytes() != first
    trained = tmp_path / "trained"
    write_model(trained, TEXTS, hidden_size=64, num_layers=1, seed=0)
    with pytest.raises(ValueError, match="choose another folder"):
        random_model(trained, TEXTS)


def test_a_random_base_model_has_no_chat_format_and_the_sizes_asked_for(tmp_path: Path) -> None:
    random_model(tmp_path / "base", TEXTS, num_layers=1, chat=False, vocab_size=260, max_positions=32)
    tokenizer = load_tokenizer(tmp_path / "base", chat_template=None)
    assert (tokenizer.has_chat_template, tokenizer.size) == (False, 260)
    assert tokenizer.hf.convert_ids_to_tokens(list(tokenizer.end_token_ids)) == ["<|endoftext|>"]
    assert read_model_config(tmp_path / "base").max_positions == 32


@pytest.mark.parametrize(
    ("options", "texts", "problem"),
    [
        ({"vocab_size": 100}, TEXTS, "vocab_size is 100"),
        ({"num_layers": 0}, TEXTS, "num_layers is 0"),
        ({}, [], "at least one text"),
        ({}, "Dublin", "found one str"),
    ],
)
def test_a_random_model_that_cannot_be_made_is_refused(
    options: dict[str, int], texts: list[str], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        random_model(tmp_path / "toy", texts, **options)
