"""The tables of the report: their texts, which terminal and report.md show alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jdpo.quickstart.experiment import DPO, PRETRAIN, STANDARD
from jdpo.quickstart.notation import odds, percent
from jdpo.quickstart.results import BEFORE, STAGES
from jdpo.quickstart.samples import ASKED, Sampled, in_words
from jdpo.safe_text import markdown

Results = Mapping[str, Any]

STAGE_TITLES = {BEFORE: "before", STANDARD: "standard training", DPO: "DPO"}


class Group(NamedTuple):
    """Lines of a table that belong together.

    Attributes:
      label: what they are about; in the first column.
      note: more about it, shown after it or below it.
      lines: the cells of the other columns.
    """

    label: str
    note: str
    lines: Sequence[Sequence[str]]


class Table(NamedTuple):
    """A table as texts.

    Attributes:
      columns: headers, the first one for labels; `numbers` of the last columns hold numbers.
    """

    title: str
    caption: str
    columns: Sequence[str]
    numbers: int
    groups: Sequence[Group]


def all_tables(results: Results, sampled: Sequence[Sampled]) -> list[Table]:
    """Returns the tables in the order of the report."""
    return [frequency_table(results), correction_table(results), carry_over_table(results), sample_table(sampled)]


def frequency_table(results: Results) -> Table:
    """Returns each answer's frequency in the corpus and its probability under the model."""
    kinds = {"well_known": "capital best known", "mistaken": "other city best known"}
    groups = []
    for name, group in results["frequencies"]["groups"].items():
        countries = group["countries"]
        one = len(countries) == 1
        lines = [
            (f"{city} (right)" if one and row == 0 else city, percent(group["in_corpus"][row]), percent(learnt))
            for row, (city, learnt) in enumerate(zip(group["cities"], group["learnt"], strict=True))
        ]
        label = f"capital of {countries[0]}" if one else f"{len(countries)} countries: {kinds[name]}"
        groups.append(Group(label, "", lines))
    return Table(
        "1. What frequency taught the model",
        "Pre-training learns how often each answer follows the question, not which one is true.",
        ("question", "answer", "in the corpus", "learnt"),
        2,
        groups,
    )


def correction_table(results: Results) -> Table:
    """Returns probabilities and odds before, after standard training, and after DPO."""
    right, wrong, _ = results["frequencies"]["groups"]["ireland"]["cities"]
    groups = []
    for cell, label, names in (
        ("ireland", "Ireland", (right, wrong)),
        ("trained_countries_trained_phrasings", "corrected countries", ("right", "wrong")),
        ("held_out_countries_trained_phrasings", "countries nobody corrected", ("right", "wrong")),
        ("held_out_mistaken", "those of them commonly mistaken", ("right", "wrong")),
    ):
        stages = [results["stages"][name][cell] for name in STAGES]
        lines = [
            (names[0], *(percent(stage["right"]) for stage in stages)),
            (names[1], *(percent(stage["wrong"]) for stage in stages)),
            ("any other answer", *(percent(stage["other"] + stage["anything_else"]) for stage in stages)),
            (f"odds {names[0]} : {names[1]}", *(odds(stage["odds"]) for stage in stages)),
        ]
        groups.append(Group(label, "", lines))
    return Table(
        f"2. Two ways to correct it, {results['cost'][DPO]['steps']} steps each",
        "Standard training repeats the right answers. DPO prefers them to the wrong ones.",
        ("about", "probability of", *STAGE_TITLES.values()),
        3,
        groups,
    )


def carry_over_table(results: Results) -> Table:
    """Returns the probability of the right answer, and how often it is the most probable of the three."""
    groups = []
    for cell, label in {
        "trained_countries_trained_phrasings": "corrected countries",
        "trained_countries_held_out_phrasings": "in new phrasings",
        "held_out_countries_trained_phrasings": "countries nobody corrected",
        "held_out_countries_held_out_phrasings": "in new phrasings",
        "held_out_mistaken": "only the commonly mistaken",
    }.items():
        stages = [results["stages"][name][cell] for name in STAGES]
        cells = [f"{percent(stage['right'])} ({100 * stage['accuracy']:.0f} %)" for stage in stages]
        groups.append(Group(f"{label} ({stages[0]['questions']})", "", [cells]))
    return Table(
        "3. Does it carry over?",
        "Mean probability of the right answer; in brackets, the share of questions where it is the most probable.",
        ("questions (how many)", *STAGE_TITLES.values()),
        3,
        groups,
    )


def sample_table(sampled: Sequence[Sampled]) -> Table:
    """Returns the sampled answers."""
    names = {BEFORE: PRETRAIN, STANDARD: STANDARD, DPO: DPO}
    groups = [
        Group(
            row.question,
            f"{row.about}; right: {row.right}",
            [[in_words(row.answers[names[stage]]) for stage in STAGES]],
        )
        for row in sampled
    ]
    return Table(
        f"4. Asked {ASKED} times",
        "Sampled at temperature 1 from the exported models.",
        ("question", *STAGE_TITLES.values()),
        0,
        groups,
    )


def markdown_table(table: Table) -> str:
    """Returns a table as Markdown, without its title."""
    rules = ["---"] * (len(table.columns) - table.numbers) + ["---:"] * table.numbers
    lines = [_line(table.columns), _line(rules)]
    for group in table.groups:
        for number, cells in enumerate(group.lines):
            # The label is in the first line of its group only.
            label = " ".join(filter(None, (group.label, group.note and f"({group.note})"))) if number == 0 else ""
            texts, numbers = cells[: len(cells) - table.numbers], cells[len(cells) - table.numbers :]
            # Answers are text of a model, which may hold what Markdown would read as markup.
            lines.append(_line([*(markdown(text) for text in (label, *texts)), *numbers]))
    return "\n".join([*lines, "", table.caption])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
