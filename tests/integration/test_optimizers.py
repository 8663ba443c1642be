"""Whole runs under every optimizer; bfloat16 weights through checkpoint, resume, reference and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from jdpo.cli.main import main
from jdpo.config import DPOConfig, load_config
from jdpo.training.run import train
from tests.run_stops import SignalAt

Words = Callable[..., list[str]]
SameRun = Callable[[Path, Path], None]

BF16 = {"optimizer.name": "adamw_bf16"}
STOPPED_AT = 5
NAME = "model.safetensors"


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def state_of(run: Path, step: int) -> Any:
    path = (run / "checkpoints" / str(step) / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def short(words: Words, run: Path, **overrides: Any) -> list[str]:
    """Returns the words of a run of four logged steps without evaluation."""
    return words(run, **{"max_steps": 4, "logging_steps": 1, "eval_datasets": "[]", "eval_steps": "null"} | overrides)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("adafactor", {"learning_rate": 1e-3, "optimizer.b1": 0.9}),
        pytest.param("lion", {"learning_rate": 1e-4}, marks=pytest.mark.full),
        pytest.param("sgd", {"learning_rate": 0.3, "optimizer.momentum": 0.9}, marks=pytest.mark.full),
    ],
)
def test_every_rule_learns_through_the_command(
    name: str, keys: dict[str, Any], cut_words: Words, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main(short(cut_words, run, **{"optimizer.name": name, "optimizer.weight_decay": 0.01} | keys)) == 0
    losses = [line["loss"] for line in lines_of(run)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01


@pytest.fixture(scope="module")
def narrow(cut_words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of an uninterrupted run with bfloat16 weights."""
    run = tmp_path_factory.mktemp("narrow") / "run"
    assert main(cut_words(run, **BF16, reference="live")) == 0
    return run


def test_bfloat16_weights_are_kept_as_such_and_exported_whole(narrow: Path) -> None:
    state = state_of(narrow, 12)
    for part in ("params", "opt_state"):
        dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(state[part]) if leaf.ndim}
        assert dtypes == {"bfloat16"}, part
    model = load_file(narrow / "model" / NAME)
    (embedding,) = [value for name, value in model.items() if "embed_tokens" in name]
    assert embedding.dtype == np.float32, "as in the model that came in"
    np.testing.assert_array_equal(embedding, state["params"]["embed"]["embedding"].astype(np.float32))


def test_losses_of_bfloat16_weights_stay_near_those_of_float32(narrow: Path, uninterrupted: Path) -> None:
    found, expected = ([line["loss"] for line in lines_of(run)] for run in (narrow, uninterrupted))
    assert expected[-1] < 0.6, "there is something to learn"
    np.testing.assert_allclose(found, expected, rtol=0.03)


def test_a_stopped_run_resumes_bitwise(narrow: Path, cut_words: Words, same_run: SameRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = cut_words(run, **BF16, reference="live")

    assert train(load_config(DPOConfig, None, words[1:]), callbacks=[SignalAt(STOPPED_AT)]).step == STOPPED_AT
    assert main(words) == 0
    same_run(run, narrow)


@pytest.mark.full
def test_a_small_rate_moves_weights_that_rounding_to_nearest_would_leave(cut_words: Words, tmp_path: Path) -> None:
    """After four updates of 1e-6, bfloat16 weights follow float32 ones in the mean.

    Each has its own cached reference, as the log-probs of rounded weights differ.
    """
    keys = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "save_steps": 4}
    for name, more in (("wide", {}), ("narrow", BF16)):
        assert main(short(cut_words, tmp_path / name, **keys, **more)) == 0
    start = load_file(Path(dict(word.split("=", 1) for word in cut_words(tmp_path)[1:])["model_name_or_path"]) / NAME)
    wide, narrow = (load_file(tmp_path / name / "model" / NAME) for name in ("wide", "narrow"))
    exact, found, naive, scatter = [], [], [], []
    for name, values in start.items():
        before = to_bf16(values)
        moved = wide[name].astype(np.float64) - values
        naive.append((to_bf16(before + moved) == before).ravel())
        exact.append(np.abs(moved).ravel())
        found.append(((narrow[name].astype(np.float64) - before) * np.sign(moved)).ravel())
        scatter.append(found[-1] ** 2)
    exact, found, naive, scatter = map(np.concatenate, (exact, found, naive, scatter))
    assert naive.mean() > 0.95
    error = np.sqrt(scatter.mean() / len(found))
    assert error < 0.1 * exact.mean(), "enough weights to tell"
    assert abs(found.mean() - exact.mean()) < 5 * error + 0.05 * exact.mean()


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16, returned as float64."""
    import ml_dtypes

    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
