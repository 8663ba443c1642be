from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdpo.losses.router import load_balancing_loss
from jdpo.models.families import read_model_config
from jdpo.models.model_config import LayerKind, ModelConfig, RopeConfig, layer_pattern
from jdpo.models.transformer import (
    Transformer,
    abstract_params,
    init_params,
    logical_axes,
    make_apply_fn,
    make_routed_apply_fn,
)
from jdpo.models.weights.loading import load_params
from jdpo.types import Routed
from tests.golden_models import GOLDEN_MODELS as GOLDEN
from tests.golden_models import golden_models

RULES = (("batch", "data"), ("act_heads", "tensor"), ("act_mlp", "tensor"), ("act_vocab", "tensor"))


def kinds(*windows: int | None) -> tuple[LayerKind, ...]:
    return tuple(LayerKind(rope=RopeConfig(theta=10000.0), window=window) for window in windows)


CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=40,
    num_layers=5,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_ff=24,
    norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
    o_bias=True,
    qk_norm="head",
    layers=kinds(None, 4, None, 4, None),
    max_positions=64,
)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 12))
MASK = np.ones((3, 12), bool)
MASK[1, 8:] = False
MASK[2, :5] = False


MODEL = Transformer(CONFIG)
SMALL = Transformer(dataclasses.replace(CONFIG, num_layers=2, layers=kinds(4, 4)))
"""One layer body to compile instead of three, for tests of gradients."""


def run(model: Transformer, params: Any, method: str, *arguments: Any) -> Any:
    return model.apply({"params": params}, *arguments, method=method)


def random_params(model: Transformer) -> Any:
    """Returns parameters whose biases and norms differ from 0 and 1."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape) + (len(leaf.shape) == 1)).astype(np.float32),
        abstract_params(model),
    )


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@pytest.fixture(scope="module")
def small_params() -> Any:
    return random_params(SMALL)


@pytest.fixture(scope="module")
def apply_fn() -> Any:
    return jax.jit(make_apply_fn(MODEL))


def mean_square(model: Transformer, params: Any, tokens: Any, mask: Any) -> jax.Array:
    return jnp.mean(jnp.where(mask[..., None], make_apply_fn(model)(params, tokens, mask), 0) ** 2)


@pytest.mark.smoke
@pytest.mark.parametrize("case", golden_models())
def test_logits_equal_those_of_transformers(case: str) -> None:
    expected = np.load(GOLDEN / case / "expected.npz")
    model = Transformer(read_model_config(GOLDEN / case))
    params = load_params(GOLDEN / case, model)
    apply_fn = jax.jit(make_apply_fn(model) if model.config.moe is None else make_routed_apply_fn(model))
    logits = apply_fn(params, expected["tokens"], expected["mask"])
    if isinstance(logits, Routed):
        logits, router = logits
        assert float(load_balancing_loss(router)) == pytest.approx(float(expected["aux_loss"]), rel=1e-6)
    assert logits.dtype == jnp.float32
    real = expected["mask"]
    assert np.abs(expected["logits"][real]).max() > 1
    np.testing.assert_allclose(np.asarray(logits)[real], expected["logits"][real], atol=1e-4)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((None,) * 3, (1, 3, 0)),
        ((4, None) * 2, (2, 2, 0)),
        ((None, 4, None, 4, None), (2, 2, 1)),
        ((4, 4, None) * 2 + (4, 4), (3, 2, 2)),
        ((None, None, 4), (3, 1, 0)),
    ],
)
def test_layer_pattern(windows: tuple[int | None, ...], expected: tuple[int, int, int]) -> None:
    config = dataclasses.replace(CONFIG, num_layers=len(windows), layers=kinds(*windows))
    assert layer_pattern(config) == expected


def test_padding_side_and_content_change_nothing(params: Any, apply_fn: Any) -> None:
    row, columns = TOKENS[0, :7], 12
    tokens, mask = np.full((3, columns), 9), np.zeros((3, columns), bool)
    tokens[0, :7], mask[0, :7] = row, True
    tokens[1, 5:], mask[1, 5:] = row, True
    tokens[2, :7], tokens[2, 7:], mask[2, :7] = row, 3, True
    logits = np.asarray(apply_fn(params, tokens, mask))
    np.testing.assert_allclose(logits[1, 5:], logits[0, :7], atol=1e-5)
    np.testing.assert_array_equal(logits[2, :7], logits[0, :7])


@pytest.fixture(scope="module")
def value_and_grad() -> Any:
    return jax.jit(jax.value_and_grad(lambda p, tokens, mask: mean_square(SMALL, p, tokens, mask)))


def test_a_fully_masked_row_gives_finite_gradients(
    params: Any, small_params: Any, apply_fn: Any, value_and_grad: Any
) -> None:
    mask = MASK.copy()
    mask[0] = False
    assert jnp.isfinite(apply_fn(params, TOKENS, mask)).all()
    _, grads = value_and_grad(small_params, TOKENS, mask)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_later_tokens_are_not_seen(params: Any, apply_fn: Any) -> None:
    before, after = (np.asarray(apply_fn(params, tokens, MASK))[0] for tokens in (TOKENS, one_token_changed()))
    np.testing.assert_array_equal(before[:6], after[:6])
    assert (np.abs(before[6:] - after[6:]).max(-1) > 1e-6).all()


def test_a_window_of_two_shows_a_token_to_itself_and_the_next() -> None:
    config = dataclasses.replace(CONFIG, num_layers=1, layers=kinds(2))
    one_layer = jax.jit(make_apply_fn(Transformer(config)))
    params = random_params(Transformer(config))
    before, after = (np.asarray(one_layer(params, tokens, MASK))[0] for tokens in (TOKENS, one_token_changed()))
    assert np.flatnonzero(np.abs(before - after).max(-1) > 0).tolist() == [6, 7]


def one_token_changed() -> np.ndarray:
    changed = TOKENS.copy()
    changed[0, 6] = (changed[0, 6] + 1) % CONFIG.vocab_size
    return changed


def test_scanned_layers_equal_the_same_layers_unrolled(params: Any) -> None:
    """Uses windows of at least the sequence's length, which hide nothing: equal arithmetic, another layer pattern."""
    period_two = dataclasses.replace(CONFIG, layers=kinds(None, 50, None, 50, None))
    uneven = dataclasses.replace(CONFIG, layers=kinds(None, 50, None, None, 50))  # period 3, a rest of 2
    assert layer_pattern(period_two) == (2, 2, 1)
    assert layer_pattern(uneven) == (3, 1, 2)
    stack, rest = params["stack"], params["rest"]
    flat = [jax.tree.map(lambda leaf, i=i: leaf[i // 2], stack[f"layer_{i % 2}"]) for i in range(4)] + [rest["layer_0"]]
    others = {name: leaf for name, leaf in params.items() if name not in ("stack", "rest")}
    uneven_params = {
        **others,
        "stack": {f"layer_{i}": jax.tree.map(lambda leaf: leaf[None], flat[i]) for i in range(3)},
        "rest": {f"layer_{i}": flat[3 + i] for i in range(2)},
    }
    scanned = jax.jit(make_apply_fn(Transformer(period_two)))(params, TOKENS, MASK)
    unrolled = jax.jit(make_apply_fn(Transformer(uneven)))(uneven_params, TOKENS, MASK)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


def test_bfloat16_compute_gives_float32_logits_near_the_float32_ones(params: Any, apply_fn: Any) -> None:
    model = Transformer(CONFIG, compute_dtype=jnp.bfloat16)
    exact, rounded = apply_fn(params, TOKENS, MASK), jax.jit(make_apply_fn(model))(params, TOKENS, MASK)
    assert rounded.dtype == jnp.float32
    assert jax.eval_shape(lambda p: run(model, p, "hidden_states", TOKENS, MASK), params).dtype == jnp.bfloat16
    error = jnp.linalg.norm((rounded - exact)[MASK]) / jnp.linalg.norm(exact[MASK])
    assert 1e-4 < error < 5e-2


def test_float64_compute_stays_float64(params: Any, apply_fn: Any) -> None:
    exact = np.asarray(apply_fn(params, TOKENS, MASK))
    with jax.enable_x64(True):
        model = Transformer(CONFIG, compute_dtype=jnp.float64, param_dtype=jnp.float64)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(model))} == {"float64"}
        wide = jax.tree.map(np.float64, params)
        lowered = jax.jit(make_apply_fn(model)).lower(wide, TOKENS, MASK)
        assert "f32" not in lowered.as_text()
        logits = np.asarray(lowered.compile()(wide, TOKENS, MASK))
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits[MASK], exact[MASK], rtol=1e-3, atol=1e-4)


def test_abstract_parameters_follow_the_precision_that_is_enabled() -> None:
    model = Transformer(CONFIG, param_dtype=jnp.float64)
    with jax.enable_x64(True):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(model))} == {"float64"}
    with pytest.warns(UserWarning, match="float64"):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(model))} == {"float32"}


@pytest.mark.parametrize("tied", [False, True])
def test_head_on_hidden_states_equals_the_logits(tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, num_layers=1, layers=kinds(None))
    model = Transformer(config)
    params = random_params(model)

    @jax.jit
    def all_three(params: Any) -> Any:
        hidden, kernel = run(model, params, "hidden_states", TOKENS, MASK), run(model, params, "head_kernel")
        return make_apply_fn(model)(params, TOKENS, MASK), hidden, kernel

    logits, hidden, kernel = all_three(params)
    assert kernel.shape == (CONFIG.d_model, CONFIG.vocab_size)
    np.testing.assert_allclose(hidden @ kernel, logits, atol=1e-5)


def test_logical_axes_name_every_dimension() -> None:
    abstract, axes = abstract_params(MODEL), logical_axes(MODEL)
    ranks = jax.tree.map(lambda names: len(names), axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert ranks == jax.tree.map(lambda leaf: len(leaf.shape), abstract)
    attention = axes["stack"]["layer_1"]["attention"]
    assert attention["query"]["kernel"] == ("layers", "embed", "heads", "head_dim")
    assert attention["key"]["kernel"] == ("layers", "embed", "kv_heads", "head_dim")
    assert attention["output"]["kernel"] == ("layers", "heads", "head_dim", "embed")
    assert axes["rest"]["layer_0"]["mlp"]["down"]["kernel"] == ("mlp", "embed")
    assert axes["embed"]["embedding"] == ("vocab", "embed")
    assert axes["lm_head"]["kernel"] == ("embed", "vocab")


def test_fresh_parameters_are_small_kernels_zero_biases_and_unit_norms() -> None:
    params = init_params(SMALL, jax.random.key(0))
    signature = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)]
    assert signature == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract_params(SMALL))]
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(SMALL))
    fresh = jax.tree_util.tree_leaves_with_path(params)
    kernels = np.concatenate([np.ravel(leaf) for path, leaf in fresh if path[-1].key in ("kernel", "embedding")])
    assert abs(kernels.std() - 0.02) < 1e-3
    assert all((leaf == 0).all() for path, leaf in fresh if path[-1].key == "bias")
    assert all((leaf == 1).all() for path, leaf in fresh if path[-1].key == "scale")


def test_sharded_equals_unsharded_and_constraints_reach_the_lowered_step(
    small_params: Any, value_and_grad: Any
) -> None:
    params = small_params
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    tokens, mask = np.tile(TOKENS, (4, 1)), np.tile(MASK, (4, 1))
    expected, expected_grads = value_and_grad(params, TOKENS, MASK)
    assert "sharding_constraint" not in value_and_grad.lower(params, tokens, mask).as_text()

    by_name = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, PartitionSpec(*map(by_name.get, names))),
        logical_axes(SMALL),
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    sharded = jax.device_put(params, shardings)
    batch = jax.device_put((tokens, mask), NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        # A separate function, so that jit does not reuse the trace made without a mesh.
        lowered = jax.jit(jax.value_and_grad(lambda p, t, m: mean_square(SMALL, p, t, m))).lower(sharded, *batch)
        assert lowered.as_text().count("sharding_constraint") >= 16  # 8 forward, 8 back
        loss, grads = lowered.compile()(sharded, *batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads)
