"""Scores and verdicts of the answers in a `gen` folder, as files.

    gen/scores/NAME.jsonl    {"prompt_id", "sample", "score"}, one line per answer, in the order of the answers; a score
                             that is null has a "reason"
    gen/scores/NAME.json     what made it, the digest of the answers that it belongs to, and a summary
    gen/verdicts/NAME.jsonl  {"prompt_id", "a", "b", "first_ab", "first_ba", "verdict"}, for scorers that compare
    gen/verdicts/NAME.json   as for the scores

The .json file has the digest of the .jsonl next to it and is written last, so a file of scores without it, or with
another one, counts as unfinished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jdpo.durable import write_durably
from jdpo.file_digests import file_digest
from jdpo.generation.values import Answer, Question
from jdpo.json_files import read_json
from jdpo.safe_text import terminal
from jdpo.words import did_you_mean, listed

FORMAT = 1
"""Version of the files; readers refuse others."""

SCORES, VERDICTS = "scores", "verdicts"
"""The folders inside of `gen`."""

RawVerdict = Literal["first", "second", "tie"]
"""A judge's verdict on two answers, by the order in which it saw them."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class Score(NamedTuple):
    """The score of one answer.

    Attributes:
      prompt_id, sample: the answer.
      score: higher is better; None: the scorer has none for this answer.
      reason: why there is none, a few words by which such answers are counted.
    """

    prompt_id: str
    sample: int
    score: float | None
    reason: str | None = None


class Verdict(NamedTuple):
    """A judge's comparison of two answers to one question, in both orders.

    Attributes:
      a, b: their sample numbers.
      first_ab: the raw verdict with a shown first; None: it could not be read.
      first_ba: the raw verdict with b shown first; None: it could not be read.
      verdict: "a" or "b", if both orders agree on it; else "tie", or None if an order has no verdict.
    """

    prompt_id: str
    a: int
    b: int
    first_ab: RawVerdict | None
    first_ba: RawVerdict | None
    verdict: Literal["a", "b", "tie"] | None


class ScoreFile(NamedTuple):
    """A complete file of scores.

    Attributes:
      name: its name in the folder.
      made_by: what made it: "by" as on the command line, and what else decides the scores.
      scores: by (prompt_id, sample).
      summary: count, mean, spread and nulls by reason; see `summarize`.
    """

    name: str
    made_by: dict[str, Any]
    scores: dict[tuple[str, int], Score]
    summary: dict[str, Any]


# --- which answers


def answers_digest(questions: Mapping[str, Question], answers: Iterable[Answer]) -> str:
    """Returns a digest of the answers to score, of their questions and the questions' columns, 64 hexadecimal digits.

    Scores belong to answers with the same digest; it depends on their order, not on the files that hold them.
    """
    digest = hashlib.sha256()
    for question in questions.values():
        _update(digest, [question.prompt_id, question.columns])
    for answer in answers:
        _update(digest, list(answer))
    return digest.hexdigest()


def _update(digest: Any, values: list[Any]) -> None:
    # Columns of Parquet files may hold dates and other values that JSON lacks.
    digest.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")


# --- names


def check_name(name: str) -> None:
    """Refuses a name that cannot be that of a file in every file system.

    Raises:
      ValueError: it has other characters than letters, digits, `.`, `_` and `-`.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a name for scores: expected at most 100 letters, digits, '.', '_' and '-', "
            "the first of them a letter, a digit or '_'"
        )


def names_of(folder: Path, kind: str = SCORES) -> list[str]:
    """Returns the names of the complete files of a kind in a `gen` folder, sorted."""
    return sorted(path.stem for path in (folder / kind).glob("*.json") if path.with_suffix(".jsonl").is_file())


# --- reading


def read_scores(folder: Path, name: str, digest: str) -> ScoreFile:
    """Reads gen/scores/NAME.jsonl.

    Args:
      folder: the `gen` folder.
      digest: `answers_digest` of the answers in the folder.

    Raises:
      ValueError: there is no such file, it is unfinished or damaged, or belongs to other answers.
    """
    rows, about = _read_rows(folder, SCORES, name, digest)
    scores = [Score(row["prompt_id"], row["sample"], row["score"], row.get("reason")) for row in rows]
    return ScoreFile(name, about["made_by"], {(score.prompt_id, score.sample): score for score in scores}, about)


def read_verdicts(folder: Path, name: str, digest: str) -> list[Verdict]:
    """Reads gen/verdicts/NAME.jsonl; arguments and errors as for `read_scores`."""
    rows, _ = _read_rows(folder, VERDICTS, name, digest)
    return [Verdict(*(row[field] for field in Verdict._fields)) for row in rows]


def read_about(folder: Path, kind: str, name: str) -> dict[str, Any] | None:
    """Reads the .json of a file of scores or verdicts; returns None if the file is not there or not finished.

    Raises:
      ValueError: the .json is damaged, or of another version.
    """
    rows, about = _paths(folder, kind, name)
    if not (about.is_file() and rows.is_file()):
        return None
    found = read_json(about)
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{about}: expected format {FORMAT}, found {terminal(found.get('format'))}; it was written by another "
            "version of jdpo: score the answers again"
        )
    # The digest is written last: another one means that the command was killed between the two files.
    return found if found.get("sha256") == file_digest(rows) else None


def _read_rows(folder: Path, kind: str, name: str, digest: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    check_name(name)
    path, _ = _paths(folder, kind, name)
    about = read_about(folder, kind, name)
    if about is None:
        state = "is not complete, or was changed" if path.is_file() else "does not exist"
        raise ValueError(f"{path} {state}; {_others(folder, kind, name)}")
    if about["answers"] != digest:
        raise ValueError(
            f"{path} belongs to other answers than those in {folder}; score them again: "
            f"`jdpo score {folder} --by {terminal(about['made_by'].get('by', '..'))} --name {name} --overwrite`"
        )
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines], about


def _others(folder: Path, kind: str, name: str) -> str:
    names = [other for other in names_of(folder, kind) if other != name]
    hint = did_you_mean(name, names)
    there = f"{kind} there: {listed(names, 10)}" if names else f"there are no {kind} in {folder}"
    return f"{there}{f'; {hint}' if hint else ''}; `jdpo score {folder} --by SCORER --name {name}` writes it"


# --- writing


def write_scores(
    folder: Path,
    name: str,
    scores: Sequence[Score],
    *,
    made_by: dict[str, Any],
    digest: str,
    counts: Mapping[str, int] | None = None,
) -> None:
    """Writes gen/scores/NAME.jsonl and NAME.json; an older file of that name is replaced.

    Args:
      made_by: what made them; `by` as on the command line, and whatever else decides the scores.
      digest: `answers_digest` of the answers.
      counts: see `Scored`.
    """
    rows = []
    for score in scores:
        row: dict[str, Any] = {"prompt_id": score.prompt_id, "sample": score.sample, "score": score.score}
        rows.append(row if score.score is not None else {**row, "reason": score.reason})
    about = {"made_by": made_by, "answers": digest, **summarize(scores)}
    _write(folder, SCORES, name, rows, about | ({"counts": dict(counts)} if counts else {}))


def write_verdicts(
    folder: Path, name: str, verdicts: Sequence[Verdict], *, made_by: dict[str, Any], digest: str
) -> None:
    """Writes gen/verdicts/NAME.jsonl and NAME.json; arguments as for `write_scores`."""
    rows = [verdict._asdict() for verdict in verdicts]
    _write(folder, VERDICTS, name, rows, {"made_by": made_by, "answers": digest, **count_verdicts(verdicts)})


def _write(folder: Path, kind: str, name: str, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    check_name(name)
    path, about_path = _paths(folder, kind, name)
    path.parent.mkdir(exist_ok=True)
    content = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    write_durably(path, content)
    about = {"format": FORMAT, **about, "sha256": hashlib.sha256(content).hexdigest()}
    write_durably(about_path, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def _paths(folder: Path, kind: str, name: str) -> tuple[Path, Path]:
    # Not with_suffix, which would replace the last part of a name like skywork-0.6b.
    return folder / kind / f"{name}.jsonl", folder / kind / f"{name}.json"


# --- summaries


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Returns the number of answers and scores, mean, standard deviation and range of the scores, nulls by reason.

    Numbers of no scores at all are None.
    """
    values = [score.score for score in scores if score.score is not None]
    mean = sum(values) / len(values) if values else None
    reasons: dict[str, int] = {}
    for score in scores:
        if score.score is None:
            reason = score.reason or "no score"
            reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "num_answers": len(scores),
        "num_scores": len(values),
        "mean": mean,
        "standard_deviation": None
        if mean is None
        else (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5,
        "smallest": min(values, default=None),
        "largest": max(values, default=None),
        "nulls": reasons,
    }


def count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Returns the number of comparisons by verdict, and of those whose two orders disagree or that cannot be read."""

    def count(of: str | None) -> int:
        return sum(verdict.verdict == of for verdict in verdicts)

    swapped = {"first": "second", "second": "first", "tie": "tie"}
    return {
        "num_comparisons": len(verdicts),
        "a": count("a"),
        "b": count("b"),
        "tie": count("tie"),
        "null": count(None),
        "orders_disagree": sum(
            verdict.verdict is not None
            and verdict.first_ab is not None
            and verdict.first_ba != swapped[verdict.first_ab]
            for verdict in verdicts
        ),
    }
