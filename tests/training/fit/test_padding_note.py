from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from jdpo.data.batching.loader import plan
from jdpo.data.batching.packing_plan import PackingPlan, pair_sizes, plan_run
from jdpo.training.fit.padding_note import SAMPLED, padding_note

RNG = np.random.default_rng(0)
# Mostly short pairs and a few long ones, as in dialogues.
LENGTHS = np.clip(RNG.lognormal(4, 1, (2048, 1)), 8, 400).astype(int).repeat(3, axis=1)
NUM_PARTS = 16


def planned(
    batch_size: int, *, lengths: np.ndarray = LENGTHS, num_parts: int = NUM_PARTS, tokens: int = 8192
) -> tuple[PackingPlan, Callable[[int], np.ndarray], int]:
    """Plans an epoch; returns the arguments of `padding_note`."""

    def rows_of(step: int) -> np.ndarray:
        return plan(step, num_rows=len(lengths), global_batch_size=batch_size, seed=0, shuffle=True)

    num_steps = len(lengths) // batch_size
    steps = map(rows_of, range(num_steps))
    run = plan_run(pair_sizes(lengths), steps, num_shards=num_parts, max_tokens_per_device=tokens)
    return run, rows_of, num_steps


def padding_of(batch_size: int, num_parts: int = NUM_PARTS) -> float:
    run, rows_of, num_steps = planned(batch_size, num_parts=num_parts)
    shapes = [run.step(rows_of(step)).shape for step in range(num_steps)]
    slots = sum(shape.num_micro * shape.num_rows * shape.num_slots for shape in shapes)
    return 1 - sum(run.sizes.slots[rows_of(step)].sum() for step in range(num_steps)) / slots


def test_a_batch_too_small_for_its_devices_is_noted_with_what_would_help() -> None:
    note = padding_note(*planned(2 * NUM_PARTS), unit="pairs")
    assert note is not None
    assert "a device has 2 pairs per step" in note
    now, larger, fewer = (float(share) / 100 for share in re.findall(r"([\d.]+) %", note))
    size, parts = map(int, re.search(r"global_batch_size (\d+) .* into (\d+) part", note).groups())  # type: ignore[union-attr]
    assert (size > 2 * NUM_PARTS, parts < NUM_PARTS) == (True, True)
    # The figures of a sample of the steps are nearly those of runs with these settings.
    assert now == pytest.approx(padding_of(2 * NUM_PARTS), abs=0.05)
    assert larger == pytest.approx(padding_of(size), abs=0.05)
    assert fewer == pytest.approx(padding_of(2 * NUM_PARTS, parts), abs=0.05)
    assert max(larger, fewer) < now / 2


@pytest.mark.parametrize(
    ("batch_size", "num_parts", "lengths"),
    [
        (16 * NUM_PARTS, NUM_PARTS, LENGTHS),  # many pairs per device
        (4, 1, LENGTHS),  # a single device
        (2 * NUM_PARTS, NUM_PARTS, np.full((512, 3), 100)),  # no padding in spite of few pairs
    ],
)
def test_other_batches_are_not_noted(batch_size: int, num_parts: int, lengths: np.ndarray) -> None:
    assert padding_note(*planned(batch_size, num_parts=num_parts, lengths=lengths), unit="pairs") is None


def test_one_pair_per_device_and_a_run_of_one_step() -> None:
    run, rows_of, _ = planned(NUM_PARTS)
    note = padding_note(run, rows_of, 1, unit="pairs")
    assert note is not None
    assert "a device has 1 pair per step" in note
    # The run has no rows of which a larger batch could be made.
    assert "global_batch_size" not in note
    assert "fewer devices" in note


def test_only_a_sample_of_a_long_run_is_planned() -> None:
    run, rows_of, _ = planned(2 * NUM_PARTS)
    asked: list[int] = []

    def counting(step: int) -> np.ndarray:
        asked.append(step)
        return rows_of(step)

    assert padding_note(run, counting, 1_000_000, unit="pairs") is not None
    assert len(asked) <= SAMPLED * 15
