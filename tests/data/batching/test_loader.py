from __future__ import annotations

import threading
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.config import MeshConfig
from jdpo.data.batching.loader import (
    WINDOW_STEPS,
    RowPlan,
    bucket_length,
    collate_completions,
    collate_pairs,
    num_steps_per_epoch,
    plan,
    prefetch,
)
from jdpo.data.batching.mixing import Mixture
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import micro_batch_sharding, place
from jdpo.types import CHOSEN, REJECTED, TokenizedCompletion, TokenizedPair


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def epoch_rows(epoch: int, num_rows: int, batch: int, *, seed: int = 0, shuffle: bool = True) -> list[int]:
    steps = num_steps_per_epoch(num_rows, batch)
    return [
        int(row)
        for step in range(epoch * steps, (epoch + 1) * steps)
        for row in plan(step, num_rows=num_rows, global_batch_size=batch, seed=seed, shuffle=shuffle)
    ]


@given(
    num_rows=st.integers(1, 200),
    batch=st.integers(1, 40),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_an_epoch_passes_over_every_row_once(num_rows: int, batch: int, epoch: int, seed: int, shuffle: bool) -> None:
    rows = epoch_rows(epoch, num_rows, batch, seed=seed, shuffle=shuffle)
    assert sorted(rows) == list(range(num_rows))
    if not shuffle:
        assert rows == sorted(rows)


@given(num_rows=st.integers(1, 100), batch=st.integers(1, 40), step=st.integers(0, 50))
def test_every_step_but_the_last_of_an_epoch_is_full(num_rows: int, batch: int, step: int) -> None:
    rows = plan(step, num_rows=num_rows, global_batch_size=batch, seed=1, shuffle=True)
    steps = num_steps_per_epoch(num_rows, batch)
    is_last = (step + 1) % steps == 0
    assert len(rows) == (num_rows - (steps - 1) * batch if is_last else batch)


def test_a_plan_is_pure() -> None:
    def rows(step: int) -> list[int]:
        return plan(step, num_rows=50, global_batch_size=8, seed=7, shuffle=True).tolist()

    first = [rows(step) for step in range(14)]
    assert [rows(step) for step in reversed(range(14))] == first[::-1]
    plan(0, num_rows=50, global_batch_size=8, seed=7, shuffle=True)[:] = 0  # a caller may write into the returned array
    assert rows(0) == first[0]


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = [epoch_rows(epoch, 50, 8, seed=seed) for epoch in range(2) for seed in range(2)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert all(order != sorted(order) for order in orders)


def test_the_order_of_a_seed_never_changes() -> None:
    # Golden: a change here breaks the resuming of every run begun before it.
    assert epoch_rows(0, 10, 4, seed=42) == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]


# --- mixed datasets, and rows grouped by length


@st.composite
def row_plans(draw: st.DrawFn) -> RowPlan:
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    takes = sizes if draw(st.booleans()) else [draw(st.integers(1, 2 * size)) for size in sizes]
    shuffle = draw(st.booleans())
    lengths = (
        np.array([draw(st.integers(1, 50)) for _ in range(sum(sizes))]) if shuffle and draw(st.booleans()) else None
    )
    return RowPlan(
        Mixture(tuple(sizes), tuple(takes)),
        global_batch_size=draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 2**32 - 1)),
        shuffle=shuffle,
        lengths=lengths,
    )


def steps_of(plan: RowPlan, epoch: int) -> list[np.ndarray]:
    return [plan.step(step) for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)]


@given(row_plans(), st.integers(0, 3), st.data())
def test_no_order_seed_weight_or_grouping_changes_the_rows_of_an_epoch(
    plan: RowPlan, epoch: int, data: st.DataObject
) -> None:
    mixture, size = plan.mixture, plan._size
    steps = steps_of(plan, epoch)
    assert [len(rows) for rows in steps[:-1]] == [size] * (len(steps) - 1)
    assert len(steps[-1]) == mixture.num_examples - size * (len(steps) - 1)
    plain = RowPlan(mixture, global_batch_size=size, seed=plan._seed, shuffle=plan._shuffle)
    assert Counter(np.concatenate(steps).tolist()) == Counter(np.concatenate(steps_of(plain, epoch)).tolist())
    if mixture.takes == mixture.sizes:
        assert sorted(np.concatenate(steps)) == list(range(sum(mixture.sizes)))
    step = data.draw(st.integers(0, 4 * plan.steps_per_epoch))  # a resumed run asks for any step first
    again = RowPlan(mixture, global_batch_size=size, seed=plan._seed, shuffle=plan._shuffle, lengths=plan._lengths)
    np.testing.assert_array_equal(again.step(step), plan.step(step))


def test_an_unweighted_mixture_has_the_plan_of_one_dataset() -> None:
    mixed = RowPlan(Mixture((30, 20), (30, 20)), global_batch_size=8, seed=7, shuffle=True)
    for step in range(14):
        rows = plan(step, num_rows=50, global_batch_size=8, seed=7, shuffle=True)
        np.testing.assert_array_equal(mixed.step(step), rows)


def grouped_and_plain(num_rows: int, batch: int) -> tuple[RowPlan, RowPlan, np.ndarray]:
    lengths = np.random.default_rng(0).integers(1, 1000, num_rows)
    mixture = Mixture((num_rows,), (num_rows,))
    plans = [
        RowPlan(mixture, global_batch_size=batch, seed=3, shuffle=True, lengths=chosen) for chosen in (lengths, None)
    ]
    return plans[0], plans[1], lengths


def test_grouped_steps_have_rows_of_similar_length() -> None:
    grouped, plain, lengths = grouped_and_plain(8 * WINDOW_STEPS * 5, 8)

    def spread(plan: RowPlan) -> float:
        return float(np.mean([np.ptp(lengths[rows]) for rows in steps_of(plan, 1)]))

    assert spread(grouped) < spread(plain) / 10


def test_grouping_keeps_rows_within_their_window_and_the_remainder_last() -> None:
    grouped, plain, lengths = grouped_and_plain(8 * (WINDOW_STEPS * 2 + 5) + 3, 8)
    for epoch in (0, 1):
        first, second = steps_of(grouped, epoch), steps_of(plain, epoch)
        np.testing.assert_array_equal(first[-1], second[-1])  # the remainder is a random one, not the longest rows
        for start in range(0, len(first) - 1, WINDOW_STEPS):
            stop = min(start + WINDOW_STEPS, len(first) - 1)
            assert set(np.concatenate(first[start:stop])) == set(np.concatenate(second[start:stop]))
        means = [lengths[rows].mean() for rows in first[:WINDOW_STEPS]]
        assert means != sorted(means), "the steps of a window come in a random order"
    orders = [[lengths[rows].mean() for rows in steps_of(grouped, epoch)[:WINDOW_STEPS]] for epoch in (0, 1)]
    assert np.argsort(orders[0]).tolist() != np.argsort(orders[1]).tolist()


def test_without_a_shuffle_there_is_nothing_to_group() -> None:
    with pytest.raises(AssertionError):
        RowPlan(Mixture((3,), (3,)), global_batch_size=2, seed=0, shuffle=False, lengths=np.ones(3))


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_the_shards_of_all_hosts_are_a_partition_of_the_step(num_hosts: int) -> None:
    # Groups of devices imitate hosts: each places only the part of the step that its own devices hold.
    mesh = make_mesh(MeshConfig(data=8, fsdp=1))
    plan = RowPlan(Mixture((40, 23), (20, 46)), global_batch_size=16, seed=1, shuffle=True)
    devices = mesh.devices.reshape(num_hosts, -1)
    for step in range(plan.steps_per_epoch - 1):
        rows = plan.step(step)
        placed = place(rows.reshape(1, -1), micro_batch_sharding(mesh))
        shards = {shard.device: np.asarray(shard.data).reshape(-1) for shard in placed.addressable_shards}
        of_hosts = [np.concatenate([shards[device] for device in host]) for host in devices]
        assert {len(part) for part in of_hosts} == {16 // num_hosts}, "no host ends before another"
        np.testing.assert_array_equal(np.concatenate(of_hosts), rows)
    assert len(jax.devices()) == 8


@given(max_length=st.integers(1, 5000), data=st.data())
def test_a_bucket_is_at_least_the_length(max_length: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, max_length))
    bucket = bucket_length(n, max_length)
    assert n <= bucket < max_length + 8
    assert bucket % 8 == 0
    assert bucket <= max(32, 1.5 * n + 1)


def test_buckets_are_few() -> None:
    assert sorted({bucket_length(n, 1000) for n in range(1, 1001)}) == [
        32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000,
    ]  # fmt: skip


def test_pairs_are_laid_out_by_length_not_by_token() -> None:
    pairs = [
        TokenizedPair(ids(5, 6), ids(7, 2), ids(8), "x:1"),  # 2 is EOS and padding
        TokenizedPair(ids(2), ids(2), ids(9, 9, 2, 4), "x:2"),
    ]
    batch = collate_pairs(pairs, num_slots=3, length=6, pad_token_id=2)
    np.testing.assert_array_equal(
        batch.tokens,
        [
            [[5, 6, 7, 2, 2, 2], [5, 6, 8, 2, 2, 2]],
            [[2, 2, 2, 2, 2, 2], [2, 9, 9, 2, 4, 2]],
            [[2, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2]],
        ],
    )
    np.testing.assert_array_equal(
        batch.attention_mask.astype(int),
        [
            [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]],
            [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
            [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
        ],
    )
    np.testing.assert_array_equal(
        batch.completion_mask.astype(int),
        [
            [[0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]],
            [[0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]],
            [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        ],
    )
    np.testing.assert_array_equal(batch.weights, np.array([1, 1, 0], np.float32))
    assert batch.reference_logps is None
    assert [array.dtype for array in (batch.tokens, batch.attention_mask, batch.completion_mask, batch.weights)] == [
        np.int32, np.bool_, np.bool_, np.float32,
    ]  # fmt: skip


@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    spare=st.integers(0, 2),
)
def test_masks_cover_exactly_the_completions(shapes: list[tuple[int, int, int]], spare: int) -> None:
    pairs = [TokenizedPair(ids(*[1] * p), ids(*[2] * c), ids(*[3] * r), f"x:{i}") for i, (p, c, r) in enumerate(shapes)]
    batch = collate_pairs(pairs, num_slots=len(pairs) + spare, length=12, pad_token_id=2)
    for index, pair in enumerate(pairs):
        for side, completion in ((CHOSEN, pair.chosen_ids), (REJECTED, pair.rejected_ids)):
            mask = batch.completion_mask[index, side]
            np.testing.assert_array_equal(batch.tokens[index, side][mask], completion)
            np.testing.assert_array_equal(
                batch.tokens[index, side][batch.attention_mask[index, side] & ~mask], pair.prompt_ids
            )
    assert batch.attention_mask.any(axis=-1).all()
    assert not batch.completion_mask[len(pairs) :].any()


def test_completions_are_laid_out_likewise() -> None:
    rows = [TokenizedCompletion(ids(5, 6, 2, 7, 2), np.array([0, 1, 1, 0, 1], bool), "x:1")]
    batch = collate_completions(rows, num_slots=2, length=6, pad_token_id=2)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 2, 7, 2, 2], [2, 2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(batch.attention_mask.astype(int), [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.completion_mask.astype(int), [[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, np.array([1, 0], np.float32))


def worker_threads() -> int:
    return sum(thread.name.startswith("jdpo-prefetch") for thread in threading.enumerate())


def test_prefetch_keeps_the_order_and_ends_its_thread() -> None:
    assert list(prefetch(lambda step: step * step, range(3, 9))) == [9, 16, 25, 36, 49, 64]
    assert list(prefetch(lambda step: step, range(0))) == []
    assert worker_threads() == 0


def test_prefetch_runs_ahead_by_depth_and_no_further() -> None:
    made: list[int] = []
    reached = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 3:
            reached.set()
        return step

    batches = prefetch(make, range(100), depth=3)
    assert next(batches) == 0
    assert reached.wait(10)
    batches.close()  # type: ignore[attr-defined]
    assert made == [0, 1, 2, 3]
    assert worker_threads() == 0


def test_prefetch_raises_at_the_step_that_failed() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("row 17 is broken")
        return step

    batches = prefetch(make, range(10))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="row 17 is broken"):
        next(batches)
    assert worker_threads() == 0


def test_a_wait_for_a_batch_is_announced() -> None:
    go_on, waits = threading.Event(), list[str]()

    def announced() -> None:
        waits.append("waiting")
        go_on.set()

    def make(step: int) -> int:
        assert go_on.wait(60)
        return step

    # The first batch is made once somebody waits for it.
    assert list(prefetch(make, range(1), before_waiting=announced)) == [0]
    assert waits == ["waiting"]
