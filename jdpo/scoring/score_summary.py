"""The summary of a file of scores, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jdpo.scoring.score_files import SCORES, VERDICTS, read_about
from jdpo.words import figure


def summary_lines(folder: Path, name: str) -> list[str]:
    """Returns a table of the scores of this name: count, mean, spread, range, and answers without a score by reason.

    Where answers were compared, the comparisons are counted by verdict.

    Raises:
      ValueError: the scores are not complete.
    """
    scores, verdicts = (read_about(folder, kind, name) for kind in (SCORES, VERDICTS))
    if scores is None:
        raise ValueError(f"the scores {name} in {folder} are not complete")
    rows = [("scorer", str(scores["made_by"].get("by"))), *_of_scores(scores)]
    if verdicts is not None and verdicts["num_comparisons"]:
        rows += _of_verdicts(verdicts)
    rows += [(what, f"{count:,}") for what, count in scores.get("counts", {}).items()]
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {value}" for label, value in rows]


def _of_scores(about: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("answers", f"{about['num_answers']:,}"), ("scores", f"{about['num_scores']:,}")]
    if about["num_scores"]:
        rows += [
            ("mean", f"{about['mean']:.4g}"),
            ("standard deviation", f"{about['standard_deviation']:.4g}"),
            ("range", f"{about['smallest']:.4g} to {about['largest']:.4g}"),
        ]
    # The most frequent reason first.
    reasons = sorted(about["nulls"].items(), key=lambda item: -item[1])
    return rows + [("no score", f"{count:,}: {reason}") for reason, count in reasons]


def _of_verdicts(about: dict[str, Any]) -> list[tuple[str, str]]:
    # A tie is a decision, too: it counts half in the scores of both answers.
    decided = about["a"] + about["b"] + about["tie"]
    disagreements = figure(about["orders_disagree"], "time")
    return [
        ("comparisons", f"{about['num_comparisons']:,}, each in both orders"),
        ("decided", f"{decided:,}, ties included"),
        ("ties", f"{about['tie']:,}, of which the two orders disagree {disagreements}"),
        ("no verdict", f"{about['null']:,}"),
    ]
