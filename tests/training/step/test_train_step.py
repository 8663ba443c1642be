"""The loss of a global batch against a plain loop in numpy, however the batch is cut into micro-batches.

Axes: k micro-batches, m rows of each, t positions, v vocabulary, d width.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jdpo.config import MeshConfig
from jdpo.devices import Target, compiling_for
from jdpo.losses import LOSSES, LossState
from jdpo.losses.settings import loss_settings
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import fetch, micro_batch_sharding, place, replicated
from jdpo.training.fit.assembly import compile_step
from jdpo.training.step.objectives import CompletionObjective, PreferenceObjective
from jdpo.training.step.train_step import (
    Frozen,
    ReferenceSync,
    TrainState,
    all_finite,
    evaluate,
    loss_and_grads,
    train_step,
)
from jdpo.types import CHOSEN, REJECTED, CompletionBatch, PreferenceBatch

VOCAB, WIDTH, LENGTH, BETA = 11, 5, 7, 0.3
NUM_REAL = 10
LAYOUTS = [
    (1, 16),
    (2, 8),
    (3, 4),
    (5, 2),
    (16, 1),
]  # all but the first and the last two leave padding in various places

Params = dict[str, Any]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def apply_fn(params: Params, tokens: Any, attention_mask: Any) -> Any:
    """Applies a causal model whose positions see the sum of the embeddings up to them."""
    embedded = params["embedding"][tokens] * attention_mask[..., None]
    return jnp.tanh(jnp.cumsum(embedded, axis=-2)) @ params["head"]


def plain_logps(params: Params, tokens: np.ndarray, mask: np.ndarray) -> float:
    """Sums the log-probs of the masked tokens of one sequence, one token at a time."""
    total, state = 0.0, np.zeros(WIDTH)
    for t in range(LENGTH - 1):
        state = state + params["embedding"][tokens[t]]
        logits = np.tanh(state) @ params["head"]
        if mask[t + 1]:
            total += logits[tokens[t + 1]] - np.log(np.sum(np.exp(logits)))
    return float(total)


def make_params(seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return {"embedding": rng.normal(size=(VOCAB, WIDTH)), "head": rng.normal(size=(WIDTH, VOCAB))}


def pairs(num_micro: int, rows_per_micro: int) -> PreferenceBatch:
    """Returns ten random pairs followed by padding pairs, whose tokens and completions must not count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (NUM_REAL, 2, LENGTH))
    starts, stops = rng.integers(1, 4, NUM_REAL), rng.integers(5, LENGTH + 1, (NUM_REAL, 2))
    at = np.arange(LENGTH)
    attention = at < stops[..., None]
    completion = attention & (at >= starts[:, None, None])
    real = PreferenceBatch(tokens, attention, completion, None, np.ones(NUM_REAL))
    return _padded(real, num_micro, rows_per_micro)


def completions(num_micro: int, rows_per_micro: int) -> CompletionBatch:
    batch = pairs(1, 16)
    side = [np.asarray(array)[0, :NUM_REAL, CHOSEN] for array in batch[:3]]
    return _padded(CompletionBatch(*side, np.ones(NUM_REAL)), num_micro, rows_per_micro)


def _padded(batch: Any, num_micro: int, rows_per_micro: int) -> Any:
    """Reshapes [b, ...] to [k, m, ...]; padding rows repeat the first row, with weight 0."""
    num_slots = num_micro * rows_per_micro
    index = np.where(np.arange(num_slots) < NUM_REAL, np.arange(num_slots), 0)
    weights = (np.arange(num_slots) < NUM_REAL).astype(np.float32)
    flat = jax.tree.map(lambda array: array[index], batch)._replace(weights=weights)
    return jax.tree.map(lambda array: jnp.asarray(array.reshape(num_micro, rows_per_micro, *array.shape[1:])), flat)


def plain_dpo(params: Params, reference: Params) -> float:
    batch = jax.tree.map(lambda array: np.asarray(array)[0], pairs(1, 16))
    total = 0.0
    for index in range(NUM_REAL):
        ratio = [
            plain_logps(params, batch.tokens[index, side], batch.completion_mask[index, side])
            - plain_logps(reference, batch.tokens[index, side], batch.completion_mask[index, side])
            for side in (CHOSEN, REJECTED)
        ]
        total += np.log1p(np.exp(-BETA * (ratio[CHOSEN] - ratio[REJECTED])))
    return float(total / NUM_REAL)


def plain_sft(params: Params, reference: Params) -> float:
    batch = jax.tree.map(lambda array: np.asarray(array)[0], completions(1, 16))
    total = sum(plain_logps(params, batch.tokens[i], batch.completion_mask[i]) for i in range(NUM_REAL))
    return float(-total / batch.completion_mask[:NUM_REAL, 1:].sum())


OBJECTIVES = {
    "dpo": (PreferenceObjective(apply_fn, loss_settings("sigmoid", beta=BETA)[0]), pairs, plain_dpo),
    "sft": (CompletionObjective(apply_fn), completions, plain_sft),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_a_plain_loop(name: str, layout: tuple[int, int]) -> None:
    objective, make, plain = OBJECTIVES[name]
    params, reference = make_params(1), make_params(2)
    loss, grads, rows, *_ = loss_and_grads(objective, jax.tree.map(jnp.asarray, params), reference, make(*layout))
    assert float(loss) == pytest.approx(plain(params, reference), rel=1e-13)
    assert all(values.shape == layout for values in rows.values())
    # The gradient along a random direction, against a central difference of the plain loop.
    direction = make_params(3)
    along = sum(float(np.sum(np.asarray(grads[key]) * direction[key])) for key in params)
    up, down = ({key: params[key] + sign * 1e-6 * direction[key] for key in params} for sign in (1, -1))
    assert along == pytest.approx((plain(up, reference) - plain(down, reference)) / 2e-6, rel=1e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_rows_have_no_effect_even_if_they_are_nan(name: str) -> None:
    objective, make, plain = OBJECTIVES[name]
    spoilt = _spoilt(objective)
    loss, grads, *_ = loss_and_grads(spoilt, make_params(1), make_params(2), make(3, 4))
    assert float(loss) == pytest.approx(plain(make_params(1), make_params(2)), rel=1e-13)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def _spoilt(objective: Any) -> Any:
    """Returns the objective with NaN as the losses of padding rows."""

    class Spoilt(type(objective)):  # type: ignore[misc]
        def losses(self, features: Any, *rest: Any) -> tuple[Any, dict[str, Any]]:
            losses, metrics = super().losses(features, *rest)
            return jnp.where(features.weights > 0, losses, jnp.nan), metrics

    return Spoilt(*(getattr(objective, field.name) for field in dataclasses.fields(objective)))


SETTINGS = [
    *((name, {"label_smoothing": 0.1} if "label_smoothing" in spec.options else {}) for name, spec in LOSSES.items()),
    ("bco_pair", {"bco_running_delta": True}),
    ("sigmoid", {"use_weighting": True, "rpo_alpha": 0.5}),
    ("ipo", {"ld_alpha": 0.4, "f_divergence_type": "js_divergence"}),
    (("sigmoid", "aot", "bco_pair", "sft"), {"loss_weights": (1.0, 0.5, 0.2, 0.7), "bco_running_delta": True}),
]


CUTS = [3, 12]  # of 12 slots, in addition to 1; few, because each is a program to compile


# Losses over the whole batch could depend on the cut; of losses per pair the default suite has two.
SHORT = ("sigmoid", "simpo", *(name for name in LOSSES if name.startswith(("aot", "bco"))))
LONG = [setting for setting in SETTINGS if isinstance(setting[0], str) and setting[0] not in SHORT]


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [pytest.param(*setting, marks=pytest.mark.full if setting in LONG else ()) for setting in SETTINGS],
    ids=str,
)
def test_any_cut_into_micro_batches_gives_the_same(loss_type: Any, options: dict[str, Any]) -> None:
    """Puts real and padding pairs in any places, as in a ragged last step; values and gradients to 1e-9."""
    objective = PreferenceObjective(apply_fn, loss_settings(loss_type, beta=BETA, **options)[0])
    state = objective.init_state and LossState(jnp.float32(0.3), jnp.float32(7))
    run = jax.jit(partial(loss_and_grads, objective))

    @given(st.permutations(range(NUM_SLOTS)), st.integers(1, NUM_REAL), st.sampled_from(CUTS), st.integers(0, 999))
    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(order: list[int], num_real: int, num_micro: int, seed: int) -> None:
        params, reference = (jax.tree.map(jnp.asarray, make_params(seed + i)) for i in (1, 2))
        one = run(params, reference, twelve(1, range(NUM_SLOTS), num_real), state)
        other = run(params, reference, twelve(num_micro, order, num_real), state)
        assert float(other.loss) == pytest.approx(float(one.loss), rel=1e-9, abs=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), other.grads, one.grads)
        if state is not None:
            np.testing.assert_allclose(other.loss_state, one.loss_state, rtol=1e-5)
            assert float(one.loss_state.num_pairs) == 7 + num_real
        real = np.array(order) < num_real
        for name, values in one.rows.items():
            expected = np.asarray(values).reshape(-1)[np.array(order)]
            found = np.asarray(other.rows[name]).reshape(-1)
            np.testing.assert_allclose(found[real], expected[real], rtol=1e-9, atol=1e-12)

    check()


NUM_SLOTS = 12


def twelve(num_micro: int, order: Sequence[int], num_real: int) -> PreferenceBatch:
    """Returns twelve slots in `order`, of which the first `num_real` before ordering are real pairs.

    All pairs differ, because the quantiles of equal ones would be ambiguous.
    """
    whole = pairs(1, 16)
    weights = (np.arange(NUM_SLOTS) < num_real).astype(np.float64)
    flat = jax.tree.map(lambda array: np.asarray(array)[0, np.arange(NUM_SLOTS) % NUM_REAL], whole)
    flat = flat._replace(weights=weights)
    index = np.array(order)
    return jax.tree.map(lambda array: jnp.asarray(array[index].reshape(num_micro, -1, *array.shape[1:])), flat)


def test_the_reference_is_updated_at_its_interval() -> None:
    objective, make, _ = OBJECTIVES["dpo"]
    start, reference = (jax.tree.map(jnp.asarray, make_params(seed)) for seed in (1, 2))
    optimizer = optax.sgd(0.1)
    state = TrainState(jnp.int32(0), start, optimizer.init(start), jnp.zeros(2, jnp.uint32), reference_params=reference)
    step = jax.jit(
        partial(
            train_step,
            objective=objective,
            optimizer=optimizer,
            schedule=lambda step: 0.1,
            shardings=jax.tree.map(lambda leaf: leaf.sharding, start),
            sync=ReferenceSync(alpha=0.6, steps=2),
        )
    )
    states = [state]
    for _ in range(4):
        states.append(step(states[-1], Frozen(), make(2, 8))[0])
    for done, (before, after) in enumerate(itertools.pairwise(states), start=1):
        expected = before.reference_params
        if done % 2 == 0:
            expected = jax.tree.map(lambda p, r: 0.6 * p + 0.4 * r, after.params, before.reference_params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), after.reference_params, expected)
    assert np.abs(states[-1].reference_params["head"] - reference["head"]).max() > 0.1


def test_evaluation_gives_the_rows_of_training() -> None:
    objective, make, plain = OBJECTIVES["sft"]
    report = evaluate(jax.tree.map(jnp.asarray, make_params(1)), Frozen(), make(3, 4), objective=objective)
    total = float(np.sum(np.asarray(report.rows["loss"]).reshape(-1)[:NUM_REAL]))
    assert total / float(report.normalizer) == pytest.approx(plain(make_params(1), {}), rel=1e-13)


def test_compiled_step_updates_once_and_reports_before_clipping() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    objective, make, plain = OBJECTIVES["dpo"]
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.5))
    whole = replicated(mesh)
    params = make_params(1)
    state = TrainState(jnp.int32(4), params, optimizer.init(params), np.zeros(2, np.uint32))
    shardings = jax.tree.map(lambda _: whole, state)
    compiled = compile_step(
        objective=objective,
        optimizer=optimizer,
        schedule=lambda step: 0.1 * step,
        mesh=mesh,
        state_shardings=shardings,
        frozen_shardings=Frozen(reference=shardings.params),
    )
    batch = place(jax.tree.map(np.asarray, make(2, 8)), micro_batch_sharding(mesh))
    after, report = compiled.train_step(place(state, whole), Frozen(reference=place(make_params(2), whole)), batch)
    assert int(after.step) == 5
    assert float(report.learning_rate) == pytest.approx(0.4), "the rate of this update, which is number 4"
    assert float(report.loss) == pytest.approx(plain(params, make_params(2)), rel=1e-12)
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, fetch(after.params), params)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.5 * 1e-3, rel=1e-9), "clipped to 1e-3"
    assert float(report.grad_norm) > 1e-2, "as it was before"


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_one_weight_that_is_not_finite_is_found(platform: str) -> None:
    weights = {"head": jnp.ones((3, 4)), "norm": jnp.full(5, -3e38)}
    with compiling_for(Target(platform)):
        check = jax.jit(lambda params: all_finite(jax.tree.map(lambda leaf: leaf + 1, params)))
        assert check(weights)
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            assert not check(weights | {"norm": weights["norm"].at[2].set(bad)})
