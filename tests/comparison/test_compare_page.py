"""compare.html: hostile texts stay texts, figures that are missing leave no holes, and a browser loads nothing."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from jdpo.comparison.compare_document import (
    AnswerShown,
    AnswersSideBySide,
    CalibrationBin,
    ComparedFact,
    ComparedModel,
    CompareDocument,
    Comparison,
    FallenPair,
    Figure,
    Values,
    Verdict,
)
from jdpo.comparison.compare_page import compare_page, write_compare_page
from jdpo.comparison.compare_plots import histogram
from jdpo.comparison.figures.fallen_pairs import fallen_pairs
from jdpo.comparison.figures.pair_figures import PairRows
from jdpo.comparison.intervals import Estimate
from jdpo.comparison.word_diff import Piece, word_diff
from tests.conftest import write_jsonl
from tests.html_page import HtmlPage, assert_only_text, chromium

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[31m\u202e{{ 7 * 7 }}</p></style> &amp;'


def document(text: str = "It is Dublin, a city by the sea.") -> CompareDocument:
    """A comparison with every part that the page shows; `text` is the answer after, and a name."""

    def values(before: float, after: float, spread: float, p_value: float | None = None) -> Values:
        first, second, change = (
            Estimate(value, value - spread, value + spread) for value in (before, after, after - before)
        )
        return Values(before=first, after=second, difference=change, num_prompts=180, num_rows=200, p_value=p_value)

    def distance(name: str, title: str, value: float) -> Figure:
        found = Values(after=Estimate(value, value * 0.8, value * 1.2), num_prompts=50, num_rows=100)
        return Figure(
            name=name, title=title, section="divergence", unit="nats", better="neither", all=found, neutral=None
        )

    figures = [
        Figure(
            name="accuracy",
            title="Pairs ranked right",
            section="pairs",
            unit="share",
            better="up",
            all=values(0.525, 0.675, 0.06, 0.0004),
            datasets={"helpful": values(0.5, 0.7, 0.09), text: values(0.55, 0.65, 0.12)},
        ),
        Figure(
            name="chosen_logp",
            title="Log-probability of the chosen answer",
            section="pairs",
            unit="nats",
            better="up",
            all=values(-84.31, -91.02, 2.4),
        ),
        Figure(
            name="answer_length",
            title="Answer length",
            section="answers",
            unit="tokens",
            better="neither",
            all=values(41.2, 55.9, 3.3),
        ),
        distance("kl", "KL of after from before", 3.21),
        Figure(
            name="win_rate",
            title="Win rate of the model after",
            section="wins",
            unit="share",
            better="up",
            neutral=0.5,
            all=Values(after=Estimate(0.56, 0.48, 0.64), num_prompts=50, num_rows=100),
        ),
        Figure(
            name="facts.accuracy",
            title="Facts answered right",
            section="facts",
            unit="share",
            better="up",
            all=Values(after=Estimate(0.8), before=Estimate(0.9), difference=Estimate(-0.1), num_prompts=1, num_rows=1),
        ),
    ]
    after = Comparison(
        after=ComparedModel(name=text, path=f"runs/{text}", digest="ab" * 8, dtype="float32"),
        figures={figure.name: figure for figure in figures},
        verdict=Verdict(
            better=["Pairs ranked right: 67.5 % instead of 52.5 % (+9.0 to +21.0 points)."],
            worse=[f"The chosen answer of {text} became less probable: −6.71 nats."],
            changed=["Answers are longer: 55.9 instead of 41.2 tokens."],
            unclear=["Win rate: 56.0 %, but 48.0 to 64.0 contains 50 %."],
            unchanged=["Answers cut off: 0.0 % before and after."],
        ),
        calibration=[
            CalibrationBin(low=0.5, high=0.6, num_rows=80, confidence=0.55, accuracy=Estimate(0.58, 0.47, 0.69)),
            CalibrationBin(low=0.6, high=0.8, num_rows=70, confidence=0.71, accuracy=Estimate(0.66, 0.54, 0.76)),
            CalibrationBin(low=0.8, high=0.9, num_rows=0, confidence=None, accuracy=None),
            CalibrationBin(low=0.9, high=1.0, num_rows=50, confidence=0.95, accuracy=Estimate(0.86, 0.74, 0.93)),
        ],
        facts=[
            ComparedFact(question="What is the capital of Peru?", answer=text, before=0.91, after=0.42, fell=True),
            ComparedFact(question="What is 2 + 2?", answer="4", before=0.7, after=0.71, fell=False),
        ],
        answers=[
            AnswersSideBySide(
                prompt_id="p0",
                prompt=f"user: What is the capital of Ireland? {text}",
                sample=0,
                before=AnswerShown(text="It is Cork, a city in the south.", num_tokens=9, finish_reason="stop"),
                after=AnswerShown(text=text, num_tokens=None, finish_reason="length"),
                won=1,
            )
        ],
        num_answers=100,
        fallen=[
            FallenPair(
                origin=f"pairs.jsonl:{text}",
                dataset="helpful",
                prompt=f"What is the capital of Ireland? {text} " + "Answer at length. " * 20,
                chosen=text,
                num_tokens=12,
                before=-20.25,
                after=-31.5,
            )
        ],
        rows=[
            {
                "kind": "pair",
                "chosen_logp_before": -20.0,
                "chosen_logp_after": -20.0 - number,
                "rejected_logp_before": -20.0,
            }
            | {"rejected_logp_after": -24.0 - 2 * number}
            for number in (0.5, 1, 2, 2, 3, 7)
        ]
        + [{"kind": "answer", "before_tokens": 30 + number, "after_tokens": 40 + 2 * number} for number in range(9)],
    )
    return CompareDocument(
        before=ComparedModel(name="sft", path="runs/sft", digest="cd" * 8, dtype="float32"),
        comparisons=[after],
        settings={"pairs": text, "seed": 0},
        warnings=["Only 50 prompts: small changes cannot be told."],
    )


def test_hostile_texts_are_shown_as_texts() -> None:
    page = compare_page(document(HOSTILE))
    seen = assert_only_text(page)
    assert "{{ 7 * 7 }}" in seen.text
    assert r"\x1b[31m\u202e" in seen.text
    assert "\x1b" not in page
    assert "\u202e" not in page
    # Name, path, dataset, verdict, fact, prompt and setting; the answer is cut into marks.
    assert seen.text.count("<script>alert(1)</script>") >= 7


def test_several_models_have_sections_of_their_own() -> None:
    one = document()
    seen = HtmlPage(compare_page(dataclasses.replace(one, comparisons=[*one.comparisons, *one.comparisons])))
    assert len(seen.ids) == len(set(seen.ids))
    links = [address for address in seen.addresses if address.startswith("#")]
    assert links == ["#model-1", "#model-2"]
    assert {link[1:] for link in links} <= set(seen.ids)


def test_figures_have_values_intervals_and_findings() -> None:
    text = re.sub(r"\s+", " ", HtmlPage(compare_page(document())).text)
    assert "Pairs ranked right 52.5 %46.5 to 58.5 67.5 %61.5 to 73.5 +15.0 points+9.0 to +21.0" in text
    assert "better 180 prompts, p < 0.001" in text
    assert "−84.31" in text
    assert "1 of 2 facts lost more than 0.05" in text
    assert "What is 2 + 2?" not in text
    assert "−20.25 before, −31.50 after, −11.25 over 12 tokens" in text
    # A figure without intervals has values, and no finding.
    assert "Facts answered right 90.0 % 80.0 % −10.0 points unclear 1 prompt" in text


def test_words_that_differ_are_marked() -> None:
    before, after = word_diff("It is Cork, a city.", "It is in the green Dublin, a city.")
    assert [piece for piece in before if piece.kind != "same"] == [Piece("removed", "Cork")]
    assert [piece for piece in after if piece.kind != "same"] == [Piece("added", "in the green Dublin")]
    for text in ("", "a\n\nb  c\n", "東京 is in Japan"):
        pieces = word_diff("a b c", text)
        assert ("".join(piece.text for piece in pieces[0]), "".join(piece.text for piece in pieces[1])) == (
            "a b c",
            text,
        )


def test_the_answers_that_fell_most_are_read_from_their_files(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        rows = [{"prompt": f"{name} {number}", "chosen": f"yes {number}", "rejected": "no"} for number in range(8)]
        paths.append(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)))
    origins = [f"{name}.jsonl:{number + 1}" for name in ("one", "two") for number in range(8)]
    before = np.full((16, 2), -1.0)
    after = before - np.arange(16)[:, None]
    pairs = PairRows(("one", "two"), np.repeat([0, 1], 8), np.arange(16), origins, np.full((16, 2), 3), before, after)
    found = fallen_pairs(pairs, paths)
    assert len(found) == 10
    assert (found[0].origin, found[0].dataset, found[0].prompt, found[0].chosen) == (
        "two.jsonl:8",
        "two",
        "two 7",
        "yes 7",
    )
    assert (found[9].origin, found[9].prompt, found[9].after) == ("one.jsonl:7", "one 6", -7.0)
    assert fallen_pairs(pairs._replace(after=before), paths) == []


@pytest.mark.ci
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_has_nothing_to_complain_about(tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    write_compare_page(document(HOSTILE), page)
    shown, log = chromium(page, tmp_path / "profile")
    assert "Pairs ranked right" in shown
    assert "CONSOLE" not in log


def test_equal_lengths_are_two_bars_over_whole_numbers() -> None:
    plot = histogram("Lengths", "tokens", {"before": [2] * 5, "after": [2] * 5}, of="answers")
    first, second = plot.bars
    assert second[1] - first[1] == pytest.approx(first[3], abs=0.1)
    assert all(float(tick.label).is_integer() for tick in plot.x_ticks)
