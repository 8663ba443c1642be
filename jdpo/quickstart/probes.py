"""Measures exact probabilities of answers while a model trains, and stores them on disk.

Nothing is sampled: the probability of an answer is the exponential of the summed log-probabilities of its tokens,
including the end of the turn, given the question.

Axes: c countries, p phrasings, a=3 answers (capital, wrong, other), f facts, n sequences, t token positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdpo.data.batching.loader import bucket_length, collate_completions
from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens.tokenize import tokenize_completions
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.durable import write_durably
from jdpo.losses.logprobs import sequence_logps, shifted_token_logps
from jdpo.models.transformer import Transformer, make_apply_fn
from jdpo.quickstart.corpus import (
    HELD_OUT_PHRASINGS,
    TRAINING_PHRASINGS,
    Fact,
    Split,
    capital_question,
    completion_row,
    other_facts,
)
from jdpo.training.interface.callbacks import Callback, RunView
from jdpo.types import CompletionBatch, CompletionRow, TokenizedCompletion

Params = Any

PROBED_PHRASINGS = (*TRAINING_PHRASINGS[:3], *HELD_OUT_PHRASINGS)
"""Three training phrasings, then the held-out ones."""

NUM_PROBED_TRAINING = 3

_FACT_STRIDE = 3
_CHUNK = 192


class Measurement(NamedTuple):
    """A model's log-probabilities of all probed answers.

    Attributes:
      step: number of optimizer steps before the measurement.
      capitals: float64 [c, p, 3], log-probability (natural) of each city as the answer.
      facts: float64 [f], log-probability of each fact's answer.
    """

    step: int
    capitals: np.ndarray
    facts: np.ndarray


Measure = Callable[[int, Params], Measurement]
"""(step, params) -> the measurement of these weights; a Prober is one."""


class Prober:
    """Measures models of one shape; it is called with their weights."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, split: Split, *, max_length: int) -> None:
        apply_fn = make_apply_fn(model)

        @jax.jit
        # The weights are an argument: captured ones would be compiled into the program as constants.
        def answer_logps(params: Params, batch: CompletionBatch) -> jax.Array:
            logits = apply_fn(params, jnp.asarray(batch.tokens), jnp.asarray(batch.attention_mask))
            return sequence_logps(*shifted_token_logps(logits, batch.tokens, batch.completion_mask))

        self._answer_logps = answer_logps
        self._num_countries = len(split.countries)
        facts = [completion_row(fact.question, fact.answer) for fact in probed_facts(split)]
        rows = _tokenized(_capital_rows(split) + facts, tokenizer, max_length)
        self._num_rows = len(rows)
        self._batches = _batches(rows, max_length, tokenizer.pad_token_id)

    def __call__(self, step: int, params: Params) -> Measurement:
        """Measures weights in one forward pass over all probed answers."""
        params = _one_copy(params)
        logps = np.concatenate([np.asarray(self._answer_logps(params, batch)) for batch in self._batches])
        # The last batch has padding rows, which come last.
        logps = logps[: self._num_rows].astype(np.float64)
        # The order of `_capital_rows`: countries, phrasings, cities; then the facts.
        num_capitals = self._num_countries * len(PROBED_PHRASINGS) * 3
        capitals = logps[:num_capitals].reshape(self._num_countries, len(PROBED_PHRASINGS), 3)
        return Measurement(step, capitals, logps[num_capitals:])


def _one_copy(params: Params) -> Params:
    """Returns the first device's copy of replicated weights, so that other devices do not repeat the computation."""
    if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
    return params


def probed_facts(split: Split) -> list[Fact]:
    """Returns every third fact of the corpus; neither continuation trains on them."""
    return other_facts(split.countries)[::_FACT_STRIDE]


def _capital_rows(split: Split) -> list[dict[str, Any]]:
    return [
        completion_row(capital_question(country, phrasing), city)
        for country in split.countries
        for phrasing in PROBED_PHRASINGS
        for city in country.cities
    ]


def _tokenized(rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, max_length: int) -> list[TokenizedCompletion]:
    """Tokenizes rows as the trainer does."""
    kept = tokenize_completions(
        [CompletionRow(row["prompt"], row["completion"], "a probe") for row in rows], tokenizer, max_length=max_length
    )
    tokenized = []
    for result in kept:
        assert not isinstance(result, Dropped), result
        assert not result.notes, result.notes  # such as a cut answer, whose probability would be another text's
        tokenized.append(result.row)
    return tokenized


def _batches(rows: list[TokenizedCompletion], max_length: int, pad_token_id: int) -> list[CompletionBatch]:
    """Collates all rows into batches of one shape, so that one program is compiled."""
    length = bucket_length(max(len(row.tokens) for row in rows), max_length)
    return [
        collate_completions(rows[start : start + _CHUNK], num_slots=_CHUNK, length=length, pad_token_id=pad_token_id)
        for start in range(0, len(rows), _CHUNK)
    ]


class ProbeLog:
    """The measurements of one run as JSON lines. They survive a kill; a resumed run overwrites those it repeats."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._measurements = {measurement.step: measurement for measurement in _read(path)}

    def record(self, measurement: Measurement) -> None:
        """Stores a measurement; it is on the disk when this returns."""
        self._measurements[measurement.step] = measurement
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The whole file again, so that a kill leaves the old or the new measurements and never half a line.
        write_durably(self._path, "".join(_line(self._measurements[step]) for step in sorted(self._measurements)))

    def holds(self, steps: Sequence[int]) -> bool:
        """Returns True if all of the steps were measured."""
        return set(steps) <= set(self._measurements)

    def measurements(self, steps: Sequence[int]) -> list[Measurement]:
        """Returns the measurements of these steps, as they are on the disk."""
        # Not from memory: the file has rounded values, and a report made again must equal the first.
        on_disk = {measurement.step: measurement for measurement in _read(self._path)}
        return [on_disk[step] for step in steps]


class Probes(Callback):
    """Measures a run at the given steps, of which 0 is before the first update."""

    def __init__(self, log: ProbeLog, measure: Measure, steps: Sequence[int]) -> None:
        self._log, self._measure, self._steps = log, measure, frozenset(steps)

    def on_start(self, run: RunView) -> None:
        self._take(run)

    def on_step(self, run: RunView) -> None:
        self._take(run)

    def _take(self, run: RunView) -> None:
        if run.step in self._steps:
            self._log.record(self._measure(run.step, run.params))


def _line(measurement: Measurement) -> str:
    values = {
        "step": measurement.step,
        "capitals": measurement.capitals.round(5).tolist(),
        "facts": measurement.facts.round(5).tolist(),
    }
    return json.dumps(values) + "\n"


def _read(path: Path) -> list[Measurement]:
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Measurement(line["step"], np.array(line["capitals"]), np.array(line["facts"])) for line in lines]
