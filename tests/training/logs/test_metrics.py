"""Averages over the logging window and over an evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jdpo.training.fit.flops import StepFlops
from jdpo.training.logs.metrics import RowAverages, Throughput, Window, rows_at


def test_a_window_saved_as_json_continues_bitwise() -> None:
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


def test_shares_are_means_over_rows_and_are_saved_too() -> None:
    window = Window()
    window.add({"loss": 1.0}, {"loss/a": (3.0, 2.0), "loss/b": (1.0, 1.0)})
    window = Window(json.loads(json.dumps(window.to_json())))
    window.add({"loss": 2.0}, {"loss/a": (7.0, 2.0)})  # a step without rows of b
    window.add({"loss": 3.0})
    assert window.averages() == {"loss": 2.0, "loss/a": 2.5, "loss/b": 1.0}
    old = {name: value for name, value in Window().to_json().items() if name != "shares"}
    assert Window(old).averages() == {}, "a checkpoint of an older version"
    averages = RowAverages()
    for total, weight in ((4.0, 1.0), (5.0, 2.0)):
        averages.add({"loss": np.array([total])}, normalizer=1.0, shares={"loss/a": (total, weight)})
    assert averages.averages() == {"loss": 4.5, "loss/a": 3.0}


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
    throughput = Throughput(unit="pairs", num_devices=2, peak=None)
    throughput.add(num_rows=8, num_tokens=100, flops=StepFlops(3e12, 5e12), seconds=0.5)
    throughput.add(num_rows=4, num_tokens=60, flops=StepFlops(5e12, 9e12), seconds=1.5)
    expected = {"pairs_per_second": 6.0, "tokens_per_second": 80.0, "step_seconds": 1.0, "model_tflops_per_second": 2.0}
    assert throughput.rates() == expected
    throughput.clear()
    throughput.add(num_rows=1, num_tokens=10, flops=StepFlops(1e12, 1e12), seconds=2.0)
    assert throughput.rates()["step_seconds"] == 2.0


def test_utilization_is_relative_to_the_peak_of_all_devices() -> None:
    throughput = Throughput(unit="rows", num_devices=4, peak=1e13)
    throughput.add(num_rows=1, num_tokens=1, flops=StepFlops(4e13, 6e13), seconds=2.0)
    rates = throughput.rates()
    assert (rates["mfu"], rates["mfu_executed"]) == (0.5, 0.75)
