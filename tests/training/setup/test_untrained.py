"""Tokens whose embedding rows were never trained: how the rows start, and what is logged about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.config import DPOConfig, load_config
from jdpo.inspection.document import inspect_run
from jdpo.models.weights.embedding_rows import NOISE_SCALE
from jdpo.training.reference.cache_entries import find_rows
from jdpo.training.setup.numerics import resolve_dtype
from jdpo.training.setup.run_setup import Setup, build
from jdpo.training.setup.weight_placement import load_reference, load_start
from tests.conftest import write_jsonl

Words = Callable[..., list[str]]
EMBEDDING = "model.embed_tokens.weight"
MARKERS = """\
{%- for message in messages -%}
<|turn:{{ message.role }}|>{{ message.content }}<|done|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|turn:assistant|>{%- endif -%}
"""


@pytest.fixture
def model_with(toy_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Returns a function (spare=0, zero=(), tiny=(), untied=False) -> the toy model with such embedding rows."""

    def make(spare: int = 0, zero: tuple[int, ...] = (), tiny: tuple[int, ...] = (), untied: bool = False) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.glob('model*')))}"
        shutil.copytree(toy_model, folder)
        tensors = load_file(folder / "model.safetensors")
        table = np.concatenate([tensors[EMBEDDING], np.zeros((spare, tensors[EMBEDDING].shape[1]), np.float32)])
        table[list(zero)] = 0
        table[list(tiny)] *= 1e-3
        tensors[EMBEDDING] = table
        if untied:
            tensors["lm_head.weight"] = table[::-1].copy()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {"vocab_size": len(table), "tie_word_embeddings": not untied}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def start_of(run_words: Words, tmp_path: Path) -> Callable[..., tuple[Setup, list[str]]]:
    """Returns a function (model, overrides) -> the Setup of a run with it, and the logged lines."""
    template = tmp_path / "markers.jinja"
    template.write_text(MARKERS, encoding="utf-8")

    def made(model: Path, *, markers: bool = False, **overrides: Any) -> tuple[Setup, list[str]]:
        chosen = {"chat_template": template} if markers else {}
        config = load_config(DPOConfig, None, run_words(model_name_or_path=model, **chosen, **overrides))
        lines: list[str] = []
        return build(resolve_dtype(config), lines.append), lines

    return made


def tables_of(setup: Setup) -> list[np.ndarray]:
    """Returns the embedding and the untied head, [v, d] each, at the start of training."""
    params = load_start(setup)
    head = [np.asarray(params["lm_head"]["kernel"]).T] if "lm_head" in params else []
    return [np.asarray(params["embed"]["embedding"]), *head]


@pytest.mark.parametrize("untied", [False, True])
def test_an_added_token_starts_at_the_mean_wherever_its_row_comes_from(
    model_with: Callable[..., Path], start_of: Callable[..., tuple[Setup, list[str]]], untied: bool
) -> None:
    size = len(load_file(model_with() / "model.safetensors")[EMBEDDING])
    spare_model = model_with(spare=32, untied=untied)
    setup, lines = start_of(spare_model, markers=True)
    ids = [size, size + 1, size + 2, size + 3]  # three roles, and the end
    assert [f"(id {id})" in "\n".join(lines) for id in ids] == [True] * 4
    assert f"the mean of {size} trained rows" in "\n".join(lines)
    source = load_file(spare_model / "model.safetensors")
    for table, name in zip(tables_of(setup), (EMBEDDING, "lm_head.weight"), strict=False):
        # In the head of the untied toy the zero rows come first.
        trained = source[name][:size][np.any(source[name][:size], axis=1)]
        distance = np.abs(table[ids] - trained.mean(0)) / trained.std(0)
        assert 0 < distance.max() < 5 * NOISE_SCALE
        kept = np.delete(np.arange(len(table)), ids)
        np.testing.assert_array_equal(table[kept], source[name][kept])
    if not untied:
        grown, _ = start_of(model_with(), markers=True)
        np.testing.assert_array_equal(tables_of(grown)[0][:size], source[EMBEDDING][:size])
        np.testing.assert_array_equal(tables_of(grown)[0][ids], tables_of(setup)[0][ids])


def test_started_rows_are_bitwise_the_same_on_every_mesh(
    model_with: Callable[..., Path], start_of: Callable[..., tuple[Setup, list[str]]]
) -> None:
    model = model_with(spare=6, untied=True)
    one, _ = start_of(model, markers=True)
    split, _ = start_of(model, markers=True, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    for first, second in zip(tables_of(one), tables_of(split), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_token_of_the_model_is_changed_only_on_request(
    model_with: Callable[..., Path], start_of: Callable[..., tuple[Setup, list[str]]], toy_model: Path
) -> None:
    end = json.loads((toy_model / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    unheld = 3  # a byte that no row has
    for fault in ({"zero": (end, unheld)}, {"tiny": (end, unheld)}):
        model = model_with(**fault)
        source = load_file(model / "model.safetensors")[EMBEDDING]
        setup, lines = start_of(model)
        (warning,) = [line for line in lines if line.startswith("warning:")]
        assert f"(id {end}, in 20 rows)" in warning
        assert f"id {unheld}" not in warning
        np.testing.assert_array_equal(tables_of(setup)[0], source)
        setup, lines = start_of(model, init_untrained_tokens=True)
        assert f"(id {end}) starts at the mean" in "\n".join(lines)
        assert not any(line.startswith("warning:") for line in lines)
        (table,) = tables_of(setup)
        np.testing.assert_array_equal(np.delete(table, end, 0), np.delete(source, end, 0))
        assert np.linalg.norm(table[end]) > 10 * np.linalg.norm(source[end])


@pytest.mark.parametrize("base_dtype", ["auto", "int8"])
@pytest.mark.parametrize("on_demand", [False, True])
def test_frozen_embeddings_refuse_untrained_tokens(
    model_with: Callable[..., Path],
    start_of: Callable[..., tuple[Setup, list[str]]],
    toy_model: Path,
    base_dtype: str,
    on_demand: bool,
) -> None:
    end = json.loads((toy_model / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    lora = {"lora.base_dtype": base_dtype, "init_untrained_tokens": on_demand}
    with pytest.raises(ValueError, match=rf"lora: the training rows contain .*\(id {end}, in 20 rows\)"):
        start_of(model_with(zero=(end,)), **lora)
    with pytest.raises(ValueError, match=r"chat_template adds tokens \(<\|turn:.*<\|done\|>"):
        start_of(model_with(spare=8), markers=True, **lora)
    start_of(model_with(zero=(3,), spare=8), **lora)  # no row holds it


def test_policy_and_reference_start_from_the_same_rows_and_the_cache_key_has_them(
    model_with: Callable[..., Path], start_of: Callable[..., tuple[Setup, list[str]]], toy_model: Path
) -> None:
    end = json.loads((toy_model / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    model = model_with(zero=(end,), spare=4)
    keys = set()
    for overrides in ({}, {"init_untrained_tokens": True}, {"init_untrained_tokens": True, "seed": 7}):
        setup, _ = start_of(model, **overrides)
        jax.tree.map(np.testing.assert_array_equal, load_reference(setup, None), load_start(setup))
        keys.add(find_rows(setup)[0].folder.path.name)
        named, lines = start_of(model, reference_model=model_with(zero=(end,), spare=4), **overrides)
        jax.tree.map(np.testing.assert_array_equal, load_reference(named, None), load_start(setup))
        assert any("the reference model's embedding" in line for line in lines)
    assert len(keys) == 3


def test_inspect_names_them_as_a_fault_and_as_a_note_where_they_are_started(
    model_with: Callable[..., Path], run_words: Words, toy_model: Path, tmp_path: Path
) -> None:
    end = json.loads((toy_model / "config.json").read_text(encoding="utf-8"))["eos_token_id"]

    def found(model: Path, **overrides: Any) -> dict[str, Any]:
        config = load_config(DPOConfig, None, run_words(model_name_or_path=model, **overrides))
        return inspect_run(config, chosen_by="", log=lambda line: None)

    def severities(document: dict[str, Any]) -> list[str]:
        return [one["severity"] for one in document["findings"] if one["name"] == "untrained_tokens"]

    broken = model_with(zero=(end, 3))
    document = found(broken)
    (token,) = document["model"]["untrained_tokens"]
    assert (token["id"], token["rows"], token["first"]) == (end, 20, "pairs.jsonl:1")
    assert severities(document) == ["fault"]
    assert severities(found(broken, init_untrained_tokens=True)) == ["note"]
    assert severities(found(broken, init_untrained_tokens=True, lora=True)) == ["fault"], "the embedding is frozen"
    assert severities(found(model_with())) == []
    template = tmp_path / "markers.jinja"
    template.write_text(MARKERS, encoding="utf-8")
    assert found(model_with(), chat_template=template)["model"]["problem"] is None
    assert "chat_template adds tokens" in found(model_with(), chat_template=template, lora=True)["model"]["problem"]
    (broken / "model.safetensors").unlink()
    assert found(broken)["model"]["untrained_tokens"] is None


def test_rows_are_counted_once_however_often_they_hold_a_token(
    start_of: Callable[..., tuple[Setup, list[str]]], toy_model: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": prompt, "chosen": f" {chosen}", "rejected": " no"}
        for prompt, chosen in [("a", "b"), ("q", "b"), ("a q q", "q q q"), ("a", "q")]
    ]
    setup, _ = start_of(toy_model, datasets=write_jsonl(tmp_path / "few.jsonl", rows))
    (letter,) = setup.tokenizer.encode(["q"])
    held = [row for row in range(4) if any(letter[0] in side for side in setup.train_data[row][:3])]
    assert len(held) >= 1
    found = setup.train_data.rows_with(np.array([3, letter[0], 10**6]))
    assert found == {letter[0]: (len(held), held[0])}
    assert setup.train_data.rows_with(np.zeros(0, int)) == {}
