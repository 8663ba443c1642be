"""Layers with a gated DeltaNet: padding, long rows, rematerialization and memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.models.model_config import DeltaConfig, LayerKind
from jdpo.models.remat import REMAT_POLICIES
from jdpo.models.transformer import Transformer, abstract_params, init_params, make_apply_fn
from tests.conftest import small_llama

DELTA = DeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=3, conv_width=4)


def hybrid(num_layers: int = 2) -> Any:
    """Returns the config of a small model whose first layer is a DeltaNet."""
    attention = small_llama(num_layers=num_layers).layers[1:]
    layers = (LayerKind(rope=None, mixer="delta"), *attention)
    return small_llama(vocab_size=40, num_layers=num_layers, delta=DELTA, layers=layers)


def loss(model: Transformer, tokens: Any, mask: Any, params: Any) -> Any:
    logits = make_apply_fn(model)(params, tokens, mask)
    return jnp.where(mask[..., None], jax.nn.log_softmax(logits)[..., :3], 0).sum() / mask.sum()


@pytest.mark.full
def test_padding_on_either_side_changes_no_logits_and_no_gradients() -> None:
    rng, length = np.random.default_rng(0), 9
    row = rng.integers(0, 40, length)
    with jax.enable_x64(True):
        model = Transformer(hybrid(), compute_dtype=jnp.float64, param_dtype=jnp.float64)
        params = init_params(model, jax.random.key(0))
        run, found = jax.jit(jax.value_and_grad(partial(loss, model), argnums=2)), []
        # Of one shape, so that one program is compiled.
        for left in (0, 3, 5):
            tokens, mask = rng.integers(0, 40, (1, 14)), np.zeros((1, 14), bool)
            tokens[0, left : left + length], mask[0, left : left + length] = row, True
            found.append(run(tokens, mask, params))
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.full
def test_every_policy_has_the_gradients_of_keeping_everything() -> None:
    rng = np.random.default_rng(1)
    tokens, mask = rng.integers(0, 40, (2, 150)), np.arange(150) < np.array([[150], [90]])
    with jax.enable_x64(True):
        settings = {"compute_dtype": jnp.float64, "param_dtype": jnp.float64}
        params = init_params(Transformer(hybrid(), **settings), jax.random.key(0))
        found = {
            remat: jax.jit(
                jax.value_and_grad(partial(loss, Transformer(hybrid(), remat=remat, **settings), tokens, mask))
            )(params)
            for remat in ("none", *REMAT_POLICIES)
        }
    for remat in REMAT_POLICIES:
        for a, b in zip(jax.tree.leaves(found[remat]), jax.tree.leaves(found["none"]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10, err_msg=remat)


@pytest.mark.full
def test_memory_is_linear_in_the_length() -> None:
    config = hybrid(num_layers=1)

    def temporary(length: int) -> int:
        model = Transformer(config, remat="full")
        shape = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), bool)
        program = jax.jit(jax.grad(partial(loss, model), argnums=2)).lower(*shape, abstract_params(model)).compile()
        return int(program.memory_analysis().temp_size_in_bytes)

    short, middle, long = (temporary(length) for length in (1024, 2048, 4096))
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.05)
