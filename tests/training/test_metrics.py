"""Averages of the window and of an evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jdpo.training.metrics import RowAverages, Throughput, Window, rows_at


def test_a_window_that_travels_through_json_goes_on_bitwise() -> None:
    values = [{"loss": value, "grad_norm": value * 3} for value in (0.1, 0.7, 1e-9, 123.456)]
    straight, cut = Window(), Window()
    for step in values:
        straight.add(step)
    for step in values[:2]:
        cut.add(step)
    resumed = Window(json.loads(json.dumps(cut.to_json())))
    for step in values[2:]:
        resumed.add(step)
    assert resumed.averages() == straight.averages()
    assert straight.averages()["loss"] == pytest.approx(np.mean([0.1, 0.7, 1e-9, 123.456]))


def test_an_empty_window_gives_nothing() -> None:
    assert Window().averages() == {}
    assert Window(Window().to_json()).averages() == {}


def test_evaluation_averages_over_real_rows_and_the_loss_over_its_normalizer() -> None:
    averages = RowAverages()
    first = {"loss": np.array([[4.0, 2.0]]), "x": np.array([[1.0, 3.0]])}
    averages.add(rows_at(first, np.array([0, 1])), normalizer=5.0)
    second = {"loss": np.array([[np.nan, 6.0]]), "x": np.array([[np.nan, 8.0]])}
    averages.add(rows_at(second, np.array([1])), normalizer=7.0)
    assert averages.averages() == {"loss": (4.0 + 2.0 + 6.0) / 12.0, "x": 4.0}


def test_throughput_counts_what_it_was_given() -> None:
    throughput = Throughput()
    throughput.add(num_rows=8, num_tokens=100, seconds=0.5)
    throughput.add(num_rows=4, num_tokens=60, seconds=1.5)
    assert throughput.rates("pairs") == {"pairs_per_second": 6.0, "tokens_per_second": 80.0, "step_seconds": 1.0}
