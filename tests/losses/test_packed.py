"""A model of one's own on packed batches: the losses and gradients of the padded batch, through public names alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdpo
from jdpo.losses import packed_token_logps

VOCAB, WIDTH, HEADS, KEY_HEADS, LONGEST, MOST_PAIRS = 13, 8, 4, 2, 14, 5
SIZES: dict[str, Any] = {
    "num_rows": 2,
    "num_slots": 2 * MOST_PAIRS * LONGEST,
    "num_pairs": MOST_PAIRS,
    "length": LONGEST,
    "num_scored": 2 * MOST_PAIRS * LONGEST,
}
"""Sizes that hold every example below, so that one program is compiled."""

lengths_of_pairs = st.lists(
    st.tuples(st.integers(0, 6), st.integers(2, 8), st.integers(2, 8)), min_size=2, max_size=MOST_PAIRS
)
seeds = st.integers(0, 2**16)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random_rows(lengths: list[tuple[int, int, int]], seed: int, *, masked: bool = False) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for sizes in lengths:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        row = {name: rng.integers(0, VOCAB, size).tolist() for name, size in zip(names, sizes, strict=True)}
        if masked:
            # The last token is always learnt, so that each side has one.
            row |= {
                f"{side}_mask": [*(rng.random(len(row[f"{side}_ids"]) - 1) < 0.5).tolist(), True]
                for side in ("chosen", "rejected")
            }
        rows.append(row)
    return rows


def padded_batch(rows: list[dict[str, Any]], seed: int = 0) -> jdpo.PreferenceBatch:
    """Returns rows padded to LONGEST, with random tokens as padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (len(rows), 2, LONGEST)).astype(np.int32)
    attention, completion = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for index, row in enumerate(rows):
        for side, name in enumerate(("chosen", "rejected")):
            ids, start = row["prompt_ids"] + row[f"{name}_ids"], len(row["prompt_ids"])
            tokens[index, side, : len(ids)], attention[index, side, : len(ids)] = ids, True
            completion[index, side, start : len(ids)] = row.get(f"{name}_mask", True)
    return jdpo.PreferenceBatch(tokens, attention, completion)


def random_params(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"embed": (VOCAB, WIDTH), "place": (LONGEST, WIDTH), "head": (WIDTH, VOCAB)}
    for layer in range(2):
        shapes |= {f"q{layer}": (WIDTH, HEADS, 3), f"o{layer}": (HEADS, 5, WIDTH)}
        # Fewer heads of keys and values than of queries, and values of another width.
        shapes |= {f"k{layer}": (WIDTH, KEY_HEADS, 3), f"v{layer}": (WIDTH, KEY_HEADS, 5)}
    return {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()}


def attend(query: Any, key: Any, value: Any, segment_ids: Any) -> Any:
    """Returns grouped-query causal attention within segments; the code of somebody else."""
    key, value = (jnp.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (key, value))
    place = jnp.arange(query.shape[1])
    seen = (place[:, None] >= place) & (segment_ids[:, :, None] == segment_ids[:, None])
    scores = jnp.where(seen[:, None], jnp.einsum("nqhd,nkhd->nhqk", query, key), -jnp.inf)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), value)


def hidden_states(params: Any, tokens: Any, positions: Any, attention: Any) -> Any:
    x = params["embed"][tokens] + params["place"][positions]
    for layer in range(2):
        qkv = (jnp.einsum("...d,dhk->...hk", x, params[f"{name}{layer}"]) for name in "qkv")
        x = jnp.tanh(x + jnp.einsum("...hk,hkd->...d", attention(*qkv), params[f"o{layer}"]))
    return x


def padded_apply(params: Any, tokens: Any, mask: Any) -> Any:
    attention = partial(attend, segment_ids=mask.astype(jnp.int32))
    return (
        hidden_states(params, tokens, jnp.broadcast_to(jnp.arange(LONGEST), tokens.shape), attention) @ params["head"]
    )


def packed_states(params: Any, batch: jdpo.PackedBatch) -> Any:
    return hidden_states(params, batch.tokens, batch.positions, jdpo.packed_attention(attend, batch))


def packed_apply(params: Any, batch: jdpo.PackedBatch) -> Any:
    return packed_token_logps(packed_states(params, batch), batch, params["head"])


def packed_apply_wpo(params: Any, batch: jdpo.PackedBatch) -> Any:
    return packed_token_logps(packed_states(params, batch) @ params["head"], batch, return_log_sum_sq=True)


def spoilt(batch: jdpo.PackedBatch, seed: int) -> jdpo.PackedBatch:
    """Returns the batch with other values, in range, in all unused places."""
    rng = np.random.default_rng(seed)
    num_slots, (num_sequences, length) = batch.tokens.shape[-1], batch.gather.shape[-2:]
    used = (batch.readers < num_sequences * length).any(-2)
    scored = batch.logp_pair < 2 * batch.pair_weight.shape[-1]

    def fill(values: Any, keep: Any, most: int) -> Any:
        return np.where(keep, values, rng.integers(0, most, values.shape)).astype(values.dtype)

    return batch._replace(
        tokens=fill(batch.tokens, used, VOCAB),
        positions=fill(batch.positions, used, LONGEST),
        scatter=fill(batch.scatter, used, num_sequences * length),
        gather=fill(batch.gather, np.arange(length) < batch.lengths.sum(-1, keepdims=True), num_slots),
        logp_slot=fill(batch.logp_slot, scored, num_slots),
        logp_target=fill(batch.logp_target, scored, VOCAB),
        logp_reference=None if batch.logp_reference is None else np.where(scored, batch.logp_reference, np.nan),
    )


def value_and_grads(apply_fn: Any, **options: Any) -> Any:
    return jax.jit(jax.value_and_grad(jdpo.make_dpo_loss(apply_fn, **options), has_aux=True))


PADDED, PACKED = value_and_grads(padded_apply), value_and_grads(packed_apply)
# jdpo.unpack_logps reads on the host what this computes.
LOGPS = jax.jit(packed_apply)


def assert_same(got: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, expected)


@settings(max_examples=12, deadline=None)
@given(lengths_of_pairs, st.booleans(), seeds)
def test_packed_equals_padded(lengths: list[tuple[int, int, int]], masked: bool, seed: int) -> None:
    rows, policy, reference = random_rows(lengths, seed, masked=masked), random_params(seed), random_params(seed + 1)
    # The padded batch always has MOST_PAIRS pairs, so that one program is compiled; the rest weigh 0.
    given_pairs = padded_batch(rows + rows[:1] * (MOST_PAIRS - len(rows)), seed)
    weights = (np.arange(MOST_PAIRS) < len(rows)).astype(np.float32)
    expected = PADDED(policy, reference, given_pairs._replace(weights=weights))
    batch = jdpo.pack(rows, **SIZES)
    assert_same(PACKED(policy, reference, batch), expected)
    assert_same(PACKED(policy, reference, spoilt(batch, seed)), expected)
    # The same with several sequences in an attention row.
    joined = jdpo.pack(rows, **SIZES, sequences_per_row=3, num_attention_rows=2 * MOST_PAIRS)
    assert joined.lengths.shape[-1] == 3
    assert_same(PACKED(policy, reference, spoilt(joined, seed)), expected)

    logps = jdpo.unpack_logps(batch, LOGPS(reference, batch))
    # In another order and another packing, as in the next epoch.
    again = jdpo.pack(rows[::-1], **SIZES, reference_logps=logps[::-1])
    (loss, _), grads = PACKED(policy, None, spoilt(again, seed))
    assert_same((loss, grads), (expected[0][0], expected[1]))


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        (["sigmoid", "sft"], {"loss_weights": [1.0, 0.3]}),
        ("sigmoid", {"use_weighting": True}),
        pytest.param("ipo", {}, marks=pytest.mark.full),
        pytest.param("aot", {}, marks=pytest.mark.full),
        pytest.param("orpo", {}, marks=pytest.mark.full),
        pytest.param("sigmoid", {"ld_alpha": 0.5}, marks=pytest.mark.full),
        pytest.param("sigmoid", {"margin_gamma": 0.5}, marks=pytest.mark.full),
    ],
)
def test_losses_and_their_options(loss_type: Any, options: dict[str, Any]) -> None:
    rows, margins = random_rows([(3, 4, 6), (0, 3, 2), (2, 2, 5)], seed=3), np.array([0.5, 2.0, 1.0])
    needs_reference = loss_type != "orpo"
    reference = random_params(1) if needs_reference else None
    padded = padded_batch(rows)._replace(score_margins=margins)
    batch = jdpo.pack(rows, num_rows=2, score_margins=margins)
    apply_fn = packed_apply_wpo if "use_weighting" in options else packed_apply
    of_padded, of_packed = (
        jax.jit(jdpo.make_dpo_loss(function, loss_type=loss_type, **options)) for function in (padded_apply, apply_fn)
    )
    assert_same(of_packed(random_params(0), reference, batch), of_padded(random_params(0), reference, padded))


def test_micro_batches_add_up() -> None:
    rows, policy, reference = random_rows([(3, 4, 6), (1, 2, 2)] * 3, 0), random_params(0), random_params(1)
    sizes = SIZES | {"num_pairs": 2}
    batch = jdpo.pack(rows, **sizes | {"num_micro": 3})
    assert batch.tokens.shape[:2] == (3, 2)
    loss_fn = jax.jit(jdpo.make_dpo_loss(packed_apply))
    parts = [jax.tree.map(lambda array, k=k: array[k], batch) for k in range(3)]
    total = sum(loss_fn(policy, reference, part, normalizer=len(rows))[0] for part in parts)
    assert_same(total, jax.jit(jdpo.make_dpo_loss(padded_apply))(policy, reference, padded_batch(rows))[0])
    with pytest.raises(ValueError, match="micro-batches"):
        loss_fn(policy, reference, batch)
    with pytest.raises(ValueError, match="micro-batches"):
        jdpo.packed_attention(attend, batch)


def test_a_row_alone_within_vmap() -> None:
    batch = jdpo.pack(random_rows([(3, 4, 6), (2, 3, 2), (0, 2, 5)], 0), num_rows=2)

    @jax.jit
    def by_row(params: Any) -> Any:
        return jax.value_and_grad(lambda p: jax.vmap(partial(packed_states, p))(batch).sum())(params)

    @jax.jit
    def at_once(params: Any) -> Any:
        return jax.value_and_grad(lambda p: packed_states(p, batch).sum())(params)

    assert_same(by_row(random_params(0)), at_once(random_params(0)))


@pytest.mark.full
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_rows_on_eight_devices_give_the_same(axis_type: AxisType) -> None:
    batch, rng = jdpo.pack(random_rows([(3, 4, 6), (2, 3, 2)] * 8, 0), num_rows=8), np.random.default_rng(0)
    heads = {name: rng.normal(size=(*batch.tokens.shape, n, 3)) for name, n in (("q", HEADS), ("k", 2), ("v", 2))}

    def packed_logps(heads: Any, batch: jdpo.PackedBatch) -> Any:
        states = jdpo.packed_attention(attend, batch)(heads["q"], heads["k"], heads["v"]).sum(2)
        return packed_token_logps(states, batch, jnp.asarray(np.eye(3, VOCAB)))

    step = jax.value_and_grad(jdpo.make_dpo_loss(packed_logps), has_aux=True)
    expected = jax.jit(step)(heads, jax.tree.map(jnp.zeros_like, heads), batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put((heads, jax.tree.map(np.zeros_like, heads), batch), by_row)
        program = jax.jit(step).lower(*on_mesh).compile()
        assert_same(program(*on_mesh), expected)
    # Rows stay on their devices: nothing but sums travels.
    assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())


def test_logits_and_states_give_the_same() -> None:
    batch = jdpo.pack(random_rows([(3, 4, 6), (2, 3, 2)], 0))

    @jax.jit
    def both(params: Any) -> Any:
        states = packed_states(params, batch)
        from_states = packed_token_logps(states, batch, params["head"], chunk_size=4)
        return from_states, packed_token_logps(states @ params["head"], batch)

    from_states, from_logits = both(random_params(0))
    assert_same(from_states, from_logits)
    assert (from_logits[0, batch.logp_pair[0] == 4] == 0).all()


def test_wrong_calls_are_named() -> None:
    rows = random_rows([(3, 4, 6), (2, 3, 2)], 0)
    batch, params = jdpo.pack(rows), random_params(0)
    states = np.zeros((*batch.tokens.shape, WIDTH))
    with pytest.raises(ValueError, match=r"batch\.tokens"):
        packed_token_logps(states[0], batch)
    with pytest.raises(ValueError, match="only with a head"):
        packed_token_logps(states, batch, logit_softcap=3.0)
    with pytest.raises(ValueError, match="found neither"):
        jdpo.dpo_loss(params, None, batch, apply_fn=packed_apply)
    cached = batch._replace(logp_reference=np.zeros(batch.logp_slot.shape))
    with pytest.raises(ValueError, match="found both"):
        jdpo.dpo_loss(params, params, cached, apply_fn=packed_apply)
    with pytest.raises(ValueError, match="return_log_sum_sq"):
        jdpo.dpo_loss(params, params, batch, apply_fn=packed_apply, use_weighting=True)
    with pytest.raises(ValueError, match="log-prob for each scored token"):
        jdpo.dpo_loss(params, params, batch, apply_fn=packed_states)
    with pytest.raises(ValueError, match=r"batch\.logp_reference must have the shape"):
        jdpo.dpo_loss(params, None, cached._replace(logp_reference=np.zeros((1, 3))), apply_fn=packed_apply)
