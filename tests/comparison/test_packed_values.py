"""Divergences and log-probs of rows: a pair of models whose values have a closed form, and all logits at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.comparison.packed_values import completion_divergences, completion_logps
from jdpo.config import MeshConfig
from jdpo.models.transformer import Transformer, init_params
from jdpo.sharding.mesh import make_mesh
from jdpo.types import TokenizedCompletion
from tests.conftest import small_llama

CONFIG = small_llama(vocab_size=5, d_model=16, head_dim=4, d_ff=16)


def on_mesh(params: Any, model: Transformer, fsdp: int = 1, tensor: int = 1) -> Any:
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor])
    return SimpleNamespace(model=model, params=params, mesh=mesh)


def always(probabilities: list[float], fsdp: int = 1, tensor: int = 1) -> Any:
    """A model that gives these probabilities to the next token, whatever came before."""
    model = Transformer(CONFIG)
    params = jax.tree.map(jnp.zeros_like, init_params(model, jax.random.key(0)))
    # Without attention and MLPs, every hidden state is the norm of the embedding: ones.
    params["embed"] = jax.tree.map(jnp.ones_like, params["embed"])
    params["final_norm"] = jax.tree.map(jnp.ones_like, params["final_norm"])
    logits = jnp.log(jnp.array(probabilities))
    params["lm_head"] = jax.tree.map(lambda kernel: kernel + logits / CONFIG.d_model, params["lm_head"])
    return on_mesh(params, model, fsdp, tensor)


def rows(lengths: list[tuple[int, int]], seed: int = 0) -> list[TokenizedCompletion]:
    rng = np.random.default_rng(seed)
    return [
        TokenizedCompletion(
            rng.integers(0, 5, prompt + answer).astype(np.int32), np.arange(prompt + answer) >= prompt, f"row {index}"
        )
        for index, (prompt, answer) in enumerate(lengths)
    ]


LENGTHS = [(3, 5), (1, 1), (9, 30), (4, 2)]
P, Q = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625]), np.full(5, 0.2)


def done(num_rows: int) -> None:
    assert num_rows > 0


@pytest.mark.parametrize(
    ("fsdp", "tensor"),
    [(1, 1), pytest.param(2, 1, marks=pytest.mark.full), pytest.param(2, 2, marks=pytest.mark.full)],
)
def test_closed_form_of_a_pair_of_models(fsdp: int, tensor: int) -> None:
    first, second = always(P.tolist(), fsdp, tensor), always(Q.tolist(), fsdp, tensor)
    found = completion_divergences(first, second, rows(LENGTHS), done)
    assert [len(one.forward) for one in found] == [answer for _, answer in LENGTHS]
    for one in found:
        np.testing.assert_allclose(one.forward, (P * np.log(P / Q)).sum(), rtol=1e-5)
        np.testing.assert_allclose(one.backward, (Q * np.log(Q / P)).sum(), rtol=1e-5)
    given = rows(LENGTHS)
    expected = [np.log(P[row.tokens[row.completion_mask]]).sum() for row in given]
    np.testing.assert_allclose(completion_logps(first, given, done), expected, rtol=1e-5)


def test_equals_the_sum_over_all_logits() -> None:
    model = Transformer(CONFIG)
    first, second = (on_mesh(init_params(model, jax.random.key(seed)), model) for seed in (0, 1))
    (row,) = rows([(4, 12)])
    (found,) = completion_divergences(first, second, [row], done)
    tokens, mask = row.tokens[None], np.ones((1, 16), bool)
    log_p, log_q = (
        np.asarray(jax.nn.log_softmax(model.apply({"params": one.params}, tokens, mask)), np.float64)[0]
        for one in (first, second)
    )
    forward = (np.exp(log_p) * (log_p - log_q)).sum(-1)[3:15]  # the state before a token predicts it
    np.testing.assert_allclose(found.forward, forward, rtol=1e-3, atol=1e-6)
    (same,) = completion_divergences(first, first, [row], done)
    assert not np.any(same.forward)
    assert not np.any(same.backward)


def test_other_vocabularies_are_refused() -> None:
    other = Transformer(small_llama(vocab_size=6))
    with pytest.raises(ValueError, match="one vocabulary"):
        completion_divergences(always(P.tolist()), on_mesh({}, other), rows([(1, 1)]), done)
