"""Preference losses: worked examples, sums and options, extremes and errors. Formulas: see test_formulas.py."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdpo.losses import LOSSES, preference_loss
from jdpo.losses.catalogue import FUNCTIONS
from jdpo.losses.settings import loss_settings
from tests.losses.loss_cases import CASES, NEEDED, REFERENCE_FREE, another_value

BETA = 0.1


def arrays(seed: int, num_pairs: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    values = {f"{name}_logps": rng.normal(-20, 5, num_pairs).astype(np.float32) for name in names}
    return values | {
        "chosen_lengths": rng.integers(1, 20, num_pairs),
        "rejected_lengths": rng.integers(1, 20, num_pairs),
    }


def close(seed: int) -> dict[str, np.ndarray]:
    """Log-ratios of a few nats, where every divergence has a slope to check."""
    x, rng = arrays(seed), np.random.default_rng(seed + 1)
    for side in ("chosen", "rejected"):
        moved = x[f"reference_{side}_logps"] + rng.normal(0, 1.5, len(x["chosen_lengths"]))
        x[f"policy_{side}_logps"] = np.minimum(moved, -0.5).astype(np.float32)
    return x


WHERE = {"a": 3.0, "b": -1.0, "D": 4.0, "l_w": -3.0, "l_l": -4.0, "n_w": 3, "n_l": 2, "N": 3}
"""The pair of the worked examples; the reference is at 0 where there is one."""


@pytest.mark.parametrize("name", [name for name, spec in LOSSES.items() if "global batch" not in spec.needs])
def test_worked_examples_of_the_docstrings(name: str) -> None:
    """`At beta = 0.1, a = 3, b = -1: the derivation = 0.513015.`, with the options by their names."""
    doc = " ".join((FUNCTIONS[name].__doc__ or "").split())
    given, result = re.findall(r"At ([^:]+): .*?(-?\d+\.\d+)\.$", doc)[0]
    values = {key: float(value) for key, value in re.findall(r"(\w+) = (-?[\d.]+\d|\d)", given)}
    assert all(WHERE[key] == values.pop(key) for key in WHERE if key in values), given
    options = {"label_smoothing" if key == "e" else key: value for key, value in values.items()}
    has_reference = "reference" in LOSSES[name].needs
    chosen, rejected = (WHERE["a"], WHERE["b"]) if has_reference else (WHERE["l_w"], WHERE["l_l"])
    result_of = preference_loss(
        *(jnp.array([value]) for value in (chosen, rejected)),
        *([jnp.zeros(1)] * 2 if has_reference else []),
        loss_type=name,
        chosen_lengths=jnp.array([WHERE["n_w"]], int),
        rejected_lengths=jnp.array([WHERE["n_l"]], int),
        **options,
    )
    assert result_of.losses[0] == pytest.approx(float(result), rel=1e-6, abs=5e-7)


def test_worked_example_of_aot_is_at_the_pair_that_has_the_quantile() -> None:
    chosen, reference = jnp.array([5.0, 1.0]), jnp.array([0.0, 2.0])
    losses = preference_loss(chosen, jnp.zeros(2), reference, jnp.zeros(2), loss_type="aot").losses
    np.testing.assert_allclose(losses, [0.554355, 0.644397], rtol=1e-5)


def test_rewards_are_beta_times_the_log_ratio_or_the_policys_own() -> None:
    x = arrays(7)
    for loss_type, spec in LOSSES.items():
        result = preference_loss(**x, loss_type=loss_type, beta=BETA, **NEEDED.get(loss_type, {}))
        expected = x["policy_chosen_logps"]
        if "reference" in spec.needs:
            expected = expected - x["reference_chosen_logps"]
        elif "lengths" in spec.needs:
            expected = expected / x["chosen_lengths"]
        np.testing.assert_allclose(result.chosen_rewards, BETA * expected, rtol=1e-5, err_msg=loss_type)


# --- sums and options


def test_a_list_is_the_weighted_sum_of_its_losses() -> None:
    x = close(8)
    names, weights = ("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.5)
    whole = preference_loss(**x, loss_type=names, loss_weights=weights).losses
    parts = [w * preference_loss(**x, loss_type=name).losses for name, w in zip(names, weights, strict=True)]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-6)
    unweighted = preference_loss(**x, loss_type=list(names)).losses
    np.testing.assert_allclose(
        unweighted, sum(p / w for p, w in zip(parts, weights, strict=True)), rtol=1e-6, err_msg="weights are 1 each"
    )


def test_rpo_adds_the_token_mean_and_pair_weights_multiply() -> None:
    x = close(9)
    sft = preference_loss(**x, loss_type="sft").losses
    rpo = preference_loss(**x, loss_type="ipo", rpo_alpha=0.5).losses
    np.testing.assert_allclose(rpo, preference_loss(**x, loss_type="ipo").losses + 0.5 * sft, rtol=1e-6)
    assert sft.mean() == pytest.approx(-x["policy_chosen_logps"].sum() / x["chosen_lengths"].sum(), rel=1e-6)
    weights = jnp.linspace(0.1, 1, len(rpo))
    np.testing.assert_allclose(
        preference_loss(**x, loss_type="ipo", rpo_alpha=0.5, pair_weights=weights).losses, weights * rpo, rtol=1e-6
    )
    halved = preference_loss(**x, loss_type="sft", num_chosen_tokens=2 * x["chosen_lengths"].sum()).losses
    np.testing.assert_allclose(halved, sft / 2, rtol=1e-6)


def test_alpha_next_to_one_is_the_limit_and_beyond_goes_smoothly_there() -> None:
    x = close(10)
    limit = preference_loss(**x).losses
    for alpha, tolerance in ((1.0, 0), (1.0 + 5e-7, 0), (1.001, 3e-3)):
        near = preference_loss(**x, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha).losses
        np.testing.assert_allclose(near, limit, rtol=max(tolerance, 1e-7))


EXTREMES = [case for case in CASES if case[0] not in REFERENCE_FREE]


@pytest.mark.parametrize(("loss_type", "options"), EXTREMES, ids=str)
def test_log_ratios_of_ten_thousand_stay_finite(loss_type: str, options: dict[str, Any]) -> None:
    chosen, rejected = (
        jnp.array(values) for values in zip(*itertools.product((1e4, 0.0, -1e4), repeat=2), strict=True)
    )
    zeros, lengths = jnp.zeros_like(chosen), jnp.ones(len(chosen), int)
    given = {"chosen_lengths": lengths, "rejected_lengths": lengths, "score_margins": jnp.full(len(chosen), 2.0)}

    def losses(*policy: Any, **more: Any) -> Any:
        return preference_loss(*policy, zeros, zeros, loss_type=loss_type, **given, **options, **more).losses

    for beta in (0.1, 1.0):
        assert np.isfinite(losses(chosen, rejected, beta=beta)).all()
    for side in (0, 1):
        assert np.isfinite(jax.grad(lambda *policy: losses(*policy).sum(), argnums=side)(chosen, rejected)).all()


@pytest.mark.parametrize("loss_type", [*REFERENCE_FREE, "ipo", "sigmoid_norm"])
def test_means_of_zero_extreme_means_and_empty_completions_stay_finite(loss_type: str) -> None:
    chosen, rejected = jnp.array([0.0, 0.0, -1e4, -1e4, -1e-9]), jnp.array([0.0, -1e4, 0.0, -1e4, -30.0])
    for lengths in (jnp.ones(5, int), jnp.zeros(5, int)):

        def total(*policy: Any, lengths: Any) -> Any:
            return preference_loss(
                *policy,
                0 * chosen,
                0 * chosen,
                chosen_lengths=lengths,
                rejected_lengths=lengths,
                loss_type=loss_type,
            ).losses.sum()

        # Lengths of 0 are refused where they are seen; traced, they must not turn into NaN.
        value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(chosen, rejected, lengths=lengths)
        assert np.isfinite(value)
        assert np.isfinite(grads).all()


@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
@settings(max_examples=30, deadline=None)
def test_swapping_the_sides_mirrors_the_margin(seed: int, beta: float) -> None:
    x = arrays(seed)
    swap = {"chosen": "rejected", "rejected": "chosen"}
    y = {name.replace(side, swap[side]): values for name, values in x.items() for side in swap if side in name}
    one, other = preference_loss(**x, beta=beta), preference_loss(**y, beta=beta)
    np.testing.assert_allclose(one.chosen_rewards, other.rejected_rewards, rtol=1e-6)
    # -ls(z) - (-ls(-z)) = -z
    margin = np.asarray(one.chosen_rewards - one.rejected_rewards)
    np.testing.assert_allclose(one.losses - other.losses, -margin, rtol=1e-3, atol=2e-5)


def test_policy_equal_to_reference_gives_ln_2() -> None:
    x = arrays(3)
    same = {name: x[name.replace("reference", "policy")] if "reference" in name else value for name, value in x.items()}
    np.testing.assert_allclose(preference_loss(**same).losses, math.log(2), rtol=1e-6)


def test_half_precision_inputs_are_computed_in_float32() -> None:
    x = {name: jnp.asarray(v, jnp.bfloat16) if "logps" in name else v for name, v in arrays(4).items()}
    assert preference_loss(**x).losses.dtype == jnp.float32


def test_unknown_names_get_the_nearest_and_the_list() -> None:
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        preference_loss(**arrays(0), loss_type="sigmod")
    with pytest.raises(ValueError, match=r"unknown option 'simpo_gama'; did you mean 'simpo_gamma'\?"):
        preference_loss(**arrays(0), loss_type="simpo", simpo_gama=1.0)
    with pytest.raises(ValueError, match=r"unknown option 'losstype'; did you mean 'loss_type'\?"):
        preference_loss(**arrays(0), losstype="simpo")
    with pytest.raises(ValueError, match="unknown f_divergence_type 'kl'; did you mean 'reverse_kl'"):
        preference_loss(**arrays(0), f_divergence_type="kl")


# Read only next to an option that is tried itself, or instead of another.
DEPENDENT = {"f_alpha_divergence_coef", "pair_weights"}


@pytest.mark.parametrize("option", sorted({name for spec in LOSSES.values() for name in spec.options} - DEPENDENT))
def test_an_option_that_a_loss_cannot_honour_is_an_error_that_names_those_that_can(option: str) -> None:
    able = [name for name, spec in LOSSES.items() if option in spec.options]
    for name in LOSSES:
        needed = {**NEEDED.get(name, {}), option: another_value(option)}
        if name in able:
            loss_settings(name, **needed)
        else:
            with pytest.raises(ValueError, match=f"{name}' cannot honour {option}=.*these can: {', '.join(able)}$"):
                loss_settings(name, **needed)


def test_options_of_the_whole_objective_must_fit_every_loss_of_a_list_but_sft() -> None:
    loss_settings(("sigmoid", "bco_pair"), bco_delta=0.2)  # one that honours it is enough
    loss_settings(("sigmoid", "sft"), f_divergence_type="forward_kl", ld_alpha=0.5)
    with pytest.raises(ValueError, match="'bco_pair' cannot honour f_divergence_type='forward_kl'"):
        loss_settings(("sigmoid", "bco_pair"), f_divergence_type="forward_kl")
    with pytest.raises(ValueError, match="'aot' cannot honour use_weighting=True"):
        loss_settings(("sigmoid", "aot"), use_weighting=True)
    with pytest.raises(ValueError, match="'sft' cannot honour ld_alpha"):
        loss_settings("sft", ld_alpha=0.5)


def test_values_at_their_default_ask_for_nothing() -> None:
    settings, rest = loss_settings("hinge", label_smoothing=0.0, simpo_gamma=0.5, rpo_alpha=None, loss_weights=None)
    assert settings == loss_settings("hinge")[0]
    assert rest == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), found 0.5"),
        ({"beta": 0.0}, "beta must be positive, found 0.0"),
        ({"beta": float("nan")}, "beta must be positive, found nan"),
        ({"beta": "0.1"}, "beta must be one number, found '0.1'"),
        ({"beta": None}, "beta must be one number, found None"),
        ({"beta": np.array([0.1, 0.2])}, "beta must be one number, found array"),
        ({"ld_alpha": "x"}, "ld_alpha must be one number"),
        ({"use_weighting": "false"}, "use_weighting must be True or False, found 'false'"),
        ({"loss_type": None}, "loss_type must be a name or a list of names, found None"),
        ({"loss_weights": 1.0}, "loss_weights must be a list of numbers"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau must be positive"),
        ({"rpo_alpha": -1.0}, "rpo_alpha must be at least 0"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\]"),
        ({"loss_type": "exo_pair"}, "'exo_pair' needs label_smoothing > 0"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "names a loss twice"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, r"one number per loss: 2 \(sigmoid, sft\), found 1"),
        ({"loss_weights": [-1.0]}, "loss_weights must be at least 0"),
        ({"f_alpha_divergence_coef": 0.3}, "read only by f_divergence_type 'alpha_divergence'"),
        ({"loss_type": "bco_pair", "bco_delta": 0.1, "bco_running_delta": True}, "give one of them"),
    ],
    ids=str,
)
def test_values_out_of_range_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_settings(**arguments)


@pytest.mark.parametrize(
    ("loss_type", "option", "remedy"),
    [
        ("sigmoid", {"ld_alpha": 0.0}, "sums that sequence_logps has weighed"),
        ("sigmoid", {"use_weighting": True}, "give pair_weights"),
        ("bco_pair", {"bco_running_delta": True}, "give bco_delta"),
    ],
)
def test_options_of_the_objective_are_refused_with_what_to_do(loss_type: str, option: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} is an option of dpo_loss.*{remedy}"):
        preference_loss(**arrays(0), loss_type=loss_type, **option)


def test_refuses_missing_reference_lengths_and_unequal_shapes() -> None:
    x = arrays(0)
    with pytest.raises(ValueError, match="needs the reference's log-probs"):
        preference_loss(x["policy_chosen_logps"], x["policy_rejected_logps"])
    without_lengths = {name: values for name, values in x.items() if "lengths" not in name}
    with pytest.raises(ValueError, match="needs chosen_lengths and rejected_lengths"):
        preference_loss(**without_lengths, loss_type="ipo")
    with pytest.raises(ValueError, match="needs num_chosen_tokens or chosen_lengths"):
        preference_loss(**without_lengths, rpo_alpha=1.0)
    with pytest.raises(ValueError, match="must have the same shape"):
        preference_loss(**(x | {"reference_chosen_logps": x["reference_chosen_logps"][:3]}))
    with pytest.raises(ValueError, match=r"chosen_lengths must have the shape \(6,\)"):
        preference_loss(**(x | {"chosen_lengths": x["chosen_lengths"][:3]}))
