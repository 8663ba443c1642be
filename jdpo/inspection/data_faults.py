"""What is wrong with the data of a run, how much it matters, what it does to training and what to do.

`--strict` fails on faults alone. See `jdpo.inspection.check_table` for what makes one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from jdpo.data.schemas.formats import NO_SHARED_TURN, STARTS_WITH_ANSWER, TIED
from jdpo.data.tokens.boundaries import PLAIN_TEXT, WOULD_MERGE
from jdpo.data.tokens.prompt_end import PROMPT_REBUILT, PROMPT_SHORTENED, STARTS_IN_PROMPT
from jdpo.data.tokens.row_notes import ANSWER_CHANGED, TOOLS_UNUSED, TURN_CHANGED
from jdpo.data.tokens.tokenize import PROMPT_CUT
from jdpo.data.tokens.turns import NOT_LEARNT
from jdpo.data.tokens.unwritten import UNWRITTEN
from jdpo.inspection.check_table import CHECKS
from jdpo.inspection.figure_words import percent
from jdpo.inspection.raw_text import BIDI, CONTROL, INVISIBLE, REPLACEMENT, SPECIAL, SPECIAL_IN_PLAIN, SURROGATE
from jdpo.inspection.row_statistics import wilson
from jdpo.models.weights.embedding_rows import MOST_NAMED, row_count
from jdpo.safe_text import terminal

Severity = Literal["fault", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("fault", "warning", "note")

FEW_EVAL_ROWS = 400
"""Evaluation rows below which an accuracy is said with its interval: 400 leave it 5 points on either side."""

BIASED, STRONGLY_BIASED = 0.6, 0.4
"""Chosen sides longer in more (or less) than this share of pairs: length alone is worth a few points of accuracy."""

_NOTE_CHECKS = {
    "answer_starts_in_prompt": STARTS_IN_PROMPT,
    "prompt_rebuilt": PROMPT_REBUILT,
    "prompt_shortened": PROMPT_SHORTENED,
    "plain_text": PLAIN_TEXT,
    "answer_changed": ANSWER_CHANGED,
    "turn_changed": TURN_CHANGED,
    "tools_unused": TOOLS_UNUSED,
    "would_merge": WOULD_MERGE,
    "prompt_cut": PROMPT_CUT,
}

Json = Mapping[str, Any]


class Finding(NamedTuple):
    """Something to know before training.

    Attributes:
      severity: fault (`--strict` fails), warning, or note.
      name: of the check.
      summary: what was found, with its size.
      effect: what it does to training.
      remedy: what to do.
      rows, share, first: how many rows, of those that the check looks at, and where the first comes from; None where
        it is not about rows.
    """

    severity: Severity
    name: str
    summary: str
    effect: str
    remedy: str
    rows: int | None = None
    share: float | None = None
    first: str | None = None


_TEXT_CHECKS = {
    SPECIAL: "special_tokens",
    SPECIAL_IN_PLAIN: "special_tokens_in_plain_text",
    CONTROL: "control",
    BIDI: "bidi",
    INVISIBLE: "invisible",
    REPLACEMENT: "replacement",
    SURROGATE: "surrogate",
}


def findings_of(document: Json) -> list[Finding]:
    """Everything to know of a document, faults first.

    Args:
      document: of `jdpo.inspection.document`, without its findings.
    """
    found = [*_model_findings(document), *_leakage_findings(document), *_part_findings(document["train"], "")]
    if document["eval"] is not None:
        found += _part_findings(document["eval"], ", in evaluation")
    found += [*_bias_findings(document), *_eval_findings(document)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _checked(name: str, rows: int, of: int, first: str | None, where: str = "") -> Iterator[Finding]:
    """The finding of a check; nothing where no row has it."""
    if not rows:
        return
    check, share = CHECKS[name], rows / max(of, 1)
    severity: Severity = "note"
    if check.fault is not None and share > check.fault:
        severity = "fault"
    elif check.warning is not None and share > check.warning:
        severity = "warning"
    summary = f"{check.what}{where}: {rows:,} of {of:,} ({percent(share)})"
    yield Finding(severity, name, summary, check.effect, check.remedy, rows, share, first)


def _model_findings(document: Json) -> Iterator[Finding]:
    model = document["model"]
    if model["problem"] is not None:
        readable = model["vocab_size"] is not None
        remedy = "change the config as it says" if readable else "use another model folder"
        yield Finding("fault", "model", model["problem"], "training refuses to start", remedy)
        if not readable:
            return
    own_tokens = model["tokenizer_size"] - len(model["added_tokens"])
    if own_tokens > model["vocab_size"]:
        yield Finding(
            "fault",
            "model",
            f"the tokenizer has {own_tokens:,} tokens and the model's embedding {model['vocab_size']:,} rows",
            "there is no embedding for some tokens; training refuses to start",
            "use the tokenizer that belongs to the model",
        )
    for warning in model["warnings"]:
        yield Finding(
            "warning",
            "tokenizer",
            warning,
            "a server that reads tokenizer.json alone feeds the model other tokens than those it is trained on",
            "save the tokenizer again with the transformers version that serves it, or correct tokenizer_config.json",
        )
    yield from _untrained_findings(model)


def _untrained_findings(model: Json) -> Iterator[Finding]:
    found = model["untrained_tokens"]
    if not found:
        return
    named = [f"{terminal(one['token'])} (id {one['id']}, in {row_count(one['rows'])})" for one in found[:MOST_NAMED]]
    more = f" and {len(found) - MOST_NAMED:,} more" if len(found) > MOST_NAMED else ""
    started = model["starts_untrained_tokens"]
    yield Finding(
        "note" if started else "fault",
        "untrained_tokens",
        f"tokens of the training rows whose embedding was never trained: {', '.join(named)}{more}",
        "they start at the mean of the trained rows"
        if started
        else "their embedding is zero or below 1 % of the median norm: gradients there are large, and adapters cannot "
        "change it",
        "nothing, if it is meant"
        if started
        else "set init_untrained_tokens: true, which starts them at the mean of the trained rows (not with lora), or "
        "use a chat template of tokens that the model knows",
        max(one["rows"] for one in found),
        first=found[0]["first"],
    )


def _leakage_findings(document: Json) -> Iterator[Finding]:
    leakage = document["leakage"]
    if leakage is not None:
        first = next((f"{one['eval']} is {one['train']}" for one in leakage["examples"]), None)
        yield from _checked("leakage", leakage["rows"], document["eval"]["rows_kept"], first)


def _part_findings(part: Json, where: str) -> Iterator[Finding]:
    kept, raw = part["rows_kept"], part["rows_read"]
    for kind, mark in part["text"].items():
        yield from _checked(_TEXT_CHECKS[kind], mark["rows"], raw, f"{mark['first']}: {mark['excerpt']}", where)
    rows_of: dict[str, Json] = dict(part["edges"])
    rows_of |= {name: part["repeats"][name] for name in ("contradictions", "same_row", "same_prompt")}
    rows_of |= {name: part[name] for name in ("answer_cut", "too_long_for_model")}
    if part["margins"] is not None:
        rows_of["negative_margins"] = part["margins"]["negative"]
    for name, counted in rows_of.items():
        yield from _checked(name, counted["rows"], kept, counted["first"], where)
    tied = [one for one in part["dropped"] if one["reason"] == TIED]
    others = [one for one in part["dropped"] if one["reason"] != TIED]
    biggest = next((f"{one['reason']}: {one['first']}" for one in others), None)
    all_rows, num_tied = kept + part["rows_dropped"], sum(one["rows"] for one in tied)
    yield from _checked("dropped", part["rows_dropped"] - num_tied, all_rows, biggest, where)
    yield from _checked("ties", num_tied, all_rows, tied[0]["first"] if tied else None, where)
    for one in part["dropped"]:
        if one["reason"] == NOT_LEARNT:
            yield from _checked("shown_only", one["rows"], kept + part["rows_dropped"], one["first"], where)
    notes = {one["note"]: one for one in part["notes"]}
    unprompted = [one for one in part["dropped"] if one["reason"] == NO_SHARED_TURN]
    unprompted += [notes[STARTS_WITH_ANSWER]] if STARTS_WITH_ANSWER in notes else []
    if unprompted:
        num_rows = sum(one["rows"] for one in unprompted)
        yield from _checked("no_prompt", num_rows, kept + part["rows_dropped"], unprompted[0]["first"], where)
    for name, note in _NOTE_CHECKS.items():
        if note in notes:
            yield from _checked(name, notes[note]["rows"], kept, notes[note]["first"], where)
    for kind, note in UNWRITTEN.items():
        if note in notes:
            first = notes[note]["first"]
            yield from _checked("content_unwritten", notes[note]["rows"], kept, first, f" ({kind}){where}")


def _bias_findings(document: Json) -> Iterator[Finding]:
    bias = document["train"]["length_bias"]
    if bias is None or bias["p_value"] is None or bias["p_value"] >= 0.01:
        return
    share, longer = bias["share_longer"], bias["share_longer"] > 0.5
    strong = share > BIASED or share < STRONGLY_BIASED
    accuracy = bias["longer_accuracy"] if longer else bias["shorter_accuracy"]
    yield Finding(
        "warning" if strong else "note",
        "length_bias",
        f"the chosen side is the {'longer' if longer else 'shorter'} one in {percent(max(share, 1 - share))} of the "
        f"pairs that differ in length, by {abs(bias['mean_difference']):.1f} tokens in the mean of all",
        f"a policy that learns length alone reaches a reward accuracy of {accuracy:.2f} on such pairs, and its answers "
        f"grow {'longer' if longer else 'shorter'}; read an accuracy below that as no more than length",
        "compare with loss_type sigmoid_norm, simpo or ld_alpha, which weigh length down; watch the length of samples",
    )


def _eval_findings(document: Json) -> Iterator[Finding]:
    held_out = document["eval"]
    if held_out is None:
        yield Finding(
            "note",
            "no_evaluation",
            "nothing is held out for evaluation",
            "training metrics alone do not tell learning from memorising",
            "set eval_fraction: 0.05, or eval_datasets",
        )
    elif held_out["rows_kept"] < FEW_EVAL_ROWS:
        rows = held_out["rows_kept"]
        low, high = wilson(round(rows * 0.6), rows)
        yield Finding(
            "note",
            "few_evaluation_rows",
            f"{rows:,} evaluation rows",
            f"a measured accuracy of 0.60 may be anything from {low:.2f} to {high:.2f} (95 %)",
            "hold more rows out, or do not rank checkpoints by small differences",
        )
