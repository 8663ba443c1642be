"""Type checkers know which fields are arrays: nothing that is a `jax.Array` is `Any` for them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ARRAYS = {
    "jdpo.types.PackedBatch": ("tokens", "logp_pair", "pair_weight", "pair_score_margin"),
    "jdpo.types.PreferenceBatch": ("tokens", "completion_mask", "reference_logps", "score_margins"),
    "jdpo.types.CompletionBatch": ("tokens", "weights"),
    "jdpo.types.RouterStats": ("assignments", "probabilities", "tokens"),
    "jdpo.losses.pairwise.LossInputs": ("chosen_logps", "real", "score_margins", "margin"),
    "jdpo.losses.pair_logps.PairFeatures": ("policy_logps", "reference_logps", "weights"),
    "jdpo.losses.preference.PreferenceLoss": ("losses", "chosen_rewards"),
    "jdpo.losses.coupled.LossState": ("mean_reward", "num_pairs"),
    "jdpo.training.step.train_step.TrainState": ("step", "rng"),
    "jdpo.training.step.train_step.StepReport": ("loss", "finite"),
}
"""Class -> some of its fields that are arrays."""


@pytest.mark.ci
def test_fields_that_are_arrays_do_not_reveal_as_any(tmp_path: Path) -> None:
    lines = [f"import {name.rpartition('.')[0]}" for name in ARRAYS]
    for number, (name, fields) in enumerate(ARRAYS.items()):
        lines += [f"def read_{number}(x: {name}) -> None:", *(f"    reveal_type(x.{field})" for field in fields)]
    snippet = tmp_path / "snippet.py"
    snippet.write_text("\n".join(lines) + "\n")
    words = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(snippet)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == sum(map(len, ARRAYS.values())), done.stdout
    for shown in revealed:
        assert "Any" not in re.sub(r"ndarray\[[^|]*\]", "ndarray", shown), shown
        assert "jax.Array" in shown or "Array" in shown.split("|")[0], shown
