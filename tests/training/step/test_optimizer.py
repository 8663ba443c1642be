"""Schedules against formulas; optimizers against optax and updates by hand; bfloat16 against float32."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdpo.config import RULE_DEFAULTS, OptimizationSettings, OptimizerConfig
from jdpo.training.step.optimizer import (
    RULES,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    num_warmup_steps,
    param_dtype_of,
)
from jdpo.training.step.rounding import apply_updates


def config(**values: Any) -> OptimizationSettings:
    return OptimizationSettings(**values)


def plain_rate(kind: str, step: int, *, peak: float, warmup: int, num_steps: int) -> float:
    """Returns the learning rate of update `step` (from 0) as transformers' schedules of these names define it."""
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
    xielu = {"alpha_p": jnp.ones(1), "alpha_n": jnp.ones(1), "beta": jnp.ones(()), "eps": jnp.ones(())}
    mask = decay_mask(PARAMS | {"attention": {"sinks": jnp.ones(2)}, "mlp": {"xielu": xielu}})
    assert mask["mlp"]["xielu"] == dict.fromkeys(xielu, False)
    assert mask["attention"] == {"sinks": False}
    assert mask["stack"]["layer_0"]["attention"]["query"] == {"kernel": True, "bias": False}
    assert mask["final_norm"] == {"scale": False}
    assert mask["embed"] == {"embedding": True}


@pytest.mark.parametrize("name", RULES)
def test_zero_gradient_step_decays_only_kernels_and_embeddings(name: str) -> None:
    rule = OptimizerConfig(name=name, weight_decay=0.1)
    optimizer = make_optimizer(config(learning_rate=0.5, lr_scheduler_type="constant", optimizer=rule), 4)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS, key=jax.random.key(0))
    after = optax.apply_updates(PARAMS, updates)
    query = after["stack"]["layer_0"]["attention"]["query"]
    np.testing.assert_allclose(query["kernel"], 3.0 * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_allclose(after["embed"]["embedding"], 3.0 * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(query["bias"], 3.0)
    np.testing.assert_array_equal(after["final_norm"]["scale"], 3.0)


def adamw_by_hand(grads: list[float], *, rate: float, b1: float, b2: float, eps: float, decay: float) -> float:
    """Updates one weight from 1.0 by bias-corrected AdamW (arXiv 1711.05101, algorithm 2)."""
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
    # Gradients of global norm `scale`: those above max_grad_norm = 1 are scaled to 1, the others stay.
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


RATE = optax.linear_schedule(0.1, 0.0, 8)
PLAIN = {
    "adamw": (optax.adamw(RATE, 0.9, 0.999, 1e-8, weight_decay=0.0), {}),
    "adamw_bf16": (optax.adamw(RATE, 0.8, 0.95, 1e-3, weight_decay=0.0), {"b1": 0.8, "b2": 0.95, "eps": 1e-3}),
    "adafactor": (optax.adafactor(RATE, multiply_by_parameter_scale=False), {}),
    "adafactor with b1": (
        optax.adafactor(RATE, multiply_by_parameter_scale=False, momentum=0.9, eps=1e-3),
        {"b1": 0.9, "eps": 1e-3},
    ),
    "lion": (optax.lion(RATE, 0.9, 0.99, weight_decay=0.0), {}),
    "lion with b2": (optax.lion(RATE, 0.8, 0.9, weight_decay=0.0), {"b1": 0.8, "b2": 0.9}),
    "sgd": (optax.sgd(RATE), {}),
    "sgd with momentum": (optax.sgd(RATE, 0.9), {"momentum": 0.9}),
}


def matrices(seed: int) -> Any:
    """Returns weights of which Adafactor factors only the one whose dims are at least 128."""
    rng = np.random.default_rng(seed)
    shapes = {"wide": (128, 130), "thin": (3, 5)}
    return {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()}


@pytest.mark.parametrize("case", PLAIN)
def test_on_float32_each_optimizer_equals_optax(case: str) -> None:
    plain, keys = PLAIN[case]
    rule = OptimizerConfig(name=case.split()[0], **keys)
    ours = make_optimizer(config(learning_rate=0.1, max_grad_norm=None, optimizer=rule), 8)
    state, plain_state = ours.init(matrices(0)), plain.init(matrices(0))
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(plain_state)]
    params = plain_params = matrices(0)
    for seed in (1, 2, 3):
        updates, state = ours.update(matrices(seed), state, params, key=jax.random.key(seed))
        params = apply_updates(params, updates, jax.random.key(seed))
        updates, plain_state = plain.update(matrices(seed), plain_state, plain_params)
        plain_params = optax.apply_updates(plain_params, updates)
    jax.tree.map(np.testing.assert_array_equal, params, plain_params)


@pytest.mark.parametrize(
    ("name", "key", "reads"),
    [
        ("adamw", "momentum", "b1, b2, eps"),
        ("adamw_bf16", "momentum", "b1, b2, eps"),
        ("adafactor", "b2", "b1, eps"),
        ("adafactor", "momentum", "b1, eps"),
        ("lion", "eps", "b1, b2"),
        ("sgd", "b1", "momentum"),
        ("sgd", "b2", "momentum"),
        ("sgd", "eps", "momentum"),
    ],
)
def test_a_key_that_the_rule_does_not_read_is_refused(name: str, key: str, reads: str) -> None:
    with pytest.raises(ValueError, match=f"{key} 0.5 has no effect: {name} uses {reads} and weight_decay"):
        OptimizerConfig(name=name, **{key: 0.5})


def test_every_key_of_a_rule_changes_what_it_does() -> None:
    """Checks that no accepted key is ignored."""
    for name, defaults in RULE_DEFAULTS.items():
        for key in (*defaults, "weight_decay"):
            after = []
            for keys in ({}, {key: 0.3}):
                settings = config(learning_rate=0.1, optimizer=OptimizerConfig(name=name, **keys))
                optimizer, params = make_optimizer(settings, 8), matrices(0)
                state = optimizer.init(params)
                for seed in (1, 2):
                    updates, state = optimizer.update(matrices(seed), state, params, key=jax.random.key(0))
                    params = optax.apply_updates(params, updates)
                after.append(np.asarray(params["wide"]["kernel"]))
            assert (after[0] != after[1]).any(), (name, key)


def test_only_adamw_bf16_has_bfloat16_weights() -> None:
    for name in RULES:
        dtype = param_dtype_of("bfloat16", name)
        assert dtype == ("bfloat16" if name == "adamw_bf16" else "float32")
    assert param_dtype_of("float64", "adamw") == "float64"
    with pytest.raises(ValueError, match="adamw_bf16 keeps weights in bfloat16"):
        param_dtype_of("float64", "adamw_bf16")


def test_bfloat16_gradients_are_clipped_by_their_norm_in_float32() -> None:
    grads = {"a": {"kernel": jnp.full(3000, 0.0123, jnp.bfloat16)}, "b": {"kernel": jnp.full(500, 0.02, jnp.bfloat16)}}
    exact = math.sqrt(sum(float(np.square(np.asarray(leaf, np.float64)).sum()) for leaf in jax.tree.leaves(grads)))
    assert float(optax.tree.norm(grads)) != pytest.approx(exact, rel=5e-4), "what optax makes of bfloat16"
    rule = OptimizerConfig(name="sgd")
    settings = config(learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.1, optimizer=rule)
    optimizer = make_optimizer(settings, 2)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads, key=jax.random.key(0))
    for update, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert update.dtype == jnp.float32
        np.testing.assert_allclose(update, -np.asarray(grad, np.float32) * np.float32(0.1 / exact), rtol=1e-6)


def test_a_second_moment_in_bfloat16_follows_the_float32_one() -> None:
    """Gradients of 1, then of 0.5: the mean square goes from 1 to 0.25, by less than 0.1 % per step."""
    optimizer = make_optimizer(config(max_grad_norm=None, optimizer="adamw_bf16"), 1000)
    params = {"kernel": jnp.ones(2048, jnp.bfloat16)}
    state = optimizer.init(params)
    assert [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim] == ["bfloat16", "bfloat16"]
    state = jax.tree.map(lambda leaf: jnp.ones_like(leaf) if leaf.ndim else leaf, state)
    grads = {"kernel": jnp.full(2048, 0.5, jnp.bfloat16)}

    @jax.jit
    def run(state: Any) -> Any:
        def step(carry: Any, key: Any) -> tuple[Any, Any]:
            state, naive = carry
            _, state = optimizer.update(grads, state, params, key=key)
            naive = (0.999 * naive.astype(jnp.float32) + 0.001 * 0.25).astype(jnp.bfloat16)
            return (state, naive), optax.tree.get(state, "nu")["kernel"]

        start = (state, jnp.bfloat16(1))
        (_, naive), second = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 1000))
        return naive, second

    naive, second = run(state)
    assert float(naive) == 1.0, "rounded to nearest it does not move at all"
    for steps in (300, 1000):
        exact = 0.25 + 0.75 * 0.999**steps
        found = np.asarray(second[steps - 1], np.float64)
        assert found.mean() == pytest.approx(exact, rel=5e-3), steps
        assert found.std() < 0.06 * exact, steps
