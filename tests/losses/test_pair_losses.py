"""The DPO objective on a small bag-of-embeddings model: gradients, masks, reference, purity of imports."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.losses import LOSSES, dpo_loss, make_dpo_loss
from jdpo.losses.pair_logps import PairFeatures, pair_features
from jdpo.losses.pair_losses import Totals, feature_losses
from jdpo.losses.settings import loss_settings
from jdpo.types import PreferenceBatch, Routed, RouterStats
from tests.losses.loss_cases import NEEDED, REFERENCE_FREE

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

    x = batch(3)
    flat = x.tokens.reshape(-1, x.tokens.shape[-1])
    logits = apply_fn(params(1), flat, x.attention_mask.reshape(flat.shape))
    logps = token_logps(logits[:, :-1], flat[:, 1:]).reshape(*x.tokens.shape[:2], -1)
    cached = jnp.pad(logps, ((0, 0), (0, 0), (1, 0)), constant_values=jnp.nan)  # the token at 0 has none
    if not per_token:
        cached = jnp.where(x.completion_mask, cached, 0).sum(-1)
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


def test_token_means_add_up_given_the_tokens_of_the_whole() -> None:
    x = batch(4, num_pairs=6)
    whole, _ = dpo_loss(params(0), params(1), x, apply_fn=apply_fn, loss_type=["sigmoid", "sft"], rpo_alpha=0.5)
    tokens = int(x.completion_mask[:, 0, 1:].sum())
    parts = [jax.tree.map(lambda leaf, s=s: leaf[s], x) for s in (slice(0, 1), slice(1, 6))]
    given = {"apply_fn": apply_fn, "loss_type": ["sigmoid", "sft"], "rpo_alpha": 0.5, "normalizer": 6}
    total = sum(float(dpo_loss(params(0), params(1), part, num_chosen_tokens=tokens, **given)[0]) for part in parts)
    assert whole == pytest.approx(total, rel=1e-6)
    with pytest.raises(ValueError, match=r"normalizer says .* needs num_chosen_tokens"):
        dpo_loss(params(0), params(1), parts[0], **given)


def test_a_sorted_loss_is_not_accumulated() -> None:
    x = batch(4, num_pairs=6)
    dpo_loss(params(0), params(1), x, apply_fn=apply_fn, loss_type="aot", normalizer=6)
    with pytest.raises(ValueError, match=r"sorts the global batch.*normalizer 12, and 6 pairs"):
        dpo_loss(params(0), params(1), x, apply_fn=apply_fn, loss_type="aot", normalizer=12)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_padding_pairs_and_empty_completions_change_nothing_and_the_reference_has_no_gradient(loss_type: str) -> None:
    """Padding pairs hold tokens; one real pair has no completion at all."""
    x = batch(5)
    x = x._replace(completion_mask=x.completion_mask.copy())
    x.completion_mask[2] = False
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf[1:3], leaf, leaf[3:4]]), x)
    padded = padded._replace(weights=np.array([0, 0, 1, 1, 1, 1, 1, 0], np.float32))
    loss_fn = make_dpo_loss(apply_fn, loss_type=loss_type, rpo_alpha=0.2, **NEEDED.get(loss_type, {}))
    grad_fn = jax.jit(jax.value_and_grad(lambda p, r, b: loss_fn(p, r, b)[0], argnums=(0, 1)))
    one, (one_grad, to_reference) = grad_fn(params(0), params(1), x)
    other, (other_grad, _) = grad_fn(params(0), params(1), padded)
    assert np.isfinite(one)
    assert one == pytest.approx(float(other), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one_grad, other_grad)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(one_grad)) > 1e-3
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(to_reference))


def test_a_sorted_loss_compares_the_quantiles_of_the_real_pairs_alone() -> None:
    """The docstring's example of aot, with padding pairs around it whose values would come first and last."""
    policy = jnp.array([[-100.0, 0.0], [5.0, 0.0], [1.0, 0.0], [100.0, 0.0]])
    reference = jnp.array([[100.0, 0.0], [0.0, 0.0], [2.0, 0.0], [-100.0, 0.0]])
    weights = jnp.array([0.0, 1.0, 1.0, 0.0])
    features = PairFeatures(policy, None, reference, None, jnp.ones((4, 2), jnp.int32), None, weights)
    settings, _ = loss_settings("aot")
    losses, _ = feature_losses(features, Totals(jnp.array(2.0), jnp.array(2.0)), settings=settings)
    np.testing.assert_allclose(losses[1:3], [0.554355, 0.644397], rtol=1e-5)


def test_a_batch_of_padding_alone_gives_zero() -> None:
    x = batch(5)._replace(weights=np.zeros(5, np.float32))
    loss, grads = jax.value_and_grad(lambda p: dpo_loss(p, params(1), x, apply_fn=apply_fn)[0])(params(0))
    assert loss == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def token_probs(model: dict, x: PreferenceBatch, pair: int, side: int) -> list[np.ndarray]:
    """The distribution that each completion token of one sequence is drawn from, with the token put first."""
    logits = np.asarray(apply_fn(model, x.tokens[pair], x.attention_mask[pair])[side], np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    at = np.flatnonzero(x.completion_mask[pair, side])
    return [np.concatenate([[probs[t - 1, x.tokens[pair, side, t]]], probs[t - 1]]) for t in at]


def test_wpo_weighs_a_pair_by_how_likely_the_policy_finds_it_and_has_no_gradient_there() -> None:
    x = batch(6)
    expected = 0.0
    for pair in range(5):
        ratios, weight = [], 1.0
        for side in (0, 1):
            policy, reference = (token_probs(params(seed), x, pair, side) for seed in (0, 1))
            ratios.append(sum(np.log(p[0]) - np.log(r[0]) for p, r in zip(policy, reference, strict=True)))
            weight *= np.exp(np.mean([np.log(p[0]) - np.log((p[1:] ** 2).sum()) for p in policy]))
        expected += weight * np.log1p(np.exp(-0.1 * (ratios[0] - ratios[1]))) / 5

    def loss(p: dict, **options: Any) -> Any:
        return dpo_loss(p, params(1), x, apply_fn=apply_fn, **options)

    assert loss(params(0), use_weighting=True)[0] == pytest.approx(expected, rel=1e-5)
    one = batch(6, num_pairs=1)  # of one pair, the gradient must be the plain one times the weight
    plain, weighed = (
        jax.grad(lambda p, w=w: dpo_loss(p, params(1), one, apply_fn=apply_fn, use_weighting=w)[0])(params(0))
        for w in (False, True)
    )
    ratio = (
        dpo_loss(params(0), params(1), one, apply_fn=apply_fn, use_weighting=True)[0]
        / (dpo_loss(params(0), params(1), one, apply_fn=apply_fn)[0])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a * ratio, b, rtol=1e-4, atol=1e-7), plain, weighed)


def test_ld_weighs_the_tail_of_the_longer_side_in_policy_and_reference_but_not_in_rewards() -> None:
    x = batch(7)
    sums = []
    for pair in range(5):
        shared = x.completion_mask[pair].sum(-1).min()
        for side in (0, 1):
            logs = [
                np.log([p[0] for p in token_probs(params(seed), x, pair, side)]) * np.r_[[1.0] * shared, [0.3] * 9][:n]
                for seed in (0, 1)
                for n in [x.completion_mask[pair, side].sum()]
            ]
            sums.append(logs[0].sum() - logs[1].sum())
    gaps = np.array(sums).reshape(5, 2)
    loss, metrics = dpo_loss(params(0), params(1), x, apply_fn=apply_fn, ld_alpha=0.3)
    assert loss == pytest.approx(np.log1p(np.exp(-0.1 * (gaps[:, 0] - gaps[:, 1]))).mean(), rel=1e-5)
    _, plain = dpo_loss(params(0), params(1), x, apply_fn=apply_fn)
    assert metrics["rewards/chosen"] == pytest.approx(float(plain["rewards/chosen"]), rel=1e-6)
    assert dpo_loss(params(0), params(0), x, apply_fn=apply_fn, ld_alpha=0.3)[0] == pytest.approx(np.log(2), rel=1e-6)


def test_ld_needs_reference_values_a_token() -> None:
    x = batch(7)._replace(reference_logps=np.zeros((5, 2), np.float32))
    with pytest.raises(ValueError, match=r"ld_alpha weighs tokens.*must be \[b, 2, t\]"):
        dpo_loss(params(0), None, x, apply_fn=apply_fn, ld_alpha=0.5)


def test_losses_without_a_reference_run_without_one() -> None:
    for name in REFERENCE_FREE:
        loss, metrics = dpo_loss(params(0), None, batch(8), apply_fn=apply_fn, loss_type=name)
        assert np.isfinite(loss)
        assert "loss_state" not in metrics


def test_the_running_delta_is_read_before_and_updated_after_the_step() -> None:
    state, seen, total = None, 0, 0.0
    for seed in range(3):
        x = batch(seed, num_pairs=3 + seed)
        x.weights[0] = 0
        delta = total / max(seen, 1)
        with_delta, _ = dpo_loss(params(0), params(1), x, apply_fn=apply_fn, loss_type="bco_pair", bco_delta=delta)
        loss, metrics = dpo_loss(params(0), params(1), x, apply_fn=apply_fn, loss_type="bco_pair", loss_state=state)
        assert loss == pytest.approx(float(with_delta), rel=1e-6)
        state = metrics["loss_state"]
        seen += 2 + seed
        total += (2 + seed) * float(metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        assert state.mean_reward == pytest.approx(total / seen, rel=1e-5)
    with pytest.raises(ValueError, match="has no running state"):
        dpo_loss(params(0), params(1), batch(), apply_fn=apply_fn, loss_state=state)


def test_a_list_gives_each_loss_and_the_sum() -> None:
    _, metrics = dpo_loss(
        params(0), params(1), batch(), apply_fn=apply_fn, loss_type=["hinge", "nca_pair"], rpo_alpha=0.3
    )
    parts = [metrics[f"loss/{name}"] for name in ("hinge", "nca_pair", "rpo")]
    assert metrics["loss"] == pytest.approx(float(sum(parts)), rel=1e-6)


def test_a_sweep_over_numbers_compiles_once() -> None:
    calls = 0

    def counted(model: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        nonlocal calls
        calls += 1
        return apply_fn(model, tokens, mask)

    losses = {
        float(
            dpo_loss(
                params(0),
                params(1),
                batch(),
                apply_fn=counted,
                loss_type=["sigmoid", "sft"],
                beta=beta,
                label_smoothing=beta,
                loss_weights=[1.0, beta],
            )[0]
        )
        for beta in (0.1, 0.2, 0.3)
    }
    assert len(losses) == 3
    assert calls == 2, "once for the policy, once for the reference"


def test_accumulation_works_under_jit_and_scan_and_is_checked_unjitted_too() -> None:
    x = batch(4, num_pairs=6)._replace(weights=None)
    policy, reference = (jax.tree.map(jnp.asarray, params(seed)) for seed in (0, 1))
    loss_fn = make_dpo_loss(apply_fn, loss_type=["sigmoid", "sft"])
    tokens = int(x.completion_mask[:, 0, 1:].sum())
    whole, _ = loss_fn(policy, reference, x)
    halves = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), x)

    def step(total: jax.Array, half: PreferenceBatch) -> tuple[jax.Array, None]:
        loss, _ = loss_fn(policy, reference, half, normalizer=6, num_chosen_tokens=tokens)
        one, _ = dpo_loss(
            policy,
            reference,
            half,
            apply_fn=apply_fn,
            loss_type=["sigmoid", "sft"],
            normalizer=6,
            num_chosen_tokens=tokens,
        )
        return total + (loss + one) / 2, None

    total, _ = jax.jit(lambda parts: jax.lax.scan(step, jnp.float32(0), parts))(halves)
    assert total == pytest.approx(float(whole), rel=1e-6)
    with pytest.raises(ValueError, match="needs num_chosen_tokens"):
        loss_fn(policy, reference, x, normalizer=12)
    with pytest.raises(ValueError, match="sorts the global batch"):
        make_dpo_loss(apply_fn, loss_type="aot")(policy, reference, x, normalizer=12)
    jax.jit(
        lambda: dpo_loss(
            policy, reference, jax.tree.map(jnp.asarray, x), apply_fn=apply_fn, loss_type="aot", normalizer=6
        )[0]
    )()
    with pytest.raises(ValueError, match="beta must be positive, found -1"):
        loss_fn(policy, reference, x, beta=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((5, 1, 9), np.int32)}, r"tokens must be \[b, 2, t\].*found \(5, 1, 9\)"),
        ({"tokens": np.zeros((10, 9), np.int32)}, r"tokens must be \[b, 2, t\].*found \(10, 9\)"),
        ({"tokens": np.zeros((0, 2, 9), np.int32)}, r"found \(0, 2, 9\)"),
        ({"completion_mask": np.ones((5, 2, 8), bool)}, r"completion_mask must have the shape \(5, 2, 9\)"),
        ({"weights": np.ones(1, np.float32)}, r"weights must be \[b\], one for each of 5 pairs, found \(1,\)"),
        ({"weights": np.float32(1)}, r"weights must be \[b\].*found \(\)"),
    ],
    ids=str,
)
def test_batches_of_the_wrong_shape_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(params(0), params(1), batch()._replace(**change), apply_fn=apply_fn)


def test_an_apply_fn_that_gives_no_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"apply_fn must return logits \[n, t, v\] for tokens \(10, 9\)"):
        dpo_loss(params(0), params(1), batch(), apply_fn=lambda *args: (apply_fn(*args), None))


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot", "ipo", "bco_pair", "discopop"])
def test_nan_reference_values_of_padding_pairs_reach_no_gradient(loss_type: str) -> None:
    x = batch(5)
    x.weights[3] = 0
    reference = np.zeros((5, 2, 9), np.float32)
    clean = x._replace(reference_logps=reference)
    spoilt = x._replace(reference_logps=np.where(np.arange(5)[:, None, None] == 3, np.nan, reference))
    (one, one_grad), (other, other_grad) = (
        jax.value_and_grad(lambda p, b=b: dpo_loss(p, None, b, apply_fn=apply_fn, loss_type=loss_type)[0])(params(0))
        for b in (clean, spoilt)
    )
    assert one == other
    jax.tree.map(np.testing.assert_array_equal, one_grad, other_grad)


def test_sorted_losses_run_over_explicit_mesh_axes() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = batch(6, num_pairs=16)
    whole, _ = dpo_loss(params(0), params(1), x, apply_fn=bare_apply_fn, loss_type=["aot", "aot_unpaired", "sigmoid"])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        found, _ = dpo_loss(
            params(0), params(1), sharded, apply_fn=bare_apply_fn, loss_type=["aot", "aot_unpaired", "sigmoid"]
        )
    assert found == pytest.approx(float(whole), rel=1e-6)


def bare_apply_fn(params: dict, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """A bigram model: over explicit axes, lookups and sums need their sharding."""
    return jax.nn.one_hot(tokens, VOCAB) @ (params["embedding"] @ params["head"])


def test_an_option_of_another_function_is_an_error() -> None:
    with pytest.raises(ValueError, match="pair_weights is for preference_loss"):
        make_dpo_loss(apply_fn, pair_weights=np.ones(5))
    with pytest.raises(ValueError, match="asked for by loss_state"):
        make_dpo_loss(apply_fn, loss_type="bco_pair", bco_running_delta=True)


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


def test_the_losses_are_an_attribute_of_the_package() -> None:
    code = "import jdpo; print(jdpo.losses.token_logps.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "token_logps\n"
    )


def test_importing_jdpo_is_light_and_unknown_names_are_errors() -> None:
    code = "import sys, jdpo; print('jax' in sys.modules, jdpo.__version__, jdpo.dpo_loss.__name__); jdpo.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("False 0.")
    assert done.stdout.endswith(" dpo_loss\n")
    assert "has no attribute 'nothing'" in done.stderr


def test_routers_are_counted_on_both_sides_of_real_pairs_alone() -> None:
    def routed(weights: dict, tokens: jax.Array, attention_mask: jax.Array) -> Routed:
        counts = attention_mask.sum(-1).astype(float)  # [(b n)]
        return Routed(
            apply_fn(weights, tokens, attention_mask), RouterStats(counts[:, None], counts[:, None], tokens=counts)
        )

    pairs = batch(num_pairs=3)._replace(weights=np.array([1, 0, 1], np.float32))
    settings, _ = loss_settings("sigmoid")
    features = pair_features(params(0), params(1), pairs, apply_fn=routed, settings=settings)
    assert features.router is not None
    real = pairs.attention_mask.sum(-1) * np.array([[1], [0], [1]])  # [b, 2]
    np.testing.assert_array_equal(features.router.tokens, real.reshape(-1))
