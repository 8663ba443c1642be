"""The DPO objective on a small bag-of-embeddings model: gradients, masks, reference, purity of imports."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.losses import dpo_loss, make_dpo_loss
from jdpo.types import PreferenceBatch

VOCAB, WIDTH = 13, 8


def apply_fn(params: dict, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """A causal model small enough to read: the running mean of embeddings, then a head."""
    embedded = params["embedding"][tokens] * attention_mask[..., None]
    context = jnp.cumsum(embedded, 1) / jnp.maximum(jnp.cumsum(attention_mask, 1), 1)[..., None]
    return jnp.tanh(context) @ params["head"]


def params(seed: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "embedding": rng.normal(0, 1, (VOCAB, WIDTH)).astype(dtype),
        "head": rng.normal(0, 1, (WIDTH, VOCAB)).astype(dtype),
    }


def batch(seed: int = 0, num_pairs: int = 5, length: int = 9) -> PreferenceBatch:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(1, 4, num_pairs)
    lengths = prompt[:, None] + rng.integers(1, length - 3, (num_pairs, 2))
    positions = np.arange(length)
    attention = positions < lengths[..., None]
    return PreferenceBatch(
        tokens=rng.integers(0, VOCAB, (num_pairs, 2, length)).astype(np.int32),
        attention_mask=attention,
        completion_mask=attention & (positions >= prompt[:, None, None]),
        weights=np.ones(num_pairs, np.float32),
    )


@pytest.mark.smoke
def test_equal_models_give_ln_2_and_known_metrics() -> None:
    loss, metrics = dpo_loss(params(0), params(0), batch(), apply_fn=apply_fn)
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    assert metrics["rewards/margins"] == 0
    assert metrics["rewards/accuracies"] == 0  # ties count 0
    assert set(metrics) == {
        "loss",
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
        "logps/chosen",
        "logps/rejected",
    }


def test_gradient_agrees_with_a_plain_float64_version() -> None:
    x = batch(1)

    def plain(flat: np.ndarray) -> float:
        p = {
            "embedding": flat[: VOCAB * WIDTH].reshape(VOCAB, WIDTH),
            "head": flat[VOCAB * WIDTH :].reshape(WIDTH, VOCAB),
        }

        def logp(weights: dict[str, np.ndarray], pair: int, side: int) -> float:
            total = 0.0
            for t in range(1, x.tokens.shape[-1]):
                if x.completion_mask[pair, side, t]:
                    context = np.tanh(weights["embedding"][x.tokens[pair, side, :t]].mean(0))
                    logits = context @ weights["head"]
                    total += logits[x.tokens[pair, side, t]] - np.log(np.exp(logits).sum())
            return total

        reference = params(7, np.float64)
        losses = []
        for pair in range(len(x.tokens)):
            a, b = (logp(p, pair, side) - logp(reference, pair, side) for side in (0, 1))
            losses.append(np.log1p(np.exp(-0.3 * (a - b))))
        return float(np.mean(losses))

    policy = params(3, np.float64)
    flat = np.concatenate([policy["embedding"].ravel(), policy["head"].ravel()])
    as_32 = jax.tree.map(lambda leaf: leaf.astype(np.float32), policy)
    (loss, _), grads = jax.value_and_grad(
        lambda p: dpo_loss(p, params(7), x, apply_fn=apply_fn, beta=0.3), has_aux=True
    )(as_32)
    assert loss == pytest.approx(plain(flat), rel=1e-5)
    found = np.concatenate([np.ravel(grads["embedding"]), np.ravel(grads["head"])])
    for index in np.random.default_rng(0).choice(len(flat), 25, replace=False):
        nudge = np.zeros_like(flat)
        nudge[index] = 1e-5
        assert found[index] == pytest.approx((plain(flat + nudge) - plain(flat - nudge)) / 2e-5, rel=2e-3, abs=2e-6)


def test_no_gradient_reaches_the_reference() -> None:
    grads, _ = jax.grad(lambda reference: dpo_loss(params(0), reference, batch(), apply_fn=apply_fn), has_aux=True)(
        params(1)
    )
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_garbage_in_padding_and_padding_pairs_changes_nothing() -> None:
    clean = batch(2)
    rng = np.random.default_rng(5)
    garbage = np.where(clean.attention_mask, clean.tokens, rng.integers(0, VOCAB, clean.tokens.shape)).astype(np.int32)
    padded = PreferenceBatch(
        *(np.concatenate([array, array[:2]]) for array in (garbage, clean.attention_mask, clean.completion_mask)),
        weights=np.array([1] * 5 + [0] * 2, np.float32),
    )
    grad = jax.value_and_grad(lambda p, b: dpo_loss(p, params(1), b, apply_fn=apply_fn)[0])
    (one, one_grad), (other, other_grad) = grad(params(0), clean), grad(params(0), padded)
    assert one == pytest.approx(float(other), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one_grad, other_grad)


@pytest.mark.parametrize("per_token", [False, True])
def test_reference_logps_in_the_batch_stand_for_the_reference_model(per_token: bool) -> None:
    from jdpo.losses.logprobs import token_logps
    from jdpo.losses.objective import pair_logps

    x = batch(3)
    if per_token:
        flat = x.tokens.reshape(-1, x.tokens.shape[-1])
        logits = apply_fn(params(1), flat, x.attention_mask.reshape(flat.shape))
        logps = token_logps(logits[:, :-1], flat[:, 1:]).reshape(*x.tokens.shape[:2], -1)
        cached = jnp.pad(logps, ((0, 0), (0, 0), (1, 0)), constant_values=jnp.nan)  # the token at 0 has none
    else:
        cached = pair_logps(params(1), x, apply_fn=apply_fn)
    live, _ = dpo_loss(params(0), params(1), x, apply_fn=apply_fn)
    from_cache, _ = dpo_loss(params(0), None, x._replace(reference_logps=cached), apply_fn=apply_fn)
    assert live == pytest.approx(float(from_cache), rel=1e-6)


def test_normalizer_makes_micro_batches_add_up() -> None:
    x = batch(4, num_pairs=6)
    loss_fn = make_dpo_loss(apply_fn)
    whole, _ = loss_fn(params(0), params(1), x)
    parts = [
        loss_fn(params(0), params(1), jax.tree.map(lambda leaf, s=s: leaf[s], x), normalizer=6)[0]
        for s in (slice(0, 2), slice(2, 6))
    ]
    assert whole == pytest.approx(float(sum(parts)), rel=1e-6)


def test_neither_or_both_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="found neither"):
        dpo_loss(params(0), None, batch(), apply_fn=apply_fn)
    with pytest.raises(ValueError, match="found both"):
        dpo_loss(params(0), params(1), batch()._replace(reference_logps=np.zeros((5, 2))), apply_fn=apply_fn)
    with pytest.raises(ValueError, match=r"must be \[b, 2\] or \[b, 2, t\]"):
        dpo_loss(params(0), None, batch()._replace(reference_logps=np.zeros(5)), apply_fn=apply_fn)


@pytest.mark.smoke
def test_importing_the_losses_pulls_in_jax_numpy_and_einops_alone() -> None:
    code = (
        "import sys, jdpo.losses;"
        "print([m for m in ('flax','optax','orbax','transformers','datasets','pydantic','yaml','matplotlib') "
        "if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_importing_jdpo_is_light_and_unknown_names_are_errors() -> None:
    code = "import sys, jdpo; print('jax' in sys.modules, jdpo.__version__, jdpo.dpo_loss.__name__); jdpo.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("False 0.")
    assert done.stdout.endswith(" dpo_loss\n")
    assert "has no attribute 'nothing'" in done.stderr
