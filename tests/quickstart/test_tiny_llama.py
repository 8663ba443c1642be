"""The model made from scratch: reproducible, readable by other libraries, with a chat format."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file

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


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Within the block, no file can grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_random_model_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    # Several times, as safetensors by itself puts metadata in one of two orders.
    folders = [random_model(tmp_path / str(number), TEXTS, num_layers=1) for number in range(6)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    assert load_file(folders[0] / "model.safetensors")["model.norm.weight"].tolist() == [1.0] * 64


def test_rows_instead_of_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"texts\[1\]: expected a text, found dict"):
        random_model(tmp_path / "toy", ["Cork", {"a": 1}])  # type: ignore[list-item]
    assert not any(tmp_path.iterdir())


def test_a_random_model_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "toy"
    # Enough for the tokenizer and too little for the weights.
    with files_of_at_most(200_000), pytest.raises((OSError, SafetensorError)):
        random_model(folder, TEXTS, num_layers=1)
    assert not list(folder.parent.iterdir())
    random_model(folder, TEXTS, num_layers=1)
    first = contents(folder)
    (folder / "runs").mkdir()
    with files_of_at_most(200_000), pytest.raises((OSError, SafetensorError)):
        random_model(folder, [*TEXTS, "Galway, Galway"], num_layers=1)
    (folder / "runs").rmdir()
    assert contents(folder) == first


def test_a_random_model_goes_on_after_a_kill_and_leaves_other_files(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "toy", TEXTS, num_layers=1)
    first = contents(folder)
    # A kill while a model is replaced: the weights are the first to arrive.
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            path.unlink()
    (folder / "notes.txt").write_text("mine")
    assert contents(random_model(folder, TEXTS, num_layers=1)) == first | {"notes.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    assert contents(random_model(tmp_path / "empty", TEXTS, num_layers=1)) == first


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
