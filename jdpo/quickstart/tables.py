"""Prints the report in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.quickstart.experiment import DPO, PRETRAIN, STANDARD
from jdpo.quickstart.experiment_findings import odds, percent, probability
from jdpo.quickstart.results import BEFORE, STAGES
from jdpo.quickstart.samples import ASKED, Sampled, in_words
from jdpo.safe_text import terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Results = Mapping[str, Any]

_STAGE_TITLES = {BEFORE: "before", STANDARD: "standard training", DPO: "DPO"}
_STAGE_STYLES = {BEFORE: "", STANDARD: "yellow", DPO: "green"}
_GROUPS = {
    "ireland": "",
    "mistaken_example": "",
    "well_known": "capital best known",
    "mistaken": "other city best known",
}


def print_report(
    console: Console,
    results: Results,
    sampled: Sequence[Sampled],
    sentences: Mapping[str, Sequence[str]],
    files: Sequence[Path],
) -> None:
    """Prints tables, sentences and the paths of the files."""
    for table in (
        frequency_table(results),
        correction_table(results),
        accuracy_table(results),
        sample_table(sampled),
    ):
        console.print()
        console.print(table)
    for heading, lines in sentences.items():
        console.print(f"\n[bold]{heading}[/bold]")
        # Sentences are plain text: brackets in them must not be read as rich's markup.
        console.print(_bullets(lines), highlight=False, markup=False)
    console.print()
    for path in files:
        console.print(f"  {terminal(path)}", highlight=False, markup=False, emoji=False, soft_wrap=True)


def frequency_table(results: Results) -> Table:
    """Returns each answer's frequency in the corpus and its probability under the model."""
    table = _table(
        "1. What frequency taught the model",
        "Pre-training learns how often each answer follows the question, not which one is true.",
    )
    for title, justify in (("question", "left"), ("answer", "left"), ("in the corpus", "right"), ("learnt", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for name, group in results["frequencies"]["groups"].items():
        countries = group["countries"]
        about = f"capital of {countries[0]}" if len(countries) == 1 else f"{len(countries)} with {_GROUPS[name]}"
        for row, city in enumerate(group["cities"]):
            right = " (right)" if row == 0 and len(countries) == 1 else ""
            table.add_row(
                about if row == 0 else "",
                f"{city}{right}",
                percent(group["in_corpus"][row]),
                percent(group["learnt"][row]),
                end_section=row == 2,
            )
    return table


def correction_table(results: Results) -> Table:
    """Returns probabilities and odds before, after standard training, and after DPO."""
    steps = results["cost"][DPO]["steps"]
    right, wrong, _ = results["frequencies"]["groups"]["ireland"]["cities"]
    table = _table(
        f"2. Two ways to correct it, {steps} steps each",
        "Standard training repeats the right answers. DPO prefers them to the wrong ones.",
    )
    table.add_column("question about")
    _stage_columns(table, "probability of")
    for cell, about, names in (
        ("ireland", "Ireland", (right, wrong)),
        ("trained_countries_trained_phrasings", "corrected\ncountries", ("right", "wrong")),
        ("held_out_countries_trained_phrasings", "countries\nnobody\ncorrected", ("right", "wrong")),
        ("held_out_mistaken", "those of them\ncommonly\nmistaken", ("right", "wrong")),
    ):
        stages = [results["stages"][name][cell] for name in STAGES]
        measures = {
            names[0]: [probability(stage["right"]) for stage in stages],
            names[1]: [probability(stage["wrong"]) for stage in stages],
            "any other answer": [probability(stage["other"] + stage["anything_else"]) for stage in stages],
            f"odds {names[0]} : {names[1]}": [odds(stage["odds"]) for stage in stages],
        }
        # The label runs down the first column, one line per measure.
        words = about.split("\n")
        for row, (measure, values) in enumerate(measures.items()):
            table.add_row(
                words[row] if row < len(words) else "", measure, *values, end_section=row == len(measures) - 1
            )
    return table


def accuracy_table(results: Results) -> Table:
    """Returns how often the right city is the most probable of the three."""
    table = _table(
        "3. Does it carry over?",
        "Share of questions for which the right city is the most probable of the three.",
    )
    _stage_columns(table, "questions about (how many)")
    for cell, words in {
        "trained_countries_trained_phrasings": "corrected countries",
        "trained_countries_held_out_phrasings": " in new phrasings",
        "held_out_countries_trained_phrasings": "countries nobody corrected",
        "held_out_countries_held_out_phrasings": " in new phrasings",
        "held_out_mistaken": " only the commonly mistaken",
    }.items():
        stages = [results["stages"][name][cell] for name in STAGES]
        table.add_row(f"{words} ({stages[0]['questions']})", *(percent(stage["accuracy"]) for stage in stages))
    return table


def sample_table(sampled: Sequence[Sampled]) -> Table:
    """Returns the sampled answers."""
    table = _table(f"4. Asked {ASKED} times", "Sampled at temperature 1 from the exported models.")
    _stage_columns(table, "question", justify="left")
    names = {BEFORE: PRETRAIN, STANDARD: STANDARD, DPO: DPO}
    for row in sampled:
        answers = (in_words(row.answers[names[stage]]) for stage in STAGES)
        table.add_row(f"{row.question}\n[dim]{row.about}; right: {row.right}[/dim]", *answers, end_section=True)
    return table


def _bullets(lines: Sequence[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row(" -", Text(line))
    return grid


def _table(title: str, caption: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        caption=caption,
        box=box.ROUNDED,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )


def _stage_columns(table: Table, first: str, justify: str = "right") -> None:
    table.add_column(first)
    for name in STAGES:
        table.add_column(_STAGE_TITLES[name], justify=justify, style=_STAGE_STYLES[name])  # type: ignore[arg-type]
