"""Files of scores: they belong to their answers, and a killed command loses at most a block."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jdpo.scoring.protocol import Asked, Scored, cut
from jdpo.scoring.score_blocks import score_answers
from jdpo.scoring.score_files import (
    Score,
    Verdict,
    answers_digest,
    count_verdicts,
    names_of,
    read_scores,
    read_verdicts,
)
from tests.scoring.toys import answer, answers_of, asked, question, questions_of

ASKED = asked()
DIGEST = answers_digest(questions_of(ASKED), answers_of(ASKED))


class Lengths:
    """Scores the length, except every third answer, and compares the first two answers; may fail at a block."""

    def __init__(self, by: str = "lengths", fails_at: int | None = None) -> None:
        self.by, self.fails_at, self.calls = by, fails_at, 0

    def describe(self) -> dict[str, Any]:
        return {"by": self.by, "margin": (1, 2)}

    def score(self, block: Sequence[Asked]) -> Scored:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        found = Scored([], [])
        for one in block:
            for made in one.answers:
                value = float(len(made.message["content"]))
                null = made.sample == 2
                found.scores.append(Score(made.prompt_id, made.sample, None if null else value, "third" * null or None))
            found.verdicts.append(Verdict(one.question.prompt_id, 0, 1, "second", "first", "b"))
        return found


def score(folder: Path, scorer: Lengths, name: str = "n", **options: Any) -> bool:
    return score_answers(folder, name, scorer, cut(ASKED, 4), digest=DIGEST, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert score(tmp_path, Lengths())
    found = read_scores(tmp_path, "n", DIGEST)
    assert [(at, one.score) for at, one in found.scores.items()][:4] == [
        (("q0", 0), 5.0),
        (("q0", 1), 10.0),
        (("q0", 2), None),
        (("q1", 0), 10.0),
    ]
    assert found.made_by == {"by": "lengths", "margin": [1, 2]}
    assert found.summary["num_answers"] == 15
    assert found.summary["nulls"] == {"third": 5}
    assert found.summary["mean"] == 17.5  # of 5, 10, 10, 15, 15, 20, 20, 25, 25, 30
    assert read_verdicts(tmp_path, "n", DIGEST)[1] == Verdict("q1", 0, 1, "second", "first", "b")
    assert names_of(tmp_path) == names_of(tmp_path, "verdicts") == ["n"]
    lines = (tmp_path / "scores/n.jsonl").read_text().splitlines()
    assert json.loads(lines[2]) == {"prompt_id": "q0", "sample": 2, "score": None, "reason": "third"}


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_stopped_command_continues_where_it_was(tmp_path: Path, fails_at: int) -> None:
    """Blocks of whole questions with at least 4 answers: 6, 6 and 3 answers."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    score(tmp_path / "whole", Lengths())
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "stopped", Lengths(fails_at=fails_at))
    assert not names_of(tmp_path / "stopped")
    again = Lengths()
    assert score(tmp_path / "stopped", again)
    assert again.calls == 3 - fails_at
    assert files(tmp_path / "whole") == files(tmp_path / "stopped")


@pytest.mark.parametrize("lost", ["scores/n.json", "scores/n.jsonl", "verdicts/n.json"])
def test_a_command_killed_between_its_files_is_done_again(tmp_path: Path, lost: str) -> None:
    score(tmp_path, Lengths())
    complete = files(tmp_path)
    (tmp_path / lost).unlink()
    if lost.startswith("scores"):
        with pytest.raises(ValueError, match="there are no scores"):
            read_scores(tmp_path, "n", DIGEST)
        assert score(tmp_path, Lengths())
        assert files(tmp_path) == complete
    else:
        with pytest.raises(ValueError, match="not complete"):
            read_verdicts(tmp_path, "n", DIGEST)


def test_complete_scores_are_not_made_again(tmp_path: Path) -> None:
    score(tmp_path, Lengths())
    assert not score(tmp_path, Lengths(fails_at=0))
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, Lengths(fails_at=0), overwrite=True)
    assert not names_of(tmp_path)


def test_scores_of_another_scorer_are_replaced_only_when_asked(tmp_path: Path) -> None:
    score(tmp_path, Lengths("first"))
    before = files(tmp_path)
    with pytest.raises(ValueError, match="comes from first"):
        score(tmp_path, Lengths("second"))
    assert files(tmp_path) == before
    assert score(tmp_path, Lengths("second"), overwrite=True)
    assert read_scores(tmp_path, "n", DIGEST).made_by["by"] == "second"


def test_unfinished_work_of_another_scorer_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, Lengths("first", fails_at=1))
    with pytest.raises(ValueError, match=r"unfinished work that comes from first"):
        score(tmp_path, Lengths("second"))
    again = Lengths("first")
    score(tmp_path, again)
    assert again.calls == 2


def test_work_of_another_scorer_without_a_finished_block_is_replaced(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, Lengths("first", fails_at=0))
    score(tmp_path, Lengths("second"))
    assert read_scores(tmp_path, "n", DIGEST).made_by["by"] == "second"


def test_scores_of_other_answers_are_refused(tmp_path: Path) -> None:
    score(tmp_path, Lengths())
    with pytest.raises(ValueError, match="other answers"):
        read_scores(tmp_path, "n", "0" * 64)
    (tmp_path / "scores/n.jsonl").write_text("")
    with pytest.raises(ValueError, match="was changed"):
        read_scores(tmp_path, "n", DIGEST)


def test_a_name_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    score(tmp_path, Lengths(), name="skywork-0.6b")
    with pytest.raises(ValueError, match=r"did you mean 'skywork-0\.6b'"):
        read_scores(tmp_path, "skywork-0.6", DIGEST)
    for name in ("", "../n", ".n", "a/b", "n" * 101):
        with pytest.raises(ValueError, match="not a name"):
            score(tmp_path, Lengths(), name=name)


def test_the_digest_is_that_of_answers_and_columns() -> None:
    questions = {"q0": question(right=1)}
    digests = [
        answers_digest(questions, [answer()]),
        answers_digest({"q0": question(right=2)}, [answer()]),
        answers_digest(questions, [answer(text="5")]),
        answers_digest(questions, [answer(), answer(sample=1)]),
        answers_digest(questions, [answer(sample=1), answer()]),
    ]
    assert len(set(digests)) == 5
    assert answers_digest(questions, [answer()]) == digests[0]


def test_verdicts_are_counted() -> None:
    verdicts = [
        Verdict("q", 0, 1, "first", "second", "a"),
        Verdict("q", 0, 1, "first", "first", "tie"),
        Verdict("q", 0, 1, "tie", "tie", "tie"),
        Verdict("q", 0, 1, None, "first", None),
    ]
    assert count_verdicts(verdicts) == {
        "num_comparisons": 4,
        "a": 1,
        "b": 0,
        "tie": 2,
        "null": 1,
        "orders_disagree": 1,
    }


def test_a_kill_at_any_write_leaves_what_a_restart_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file takes two flushes: its own and its folder's. An interruption before each of them in turn."""
    whole, fsync = tmp_path / "whole", os.fsync
    whole.mkdir()
    num_flushes = 0

    def counted(file: int) -> None:
        nonlocal num_flushes
        num_flushes += 1
        fsync(file)

    monkeypatch.setattr(os, "fsync", counted)
    score(whole, Lengths())
    assert num_flushes == 2 * (1 + 3 + 4)  # made_by.json, three blocks, two files of scores and two of verdicts
    for stop in range(num_flushes):
        folder, left = tmp_path / f"stopped-{stop}", stop
        folder.mkdir()

        def interrupted(file: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            fsync(file)

        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            score(folder, Lengths())
        monkeypatch.setattr(os, "fsync", fsync)
        score(folder, Lengths())
        assert files(folder) == files(whole)
