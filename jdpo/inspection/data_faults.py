"""Finds what is wrong with the data of a run; `--strict` fails on faults only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jdpo.data.schemas import formats
from jdpo.data.tokens import boundaries, prompt_end, row_notes, tokenize, turns, unwritten
from jdpo.models.weights.embedding_rows import MOST_NAMED
from jdpo.reports.data_summary.check_table import CHECKS, OTHERS
from jdpo.reports.data_summary.row_statistics import Json
from jdpo.reports.share_tests import wilson
from jdpo.safe_text import terminal
from jdpo.words import figure, listed, percent

SEVERITIES = ("fault", "warning", "note")

FEW_EVAL_ROWS = 400
"""With fewer evaluation rows, a finding gives the confidence interval of an accuracy: +-5 points at 400 rows."""

BIASED, STRONGLY_BIASED = 0.6, 0.4
"""A share of longer chosen sides outside this range is a warning: length alone then gains some points of accuracy."""

_NOTES = {
    "answer_starts_in_prompt": prompt_end.STARTS_IN_PROMPT,
    "prompt_rebuilt": prompt_end.PROMPT_REBUILT,
    "prompt_shortened": prompt_end.PROMPT_SHORTENED,
    "plain_text": boundaries.PLAIN_TEXT,
    "answer_changed": row_notes.ANSWER_CHANGED,
    "turn_changed": row_notes.TURN_CHANGED,
    "tools_unused": row_notes.TOOLS_UNUSED,
    "would_merge": boundaries.WOULD_MERGE,
    "prompt_cut": tokenize.PROMPT_CUT,
}
"""Name of a check -> the note under which tokenization counts its rows."""


def findings_of(document: Json) -> list[Json]:
    """Returns the findings about a document of `jdpo.inspection.document`, faults first."""
    train, held_out, leakage = document["train"], document["eval"], document["leakage"]
    found = list(_model_findings(document["model"]))
    if leakage is not None:
        first = next((f"{one['eval']} is {one['train']}" for one in leakage["examples"]), None)
        found += _checked("leakage", leakage | {"first": first}, held_out["rows_kept"])
    found += _part_findings(train, "")
    if held_out is not None:
        found += _part_findings(held_out, ", in evaluation")
    found += [*_length_findings(train["length_bias"]), *_eval_findings(held_out)]
    # The sort is stable: findings of one severity keep the order above.
    return sorted(found, key=lambda finding: SEVERITIES.index(finding["severity"]))


def _finding(severity: str, name: str, summary: str, effect: str, remedy: str, **rows: Any) -> Json:
    finding = {"severity": severity, "name": name, "summary": summary, "effect": effect, "remedy": remedy}
    return {**finding, "rows": None, "share": None, "first": None, **rows}


def _other(severity: str, name: str, texts: Mapping[str, str], *, words: str = "", **rows: Any) -> Json:
    """Returns a finding that is not about a share of rows, in the words of OTHERS, which `texts` completes."""
    _, *sentences = OTHERS[words or name]
    what, effect, remedy = (sentence.format(**texts) for sentence in sentences)
    return _finding(severity, name, what, effect, remedy, **rows)


def _checked(name: str, count: Mapping[str, Any], of: int, where: str = "") -> Iterator[Json]:
    """Yields the finding of a check, if any row has it.

    Args:
      count: {rows, first}.
      of: number of rows that the check looks at.
      where: which of the rows, for the summary.
    """
    rows, check = count["rows"], CHECKS[name]
    if not rows:
        return
    share, severity = rows / max(of, 1), "note"
    if check.above.fault is not None and share > check.above.fault:
        severity = "fault"
    elif check.above.warning is not None and share > check.above.warning:
        severity = "warning"
    summary = f"{check.what}{where}: {rows:,} of {of:,} ({percent(share)})"
    yield _finding(severity, name, summary, check.effect, check.remedy, rows=rows, share=share, first=count["first"])


def _model_findings(model: Json) -> Iterator[Json]:
    readable = model["vocab_size"] is not None
    if model["problem"] is not None:
        remedy = "change the config as it says" if readable else "use another model folder"
        yield _finding("fault", "model", model["problem"], "training refuses to start", remedy)
    if not readable:  # without config.json, the sizes below are unknown
        return
    own_tokens = model["tokenizer_size"] - len(model["added_tokens"])
    if own_tokens > model["vocab_size"]:
        sizes = {"tokens": f"{own_tokens:,}", "vocab_size": f"{model['vocab_size']:,}"}
        yield _other("fault", "model", sizes, words="tokenizer_too_large")
    for warning in model["warnings"]:
        yield _other("warning", "tokenizer", {"warning": warning})
    if found := model["untrained_tokens"]:
        named = [f"{terminal(one['token'])} (id {one['id']}, in {figure(one['rows'], 'row')})" for one in found]
        severity, words = ("note", "started_tokens") if model["starts_untrained_tokens"] else ("fault", "")
        texts, most = {"tokens": listed(named, MOST_NAMED)}, max(one["rows"] for one in found)
        yield _other(severity, "untrained_tokens", texts, words=words, rows=most, first=found[0]["first"])


def _part_findings(part: Json, where: str) -> Iterator[Json]:
    kept, notes = part["rows_kept"], {one["note"]: one for one in part["notes"]}
    for kind, mark in part["text"].items():  # counted per raw row; the other checks count kept rows
        first = f"{mark['first']}: {mark['excerpt']}"
        yield from _checked(kind, {"rows": mark["rows"], "first": first}, part["rows_read"], where)
    counts = dict(part["edges"])
    counts |= {name: part["repeats"][name] for name in ("contradictions", "same_row", "same_prompt")}
    counts |= {name: part[name] for name in ("answer_cut", "too_long_for_model")}
    if part["margins"] is not None:
        counts["negative_margins"] = part["margins"]["negative"]
    for name, count in counts.items():
        yield from _checked(name, count, kept, where)
    yield from _dropped_findings(part, notes, where)
    for name, note in _NOTES.items():
        if note in notes:
            yield from _checked(name, notes[note], kept, where)
    for kind, note in unwritten.UNWRITTEN.items():
        if note in notes:
            yield from _checked("content_unwritten", notes[note], kept, f" ({kind}){where}")


def _dropped_findings(part: Json, notes: Mapping[str, Json], where: str) -> Iterator[Json]:
    all_rows, none = part["rows_kept"] + part["rows_dropped"], {"rows": 0, "first": None}
    dropped = {one["reason"]: one for one in part["dropped"]}
    tied = dropped.get(formats.TIED, none)
    first = next((f"{reason}: {one['first']}" for reason, one in dropped.items() if reason != formats.TIED), None)
    # Ties are counted by themselves: they are usual, and no sign that rows are lost.
    yield from _checked("dropped", {"rows": part["rows_dropped"] - tied["rows"], "first": first}, all_rows, where)
    yield from _checked("ties", tied, all_rows, where)
    yield from _checked("shown_only", dropped.get(turns.NOT_LEARNT, none), all_rows, where)
    lost, unprompted = dropped.get(formats.NO_SHARED_TURN, none), notes.get(formats.STARTS_WITH_ANSWER, none)
    both = {"rows": lost["rows"] + unprompted["rows"], "first": lost["first"] or unprompted["first"]}
    yield from _checked("no_prompt", both, all_rows, where)


def _length_findings(bias: Json | None) -> Iterator[Json]:
    if bias is None or bias["p_value"] is None or bias["p_value"] >= 0.01:  # None: all sides are equally long
        return
    share, way = bias["share_longer"], "longer" if bias["share_longer"] > 0.5 else "shorter"
    severity = "warning" if share > BIASED or share < STRONGLY_BIASED else "note"
    texts = {"share": percent(max(share, 1 - share)), "difference": f"{abs(bias['mean_difference']):.1f}"}
    texts |= {"way": way, "accuracy": f"{bias[f'{way}_accuracy']:.2f}"}
    yield _other(severity, "length_bias", texts)


def _eval_findings(held_out: Json | None) -> Iterator[Json]:
    if held_out is None:
        yield _other("note", "no_evaluation", {})
    elif held_out["rows_kept"] < FEW_EVAL_ROWS:
        rows = held_out["rows_kept"]
        # At an accuracy of 0.6, which the text of the finding names.
        low, high = (f"{bound:.2f}" for bound in wilson(round(rows * 0.6), rows))
        yield _other("note", "few_evaluation_rows", {"count": f"{rows:,}", "low": low, "high": high})
