"""Pairs that two models have scored, brought together by their places in the files."""

from __future__ import annotations

import numpy as np
import pytest

from jdpo.comparison.measuring import PairLogps, aligned


def scored(datasets: list[int], origins: list[str], logps: list[float], num_tokens: int = 3) -> PairLogps:
    both = np.array([[value, value - 1] for value in logps])
    numbers = np.array(datasets)
    return PairLogps(
        ("held", "held-2"),
        numbers,
        np.arange(len(origins)),
        origins,
        np.full((len(origins), 2), num_tokens),
        both,
        {},
        [],
    )


def test_files_of_one_name_in_two_folders() -> None:
    origins = ["held.jsonl:1", "held.jsonl:2"] * 2
    rows, notes = aligned(
        scored([0, 0, 1, 1], origins, [-1.0, -2.0, -3.0, -4.0]), scored([0, 0, 1, 1], origins, [-1.5, -2.5, -3.5, -4.5])
    )
    assert rows.before[:, 0].tolist() == [-1.0, -2.0, -3.0, -4.0]
    np.testing.assert_allclose(rows.after - rows.before, -0.5)
    assert notes == []


def test_rows_that_one_model_cannot_read() -> None:
    before = scored([0, 0], ["held.jsonl:1", "held.jsonl:2"], [-1.0, -2.0])
    rows, notes = aligned(before, scored([0], ["held.jsonl:2"], [-2.5], num_tokens=4))
    assert (rows.before[:, 0].tolist(), rows.after[:, 0].tolist()) == ([-2.0], [-2.5])
    assert ["both models" in notes[0], "numbers of tokens" in notes[1]] == [True, True]
    with pytest.raises(ValueError, match="no held-out pair"):
        aligned(before, scored([1], ["held.jsonl:2"], [-2.5]))
