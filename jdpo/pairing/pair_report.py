"""The report of a pairing: the outcome of every prompt, answer and comparison, counted, as JSON and as a table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from jdpo.pairing import candidates as reasons
from jdpo.pairing.answers_read import Group, Material
from jdpo.pairing.candidates import PairRules, margin_of
from jdpo.pairing.selecting import Selection
from jdpo.reports.share_tests import length_bias
from jdpo.safe_text import terminal
from jdpo.words import figure, percent

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
"""Version of the report."""

BIASED = 0.6
"""A longer (or shorter) chosen side in more than this share of the pairs is a warning, as in `jdpo inspect`."""

SURE = 0.01
"""There is no warning if fair coins would give such a share with at least this probability."""


def make_report(material: Material, rules: PairRules, selections: Iterable[tuple[Group, Selection]]) -> dict[str, Any]:
    """Returns the counts of a pairing.

    In each of `prompts`, `answers` and `pairs` the counts of what was kept and of `dropped`, by reason, add up to the
    first count.
    """
    kept, answers, pairs, prompts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    num_answers = tried = 0
    sides: list[tuple[int, int]] = []
    margins: list[Decimal] = []
    found = list(selections)
    for group, selection in found:
        num_answers += len(group.candidates)
        tried += selection.tried
        kept.update(_roles(selection))
        answers.update(selection.dropped_answers.values())
        pairs.update(selection.dropped_pairs)
        sides += [(chosen.length, rejected.length) for chosen, rejected in selection.pairs]
        margins += [margin for pair in selection.pairs if (margin := margin_of(*pair)) is not None]
        if not selection.pairs:
            prompts[_why_none(selection)] += 1
    # A prompt of two folders is one prompt.
    prompt_ids = frozenset[str]().union(*(source.prompt_ids for source in material.sources))
    prompts["no answers"] = len(prompt_ids) - len(found)
    return {
        "format": FORMAT,
        # The limit in force: some strategies have one of their own.
        "rules": asdict(rules) | {"max_per_prompt": rules.most_pairs},
        "folders": [{"folder": str(source.folder), "answers": source.digest} for source in material.sources],
        "score": None if material.scores is None else {"name": material.scores.name, **material.scores.made_by},
        "prompts": {
            "read": len(prompt_ids),
            "with_pairs": sum(bool(selection.pairs) for _, selection in found),
            "dropped": _sorted(prompts),
        },
        "answers": {
            "read": num_answers,
            "chosen": kept["chosen"],
            "rejected": kept["rejected"],
            "chosen_and_rejected": kept["chosen_and_rejected"],
            "dropped": _sorted(answers),
        },
        "pairs": {"tried": tried, "kept": len(sides), "dropped": _sorted(pairs)},
        "length": {"unit": material.unit, **length_bias(*np.array(sides).T)} if sides else None,
        "margin": _spread(margins) if margins else None,
    }


def _spread(margins: Sequence[Decimal]) -> dict[str, float]:
    spread = {"smallest": min(margins), "median": statistics.median(margins), "largest": max(margins)}
    return {name: float(value) for name, value in spread.items()}


def _roles(selection: Selection) -> list[str]:
    chosen = {pair[0].name for pair in selection.pairs}
    rejected = {pair[1].name for pair in selection.pairs}
    both = len(chosen & rejected)
    return ["chosen_and_rejected"] * both + ["chosen"] * (len(chosen) - both) + ["rejected"] * (len(rejected) - both)


def _why_none(selection: Selection) -> str:
    """Returns why a prompt has no pair: its first comparison, a missing folder, or the reason of most answers."""
    if selection.dropped_pairs:
        return selection.dropped_pairs[0]
    counts = Counter(selection.dropped_answers.values())
    if reasons.ONE_FOLDER in counts:
        return reasons.ONE_FOLDER
    # Of reasons that are equally frequent, the first in the alphabet, so that a report repeats.
    return min(counts, key=lambda reason: (-counts[reason], reason))


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count}


def table_of(report: dict[str, Any]) -> Table:
    """Returns the report as a table for the terminal."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")

    def section(name: str, total: int, kept: dict[str, int], dropped: dict[str, int]) -> None:
        table.add_row(name, f"{total:,}", style="bold")
        for what, count in kept.items():
            table.add_row(f"  {what}", f"{count:,}")
        for reason, count in dropped.items():
            limit = f" ({report['rules']['max_per_prompt']})" if reason == reasons.ENOUGH else ""
            table.add_row(f"  dropped: {terminal(reason)}{limit}", f"{count:,}")

    prompts, answers, pairs = report["prompts"], report["answers"], report["pairs"]
    section("prompts", prompts["read"], {"with pairs": prompts["with_pairs"]}, prompts["dropped"])
    roles = ("chosen", "rejected", "chosen_and_rejected")
    named = {role.replace("_", " "): answers[role] for role in roles if answers[role]}
    section("answers", answers["read"], named, answers["dropped"])
    section("comparisons", pairs["tried"], {"pairs": pairs["kept"]}, pairs["dropped"])
    return table


def notes_of(report: dict[str, Any]) -> list[str]:
    """Returns sentences about the pairs' lengths and margins, and warnings."""
    lines = []
    if (margin := report["margin"]) is not None:
        lines.append(f"margins: {margin['smallest']:.4g} to {margin['largest']:.4g}, median {margin['median']:.4g}")
    if (length := report["length"]) is not None:
        lines.append(
            f"length: chosen {length['mean_chosen']:.1f} {length['unit']} on average, rejected "
            f"{length['mean_rejected']:.1f}; chosen is longer in {figure(length['longer'], 'pair')}, shorter in "
            f"{figure(length['shorter'], 'pair')}"
        )
        share = length["share_longer"]
        if share is not None and max(share, 1 - share) > BIASED and length["p_value"] < SURE:
            way = "longer" if share > 0.5 else "shorter"
            lines.append(
                f"warning: the chosen answer is {way} in {percent(max(share, 1 - share))} of the pairs that differ in "
                f"length, so training may learn to answer {way}; --max_length_gap drops pairs of very different length"
            )
    dropped = report["answers"]["dropped"]
    if report["pairs"]["kept"] == 0:
        lines.append("warning: no pairs; the table says why")
    elif dropped.get(reasons.NO_SCORE, 0) > report["answers"]["read"] / 2:
        lines.append("warning: more than half of the answers have no score")
    return lines
