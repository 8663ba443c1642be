from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdpo.data.batching.loader import collate_completions, collate_pairs
from jdpo.data.batching.packing import pack_step, unused
from jdpo.data.batching.packing_plan import PackingPlan, StepPlan, item_sizes, plan_run, plan_step
from jdpo.data.batching.packing_shapes import PackedShape
from jdpo.losses.pair_logps import predicted_tokens
from jdpo.types import PackedBatch, PreferenceBatch, TokenizedCompletion, TokenizedPair
from tests.data.batching.packed_tools import padding_of, unpack

VOCABULARY, LONGEST = 11, 16


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def random_pairs(lengths: list[tuple[int, int, int]], seed: int) -> list[TokenizedPair]:
    rng = np.random.default_rng(seed)
    return [
        TokenizedPair(*(rng.integers(0, VOCABULARY, n).astype(np.int32) for n in row), f"pairs:{index}")
        for index, row in enumerate(lengths)
    ]


def random_completions(lengths: list[int], seed: int) -> list[TokenizedCompletion]:
    rng = np.random.default_rng(seed)
    return [
        TokenizedCompletion(rng.integers(0, VOCABULARY, n).astype(np.int32), rng.random(n) < 0.5, f"rows:{index}")
        for index, n in enumerate(lengths)
    ]


def random_reference(pairs: list[TokenizedPair], seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.normal(size=len(part)).astype(np.float32) for part in pair[1:3]) for pair in pairs]


def plan_of(rows: Any, **options: Any) -> tuple[PackingPlan, StepPlan]:
    indices = np.arange(len(rows))
    plan = plan_run(item_sizes(rows), [indices], **{"num_shards": 1, "max_tokens_per_device": 4096} | options)
    return plan, plan.step(indices)


pairs_lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=9)
layouts = st.fixed_dictionaries(
    {
        "num_shards": st.integers(1, 8),
        "max_tokens_per_device": st.sampled_from([128, 4096]),
        "micro_batch_size": st.sampled_from([None, 2, 5]),
        "sequences_per_row": st.sampled_from([1, 2, None]),
    }
)
seeds = st.integers(0, 2**16)


# --- the layout


SHAPE = PackedShape(
    num_micro=1,
    num_rows=1,
    num_items=2,
    num_slots=8,
    num_attention_rows=4,
    sequences_per_row=1,
    length=4,
    num_scored=4,
)


def worked_example(shape: PackedShape) -> PackedBatch:
    pair = TokenizedPair(ids(5, 6), ids(7, 2), ids(8), "pairs:3")
    bins = plan_step(np.array([5]), num_rows=1, max_slots=8)
    reference = [(np.array([-0.5, -1.5], np.float32), np.array([-2.5], np.float32))]
    return pack_step(
        [pair], np.array([3]), StepPlan(bins, shape), reference_logps=reference, score_margins=np.array([2.5])
    )


def lists_of(batch: PackedBatch) -> dict[str, Any]:
    return {name: getattr(batch, name)[0, 0].tolist() for name in PackedBatch._fields}


def test_worked_example() -> None:
    batch = worked_example(SHAPE)
    found, none = lists_of(batch), 4 * 4
    assert found.pop("gather")[:2] == [[0, 1, 2, 3], [0, 1, 4, 3]]
    assert found == {
        "tokens": [5, 6, 7, 2, 8, 0, 0, 0],
        "positions": [0, 1, 2, 3, 2, 0, 0, 0],
        "lengths": [[4], [3], [1], [1]],
        "scatter": [0, 1, 2, 3, 6, 0, 0, 0],
        "readers": [[0, 1, 2, 3, none, none, none, none], [4, 5, none, none, 6, none, none, none]],
        "logp_slot": [1, 2, 1, 0],
        "logp_target": [7, 2, 8, 0],
        "logp_pair": [0, 0, 1, 4],
        "pair_weight": [1, 0],
        "pair_row": [3, 0],
        "logp_reference": [-0.5, -1.5, -2.5, 0],
        "pair_score_margin": [2.5, 1],
    }
    assert padding_of(batch) == pytest.approx((3 / 8, 9 / 16, 1 / 4))


def test_worked_example_of_two_sequences_in_one_attention_row() -> None:
    apart = lists_of(worked_example(SHAPE))
    joined = lists_of(worked_example(SHAPE._replace(num_attention_rows=2, sequences_per_row=2, length=8)))
    assert joined["gather"][0][:7] == [0, 1, 2, 3, 0, 1, 4]
    assert joined["lengths"] == [[4, 3], [0, 0]]
    # The places of the second sequence follow those of the first, as in separate rows of 4 places.
    for name in PackedBatch._fields:
        assert name in ("gather", "lengths") or joined[name] == apart[name]


@settings(deadline=None)
@given(pairs_lengths, layouts, seeds)
def test_every_pair_comes_back(lengths: list[tuple[int, int, int]], layout: dict[str, Any], seed: int) -> None:
    pairs = random_pairs(lengths, seed)
    plan, step = plan_of(pairs, **layout)
    indices = np.random.default_rng(seed).permutation(len(pairs)) + 100
    reference = random_reference(pairs)
    batch = pack_step(pairs, indices, step, reference_logps=reference)
    assert batch.tokens.shape == (*step.shape[:2], step.shape.num_slots)
    assert step.shape in plan.shapes

    _, predicted = padded_batch(pairs)
    found = unpack(batch)
    assert sorted(found) == sorted(indices)
    for i, pair in enumerate(pairs):
        for side, (got, completion) in enumerate(zip(found[indices[i]], pair[1:3], strict=True)):
            sequence, start = np.concatenate([pair.prompt_ids, completion]), len(pair.prompt_ids)
            np.testing.assert_array_equal(got.tokens, sequence)
            np.testing.assert_array_equal(got.positions, np.arange(len(sequence)))
            scored = predicted[i, side, : len(sequence)]
            np.testing.assert_array_equal(got.scored, scored)
            np.testing.assert_array_equal(got.predicted_from + 1, np.flatnonzero(scored))
            np.testing.assert_array_equal(got.targets, sequence[scored])
            np.testing.assert_array_equal(got.reference, reference[i][side][scored[start:]])
    check_indices(batch, num_tokens=sum(map(sum, lengths)), num_scored=int(predicted.sum()))


@given(st.lists(st.integers(1, LONGEST), min_size=1, max_size=9), layouts, seeds)
def test_every_supervised_row_comes_back(lengths: list[int], layout: dict[str, Any], seed: int) -> None:
    rows = random_completions(lengths, seed)
    _, step = plan_of(rows, **layout)
    batch = pack_step(rows, np.arange(len(rows)), step)
    padded = collate_completions(rows, num_slots=len(rows), length=LONGEST, pad_token_id=0)
    found = unpack(batch)
    assert len(found) == len(rows)
    for i, row in enumerate(rows):
        (got,) = found[i]
        np.testing.assert_array_equal(got.tokens, row.tokens)
        np.testing.assert_array_equal(got.positions, np.arange(len(row.tokens)))
        scored = np.append(False, padded.completion_mask[i, 1:])[: len(row.tokens)]
        np.testing.assert_array_equal(got.scored, scored)
        np.testing.assert_array_equal(got.targets, row.tokens[scored])
        assert got.reference is None
    check_indices(batch, num_tokens=sum(lengths), num_scored=int(padded.completion_mask[:, 1:].sum()))


def check_indices(batch: PackedBatch, *, num_tokens: int, num_scored: int) -> None:
    """Checks what a model relies on: indices in range, and the two transposes as gathers."""
    *_, num_attention_rows, length = batch.gather.shape
    num_slots, none = batch.tokens.shape[-1], num_attention_rows * length
    num_sequences = batch.readers.shape[-2] * batch.pair_weight.shape[-1]
    for array, bound in (
        (batch.gather, num_slots),
        (batch.lengths, length + 1),
        (batch.scatter, none),
        (batch.logp_slot, num_slots),
        (batch.readers, none + 1),
        (batch.logp_pair, num_sequences + 1),
    ):
        assert array.dtype == np.int32
        assert array.min() >= 0
        assert array.max() < bound
    used = (batch.readers < none).any(-2)
    assert used.sum() == num_tokens
    assert (batch.logp_pair < num_sequences).sum() == num_scored
    rng = np.random.default_rng(0)
    for at in np.ndindex(*batch.gather.shape[:2]):
        gather, scatter = batch.gather[at].reshape(-1), batch.scatter[at]
        # Every place of a sequence is read, and no other.
        in_use = real_places(PackedBatch._make(None if array is None else array[at] for array in batch)).reshape(-1)
        read = batch.readers[at][batch.readers[at] < none]
        assert len(np.unique(read)) == len(read)
        np.testing.assert_array_equal(np.sort(read), np.flatnonzero(in_use))
        # slots <- places, whose transpose adds up
        of_places = np.where(in_use, rng.normal(size=none), 0)
        added = np.zeros(num_slots)
        np.add.at(added, gather, of_places)
        np.testing.assert_allclose(np.append(of_places, 0)[batch.readers[at]].sum(0), added, atol=1e-12)
        # places <- slots
        of_slots = np.where(used[at], rng.normal(size=num_slots), 0)
        added = np.zeros(none)
        np.add.at(added, scatter, of_slots)
        np.testing.assert_array_equal(np.where(scatter[gather] == np.arange(none), of_slots[gather], 0), added)


def real_places(row: PackedBatch) -> np.ndarray:
    """Returns bool [q, t], True for places of the sequences of real items."""
    lengths = row.lengths
    if lengths.shape[-1] == 1:  # unused rows have a length, too
        lengths = lengths * np.resize(np.repeat(row.pair_weight > 0, len(row.readers)), len(lengths))[:, None]
    return np.arange(row.gather.shape[-1]) < lengths.sum(-1)[:, None]


def test_a_step_of_a_larger_shape_leaves_the_rest_empty() -> None:
    pairs = random_pairs([(3, 2, 4)], seed=0)
    _, step = plan_of(pairs)
    larger = step._replace(shape=PackedShape(3, 2, 4, 128, 8, 1, 64, 64))
    batch = pack_step(pairs, np.array([7]), larger)
    assert batch.pair_weight.sum() == batch.pair_weight[0, 0, 0] == 1
    np.testing.assert_array_equal(
        unpack(batch)[7][1].tokens, np.concatenate([pairs[0].prompt_ids, pairs[0].rejected_ids])
    )


def test_scores_stay_with_their_pairs_and_padding_holds_1() -> None:
    pairs = random_pairs([(2, 3, 4), (5, 1, 2), (1, 6, 1)], seed=0)
    _, step = plan_of(pairs, num_shards=2, max_tokens_per_device=64)
    batch = pack_step(pairs, np.arange(3), step, score_margins=np.array([0.5, 2.0, 3.0]))
    scores, rows, real = (
        values.reshape(-1) for values in (batch.pair_score_margin, batch.pair_row, batch.pair_weight == 1)
    )
    np.testing.assert_array_equal(scores[real][np.argsort(rows[real])], [0.5, 2.0, 3.0])
    assert (scores[~real] == 1).all()
    assert pack_step(pairs, np.arange(3), step).pair_score_margin is None
    for with_scores in (False, True):
        empty = unused(step.shape, num_sides=2, with_scores=with_scores)
        assert (empty.pair_score_margin is not None) == with_scores
    assert empty.pair_score_margin.shape == batch.pair_score_margin.shape
    assert empty.pair_score_margin.dtype == batch.pair_score_margin.dtype


def test_a_reference_of_other_lengths_is_refused() -> None:
    pairs = random_pairs([(3, 2, 4)], seed=0)
    _, step = plan_of(pairs)
    with pytest.raises(AssertionError):
        pack_step(pairs, np.array([0]), step, reference_logps=[(np.zeros(4, np.float32), np.zeros(2, np.float32))])


# --- a small model, run both ways


def random_params(seed: int, width: int = 8, num_layers: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"embed": (VOCABULARY, width), "place": (LONGEST, width), "head": (width, VOCABULARY)}
    shapes |= {f"{name}{layer}": (width, width) for layer in range(num_layers) for name in ("q", "k", "v", "o", "mlp")}
    return {name: rng.normal(size=shape) / 2 for name, shape in shapes.items()}


def attend(xp: ModuleType, q: Any, k: Any, v: Any, lengths: Any) -> Any:
    """Returns causal attention over rows [rows, t, d] of sequences back to back, with lengths [rows, u]."""
    places = np.arange(q.shape[1])
    segments = (places[:, None] >= xp.cumsum(lengths, axis=1)[:, None]).sum(-1)  # [rows, t]
    seen = (places[:, None] >= places) & (segments[:, :, None] == segments[:, None])
    scores = xp.where(seen, xp.einsum("bqd,bkd->bqk", q, k), -1e30)
    weights = xp.exp(scores - scores.max(-1, keepdims=True))
    return xp.einsum("bqk,bkd->bqd", weights / weights.sum(-1, keepdims=True), v)


def hidden_states(xp: ModuleType, params: Any, tokens: Any, positions: Any, mix: Any) -> Any:
    """Returns hidden states [..., d]; `mix` (q, k, v) is attention in the layout of tokens."""
    x = params["embed"][tokens] + params["place"][positions]
    for layer in range(sum(name.startswith("mlp") for name in params)):
        q, k, v = (x @ params[f"{name}{layer}"] for name in "qkv")
        x = x + mix(q, k, v) @ params[f"o{layer}"]
        x = x + xp.tanh(x @ params[f"mlp{layer}"])
    return x


def log_probs(xp: ModuleType, params: Any, hidden: Any, targets: Any) -> Any:
    logits = hidden @ params["head"]
    top = logits.max(-1, keepdims=True)
    logits = logits - top - xp.log(xp.exp(logits - top).sum(-1, keepdims=True))
    return xp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def padded_batch(pairs: list[TokenizedPair]) -> tuple[PreferenceBatch, np.ndarray]:
    """Returns the padded batch and the mask bool [b, 2, t] of the tokens that it scores."""
    batch = collate_pairs(pairs, num_slots=len(pairs), length=LONGEST, pad_token_id=0)
    return batch, np.asarray(predicted_tokens(batch))


def padded_logps(xp: ModuleType, params: Any, batch: PreferenceBatch) -> Any:
    """Returns log-probs [b, 2, t], each of the token at t."""
    tokens = batch.tokens.reshape(-1, LONGEST)
    lengths = batch.attention_mask.reshape(-1, LONGEST).sum(-1, keepdims=True)
    positions = np.broadcast_to(np.arange(LONGEST), tokens.shape)
    hidden = hidden_states(xp, params, tokens, positions, lambda q, k, v: attend(xp, q, k, v, lengths))
    logps = log_probs(xp, params, hidden[:, :-1], tokens[:, 1:])
    return xp.concatenate([xp.zeros((len(tokens), 1)), logps], axis=1).reshape(batch.tokens.shape)


def packed_logps(xp: ModuleType, params: Any, row: PackedBatch) -> Any:
    """Returns log-probs [c] of one row of a batch."""

    def mix(*qkv: Any) -> Any:
        return attend(xp, *(x[row.gather] for x in qkv), row.lengths).reshape(-1, qkv[0].shape[-1])[row.scatter]

    hidden = hidden_states(xp, params, row.tokens, row.positions, mix)
    return log_probs(xp, params, hidden[row.logp_slot], row.logp_target)


def rows_of(batch: PackedBatch) -> list[PackedBatch]:
    return [
        PackedBatch(*(None if array is None else array[at] for array in batch))
        for at in np.ndindex(*batch.tokens.shape[:2])
    ]


def with_garbage(row: PackedBatch, seed: int) -> PackedBatch:
    """Returns the row with arbitrary values, in range, in every unused place."""
    rng = np.random.default_rng(seed)
    num_slots, none = len(row.tokens), row.gather.size
    used, places = (row.readers < none).any(0), real_places(row)
    scored = row.logp_pair < len(row.readers) * len(row.pair_weight)

    def fill(array: np.ndarray, kept: np.ndarray, bound: int) -> np.ndarray:
        return np.where(kept, array, rng.integers(0, bound, array.shape))

    return row._replace(
        tokens=fill(row.tokens, used, VOCABULARY),
        positions=fill(row.positions, used, LONGEST),
        scatter=fill(row.scatter, used, none),
        gather=fill(row.gather, places, num_slots),
        logp_slot=fill(row.logp_slot, scored, num_slots),
        logp_target=fill(row.logp_target, scored, VOCABULARY),
    )


@settings(max_examples=50, deadline=None)
@given(pairs_lengths, layouts, seeds)
def test_packed_and_padded_give_the_same_log_probs(
    lengths: list[tuple[int, int, int]], layout: dict[str, Any], seed: int
) -> None:
    pairs, params = random_pairs(lengths, seed), random_params(seed)
    batch = pack_step(pairs, np.arange(len(pairs)), plan_of(pairs, **layout)[1])
    padded, scored = padded_batch(pairs)
    expected = padded_logps(np, params, padded)
    num_checked = 0
    for row in rows_of(batch):
        for variant in (row, with_garbage(row, seed)):
            logps = packed_logps(np, params, variant)
            assert np.isfinite(logps).all()
            for item, side in np.ndindex(len(row.pair_weight), 2):
                if row.pair_weight[item]:
                    at = row.pair_row[item], side
                    got = logps[row.logp_pair == 2 * item + side]
                    np.testing.assert_allclose(got, expected[at][scored[at]], rtol=0, atol=1e-9)
                    num_checked += 1
    assert num_checked == 4 * len(pairs)


@pytest.mark.parametrize("sequences_per_row", [1, None])
def test_packed_and_padded_give_the_same_gradients(sequences_per_row: int | None) -> None:
    pairs, params = random_pairs([(5, 3, 9), (0, 2, 1), (6, 1, 1), (1, 10, 2)], seed=1), random_params(seed=2)
    batch = pack_step(pairs, np.arange(len(pairs)), plan_of(pairs, sequences_per_row=sequences_per_row)[1])
    (row,) = rows_of(batch)
    garbage = with_garbage(row, seed=3)
    weights = np.random.default_rng(4).normal(size=(len(pairs), 2))

    padded_rows, scored = padded_batch(pairs)

    def padded(params: Any) -> Any:
        return (jnp.where(scored, padded_logps(jnp, params, padded_rows), 0).sum(-1) * weights).sum()

    def packed(params: Any, row: PackedBatch) -> Any:
        sums = jax.ops.segment_sum(packed_logps(jnp, params, row), row.logp_pair, num_segments=2 * len(row.pair_weight))
        return (sums.reshape(-1, 2)[row.pair_row] * weights[: len(pairs)]).sum()

    with jax.enable_x64(True):
        params = {name: jnp.asarray(value) for name, value in params.items()}
        expected = jax.jit(jax.value_and_grad(padded))(params)
        gradient = jax.jit(jax.value_and_grad(packed))
        for variant in (row, garbage):
            got = gradient(params, jax.tree.map(jnp.asarray, variant))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), got, expected)
