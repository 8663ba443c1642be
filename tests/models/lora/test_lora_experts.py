"""Adapters and int8 kernels of experts equal kernels with the adapters added, in value and gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdpo.models.lora.adapters import Lora, init_adapters, weights_of
from jdpo.models.lora.base_weights import Base, as_float, quantize
from jdpo.models.lora.merge import merge
from jdpo.models.lora.sites import KERNEL, get_at, tree_of
from jdpo.models.lora.targets import find_sites
from jdpo.models.model_config import MoEConfig
from jdpo.models.transformer import Transformer, init_params, make_apply_fn
from tests.conftest import small_llama

EXPERTS = MoEConfig(num_experts=3, experts_per_token=2, aux_loss_coef=0.0, d_ff=24, normalize=True)
DENSE = small_llama(family="qwen3_moe", num_layers=1, d_model=32, vocab_size=40)
CONFIG = dataclasses.replace(
    DENSE, layers=tuple(dataclasses.replace(kind, mlp="experts") for kind in DENSE.layers), moe=EXPERTS
)
MODEL = Transformer(CONFIG)
SITES = find_sites(MODEL)
LORA = Lora(r=2, alpha=4.0, use_rslora=False, sites=SITES)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 7))


def test_adapters_of_experts_are_those_of_their_sum_over_floats_and_int8() -> None:
    params = init_params(MODEL, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, params
    )  # routers that send tokens to different experts
    quantized: dict[Any, Any] = {
        (*site.path, KERNEL): quantize(get_at(params, (*site.path, KERNEL)), site) for site in SITES
    }

    def of_leaf(path: Any, leaf: Any) -> Any:
        return quantized.get(tuple(key.key for key in path), (leaf, None))[0]

    scales = tree_of({path: unit for path, (_, unit) in quantized.items()})
    base = Base(jax.tree_util.tree_map_with_path(of_leaf, params), scales)
    adapters = init_adapters(LORA, jax.random.key(1), jnp.float32)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), adapters)
    cotangent = jax.random.normal(jax.random.key(3), (*TOKENS.shape, 40))
    apply, mask = make_apply_fn(MODEL), np.ones(TOKENS.shape, bool)

    def apart(adapters: Any) -> Any:
        logits = apply(weights_of(LORA, base, adapters), TOKENS, mask)
        return (logits * cotangent).sum(), logits

    def together(adapters: Any) -> Any:
        logits = apply(merge(LORA, base, adapters, sites=SITES, dtype=jnp.float32), TOKENS, mask)
        return (logits * cotangent).sum(), logits

    (grads, found), (expected_grads, expected) = (
        jax.jit(jax.grad(f, has_aux=True))(adapters) for f in (apart, together)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    path = (*SITES[-1].path, KERNEL)
    numbers = as_float(*(get_at(tree, path) for tree in base), SITES[-1], jnp.float32)
    assert np.abs(numbers - get_at(params, path)).max() > 0, "int8 rounds"
