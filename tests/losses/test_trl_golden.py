"""Every loss that TRL has too: value and gradient against what TRL's trainers computed (tests/golden/trl_losses).

The gradient is the one with respect to the logits, so that a shift by one position, a mask or a side that is not
TRL's shows. Two differences are meant: rewards are never length-desensitised, where TRL's are; and label smoothing
turns sigmoid into cDPO, where TRL ignores it, so that no case here has both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

import jdpo
from jdpo.losses import LOSSES
from jdpo.types import PreferenceBatch

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "trl_losses"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))["cases"]
TOLERANCE = 1e-5


def apply_fn(params: dict[str, Any], tokens: Any, attention_mask: Any) -> Any:
    """A model whose parameters are its logits, [n, t, v]."""
    return params["logits"]


def describe(case: dict[str, Any]) -> str:
    names = case.get("loss_type", "")
    words = [case["trainer"], names if isinstance(names, str) else "+".join(names)]
    settings = {key: case[key] for key in case if key not in ("trainer", "loss_type", "loss", "metrics")}
    return "-".join([*words, *(f"{key}={value}" for key, value in settings.items())])


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """jdpo's keyword arguments for a case: TRL's names, except for the losses that have trainers of their own."""
    given = {key: value for key, value in case.items() if key not in ("trainer", "loss", "metrics")}
    if case["trainer"] == "orpo":
        return {"loss_type": "orpo", "orpo_lambda": case["beta"]}
    if case["trainer"] == "cpo" and case["loss_type"] == "simpo":
        assert given.pop("cpo_alpha") == 0
        return given
    return {**given, "loss_type": "cpo"} if case["trainer"] == "cpo" else given


def index_of(options: dict[str, Any]) -> int:
    """Returns the index of the case with exactly these arguments."""
    (index,) = (index for index, case in enumerate(CASES) if arguments(case) == options)
    return index


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    """Inputs and logits of TRL's models, rows in jdpo's order: pairs first, then sides."""
    with np.load(GOLDEN / "inputs.npz") as arrays:
        by_pair = {name: rearrange(array, "n b ... -> b n ...") for name, array in arrays.items()}
    return {
        name: rearrange(array, "b n ... -> (b n) ...") if name.endswith("logits") else array
        for name, array in by_pair.items()
    }


@pytest.fixture(scope="module")
def gradients() -> list[np.ndarray]:
    """TRL's gradients with respect to the policy's logits, [(b n), t, v], case by case."""
    with np.load(GOLDEN / "gradients.npz") as arrays:
        return [rearrange(arrays[str(index)], "n b t v -> (b n) t v") for index in range(len(CASES))]


def make_batch(inputs: dict[str, np.ndarray], **fields: Any) -> PreferenceBatch:
    masks = (inputs[name].astype(bool) for name in ("attention_mask", "completion_mask"))
    batch: PreferenceBatch = jax.tree.map(jnp.asarray, PreferenceBatch(inputs["input_ids"], *masks, **fields))
    return batch


def models(inputs: dict[str, np.ndarray], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Policy and reference parameters; no reference where no loss reads one."""
    names = options["loss_type"]
    reads = any("reference" in LOSSES[name].needs for name in ([names] if isinstance(names, str) else names))
    return {"logits": inputs["policy_logits"]}, {"logits": inputs["reference_logits"]} if reads else None


def distance(found: Any, expected: Any) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[describe(case) for case in CASES])
def test_value_and_gradient_are_trl_s(index: int, inputs: dict[str, np.ndarray], gradients: list[np.ndarray]) -> None:
    case, options = CASES[index], arguments(CASES[index])
    loss_fn = jdpo.make_dpo_loss(apply_fn, **options)
    (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(*models(inputs, options), make_batch(inputs))
    assert loss.dtype == gradient["logits"].dtype == np.float32
    assert distance(loss, case["loss"]) <= TOLERANCE
    assert distance(gradient["logits"], gradients[index]) <= TOLERANCE
    if case["trainer"] == "dpo" and "ld_alpha" not in case and options["loss_type"] != ["sft"]:
        expected = case["metrics"]
        assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=TOLERANCE, abs=1e-6)


def test_rewards_are_not_length_desensitised(inputs: dict[str, np.ndarray]) -> None:
    """The stated difference: with ld_alpha, jdpo's rewards and log-probs are those that TRL logs without it."""
    options: dict[str, Any] = {"loss_type": ["sigmoid"], "beta": 0.5, "ld_alpha": 0.5}
    desensitised = CASES[index_of(options)]
    plain = CASES[index_of({"loss_type": ["sigmoid"], "beta": 0.5})]
    _, metrics = jdpo.make_dpo_loss(apply_fn, **options)(*models(inputs, options), make_batch(inputs))
    found = {name: metrics[name].item() for name in plain["metrics"]}
    assert found == pytest.approx(plain["metrics"], rel=TOLERANCE, abs=1e-6)
    assert found != pytest.approx(desensitised["metrics"], rel=0.1)


COMBINED: list[dict[str, Any]] = [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "beta": 0.5, "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["ipo"], "beta": 0.5, "ld_alpha": 0.5, "f_divergence_type": "forward_kl"},
    {"loss_type": ["sigmoid"], "beta": 0.5, "ld_alpha": 0.5, "use_weighting": True},
]


@pytest.mark.parametrize("options", COMBINED, ids=lambda options: "+".join(options["loss_type"]))
def test_jitted_and_cached_are_trl_s(
    options: dict[str, Any], inputs: dict[str, np.ndarray], gradients: list[np.ndarray]
) -> None:
    """dpo_loss itself, with the reference's per-token log-probs in the batch instead of its parameters."""
    index = index_of(options)
    logits = inputs["reference_logits"].reshape(*inputs["input_ids"].shape, -1)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.take_along_axis(logps[:, :, :-1], inputs["input_ids"][:, :, 1:, None], -1)[..., 0]
    batch = make_batch(inputs, reference_logps=np.pad(taken, ((0, 0), (0, 0), (1, 0))))
    (loss, _), gradient = jax.value_and_grad(jdpo.dpo_loss, has_aux=True)(
        {"logits": inputs["policy_logits"]}, None, batch, apply_fn=apply_fn, **options
    )
    assert distance(loss, CASES[index]["loss"]) <= TOLERANCE
    assert distance(gradient["logits"], gradients[index]) <= TOLERANCE


def test_numpy_batches_are_taken(inputs: dict[str, np.ndarray]) -> None:
    """Numpy arrays, as a data loader returns them, without jit."""
    options: dict[str, Any] = {"loss_type": ["sigmoid"], "beta": 0.5}
    batch = jax.tree.map(np.asarray, make_batch(inputs))
    loss, _ = jdpo.make_dpo_loss(apply_fn, **options)(*models(inputs, options), batch)
    assert distance(loss, CASES[index_of(options)]["loss"]) <= TOLERANCE


def test_rpo_alpha_is_a_weighted_sft_term(inputs: dict[str, np.ndarray], gradients: list[np.ndarray]) -> None:
    index = index_of({"loss_type": ["sigmoid", "sft"], "beta": 0.5, "loss_weights": [1.0, 0.5]})
    options: dict[str, Any] = {"loss_type": "sigmoid", "beta": 0.5, "rpo_alpha": 0.5}
    loss_fn = jdpo.make_dpo_loss(apply_fn, **options)
    (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(*models(inputs, options), make_batch(inputs))
    assert distance(loss, CASES[index]["loss"]) <= TOLERANCE
    assert distance(gradient["logits"], gradients[index]) <= TOLERANCE


def test_golden_covers_what_both_have() -> None:
    """A golden folder that is made again cannot quietly lose a loss or an option."""
    cases = [arguments(case) for case in CASES]
    names = [name for case in cases for name in np.atleast_1d(case["loss_type"]).tolist()]
    assert set(names) == {name for name, spec in LOSSES.items() if spec.in_trl}
    assert {option for case in cases for option in case} == {
        *("loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef"),
        *("discopop_tau", "ld_alpha", "use_weighting", "cpo_alpha", "simpo_gamma", "orpo_lambda"),
    }
    divergences = {(case.get("f_divergence_type"), case.get("f_alpha_divergence_coef")) for case in cases}
    assert divergences == {
        *((None, None), ("forward_kl", None), ("js_divergence", None)),
        *(("alpha_divergence", alpha) for alpha in (0.5, 1.0, 2.0)),
    }
