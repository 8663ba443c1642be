"""Whole runs with each kind of reference, and with losses that carry state from step to step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo.cli.main import main
from jdpo.config import DPOConfig, load_config
from jdpo.training.run import train
from tests.run_stops import SignalAt

Words = Callable[..., list[str]]
SameRun = Callable[[Path, Path], None]
Capture = pytest.CaptureFixture[str]

QUICK = {"eval_steps": "null", "save_steps": 1000, "logging_steps": 1}


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def trace(run: Path) -> np.ndarray:
    """Returns loss, gradient norm, margin and log-probs of every logged step and of the evaluation."""
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")
    steps = [[line[name] for name in names] for line in lines_of(run) if "loss" in line]
    held_out = [[line[f"eval_{name}"] for name in names if name != "grad_norm"] for line in lines_of(run)[-1:]]
    return np.concatenate([np.ravel(steps), np.ravel(held_out)])


@pytest.mark.parametrize(("dtype", "bar"), [("float32", 3e-5), pytest.param("float64", 1e-9, marks=pytest.mark.full)])
def test_cached_and_live_give_the_same_twenty_steps(
    dtype: str, bar: float, cut_words: Words, tmp_path: Path, capsys: Capture
) -> None:
    """Covers a ragged last batch of each epoch, and evaluation rows from a cache of their own."""
    given = QUICK | {"max_steps": 20, "compute_dtype": dtype, "learning_rate": 1e-4, "cache_dir": tmp_path / "cache"}
    for kind in ("live", "auto"):
        assert main(cut_words(tmp_path / kind, reference=kind, **given)) == 0
    output = "".join(capsys.readouterr())
    assert "reference: live, as asked for" in output
    assert "reference: cached, 0 rows found, 26 computed" in output
    live, cached = trace(tmp_path / "live"), trace(tmp_path / "auto")
    assert live.shape == cached.shape == (20 * 5 + 4,)
    # Rewards start at 0, where only absolute differences mean anything; a margin of 1 is a loss of about 0.3.
    np.testing.assert_allclose(cached, live, rtol=bar, atol=bar)
    assert abs(live[-10] / live[0] - 1) > 1e-3, "a trace that stays where it starts compares nothing"


def test_a_second_run_with_another_beta_and_loss_computes_no_reference(
    cut_words: Words, tmp_path: Path, capsys: Capture
) -> None:
    given = QUICK | {"max_steps": 2, "cache_dir": tmp_path / "cache"}
    assert main(["reference", *cut_words(tmp_path / "a", **given)[1:]]) == 0
    assert "26 computed" in "".join(capsys.readouterr())
    changed = {"beta": 0.3, "loss_type": "[ipo,sft]", "learning_rate": 1e-3, "seed": 7}
    assert main(cut_words(tmp_path / "b", reference="cached", **given, **changed)) == 0
    assert "reference: cached, 26 rows found, 0 computed" in "".join(capsys.readouterr())
    assert {"loss/ipo", "loss/sft", "eval_loss/ipo"} <= {name for line in lines_of(tmp_path / "b") for name in line}


@pytest.mark.parametrize(
    "changed",
    [
        {"loss_type": "[bco_pair,sigmoid]", "bco_running_delta": "true", "loss_weights": "[1,0.5]"},
        {"sync_ref_model": "true", "ref_model_sync_steps": 4, "ref_model_mixup_alpha": 0.5},
    ],
    ids=["bco_running_delta", "sync_ref_model"],
)
def test_the_state_of_a_loss_survives_a_stop(
    changed: dict[str, Any], cut_words: Words, tmp_path: Path, uninterrupted: Path, same_run: SameRun
) -> None:
    words = cut_words(tmp_path / "stopped", **changed)

    whole = train(load_config(DPOConfig, None, cut_words(tmp_path / "whole", **changed)[1:]))
    assert whole.step == 12
    assert train(load_config(DPOConfig, None, words[1:]), callbacks=[SignalAt(6)]).interrupted
    assert train(load_config(DPOConfig, None, words[1:])).step == 12
    same_run(tmp_path / "stopped", tmp_path / "whole")
    # The carried state must make a difference, or this test would compare nothing.
    plain = uninterrupted
    if "loss_type" in changed:
        plain = tmp_path / "plain"
        losses = {name: value for name, value in changed.items() if name != "bco_running_delta"}
        train(load_config(DPOConfig, None, cut_words(plain, **losses)[1:]))
    with pytest.raises(AssertionError):
        same_run(plain, tmp_path / "whole")


def test_losses_without_a_reference_load_none(cut_words: Words, tmp_path: Path, capsys: Capture) -> None:
    given = QUICK | {"max_steps": 3, "loss_type": "simpo", "beta": 2.0}
    assert main(cut_words(tmp_path / "run", **given)) == 0
    assert "reference: none, the loss has none" in "".join(capsys.readouterr())
    assert not (tmp_path / "run" / "reference").exists()


@pytest.mark.full
def test_aot_over_micro_batches_is_aot_over_the_batch(cut_words: Words, tmp_path: Path) -> None:
    """Compares 8 shards in one micro-batch with 2 shards of one pair each in four micro-batches."""
    given = QUICK | {"max_steps": 5, "loss_type": "[aot,sft]", "label_smoothing": 0.1}
    for name, layout in {"wide": {}, "deep": {"mesh.fsdp": 2, "mesh.tensor": 4, "micro_batch_size": 1}}.items():
        assert main(cut_words(tmp_path / name, **given, **layout)) == 0
    np.testing.assert_allclose(trace(tmp_path / "deep"), trace(tmp_path / "wide"), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss_type": "simpo", "reference": "cached"}, "reference is 'cached', but the loss has no reference"),
        ({"loss_type": "simpo", "reference_model": "MODEL"}, "has no effect: loss_type simpo uses no reference"),
        ({"reference": "none"}, "reference is 'none', but the loss compares with a reference"),
        ({"reference": "cached", "sync_ref_model": "true"}, "moves the reference in training"),
        ({"ref_model_sync_steps": 4}, "ref_model_sync_steps 4 needs sync_ref_model: true"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "'hinge' cannot honour label_smoothing=0.1; these can: sig"),
        ({"loss_type": "sigmod"}, "unknown loss_type 'sigmod'; did you mean 'sigmoid'"),
        ({"loss_weights": "[1,2]"}, "loss_weights must have one number per loss"),
        ({"reference": "cached"}, "reference is 'cached', but the training rows are not in the cache"),
    ],
    ids=str,
)
def test_incompatible_reference_settings_are_refused(
    changed: dict[str, Any], message: str, cut_words: Words, tmp_path: Path, capsys: Capture
) -> None:
    words = cut_words(tmp_path / "run", **{"cache_dir": tmp_path / "cache", **changed})
    model = next(word.partition("=")[2] for word in words if word.startswith("model_name_or_path="))
    assert main([word.replace("MODEL", model) for word in words]) == 2
    assert message in "".join(capsys.readouterr())


def test_reference_command_names_unsupported_losses_and_needs_no_output_dir(
    cut_words: Words, tmp_path: Path, capsys: Capture
) -> None:
    words = [word for word in cut_words(tmp_path / "run")[1:] if not word.startswith("output_dir=")]
    assert main(["reference", *words, "loss_type=simpo"]) == 2
    assert "loss_type simpo has no reference: there is nothing to compute" in "".join(capsys.readouterr())
    assert main(["reference", *words, "sync_ref_model=true"]) == 2
    assert "cannot be computed beforehand" in "".join(capsys.readouterr())
    assert main(["dpo", *words, f"output_dir={tmp_path / 'run'}", "reference=none", "--dry_run"]) == 2
    assert "the loss compares with a reference" in "".join(capsys.readouterr())


def test_held_out_token_means_do_not_depend_on_the_batch_size(cut_words: Words, tmp_path: Path) -> None:
    given = QUICK | {"loss_type": "[sigmoid,sft]", "rpo_alpha": 0.5, "max_steps": 1, "learning_rate": 1e-30}
    found = []
    for size, mesh in ((8, 8), (2, 2)):
        layout = {"global_batch_size": size, "mesh.fsdp": mesh, "mesh.tensor": 8 // mesh}
        assert main(cut_words(tmp_path / str(size), **layout, **given)) == 0
        found.append(lines_of(tmp_path / str(size))[-1])
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)
    assert found[0]["eval_loss/sft"] == pytest.approx(found[1]["eval_loss/sft"], rel=1e-6)
