"""Every loss is the formula that `jdpo.loss_specs` declares: values, gradients and pushes against float64."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.loss_specs import F_DIVERGENCES, LOSSES, OPTIONS
from jdpo.losses import preference_loss
from jdpo.losses.pairwise import divergence_score
from tests.losses.loss_cases import CASES, NEEDED

BETA = 0.1
SIDES = ("policy_chosen_logps", "policy_rejected_logps")

each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


def evaluate(formula: str, names: dict[str, Any]) -> Any:
    """The value of a formula, `first part, x = meaning of x`; a space between two values multiplies.

    >>> evaluate("(a - 1/(2 beta))^2 + c, c = 3 a", {"a": 7.0, "beta": 0.1})
    25.0
    """
    body, *definitions = re.split(r", (?=\w+ = )", formula)
    names = dict(names)
    for definition in definitions:
        name, meaning = definition.split(" = ", 1)
        names[name] = evaluate(meaning, names)
    python = body.translate(str.maketrans("[]", "()")).replace("^", "**")
    python = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", re.sub(r"(?<!\w)(\d)(?=[a-z])", r"\1*", python))  # 2 x, 2x
    return eval(python, {"__builtins__": {}}, names)


def log_sigmoid(z: Any) -> Any:
    return -np.logaddexp(0, -z)


FUNCTIONS: dict[str, Any] = {
    "ls": log_sigmoid,
    "s": lambda z: np.exp(log_sigmoid(z)),
    "log": np.log,
    "exp": np.exp,
    "max": np.maximum,
    "sort": np.sort,
    "log1mexp": lambda x: np.log(1 - np.exp(x)),
}
DEFAULTS = {name: option.default for name, option in OPTIONS.items() if option.is_number}


def pairs(seed: int, num_pairs: int = 12, scale: float = 1.5) -> dict[str, np.ndarray]:
    """Arguments of preference_loss in float64: log-ratios of `scale` nats, lengths of 1 to 12 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 13, (2, num_pairs))
    policy = -rng.uniform(0.2, 3, (2, num_pairs)) * lengths
    reference = policy + rng.normal(0, scale, (2, num_pairs))
    return {
        "policy_chosen_logps": policy[0],
        "policy_rejected_logps": policy[1],
        "reference_chosen_logps": reference[0],
        "reference_rejected_logps": reference[1],
        "chosen_lengths": lengths[0],
        "rejected_lengths": lengths[1],
        "score_margins": rng.uniform(0.2, 4, num_pairs),
    }


def notation(x: dict[str, np.ndarray], **options: Any) -> dict[str, Any]:
    """The names of the formulas, with their values."""
    l_w, l_l, r_w, r_l, n_w, n_l, g = x.values()
    names = {"l_w": l_w, "l_l": l_l, "r_w": r_w, "r_l": r_l, "n_w": n_w, "n_l": n_l, "N": n_w.mean(), "beta": BETA}
    names |= {"m_w": l_w / n_w, "m_l": l_l / n_l, "e": options.get("label_smoothing", 0.0)}
    names |= FUNCTIONS | DEFAULTS | {"beta": BETA} | options
    score = F_DIVERGENCES[options.get("f_divergence_type", "reverse_kl")]
    a, b = (evaluate(score, names | {"r": ratio}) for ratio in (l_w - r_w, l_l - r_l))
    o = options.get("margin_gamma", 0.0) * np.log(g)
    return names | {"a": a, "b": b, "D": a - b, "g": g, "o": o, "z": BETA * (a - b) - o}


def plain(name: str, x: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    losses: np.ndarray = evaluate(LOSSES[name].formula, notation(x, **options))
    return losses


def by_rank(name: str, values: Any) -> Any:
    """Sorted for losses whose formula goes by rank, while jdpo puts each value at its pair."""
    return np.sort(values) if "global batch" in LOSSES[name].needs else values


@pytest.mark.smoke
@each_case
def test_value_and_gradient_are_those_of_the_formula(name: str, options: dict[str, Any]) -> None:
    """The gradient in a random direction, by central differences of the formula: no derivative is shared."""
    with jax.enable_x64(True):
        x = pairs(1)
        weights = np.ones(12) if "global batch" in LOSSES[name].needs else np.random.default_rng(5).normal(size=12)

        def losses(chosen: Any, rejected: Any) -> Any:
            moved = x | dict(zip(SIDES, (chosen, rejected), strict=True))
            return preference_loss(**moved, loss_type=name, beta=BETA, **options).losses

        given = [jnp.asarray(x[side]) for side in SIDES]
        found = by_rank(name, losses(*given))
        np.testing.assert_allclose(found, by_rank(name, plain(name, x, **options)), rtol=1e-12, atol=1e-13)
        grads = jax.grad(lambda *logps: (losses(*logps) * weights).sum(), argnums=(0, 1))(*given)
        direction = np.random.default_rng(6).normal(size=12)
        for side, grad in zip(SIDES, grads, strict=True):
            up, down = (
                np.dot(weights, plain(name, x | {side: x[side] + step * direction}, **options))
                for step in (1e-6, -1e-6)
            )
            assert np.dot(grad, direction) == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-8)


@each_case
def test_float32_is_close_to_the_formula(name: str, options: dict[str, Any]) -> None:
    x = pairs(2)
    single = {key: values.astype(np.float32) if "logps" in key else values for key, values in x.items()}
    found = preference_loss(**single, loss_type=name, beta=BETA, **options).losses
    assert found.dtype == jnp.float32
    expected = plain(name, single | {key: single[key].astype(np.float64) for key in x if "logps" in key}, **options)
    np.testing.assert_allclose(by_rank(name, found), by_rank(name, expected), rtol=3e-5, atol=2e-6)


def slopes(x: dict[str, np.ndarray], name: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The push on the log-prob of the chosen and the rejected sides, [b] each."""

    def total(chosen: Any, rejected: Any) -> Any:
        moved = x | dict(zip(SIDES, (chosen, rejected), strict=True))
        return preference_loss(**moved, loss_type=name, beta=BETA, **options).losses.sum()

    gradients = jax.grad(total, argnums=(0, 1))(*(jnp.asarray(x[side], jnp.float32) for side in SIDES))
    return -np.asarray(gradients[0]), -np.asarray(gradients[1])


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if "f_divergence_type" not in case[1]], ids=str)
def test_the_push_on_the_chosen_side_is_the_declared_one(name: str, options: dict[str, Any]) -> None:
    x = pairs(1, scale=6)
    expected, found = evaluate(LOSSES[name].push, notation(x, **options)), slopes(x, name, **options)[0]
    expected = np.broadcast_to(expected, found.shape)
    np.testing.assert_allclose(by_rank(name, found), by_rank(name, expected), rtol=2e-4, atol=1e-6)


def check_kind(name: str, kind: str, x: dict[str, np.ndarray], options: dict[str, Any]) -> None:
    chosen, rejected = slopes(x, name, **options)
    names = notation(x)
    if kind == "difference" and name == "aot_unpaired":
        np.testing.assert_allclose(np.sort(chosen), np.sort(-rejected), rtol=1e-5)
    elif kind == "difference":
        np.testing.assert_allclose(chosen, -rejected, rtol=1e-5)
    elif kind == "difference per token":
        np.testing.assert_allclose(chosen * names["n_w"], -rejected * names["n_l"], rtol=1e-5)
    elif kind == "up":
        assert (chosen > 0).all()
        assert (rejected <= 0).all()
    elif kind == "level":
        level = np.log(2) / BETA if name == "nca_pair" else 1 / (2 * BETA)
        np.testing.assert_array_equal(np.sign(chosen), np.sign(level - names["a"]))
    else:
        assert kind == "down", kind
        near = np.abs(names["a"]) < np.abs(names["D"])
        assert 0 < near.sum() < len(near)
        assert (chosen[near] < 0).all()
        assert (rejected < 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_pushes_the_two_sides_as_declared(name: str) -> None:
    check_kind(name, LOSSES[name].kind, pairs(2, 40, scale=6), NEEDED.get(name, {}))


@pytest.mark.parametrize(("name", "kind"), [("apo_zero", "difference"), ("nca_pair", "up"), ("sigmoid", "level")])
def test_a_wrong_kind_would_show(name: str, kind: str) -> None:
    with pytest.raises(AssertionError):
        check_kind(name, kind, pairs(2, 40, scale=6), {})


@pytest.mark.parametrize("name", LOSSES)
def test_value_where_policy_equals_reference(name: str) -> None:
    spec = LOSSES[name]
    if "reference" not in spec.needs:
        assert spec.start == ""
        return
    x = pairs(3)
    x |= {side.replace("reference", "policy"): x[side] for side in x if side.startswith("reference")}
    found = preference_loss(**x, loss_type=name, beta=BETA, **NEEDED.get(name, {})).losses
    np.testing.assert_allclose(found, float(spec.start.split("= ")[-1]), rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_divergences_are_their_formulas(name: str, alpha: float) -> None:
    r = np.linspace(-3, 3, 7)
    expected = evaluate(F_DIVERGENCES[name], FUNCTIONS | {"r": r, "f_alpha_divergence_coef": alpha})
    found = divergence_score(jnp.asarray(r, jnp.float32), name, alpha)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
