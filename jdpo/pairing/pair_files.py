"""Writes pairs.jsonl and pairs.report.json from answers and rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jdpo.data.schemas.messages import assistant
from jdpo.durable import replacing, write_durably
from jdpo.generation.values import Question
from jdpo.pairing.answers_read import Group, Material
from jdpo.pairing.candidates import Candidate, PairRules, Proposal, margin_of
from jdpo.pairing.pair_report import make_report
from jdpo.pairing.selecting import Choice, Selection, select
from jdpo.types import Text

ChooseFor = Callable[[str, Candidate, Candidate], Choice | None]
"""(prompt_id, a, b) -> the choice of a person, or None if they have not been asked yet."""


def report_path(output: Path) -> Path:
    """Returns the path of the report next to a file of pairs: pairs.report.json for pairs.jsonl."""
    return output.with_name(f"{output.stem}.report.json")


def check_output(output: Path) -> None:
    """Refuses to replace a file that `jdpo pair` has not written.

    Raises:
      ValueError: it is a folder, in no folder, or has no report next to it.
    """
    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: expected the name of a .jsonl file")
    if output.is_dir() or not output.absolute().parent.is_dir():
        where = "is a folder" if output.is_dir() else "is in a folder that does not exist"
        raise ValueError(f"--output {output} {where}; give a file in an existing folder")
    # Pairs that a person has written or bought are not to be lost by a slip.
    if output.exists() and not report_path(output).is_file():
        raise ValueError(
            f"{output} exists and has no {report_path(output).name} next to it, so `jdpo pair` has not written it; "
            "choose another --output, or remove it"
        )


def write_pairs(
    output: Path, material: Material, rules: PairRules, choose_for: ChooseFor | None = None
) -> dict[str, Any]:
    """Makes the pairs of all prompts and writes them, with their report.

    The files follow from the arguments: written again, they are equal byte for byte.

    Returns:
      the report.

    Raises:
      ValueError: see `check_output`.
      OSError: the folder cannot be written.
    """
    check_output(output)
    found = [(group, _select(group, rules, choose_for)) for group in material.groups]
    report = make_report(material, rules, found)
    # The report first: it marks the pairs as ours, so that a command that was killed between the two can be repeated.
    write_durably(report_path(output), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    with replacing(output) as file:
        for row in _rows(found):
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return report


def _select(group: Group, rules: PairRules, choose_for: ChooseFor | None) -> Selection:
    prompt_id = group.question.prompt_id
    if choose_for is None:
        return select(group.candidates, rules, prompt_id)
    return select(group.candidates, rules, prompt_id, lambda a, b: choose_for(prompt_id, a, b))


def _rows(found: list[tuple[Group, Selection]]) -> Iterator[dict[str, Any]]:
    for group, selection in found:
        for pair in selection.pairs:
            yield pair_row(group.question, pair)


def pair_row(question: Question, pair: Proposal) -> dict[str, Any]:
    """Returns a pair as a row that jdpo reads: plain text if the prompt is, else messages."""
    chosen, rejected = pair

    def side(candidate: Candidate) -> Text:
        if isinstance(question.prompt, str):
            return candidate.text
        return [candidate.message or assistant(candidate.text)]

    row: dict[str, Any] = {"prompt": question.prompt, "chosen": side(chosen), "rejected": side(rejected)}
    if (margin := margin_of(chosen, rejected)) is not None:
        row |= {"score_chosen": chosen.score, "score_rejected": rejected.score, "margin": float(margin)}
    if question.tools is not None:
        row["tools"] = question.tools
    if question.template_kwargs is not None:
        row["chat_template_kwargs"] = question.template_kwargs
    # Last: they lead back to the answers, and nobody trains on them.
    return row | {
        "prompt_id": question.prompt_id,
        "sample_chosen": chosen.sample,
        "sample_rejected": rejected.sample,
    }
