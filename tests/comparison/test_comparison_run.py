"""The models in memory during a comparison."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

import jdpo
from jdpo.comparison.comparison_run import CompareSettings, compare
from jdpo.comparison.measuring import Material
from jdpo.config import DatasetConfig
from jdpo.generation.loaded_model import LoadedModel
from jdpo.generation.prompts import read_prompts
from jdpo.generation.values import Sampling
from tests.conftest import chat_pairs, write_jsonl


def settings_of(models: list[str], folder: Path) -> CompareSettings:
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in chat_pairs(2)])
    prompts = read_prompts(DatasetConfig(path=str(folder / "prompts.jsonl")))
    return CompareSettings(
        before=models[0],
        afters=models[1:],
        material=Material(prompts=prompts, sampling=Sampling(max_new_tokens=4)),
        output_dir=folder / "cmp",
        betas=[0.1] * (len(models) - 1),
    )


def test_only_the_divergence_needs_two_models(toy_model: Path, tmp_path: Path) -> None:
    loaded: list[weakref.ref[LoadedModel]] = []
    others, sizes = [], []

    def load(path: str) -> LoadedModel:
        others.append(sum(one() is not None for one in loaded))
        model = jdpo.load(path)
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))
        loaded.append(weakref.ref(model))
        return model

    found = compare(settings_of([str(toy_model)] * 3, tmp_path), load, lambda line: None)
    assert [one.figures["kl"].all.after.value for one in found.comparisons] == [0, 0]
    # The model before; then each model after, and with it the model before again.
    assert others == [0, 0, 1, 0, 1]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(jdpo.load(toy_model).params))
    # The copy by which answers were drawn is gone.
    np.testing.assert_allclose(np.diff(sizes)[1], weights, rtol=0.1)


def test_a_model_that_changes_meanwhile(toy_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_model, folder)

    def load(path: str) -> LoadedModel:
        model = jdpo.load(path)
        config = folder / "config.json"
        config.write_text(config.read_text() + " ")
        return model

    with pytest.raises(ValueError, match="has changed since"):
        compare(settings_of([str(folder), str(toy_model)], tmp_path), load, lambda line: None)
