"""Scorers without a model, by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jdpo.scoring.protocol import Asked, grouped
from jdpo.scoring.scorers import KINDS, default_name, make_scorer, parse_by
from tests.scoring.toys import answer, asked, question

CONVERSATION = [{"role": "user", "content": "2 + 2 ="}]


def scores(by: str, given: Sequence[Asked]) -> list[Any]:
    return [score.reason or score.score for score in make_scorer(parse_by(by), [given], {}).score(given).scores]


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `own_rules` in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "own_rules.py"
    path.write_text(
        "def shared(prompt, answer, columns):\n"
        "    return {'none': None, 'bad': 'x', 'nan': float('nan')}.get(answer, len(prompt) + columns['right'])\n"
        "def fails(prompt, answer, columns): return columns['missing']\n"
        "def leaves(prompt, answer, columns): raise SystemExit('enough')\n"
        "def is_short(prompt, answer, columns): return len(answer) < 3\n"
        "def two(prompt, answer): return 1\n"
    )
    yield path
    sys.modules.pop("own_rules", None)


def test_a_rule_gets_prompt_answer_and_columns(rules: Path) -> None:
    given = [Asked(question("q0", CONVERSATION, right=41), [answer(text="a"), answer(text="none")])]
    assert scores("rule:own_rules:shared", given) == [42.0, "the rule returned None"]
    assert scores("rule:own_rules:is_short", given) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("rule", "text", "part"),
    [
        ("own_rules:fails", "a", "answer 3 to prompts.jsonl:q0: it raised KeyError"),
        ("own_rules:leaves", "a", "answer 3 to prompts.jsonl:q0: it raised SystemExit"),
        ("own_rules:shared", "bad", "answer 3 to prompts.jsonl:q0: expected a number"),
        ("own_rules:shared", "nan", "found nan"),
        ("own_rules:two", "a", "three arguments"),
        ("own_rules:shard", "a", "did you mean 'shared'"),
        ("own_rulez:shared", "a", "no module own_rulez"),
        ("own_rules", "a", "expected rule:package.module:function"),
    ],
)
def test_a_rule_that_fails_is_named_with_its_row(rules: Path, rule: str, text: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        scores(f"rule:{rule}", [Asked(question(right=1), [answer(sample=3, text=text)])])


def test_another_version_of_a_rule_is_another_scorer(rules: Path) -> None:
    by, given = parse_by("rule:own_rules:is_short"), asked(1)
    before = make_scorer(by, [given], {}).describe()
    rules.write_text(f"{rules.read_text()}\n")
    assert make_scorer(by, [given], {}).describe() != before


def test_exact_compares_with_the_column() -> None:
    given = [
        Asked(question("q0", right=4), [answer(text=" 4\n"), answer(text="4."), answer(text=None)]),
        Asked(question("q1", right=["four", "Four"]), [answer("q1", text="Four")]),
        Asked(question("q2", right=None), [answer("q2", text="None")]),
    ]
    assert scores("exact:right", given) == [1.0, 0.0, 0.0, 1.0, "no value in the column"]


def test_exact_names_the_columns_that_there_are() -> None:
    with pytest.raises(ValueError, match="columns there: rigth, source; did you mean 'rigth'"):
        scores("exact:right", [Asked(question(rigth=1, source="a"), [answer()])])
    with pytest.raises(ValueError, match="column right: expected a text"):
        scores("exact:right", [Asked(question(right={"a": 1}), [answer()])])


def test_logps_are_those_of_the_answers() -> None:
    given = [Asked(question(), [answer(tokens=[5, 6, 7], logp=-1.0), answer(tokens=None, logp=-2.0), answer()])]
    assert scores("logp", given) == [-1.0, -2.0, "no log-probability"]
    assert scores("logp_per_token", given) == [-0.333333, "no tokens", "no log-probability"]


def test_length_has_one_unit_for_all_answers() -> None:
    with_tokens = Asked(question(), [answer(text="four", tokens=[5, 6])])
    assert scores("length", [with_tokens]) == [2.0]
    assert scores("length", [with_tokens, Asked(question(), [answer(text="a b", tokens=None)])]) == [4.0, 3.0]


@pytest.mark.parametrize(
    ("by", "part"),
    [("lenght", "did you mean 'length'"), ("exact", "exact:COLUMN"), ("length:3", "write --by length")],
)
def test_an_unknown_scorer_is_refused_by_name(by: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        parse_by(by)


def test_an_option_of_another_scorer_is_refused() -> None:
    with pytest.raises(ValueError, match="length does not read it"):
        make_scorer(parse_by("length"), [asked(1)], {"rubric": "r.md"})


def test_every_scorer_has_a_file_name_of_its_own() -> None:
    texts = [f"{name}:org/Some Model" if kind.argument else name for name, kind in KINDS.items()]
    names = [default_name(parse_by(text)) for text in texts]
    assert len(set(names)) == len(KINDS)
    assert "reward-Some-Model" in names or "reward" not in KINDS


def test_an_answer_without_its_question_is_refused() -> None:
    with pytest.raises(ValueError, match="q9"):
        grouped({"q0": question()}, [answer("q9")])
