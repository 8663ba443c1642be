"""Schedules against their formulas, the decay mask and clipping against updates worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdpo.config import OptimizerConfig, SFTConfig, TrainConfig
from jdpo.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer, num_warmup_steps


def config(**values: Any) -> TrainConfig:
    return SFTConfig(model_name_or_path="m", output_dir="o", datasets="d", **values)  # type: ignore[arg-type]


def plain_rate(kind: str, step: int, *, peak: float, warmup: int, num_steps: int) -> float:
    """The learning rate of update `step` (from 0), as the transformers schedules of the same names define it."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (num_steps - warmup)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[kind]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedule_is_its_formula(kind: str, warmup: int) -> None:
    schedule = learning_rate_schedule(config(learning_rate=2e-4, lr_scheduler_type=kind, warmup_steps=warmup), 11)
    for step in range(11):
        expected = plain_rate(kind, step, peak=2e-4, warmup=warmup, num_steps=11)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6, abs=1e-7 * 2e-4), step


def test_known_values_of_cosine_and_linear() -> None:
    # transformers: get_cosine_schedule_with_warmup and get_linear_schedule_with_warmup, 2 warm-up steps of 10.
    cosine = learning_rate_schedule(config(learning_rate=1.0, lr_scheduler_type="cosine", warmup_steps=2), 10)
    linear = learning_rate_schedule(config(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=2), 10)
    np.testing.assert_allclose([cosine(s) for s in (0, 1, 2, 4, 6, 9)], [0, 0.5, 1, 0.853553, 0.5, 0.038060], atol=1e-6)
    np.testing.assert_allclose([linear(s) for s in (0, 1, 2, 4, 6, 9)], [0, 0.5, 1, 0.75, 0.5, 0.125], atol=1e-6)


def test_warmup_ratio_rounds_up_and_warmup_steps_replaces_it() -> None:
    assert num_warmup_steps(config(warmup_ratio=0.1), 11) == 2
    assert num_warmup_steps(config(warmup_ratio=0.1, warmup_steps=0), 11) == 0
    assert num_warmup_steps(config(), 11) == 0


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps 12 is more than the 11 steps of the run"):
        learning_rate_schedule(config(warmup_steps=12), 11)


def test_warmup_that_fills_the_run() -> None:
    schedule = learning_rate_schedule(config(learning_rate=1.0, warmup_steps=4), 4)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0, 0.25, 0.5, 0.75])


PARAMS = {
    "stack": {"layer_0": {"attention": {"query": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}}}},
    "final_norm": {"scale": jnp.full(2, 3.0)},
    "embed": {"embedding": jnp.full((4, 2), 3.0)},
}


def test_decay_mask_of_a_real_model_spares_norms_and_biases() -> None:
    mask = decay_mask(PARAMS)
    assert mask["stack"]["layer_0"]["attention"]["query"] == {"kernel": True, "bias": False}
    assert mask["final_norm"] == {"scale": False}
    assert mask["embed"] == {"embedding": True}


def test_zero_gradient_step_decays_kernels_and_embeddings_alone() -> None:
    rule = OptimizerConfig(weight_decay=0.1)
    optimizer = make_optimizer(config(learning_rate=0.5, lr_scheduler_type="constant", optimizer=rule), 4)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    query = after["stack"]["layer_0"]["attention"]["query"]
    np.testing.assert_allclose(query["kernel"], 3.0 * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_allclose(after["embed"]["embedding"], 3.0 * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(query["bias"], 3.0)
    np.testing.assert_array_equal(after["final_norm"]["scale"], 3.0)


def adamw_by_hand(grads: list[float], *, rate: float, b1: float, b2: float, eps: float, decay: float) -> float:
    """One weight from 1.0 under AdamW (arXiv 1711.05101, algorithm 2), bias-corrected."""
    weight, first, second = 1.0, 0.0, 0.0
    for step, grad in enumerate(grads, start=1):
        first, second = b1 * first + (1 - b1) * grad, b2 * second + (1 - b2) * grad**2
        corrected = first / (1 - b1**step), second / (1 - b2**step)
        weight -= rate * (corrected[0] / (math.sqrt(corrected[1]) + eps) + decay * weight)
    return weight


def test_adamw_is_the_algorithm_of_the_paper() -> None:
    rule = OptimizerConfig(b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1)
    settings = config(learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=None, optimizer=rule)
    optimizer = make_optimizer(settings, 3)
    params = {"kernel": jnp.ones(())}
    state = optimizer.init(params)
    for grad in (0.5, -2.0, 0.25):
        updates, state = optimizer.update({"kernel": jnp.float32(grad)}, state, params)
        params = optax.apply_updates(params, updates)
    expected = adamw_by_hand([0.5, -2.0, 0.25], rate=0.1, b1=0.8, b2=0.95, eps=1e-3, decay=0.1)
    assert float(params["kernel"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("scale", "clipped"), [(0.1, 0.1), (10.0, 1.0)])
def test_clipping_is_by_the_norm_over_all_weights(scale: float, clipped: float) -> None:
    # Gradients of global norm `scale`: above max_grad_norm 1 they shrink to it, below they stay.
    grads = {"a": {"kernel": jnp.array([0.6, 0.0]) * scale}, "b": {"bias": jnp.array([0.8]) * scale}}
    params = jax.tree.map(jnp.zeros_like, grads)
    # Adam's update hides the scale of a gradient; its first moment, (1 - b1) times the gradient, shows it.
    optimizer = make_optimizer(config(learning_rate=1.0, max_grad_norm=1.0), 2)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    (adam,) = [leaf for leaf in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(leaf)]
    np.testing.assert_allclose(adam.mu["a"]["kernel"], [0.1 * 0.6 * clipped, 0.0], rtol=1e-5)
    np.testing.assert_allclose(adam.mu["b"]["bias"], [0.1 * 0.8 * clipped], rtol=1e-5)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
