"""The table of figures in a terminal of 80 columns."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from jdpo.comparison.compare_document import SECTIONS, Figure
from jdpo.comparison.compare_table import figure_table
from jdpo.comparison.figures.answer_figures import AnswerPair, answer_figures
from jdpo.comparison.figures.divergence_figures import Distances, divergence_figures
from jdpo.comparison.figures.fact_figures import Fact, fact_figures
from jdpo.comparison.figures.pair_figures import PairRows, pair_figures
from jdpo.comparison.figures.win_figures import Won, win_rates
from jdpo.comparison.packed_values import Divergences
from jdpo.generation.prompts import make_question
from jdpo.generation.values import Answer

NUM = 40


def every_figure() -> list[Figure]:
    """Returns all figures of a comparison, with numbers that are about as long as real ones."""
    rng = np.random.default_rng(0)
    before = rng.normal(-380, 30, (NUM, 2))
    after = before + rng.normal(-20, 15, (NUM, 2))
    rows = PairRows(
        datasets=("pairs",),
        dataset_of=np.zeros(NUM, int),
        prompts=np.arange(NUM),
        origins=[""] * NUM,
        lengths=rng.integers(50, 300, (NUM, 2)),
        before=before,
        after=after,
    )
    ids = [f"{row:016x}" for row in range(NUM)]
    drawn = {(one, 0): Divergences(rng.random(90), rng.random(90)) for one in ids}
    answers = [Answer(one, 0, {"role": "assistant", "content": "a b c d e f"}, [1] * 120, "stop", -1.0) for one in ids]
    facts = [Fact(make_question(one, ""), "yes") for one in ids]
    return [
        *pair_figures(rows, beta=0.1),
        *divergence_figures(Distances(drawn, drawn, [])),
        *answer_figures([AnswerPair(one, one) for one in answers]),
        *win_rates([Won(one, 0, row % 2, row - 20, (True, False)) for row, one in enumerate(ids)]).figures,
        *fact_figures(facts, rng.random(NUM), rng.random(NUM)),
    ]


def test_a_figure_has_one_line_at_80_columns() -> None:
    figures = every_figure()
    console = Console(file=io.StringIO(), width=80)
    console.print(figure_table(figures))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    # Two titles that name the answers of the other model have a second line.
    assert len(lines) == 1 + len({figure.section for figure in figures}) + len(figures) + 2
    assert len({figure.section for figure in figures}) == len(SECTIONS)
    assert not any("…" in line for line in lines)
