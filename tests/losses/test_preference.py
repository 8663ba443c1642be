"""Preference losses against hand-derived values, a plain float64 version, and their properties."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdpo.losses import LOSSES, preference_loss
from jdpo.losses.divergences import F_DIVERGENCES
from jdpo.losses.settings import loss_settings

BETA = 0.1


def arrays(seed: int, num_pairs: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    values = {f"{name}_logps": rng.normal(-20, 5, num_pairs).astype(np.float32) for name in names}
    return values | {
        "chosen_lengths": rng.integers(1, 20, num_pairs),
        "rejected_lengths": rng.integers(1, 20, num_pairs),
    }


def log_sigmoid(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def sigmoid(z: float) -> float:
    return math.exp(log_sigmoid(z))


def score(r: float, divergence: str, alpha: float) -> float:
    return {
        "reverse_kl": lambda: r,
        "forward_kl": lambda: 1 - math.exp(-r),
        "js_divergence": lambda: math.log(2) + log_sigmoid(r),
        "alpha_divergence": lambda: (math.exp((alpha - 1) * r) - 1) / (alpha - 1),
    }[divergence]()


def plain(loss_type: str, x: dict[str, np.ndarray], beta: float, **options: Any) -> list[float]:
    """The formulas in float64, one pair at a time, with the math module."""
    given = {"e": options.get("label_smoothing", 0.0), "delta": options.get("bco_delta", 0.0)}
    divergence = options.get("f_divergence_type", "reverse_kl")
    alpha = options.get("f_alpha_divergence_coef", 0.5)
    rows = [{name: float(values[i]) for name, values in x.items()} for i in range(len(x["policy_chosen_logps"]))]
    e, tokens = given["e"], sum(row["chosen_lengths"] for row in rows)

    def smoothed(z: float) -> float:
        return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)

    if loss_type.startswith("aot"):
        return plain_aot(loss_type, rows, beta, smoothed)
    losses = []
    for row in rows:
        l_w, l_l, n_w, n_l = (
            row[name] for name in ("policy_chosen_logps", "policy_rejected_logps", "chosen_lengths", "rejected_lengths")
        )
        raw_a, raw_b = l_w - row["reference_chosen_logps"], l_l - row["reference_rejected_logps"]
        a, b = score(raw_a, divergence, alpha), score(raw_b, divergence, alpha)
        z, tau, m_w, m_l = beta * (a - b), options.get("discopop_tau", 0.05), l_w / n_w, l_l / n_l
        sft = -l_w * len(rows) / tokens
        formulas = {
            "sigmoid": lambda z=z: smoothed(z),
            "robust": lambda z=z: (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e),
            "hinge": lambda z=z: max(0.0, 1 - z),
            "ipo": lambda a=a, b=b, n_w=n_w, n_l=n_l: (a / n_w - b / n_l - 1 / (2 * beta)) ** 2,
            "ipo_sum": lambda a=a, b=b: (a - b - 1 / (2 * beta)) ** 2,
            "exo_pair": lambda z=z: (
                sigmoid(z) * (log_sigmoid(z) - math.log(1 - e)) + sigmoid(-z) * (log_sigmoid(-z) - math.log(e))
            ),
            "nca_pair": lambda a=a, b=b: (
                -log_sigmoid(beta * a) - log_sigmoid(-beta * a) / 2 - log_sigmoid(-beta * b) / 2
            ),
            "bco_pair": lambda a=a, b=b: (
                -log_sigmoid(beta * a - given["delta"]) - log_sigmoid(-(beta * b - given["delta"]))
            ),
            "sppo_hard": lambda a=a, b=b: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2,
            "apo_zero": lambda a=a, b=b: 1 - sigmoid(beta * a) + sigmoid(beta * b),
            "apo_down": lambda a=a, z=z: sigmoid(beta * a) + 1 - sigmoid(z),
            "discopop": lambda z=z, tau=tau: -log_sigmoid(z) * (1 - sigmoid(z / tau)) + math.exp(-z) * sigmoid(z / tau),
            "sigmoid_norm": lambda a=a, b=b, n_w=n_w, n_l=n_l: -log_sigmoid(beta * (a / n_w - b / n_l)),
            "simpo": lambda m_w=m_w, m_l=m_l: -log_sigmoid(beta * (m_w - m_l) - options.get("simpo_gamma", 0.5)),
            "cpo": lambda l_w=l_w, l_l=l_l, sft=sft: (
                -log_sigmoid(beta * (l_w - l_l)) + options.get("cpo_alpha", 1.0) * sft
            ),
            "orpo": lambda m_w=m_w, m_l=m_l: (
                -m_w
                - options.get("orpo_lambda", 0.1)
                * log_sigmoid((m_w - m_l) - math.log(1 - math.exp(m_w)) + math.log(1 - math.exp(m_l)))
            ),
            "sft": lambda sft=sft: sft,
        }
        losses.append(formulas[loss_type]())
    return losses


def plain_aot(loss_type: str, rows: list[dict[str, float]], beta: float, smoothed: Any) -> list[float]:
    def margin(row: dict[str, float], first: str, second: str) -> float:
        return row[f"{first}_logps"] - row[f"{second}_logps"]

    paired = loss_type == "aot"
    upper = ("policy_chosen", "policy_rejected") if paired else ("policy_chosen", "reference_chosen")
    lower = ("reference_chosen", "reference_rejected") if paired else ("policy_rejected", "reference_rejected")
    highs, lows = ([margin(row, *names) for row in rows] for names in (upper, lower))
    by_rank = [smoothed(beta * (high - low)) for high, low in zip(sorted(highs), sorted(lows), strict=True)]
    return [by_rank[sorted(highs).index(high)] for high in highs]


NEEDED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 1e-3}}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, NEEDED.get(name, {})) for name in LOSSES),
    *((name, {"label_smoothing": 0.2}) for name, spec in LOSSES.items() if "label_smoothing" in spec.options),
    *(
        (name, {"f_divergence_type": divergence, **NEEDED.get(name, {})})
        for name, spec in LOSSES.items()
        if "f_divergence_type" in spec.options
        for divergence in F_DIVERGENCES
    ),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.4}),
    ("discopop", {"discopop_tau": 0.7}),
    ("simpo", {"simpo_gamma": 1.1}),
    ("cpo", {"cpo_alpha": 0.3}),
    ("orpo", {"orpo_lambda": 0.7}),
    ("bco_pair", {"bco_delta": 0.4}),
]


def close(seed: int) -> dict[str, np.ndarray]:
    """Log-ratios of a few nats, where every divergence has a slope to check."""
    x, rng = arrays(seed), np.random.default_rng(seed + 1)
    for side in ("chosen", "rejected"):
        moved = x[f"reference_{side}_logps"] + rng.normal(0, 1.5, len(x["chosen_lengths"]))
        x[f"policy_{side}_logps"] = np.minimum(moved, -0.5).astype(np.float32)
    return x


@pytest.mark.smoke
@pytest.mark.parametrize(("loss_type", "options"), CASES, ids=str)
def test_value_and_gradient_agree_with_the_plain_version_in_float64(loss_type: str, options: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        x = {name: values.astype(np.float64) for name, values in close(1).items()}
        sides = ("policy_chosen_logps", "policy_rejected_logps")

        def losses(chosen: Any, rejected: Any) -> Any:
            moved = x | dict(zip(sides, (chosen, rejected), strict=True))
            return preference_loss(**moved, loss_type=loss_type, beta=BETA, **options).losses

        given = [jnp.asarray(x[side]) for side in sides]
        np.testing.assert_allclose(losses(*given), plain(loss_type, x, BETA, **options), rtol=1e-12, atol=1e-14)
        weights = np.random.default_rng(5).normal(size=len(given[0]))
        grads = jax.grad(lambda *logps: (losses(*logps) * weights).sum(), argnums=(0, 1))(*given)
        for side, grad in zip(sides, grads, strict=True):
            direction = np.random.default_rng(6).normal(size=len(grad))
            up, down = (
                np.dot(weights, plain(loss_type, x | {side: x[side] + step * direction}, BETA, **options))
                for step in (1e-6, -1e-6)
            )
            assert np.dot(grad, direction) == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("loss_type", "options"), CASES, ids=str)
def test_float32_agrees_with_the_plain_version(loss_type: str, options: dict[str, Any]) -> None:
    x = close(2)
    result = preference_loss(**x, loss_type=loss_type, beta=BETA, **options)
    assert result.losses.dtype == jnp.float32
    np.testing.assert_allclose(result.losses, plain(loss_type, x, BETA, **options), rtol=3e-5, atol=2e-6)


WORKED = [
    ("sigmoid", {}, 0.513015),
    ("robust", {"label_smoothing": 0.1}, 0.463015),
    ("hinge", {}, 0.6),
    ("ipo", {}, 12.25),
    ("ipo_sum", {}, 1.0),
    ("sigmoid_norm", {"beta": 5.0}, 0.000553),
    ("exo_pair", {"label_smoothing": 0.1}, 0.313594),
    ("nca_pair", {}, 1.303731),
    ("bco_pair", {"bco_delta": 0.2}, 1.198752),
    ("sppo_hard", {}, 20.0),
    ("apo_zero", {}, 0.900578),
    ("apo_down", {}, 0.975755),
    ("discopop", {"discopop_tau": 0.5}, 0.621551),
]
WORKED_WITHOUT_REFERENCE = [("simpo", {"beta": 2.0}, 0.201413), ("cpo", {}, 1.644397), ("orpo", {}, 1.023818)]


@pytest.mark.parametrize(("loss_type", "options", "expected"), WORKED + WORKED_WITHOUT_REFERENCE, ids=str)
def test_worked_examples_of_the_docstrings(loss_type: str, options: dict[str, Any], expected: float) -> None:
    """a = 3, b = -1 with a reference, l_w = -3, l_l = -4 without; three chosen tokens, two rejected."""
    logps = [jnp.array([value]) for value in ((3.0, -1.0) if LOSSES[loss_type].needs_reference else (-3.0, -4.0))]
    reference = [jnp.zeros(1)] * 2 if LOSSES[loss_type].needs_reference else []
    lengths = {"chosen_lengths": jnp.array([3]), "rejected_lengths": jnp.array([2])}
    result = preference_loss(*logps, *reference, loss_type=loss_type, **lengths, **options)
    assert result.losses[0] == pytest.approx(expected, rel=1e-6, abs=5e-7)


def test_worked_example_of_aot_stands_at_the_pair_that_has_the_quantile() -> None:
    chosen, reference = jnp.array([5.0, 1.0]), jnp.array([0.0, 2.0])
    losses = preference_loss(chosen, jnp.zeros(2), reference, jnp.zeros(2), loss_type="aot").losses
    np.testing.assert_allclose(losses, [0.554355, 0.644397], rtol=1e-5)


def test_rewards_are_beta_times_the_log_ratio_or_the_policys_own() -> None:
    x = arrays(7)
    for loss_type, spec in LOSSES.items():
        result = preference_loss(**x, loss_type=loss_type, beta=BETA, **NEEDED.get(loss_type, {}))
        expected = x["policy_chosen_logps"]
        if spec.needs_reference:
            expected = expected - x["reference_chosen_logps"]
        elif loss_type in ("simpo", "orpo"):
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


EXTREMES = [case for case in CASES if case[0] not in ("simpo", "cpo", "orpo", "sft")]


@pytest.mark.parametrize(("loss_type", "options"), EXTREMES, ids=str)
def test_log_ratios_of_ten_thousand_stay_finite(loss_type: str, options: dict[str, Any]) -> None:
    chosen, rejected = (
        jnp.array(values) for values in zip(*itertools.product((1e4, 0.0, -1e4), repeat=2), strict=True)
    )
    zeros, lengths = jnp.zeros_like(chosen), jnp.ones(len(chosen), int)

    def losses(*policy: Any) -> Any:
        return preference_loss(
            *policy, zeros, zeros, chosen_lengths=lengths, rejected_lengths=lengths, loss_type=loss_type, **options
        ).losses

    for beta in (0.1, 1.0):
        value = preference_loss(
            chosen,
            rejected,
            zeros,
            zeros,
            chosen_lengths=lengths,
            rejected_lengths=lengths,
            loss_type=loss_type,
            beta=beta,
            **options,
        ).losses
        assert np.isfinite(value).all()
    for side in (0, 1):
        assert np.isfinite(jax.grad(lambda *policy: losses(*policy).sum(), argnums=side)(chosen, rejected)).all()


@pytest.mark.parametrize("loss_type", ["simpo", "cpo", "orpo", "sft", "ipo", "sigmoid_norm"])
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
    with pytest.raises(ValueError, match=r"unknown loss_type 'sigmod'; did you mean 'sigmoid'\? The losses are: sig"):
        preference_loss(**arrays(0), loss_type="sigmod")
    with pytest.raises(ValueError, match=r"unknown option 'simpo_gama'; did you mean 'simpo_gamma'\?"):
        preference_loss(**arrays(0), loss_type="simpo", simpo_gama=1.0)
    with pytest.raises(ValueError, match=r"unknown option 'losstype'; did you mean 'loss_type'\?"):
        preference_loss(**arrays(0), losstype="simpo")
    with pytest.raises(ValueError, match="unknown f_divergence_type 'kl'; did you mean 'reverse_kl'"):
        preference_loss(**arrays(0), f_divergence_type="kl")


HONOURED = {
    "label_smoothing": 0.1,
    "f_divergence_type": "forward_kl",
    "discopop_tau": 0.1,
    "simpo_gamma": 0.7,
    "cpo_alpha": 0.5,
    "orpo_lambda": 0.5,
    "bco_delta": 0.3,
    "ld_alpha": 0.5,
    "use_weighting": True,
}


@pytest.mark.parametrize("option", HONOURED)
def test_an_option_that_a_loss_cannot_honour_is_an_error_that_names_those_that_can(option: str) -> None:
    able = [name for name, spec in LOSSES.items() if option in spec.options]
    for name in LOSSES:
        needed = {**NEEDED.get(name, {}), option: HONOURED[option]}
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
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, r"one number a loss: 2 \(sigmoid, sft\), found 1"),
        ({"loss_weights": [-1.0]}, "loss_weights must be at least 0"),
        ({"f_alpha_divergence_coef": 0.3}, "read by f_divergence_type 'alpha_divergence' alone"),
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
    with pytest.raises(ValueError, match="must have one shape"):
        preference_loss(**(x | {"reference_chosen_logps": x["reference_chosen_logps"][:3]}))
    with pytest.raises(ValueError, match=r"chosen_lengths must have the shape \(6,\)"):
        preference_loss(**(x | {"chosen_lengths": x["chosen_lengths"][:3]}))


def test_every_loss_says_what_it_is_and_where_it_comes_from() -> None:
    for name, spec in LOSSES.items():
        assert spec.source, name
        assert spec.function.__doc__, name
