"""The comparison of a model before with one or more models after, from files to a document."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jdpo.comparison.compare_document import (
    AnswerShown,
    AnswersSideBySide,
    CompareDocument,
    Comparison,
    Figure,
)
from jdpo.comparison.figures.answer_figures import AnswerPair, answer_figures
from jdpo.comparison.figures.divergence_figures import Distances, distances_of, divergence_figures
from jdpo.comparison.figures.fact_figures import compared_facts, fact_figures, facts_digest
from jdpo.comparison.figures.fallen_pairs import fallen_pairs, text_of_turns
from jdpo.comparison.figures.pair_figures import PairRows, calibration_bins, length_rule, pair_figures
from jdpo.comparison.figures.win_figures import Won, win_rates
from jdpo.comparison.judging import judge_pairs
from jdpo.comparison.measuring import Log, Material, Measured, aligned, measure
from jdpo.comparison.sentences import verdict_of
from jdpo.config import CONFIGS, load_config
from jdpo.generation.loaded_model import LoadedModel
from jdpo.generation.values import Answer, Question, message_text
from jdpo.scoring.scorers import By
from jdpo.training.run_record import RunRecord
from jdpo.types import CHOSEN, REJECTED
from jdpo.words import listed

MOST_ANSWERS = 300
"""`compare.json` holds the answers to about this many prompts; the folders of answers hold all."""

BETA = 0.1
"""Beta of the implicit reward of a model that is not a run of `jdpo dpo`; the default of training."""


def beta_of(model: str) -> float | None:
    """Returns beta of the run of `jdpo dpo` that a model comes from; None if it comes from another place.

    Args:
      model: the folder of a run, of one of its steps, or of the model that it exported.
    """
    path = Path(model).expanduser().absolute()
    run = next((folder for folder in (path, *path.parents[:2]) if (folder / "run.json").is_file()), None)
    if run is None or RunRecord.read(run / "run.json").command != "dpo":
        return None
    config: Any = load_config(CONFIGS["dpo"], run / "resolved_config.yaml", [])
    return float(config.beta)


Load = Callable[[str], LoadedModel]


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The models to compare, and everything that they are given.

    Attributes:
      before, afters: models, as `jdpo.load` takes them.
      material: what they are given.
      output_dir: where answers, verdicts and results are written.
      betas: beta of the implicit reward of each model after.
      by, scorer_options: what decides which answer wins; None: nothing is judged.
      described: what was asked for, for the document.
    """

    before: str
    afters: Sequence[str]
    material: Material
    output_dir: Path
    betas: Sequence[float]
    by: By | None = None
    scorer_options: Mapping[str, Any] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)


class _Pair(NamedTuple):
    """The measurements of two models, and the distance between them."""

    before: Measured
    after: Measured
    distances: Distances


def compare(settings: CompareSettings, load: Load, log: Log) -> CompareDocument:
    """Compares models.

    One model at a time is in memory, and both while their divergence is computed.

    Args:
      load: opens a model.
      log: receives lines for the user.

    Raises:
      ValueError: a model or a file cannot be read, or output_dir holds answers that were made in another way.
    """
    material, folder = settings.material, settings.output_dir
    before = measure(load(settings.before), settings.before, material, folder / "answers-before", log)
    pairs = []
    for number, path in enumerate(settings.afters, 1):
        second = load(path)
        # Without a number for a single model, whose folder is the one that the documentation names.
        suffix = f"-{number}" if len(settings.afters) > 1 else ""
        after = measure(second, path, material, folder / f"answers-after{suffix}", log)
        pairs.append(_Pair(before, after, _distances(settings.before, second, before, after, load, log)))
        del second  # before the next model is loaded
    warnings: list[str] = []
    comparisons = []
    for number, (pair, beta) in enumerate(zip(pairs, settings.betas, strict=True), 1):
        suffix = f"-{number}" if len(pairs) > 1 else ""
        comparison, noted = _compared(pair, beta, settings, folder / f"wins{suffix}", log)
        comparisons.append(comparison)
        warnings += [*pair.distances.warnings, *noted]
    if settings.material.prompts is not None:
        warnings += _sampling_notes(settings)
    described = {
        **settings.described,
        "betas": list(settings.betas),
        "digests": _digests(before, material),
        # Log-probabilities differ in their last bits between devices, and in bfloat16 by more.
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    # A note that several models share is shown once.
    warnings = list(dict.fromkeys(warnings))
    return CompareDocument(before=before.model, comparisons=comparisons, settings=described, warnings=warnings)


def _distances(path: str, second: LoadedModel, before: Measured, after: Measured, load: Load, log: Log) -> Distances:
    """Computes the divergences on the answers of both models; none if there are no prompts.

    Args:
      path: the model before.
      second: the model after.
    """
    if before.answers is None or after.answers is None:
        return Distances({}, {}, [])
    # Loaded again: if it had waited while the other one drew, the cache of the answers might not have fitted.
    first = load(path)
    if first.digest != before.model.digest:
        raise ValueError(
            f"{path}: the model has changed since it was measured, as that of a run that still trains; name a step of "
            "it (checkpoints/STEP), and compare again with another output_dir"
        )
    return distances_of(first, second, before.answers, after.answers, log)


def _digests(before: Measured, material: Material) -> dict[str, Any]:
    """Returns digests of everything that the models were given."""
    return {
        "pairs": None if before.pairs is None else before.pairs.digests,
        "prompts": None if before.answers is None else before.answers.manifest.prompts["digest"],
        "facts": facts_digest(material.facts) if material.facts else None,
    }


def _sampling_notes(settings: CompareSettings) -> Iterator[str]:
    sampling = settings.material.sampling
    if sampling.temperature != 1 or sampling.top_p != 1 or sampling.top_k is not None:
        yield (
            "kl is the divergence on answers drawn with another temperature, top_p or top_k than the model's own "
            "distribution (1, 1, none), so per answer it does not estimate the divergence of the two models"
        )


# --- figures


def _compared(
    pair: _Pair, beta: float, settings: CompareSettings, folder: Path, log: Log
) -> tuple[Comparison, list[str]]:
    figures: list[Figure] = []
    warnings: list[str] = []
    lines: list[Mapping[str, Any]] = []
    bins, facts, fallen = [], [], []
    if pair.before.pairs is not None and pair.after.pairs is not None:
        rows, noted = aligned(pair.before.pairs, pair.after.pairs)
        figures += pair_figures(rows, beta)
        bins = calibration_bins(rows, beta)
        warnings += [*noted, f"the length rule of accuracy.length_only prefers the {length_rule(rows)[0]} answer"]
        lines += _pair_lines(rows, beta)
        fallen = fallen_pairs(rows, settings.material.pairs)
    answers, questions = _answer_pairs(pair, warnings)
    won: dict[tuple[str, int], Won] = {}
    if answers:
        figures += [*divergence_figures(pair.distances), *answer_figures(answers)]
        if settings.by is not None:
            outcomes = judge_pairs(answers, questions, settings.by, settings.scorer_options, folder, log)
            rates = win_rates(outcomes)
            figures, warnings = [*figures, *rates.figures], [*warnings, *rates.warnings]
            won = {(one.prompt_id, one.sample): one for one in outcomes}
        lines += _answer_lines(answers, won, pair)
    if settings.material.facts:
        probabilities = np.exp(pair.before.facts), np.exp(pair.after.facts)
        figures += fact_figures(settings.material.facts, *probabilities)
        facts = compared_facts(settings.material.facts, *probabilities)
        lines += [{"kind": "fact", **dataclasses.asdict(fact)} for fact in facts]
    comparison = Comparison(
        after=pair.after.model,
        figures={one.name: one for one in figures},
        verdict=verdict_of(figures, facts),
        calibration=bins,
        facts=facts,
        answers=[_side_by_side(one, questions, won) for one in answers[:MOST_ANSWERS]],
        num_answers=len(answers),
        fallen=fallen,
        rows=lines,
    )
    return comparison, warnings


def _answer_pairs(pair: _Pair, warnings: list[str]) -> tuple[list[AnswerPair], dict[str, Question]]:
    """Returns the answers of both models to the same prompts with the same number."""
    if pair.before.answers is None or pair.after.answers is None:
        return [], {}
    # By key and not by place: a model with fewer positions may have answered fewer prompts.
    before = {(one.prompt_id, one.sample): one for one in pair.before.answers.answers}
    found = [
        AnswerPair(before[key], answer)
        for answer in pair.after.answers.answers
        if (key := (answer.prompt_id, answer.sample)) in before
    ]
    asked = len(pair.after.answers.questions) * pair.after.answers.manifest.num_samples
    if missing := asked - len(found):
        manifests = [one.manifest for one in (pair.before.answers, pair.after.answers)]
        reasons = dict.fromkeys(reason for manifest in manifests for reason in manifest.unanswered)
        warnings.append(
            f"{missing:,} of {asked:,} answers are missing from at least one model, and left out for both"
            f"{'' if found else ', so there are no figures of answers'} ({listed(list(reasons), 3)})"
        )
    return found, pair.after.answers.questions


# --- rows


def _pair_lines(rows: PairRows, beta: float) -> Iterator[Mapping[str, Any]]:
    margins = rows.margins(beta)
    for index, origin in enumerate(rows.origins):
        line: dict[str, Any] = {
            "kind": "pair",
            "dataset": rows.datasets[int(rows.dataset_of[index])],
            "origin": origin,
            "prompt_id": f"{int(rows.prompts[index]):016x}",
            "margin": float(margins[index]),
        }
        for side, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
            line |= {
                f"{name}_tokens": int(rows.lengths[index, side]),
                f"{name}_logp_before": float(rows.before[index, side]),
                f"{name}_logp_after": float(rows.after[index, side]),
            }
        yield line


def _answer_lines(
    answers: Sequence[AnswerPair], won: Mapping[tuple[str, int], Won], pair: _Pair
) -> Iterator[Mapping[str, Any]]:
    for one in answers:
        key = (one.after.prompt_id, one.after.sample)
        line: dict[str, Any] = {"kind": "answer", "prompt_id": key[0], "sample": key[1]}
        for name, answer, distances in (
            ("before", one.before, pair.distances.on_before),
            ("after", one.after, pair.distances.on_after),
        ):
            line |= {
                f"{name}_tokens": None if answer.tokens is None else len(answer.tokens),
                f"{name}_cut_off": answer.finish_reason == "length",
                f"{name}_text": message_text(answer.message),
            }
            if (found := distances.get(key)) is not None:
                line[f"kl_on_{name}"] = float(found.forward.sum(dtype=np.float64))
                line[f"kl_reverse_on_{name}"] = float(found.backward.sum(dtype=np.float64))
        line["won"] = won[key].won if key in won else None
        yield line


def _side_by_side(
    one: AnswerPair, questions: Mapping[str, Question], won: Mapping[tuple[str, int], Won]
) -> AnswersSideBySide:
    key = (one.after.prompt_id, one.after.sample)
    return AnswersSideBySide(
        prompt_id=key[0],
        prompt=text_of_turns(questions[key[0]].prompt),
        sample=key[1],
        before=_shown(one.before),
        after=_shown(one.after),
        won=won[key].won if key in won else None,
    )


def _shown(answer: Answer) -> AnswerShown:
    num_tokens = None if answer.tokens is None else len(answer.tokens)
    return AnswerShown(text=message_text(answer.message), num_tokens=num_tokens, finish_reason=answer.finish_reason)
