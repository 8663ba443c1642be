"""`jdpo score`: folders of answers in, files of scores out, also when it is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jdpo.cli.main import main
from jdpo.scoring.score_files import names_of
from tests.pairing.gen_folders import write_gen

RULES = """
import time

def num_words(prompt, answer, columns):
    return len(answer.split()) if answer != "..." else None

def slow(prompt, answer, columns):
    time.sleep(0.001)
    return len(answer)
"""


@pytest.fixture
def gen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two questions with three answers each, and a module of rules in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rules.py").write_text(RULES)
    write_gen(
        tmp_path / "gen", {"Why?": ["Because.", "So it is.", "..."], "When?": ["Now.", "At two in the night.", "No"]}
    )
    yield tmp_path / "gen"
    sys.modules.pop("my_rules", None)


def score(*words: object) -> int:
    return main(["score", *map(str, words)])


def test_scores_of_which_all_are_missing_are_warned_of(gen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (gen.parent / "my_rules.py").write_text("def nothing(prompt, answer, columns):\n    return None\n")
    assert score(gen, "--by", "rule:my_rules:nothing") == 0
    assert "no answer has a score" in capsys.readouterr().err


def scores_of(path: Path) -> list[float | None]:
    return [json.loads(line)["score"] for line in path.read_text().splitlines()]


def test_a_rule_in_the_current_folder(gen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(gen, "--by", "rule:my_rules:num_words", "--name", "words") == 0
    assert scores_of(gen / "scores/words.jsonl") == [1, 3, None, 1, 5, 1]
    shown = capsys.readouterr().out
    table = dict(line.split("  ", 1) for line in shown.splitlines()[:-1])
    assert {label: value.strip() for label, value in table.items()} == {
        "scorer": "rule:my_rules:num_words",
        "answers": "6",
        "scores": "5",
        "mean": "2.2",
        "standard deviation": "1.6",
        "range": "1 to 5",
        "no score": "1: the rule returned None",
    }
    assert score(gen, "--by", "rule:my_rules:num_words", "--name", "words") == 0
    assert "there already" in capsys.readouterr().out


def test_a_reward_model(gen: Path, reward_folder: Path) -> None:
    assert score(gen, "--by", f"reward:{reward_folder}", "--max_length", 36) == 0
    assert names_of(gen) == ["reward-toy"]
    found = scores_of(gen / "scores/reward-toy.jsonl")
    assert None in found  # the longest
    assert len(set(found)) == 6


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--by", "length", "--max_length", "7"], "--max_length is an option of --by reward"),
        (["--by", "exact:right"], "no column of that name"),
        (["--by", "length", "--name", "a/b"], "not a name"),
        (["--by", "size"], "no such scorer"),
        (["--by", "reward:nowhere/at/all"], "does not exist"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    gen: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert score(gen, *words) == 2
    assert part in capsys.readouterr().err
    assert not names_of(gen)


RUN = "import sys; from jdpo.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.full
@pytest.mark.parametrize(("by", "num_runs", "least_kills"), [("rule", 20, 10), ("reward", 4, 1)])
def test_killed_at_random_points_the_rows_are_equal(
    gen: Path, reward_folder: Path, tmp_path: Path, by: str, num_runs: int, least_kills: int
) -> None:
    texts = {f"Question {i}?": ["word " * (i % 7 + j) + "." for j in range(8)] for i in range(256)}
    write_gen(tmp_path / "large", texts)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    scorer = {"rule": "rule:my_rules:slow", "reward": f"reward:{reward_folder}"}[by]

    def start(name: str) -> subprocess.Popen[bytes]:
        words = ["score", str(tmp_path / "large"), "--by", scorer, "--name", name]
        return subprocess.Popen([sys.executable, "-c", RUN, *words], cwd=tmp_path, env=environment)

    began = time.monotonic()
    assert start("whole").wait() == 0
    duration = time.monotonic() - began
    draw, kills = random.Random(0), 0
    for number in range(num_runs):
        name = f"killed-{number}"
        while True:  # until it ends before it is killed
            process = start(name)
            try:
                assert process.wait(timeout=draw.uniform(0.2, 1.1) * duration) == 0
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        for kind in ("jsonl", "json"):
            paths = [tmp_path / "large/scores" / f"{one}.{kind}" for one in (name, "whole")]
            assert paths[0].read_bytes() == paths[1].read_bytes()
        assert not (tmp_path / "large/scores" / f".{name}.parts").exists()
    assert kills >= least_kills
