"""`jdpo.load` and what it returns, on a toy."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jdpo
from jdpo.generation.asking.token_logps import completion_logps
from jdpo.generation.loaded_model import LoadedModel
from jdpo.types import Message

ASK = [{"role": "user", "content": "slow river"}]
OPTIONS = {"max_new_tokens": 8, "top_p": 0.9, "seed": 5}


@pytest.fixture(scope="module")
def model(toy_model: Path) -> LoadedModel:
    return jdpo.load(toy_model)


def ids_of(model: LoadedModel, prompt: list[dict[str, str]]) -> list[int]:
    (ids,) = model.tokenizer.encode([model.tokenizer.render(prompt, add_generation_prompt=True)])
    return ids


def test_a_list_of_prompts_gets_the_answers_of_each(model: LoadedModel) -> None:
    first, second = model.generate(ASK, n=2, **OPTIONS)
    assert (first.sample, second.sample, first.tokens == second.tokens) == (0, 1, False)
    other = [{"role": "user", "content": "green"}]
    assert model.generate([ASK, other], **OPTIONS)[0] == [first]
    assert model.generate([], **OPTIONS) == []
    # The stream is the text of the answer.
    for answer in (first, second):
        assert "".join(model.stream(ASK, sample=answer.sample, **OPTIONS)) == answer.text == answer.message["content"]


def test_logps_are_those_of_the_tokens_that_training_learns(model: LoadedModel) -> None:
    found = model.logps(ASK, "green paper")
    prompt = ids_of(model, ASK)
    (whole,) = model.tokenizer.encode([model.tokenizer.render([*ASK, {"role": "assistant", "content": "green paper"}])])
    assert prompt + found.tokens == whole
    assert "".join(found.pieces) == "green paper<|im_end|>\n"
    assert found.total == pytest.approx(sum(found.logps))
    text = model.logps("slow river", " green")
    assert text.pieces[-1] == "<|im_end|>"  # the EOS, once
    best = model.next_tokens(ASK, 3)
    assert [one.logp for one in best] == sorted((one.logp for one in best), reverse=True)
    assert model.next_tokens(ASK, 400)[0] == best[0]
    assert sum(np.exp(one.logp) for one in model.next_tokens(ASK, 10_000)) == pytest.approx(1, abs=1e-5)
    after = {one.token: one.logp for one in model.next_tokens(ASK, 10_000, start="green")}
    assert after[found.tokens[1]] == pytest.approx(found.logps[1], abs=1e-5)


def test_the_logp_of_an_answer_is_that_of_its_tokens(model: LoadedModel) -> None:
    answer, _ = model.generate(ASK, n=2, **OPTIONS)
    assert answer.tokens is not None
    logps = completion_logps(model.model, model.params, model.mesh, ids_of(model, ASK), answer.tokens)
    assert answer.logp == pytest.approx(float(logps.sum()), abs=1e-4)


def test_the_repr_has_no_weights(model: LoadedModel) -> None:
    assert len(repr(model)) < 500
    assert model.name in repr(model)


def test_wrong_arguments_are_errors_of_the_call(model: LoadedModel) -> None:
    for call, words in (
        (lambda: model.generate(ASK, temperature=-1), "temperature: expected 0"),
        (lambda: model.generate("river " * 300), "none of the model's 256 positions"),
        (lambda: model.stream("river " * 300), "none of the model's 256 positions"),
        (lambda: model.generate([[]]), "the prompt cannot be answered: empty prompt"),
        (lambda: model.logps(ASK, ""), "the answer cannot be scored: empty side"),
        (lambda: model.logps("x", "river " * 300), r"more than the model's 256 positions"),
        (lambda: model.next_tokens(ASK, 0), "k: expected 1 or more"),
        (lambda: model.logps("", "slow"), "the answer cannot be scored: empty prompt"),
        (lambda: model.generate("\ud800"), "not Unicode"),
        (lambda: model.generate("x", max_new_tokens=1.5), "max_new_tokens: expected a whole number"),  # type: ignore[call-overload]
        (lambda: model.generate({"role": "user"}), "prompt: expected text"),  # type: ignore[call-overload]
        (lambda: model.generate(ASK, n=0), "n: expected 1 or more"),
        (lambda: model.logps(ASK, None), "answer: expected text"),  # type: ignore[arg-type]
        (lambda: jdpo.load(""), "model: expected a model folder"),
        (lambda: model.generate([1]), "prompt: expected text"),  # type: ignore[list-item]
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_logits_of_nan_are_an_error(model: LoadedModel) -> None:
    ruined = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * np.nan, model.params))
    with pytest.raises(FloatingPointError, match="logits of NaN"):
        ruined.generate(ASK, n=2, **OPTIONS)


def test_answers_end_at_the_tokens_of_the_generation_config(toy_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_model, tmp_path / "model"))
    own = jdpo.load(folder)
    first, _ = own.generate(ASK, n=2, **OPTIONS)
    assert first.tokens is not None
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first.tokens[2]]}))
    ended = jdpo.load(folder)
    assert ended.end_token_ids == (*own.tokenizer.end_token_ids, first.tokens[2])
    answer, _ = ended.generate(ASK, n=2, **OPTIONS)
    assert (answer.tokens, answer.finish_reason) == (first.tokens[:3], "stop")
    assert "".join(ended.stream(ASK, **OPTIONS)) == answer.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype: expected auto, float32 or bfloat16"),
        ({"chat_template": "chatml"}, "tokens, 2 of them for chat_template"),
        ({"mesh": jdpo.MeshConfig(data=3)}, "does not fit the 8 devices"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, options: dict[str, str], words: str) -> None:
    from tests.data.conftest import save_byte_level

    golden = Path(__file__).parents[1] / "golden" / "logits" / "qwen3"
    folder = Path(shutil.copytree(golden, tmp_path / "model"))
    save_byte_level(folder, ["a"], vocab_size=0)
    with pytest.raises(ValueError, match=words):
        jdpo.load(folder, **options)
    with pytest.raises(ValueError, match="does not exist"):
        jdpo.load("./nowhere")


def test_a_question_about_an_image_is_refused_by_name(model: LoadedModel) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image", "image": "sky.png"}]
    question: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "user", "content": parts}]
    for ask in (model.generate, model.stream, model.next_tokens):
        with pytest.raises(ValueError, match="prompt: the content of message 1 is a list with a part of type 'image'"):
            ask(question)


def test_bfloat16_is_computed_in_bfloat16(toy_model: Path, model: LoadedModel) -> None:
    half = jdpo.load(toy_model, dtype="bfloat16")
    assert half.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert half.digest == model.digest
    assert half.logps(ASK, "green").total == pytest.approx(model.logps(ASK, "green").total, abs=0.2)
