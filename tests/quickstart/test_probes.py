"""Exact probabilities are exact, and measurements survive on disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Params, Transformer, make_apply_fn
from jdpo.models.weights.loading import load_params
from jdpo.quickstart.corpus import capital_question, corpus_rows, split_countries
from jdpo.quickstart.probes import PROBED_PHRASINGS, Measurement, ProbeLog, Prober, Probes, probed_facts
from jdpo.quickstart.tiny_llama import write_model

SPLIT = split_countries(6)


class World:
    """A random model with its prober, made once: compiling it takes most of the time."""

    def __init__(self, folder: Path) -> None:
        rows = corpus_rows(SPLIT, (1, 1, 1), 0)
        texts = [message["content"] for row in rows for side in row.values() for message in side]
        write_model(folder, texts, hidden_size=64, num_layers=1, seed=0)
        self.model = Transformer(read_model_config(folder))
        self.tokenizer: Tokenizer = load_tokenizer(folder, chat_template=None)
        self.params: Params = load_params(folder, self.model)
        self.prober = Prober(self.model, self.tokenizer, SPLIT, max_length=64)
        self.measured = self.prober(7, self.params)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("model"))


def by_hand(world: World, question: str, answer: str) -> float:
    """Sums the log-probabilities of an answer's tokens, each a softmax given the text so far."""
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    before, whole = world.tokenizer.encode([prompt, f"{prompt}{answer}<|im_end|>\n"])
    logits = make_apply_fn(world.model)(world.params, jnp.array([whole]), jnp.ones((1, len(whole)), bool))[0]
    probabilities = np.asarray(nn.softmax(logits), np.float64)
    steps = range(len(before), len(whole))
    return float(sum(np.log(probabilities[step - 1, whole[step]]) for step in steps))


def test_a_capital_has_the_summed_log_probability_of_the_answer_and_its_end(world: World) -> None:
    for row, column, answer in ((0, 0, 0), (0, 3, 1), (5, 5, 2)):
        country = SPLIT.countries[row]
        expected = by_hand(world, capital_question(country, PROBED_PHRASINGS[column]), country.cities[answer])
        assert world.measured.capitals[row, column, answer] == pytest.approx(expected, abs=1e-4)


def test_facts_are_measured_the_same_way(world: World) -> None:
    facts = probed_facts(SPLIT)
    assert world.measured.facts.shape == (len(facts),)
    assert world.measured.facts[-1] == pytest.approx(by_hand(world, *facts[-1]), abs=1e-4)


def test_a_batch_mixes_no_answers(world: World) -> None:
    capitals = world.measured.capitals
    assert capitals.shape == (6, len(PROBED_PHRASINGS), 3)
    assert len(np.unique(capitals.round(6))) > 0.9 * capitals.size


def measurement(step: int, value: float = -1.0) -> Measurement:
    return Measurement(step, np.full((2, 6, 3), value), np.full(4, value))


def test_log_keeps_measurements_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "probes" / "dpo.jsonl"
    log = ProbeLog(path)
    log.record(measurement(0))
    log.record(measurement(4, -2.0))
    again = ProbeLog(path)
    assert again.holds([0, 4])
    assert not again.holds([0, 2, 4])
    first, last = again.measurements([0, 4])
    assert (first.step, last.step) == (0, 4)
    np.testing.assert_array_equal(last.capitals, np.full((2, 6, 3), -2.0))


def test_a_resumed_run_overwrites_what_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "dpo.jsonl"
    for value in (-1.0, -3.0):
        ProbeLog(path).record(measurement(2, value))
    ProbeLog(path).record(measurement(1))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert ProbeLog(path).measurements([2])[0].facts[0] == -3.0


def test_what_is_read_back_is_what_a_fresh_process_reads(tmp_path: Path) -> None:
    log = ProbeLog(tmp_path / "dpo.jsonl")
    log.record(measurement(0, -1 / 3))
    fresh = ProbeLog(tmp_path / "dpo.jsonl")
    np.testing.assert_array_equal(log.measurements([0])[0].facts, fresh.measurements([0])[0].facts)


def test_hook_measures_at_the_wanted_steps_only(tmp_path: Path) -> None:
    log = ProbeLog(tmp_path / "dpo.jsonl")
    probes: Any = Probes(log, lambda step, params: measurement(step, params), [0, 2])
    probes.on_start(SimpleNamespace(step=0, params=0.0))
    for step in range(1, 4):
        probes.on_step(SimpleNamespace(step=step, params=-float(step)))
    assert [m.facts[0] for m in log.measurements([0, 2])] == [0.0, -2.0]
    assert not log.holds([1])
