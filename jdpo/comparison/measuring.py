"""Measurements of one model alone: log-probs of held-out pairs, of facts, and its answers to prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jdpo.comparison.compare_document import ComparedModel
from jdpo.comparison.figures.fact_figures import Fact, completion_rows
from jdpo.comparison.figures.pair_figures import PairRows
from jdpo.comparison.packed_values import completion_logps, pair_logps
from jdpo.config import DatasetConfig, public_text
from jdpo.data.prepared.prepare import DROPPED, prepare_pairs
from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens.tokenize import COMPLETION_CUT, tokenize_completions
from jdpo.generation.answer_files import AnswerFolder, read_answers
from jdpo.generation.asking.model_source import ModelSource
from jdpo.generation.loaded_model import LoadedModel
from jdpo.generation.prompts import Prompts
from jdpo.generation.values import Sampling
from jdpo.generation.writing import write_answers
from jdpo.models.transformer import float32_products
from jdpo.reports.progress import RowCounter
from jdpo.types import completions_of
from jdpo.words import figure

Log = Callable[[str], None]

MAX_LENGTH = 2048
"""Longer sequences are cut, unless --max_length says otherwise, or the model has fewer positions."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """Everything that both models are given.

    Attributes:
      pairs: files of held-out pairs, each a dataset of its own.
      prompts: questions to answer, or None.
      facts: questions with their right answers.
      sampling, num_samples: how answers are drawn, and how many to each prompt.
      max_length: longest sequence of a pair, in tokens; None: see `MAX_LENGTH`.
      cache_dir: where tokenized pairs are kept; None: as for training.
    """

    pairs: Sequence[str] = ()
    prompts: Prompts | None = None
    facts: Sequence[Fact] = ()
    sampling: Sampling = field(default_factory=Sampling)
    num_samples: int = 1
    max_length: int | None = None
    cache_dir: str | None = None


class PairLogps(NamedTuple):
    """Held-out pairs under one model; see `PairRows`.

    Attributes:
      logps: float64 [b, 2].
      digests: {file: digest of its content}.
      notes: sentences on pairs that were dropped or cut.
    """

    datasets: tuple[str, ...]
    dataset_of: np.ndarray
    prompts: np.ndarray
    origins: list[str]
    lengths: np.ndarray
    logps: np.ndarray
    digests: dict[str, str]
    notes: list[str]


class Measured(NamedTuple):
    """One model's part of a comparison.

    Attributes:
      pairs: None if there are no pairs.
      facts: float64 [facts], log-probabilities of the right answers.
      answers: its answers, or None.
    """

    model: ComparedModel
    pairs: PairLogps | None
    facts: np.ndarray
    answers: AnswerFolder | None


def measure(loaded: LoadedModel, path: str, material: Material, answers_folder: Path, log: Log) -> Measured:
    """Measures a model, and lets it answer the prompts.

    Args:
      path: of the model, as it was given.
      answers_folder: where its answers are written; those that are there already are kept.

    Raises:
      ValueError: rows cannot be read, or the folder holds answers that were made in another way.
      FloatingPointError: the model gives log-probs that are not finite.
    """
    measured = measure_model(loaded, path, material, log)
    answers = _answers(loaded, material, answers_folder, log) if material.prompts else None
    # Two models must fit into memory for the divergence, so neither keeps what only drawing needs.
    loaded.free_engine()
    return measured._replace(answers=answers)


def measure_model(loaded: LoadedModel, path: str, material: Material, log: Log) -> Measured:
    """Scores pairs and facts; arguments and errors as for `measure`."""
    with float32_products(loaded.model):
        pairs = measure_pairs(loaded, material, log) if material.pairs else None
        facts = _facts(loaded, material.facts, log)
    model = ComparedModel(
        name=public_text(loaded.name), path=public_text(path), digest=loaded.digest, dtype=loaded.dtype
    )
    return Measured(model, pairs, facts, None)


def measure_pairs(loaded: LoadedModel, material: Material, log: Log) -> PairLogps:
    """Tokenizes the held-out pairs and scores them; errors as for `measure`."""
    datasets = [DatasetConfig(path=path) for path in material.pairs]
    max_length = material.max_length or min(MAX_LENGTH, loaded.model.config.max_positions)
    data = prepare_pairs(
        datasets,
        loaded.tokenizer,
        max_length=max_length,
        cache_dir=Path(material.cache_dir) if material.cache_dir else None,
        progress=RowCounter(log),
    )
    log(f"{loaded.name}: scoring {figure(len(data), 'pair')}")
    notes = []
    if cut := data.counts.get(COMPLETION_CUT, 0):
        at_the_end = max_length >= loaded.model.config.max_positions
        advice = "the model has no more positions" if at_the_end else "--max_length takes more"
        notes.append(
            f"{figure(cut, 'pair')} of {len(data):,} were cut at {max_length} tokens, so their log-probs are those of "
            f"the part that is left; {advice}"
        )
    reasons = _dropped(data.counts)
    if reasons:
        notes.append(f"pairs left out: {', '.join(f'{count:,} {reason}' for reason, count in reasons.items())}")
    origins, lengths = [], []
    # Row by row: the tokens of all rows at once would be gigabytes.
    for row in map(data.__getitem__, range(len(data))):
        origins.append(row.origin)
        lengths.append([int(mask.sum()) for _, mask in completions_of(row)])
    return PairLogps(
        datasets=data.names,
        dataset_of=np.asarray(data.dataset_of),
        prompts=np.asarray(data.prompt_keys),
        origins=origins,
        lengths=np.array(lengths),
        logps=pair_logps(loaded, data, _Done(log, len(data))),
        digests={public_text(file): digest for file, digest in data.file_digests().items()},
        notes=notes,
    )


def _dropped(counts: Mapping[str, int]) -> dict[str, int]:
    return {name.removeprefix(DROPPED): count for name, count in counts.items() if name.startswith(DROPPED)}


class _Done:
    """Counts rows that are scored, and logs at most ten lines."""

    def __init__(self, log: Log, total: int) -> None:
        self._log, self._total, self._done, self._told = log, total, 0, 0

    def __call__(self, num_rows: int) -> None:
        self._done += num_rows
        tenths = 10 * self._done // self._total
        # A small file is done before anybody could read of it.
        if tenths > self._told and self._total >= 1000:
            self._told = tenths
            self._log(f"  {self._done:,} of {self._total:,} rows")


def aligned(before: PairLogps, after: PairLogps) -> tuple[PairRows, list[str]]:
    """Returns the pairs that both models could read, by their place in the files, and notes on the others."""
    # The dataset is part of the place: files in different folders may share their names, and origins with them.
    place = {one: index for index, one in enumerate(_places(before))}
    found = [(place[one], index) for index, one in enumerate(_places(after)) if one in place]
    if not found:
        raise ValueError("no held-out pair could be read by both models")
    at_before, kept = np.array(found).T
    notes = list(dict.fromkeys([*before.notes, *after.notes]))
    if len(kept) < max(len(before.origins), len(after.origins)):
        notes.append(f"only {figure(len(kept), 'pair')} could be read by both models, whose tokenizers differ")
    if other := int((before.lengths[at_before] != after.lengths[kept]).any(axis=1).sum()):
        notes.append(
            f"{figure(other, 'pair')} of {len(kept):,} have different numbers of tokens for the two models; figures "
            "per token divide both log-probs by the tokens of the model after"
        )
    rows = PairRows(
        datasets=after.datasets,
        dataset_of=after.dataset_of[kept],
        prompts=after.prompts[kept],
        origins=[after.origins[index] for index in kept.tolist()],
        lengths=after.lengths[kept],
        before=before.logps[at_before],
        after=after.logps[kept],
    )
    return rows, notes


def _places(pairs: PairLogps) -> Iterator[tuple[int, str]]:
    """Yields the dataset and the origin of each pair."""
    return zip(pairs.dataset_of.tolist(), pairs.origins, strict=True)


def _facts(loaded: LoadedModel, facts: Sequence[Fact], log: Log) -> np.ndarray:
    if not facts:
        return np.zeros(0)
    rows = []
    length = loaded.model.config.max_positions
    for fact, found in zip(
        facts,
        tokenize_completions(completion_rows(facts, loaded.tokenizer), loaded.tokenizer, max_length=length),
        strict=True,
    ):
        # A fact that is cut would have the probability of another answer.
        if isinstance(found, Dropped) or COMPLETION_CUT in found.notes:
            why = found.reason if isinstance(found, Dropped) else f"longer than {length} tokens"
            raise ValueError(f"{fact.question.origin}: the fact cannot be scored: {why}; change it, or take it out")
        rows.append(found.row)
    log(f"{loaded.name}: scoring {figure(len(facts), 'fact')}")
    if not loaded.tokenizer.has_chat_template:
        log(f"{loaded.name} has no chat template: questions are plain text, which the answer continues")
    return completion_logps(loaded, rows, _Done(log, len(rows)))


def _answers(loaded: LoadedModel, material: Material, folder: Path, log: Log) -> AnswerFolder:
    assert material.prompts is not None
    log(f"{loaded.name}: answering {figure(len(material.prompts.questions), 'prompt')}")
    source = ModelSource(loaded, material.sampling)
    write_answers(
        folder,
        material.prompts,
        source,
        sampling=material.sampling,
        num_samples=material.num_samples,
        log=log,
    )
    return read_answers(folder)
