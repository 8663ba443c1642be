"""`jdpo pair`: files in, files out."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.cli.main import main
from jdpo.data.schemas.formats import Dropped, preference_rows
from jdpo.pairing import candidates as reasons
from jdpo.types import PreferenceRow
from tests.pairing.gen_folders import write_gen, write_gen_scores

TEXTS = {
    "Capital of Ireland?": ("Dublin", "Cork", "It is Dublin, and then ...", ""),
    "Capital of Japan?": ("Tokyo", "Tokyo", "Osaka", None),
    "Capital of Peru?": ("Lima", "Cusco", "Puno", "Lima it is"),
}
SCORES = (2.5, 0.0, 9.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, None)
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def gen(tmp_path: Path) -> Path:
    """Three prompts with four answers each, one of which could not be made, and their scores."""
    write_gen(tmp_path / "gen", TEXTS, tools=TOOLS, template_kwargs={"thinking": False})
    write_gen_scores(tmp_path / "gen", SCORES)
    return tmp_path / "gen"


def pair(gen: Path, *words: str, output: str = "pairs.jsonl") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs the command; returns the rows and the report."""
    path = gen.parent / output
    assert main(["pair", str(gen), "--output", str(path), *words]) == 0
    report = path.with_name(f"{path.stem}.report.json")
    return [json.loads(line) for line in path.read_text().splitlines()], json.loads(report.read_text())


def sides(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def assert_adds_up(report: dict[str, Any]) -> None:
    prompts, answers, pairs = report["prompts"], report["answers"], report["pairs"]
    assert prompts["read"] == prompts["with_pairs"] + sum(prompts["dropped"].values())
    used = answers["chosen"] + answers["rejected"] + answers["chosen_and_rejected"]
    assert answers["read"] == used + sum(answers["dropped"].values())
    assert pairs["tried"] == pairs["kept"] + sum(pairs["dropped"].values())


def test_rows_are_read_with_scores_tools_and_variables(gen: Path) -> None:
    rows, _ = pair(gen)
    assert sides(rows) == [("Dublin", "Cork"), ("Tokyo", "Osaka")]
    (read,) = preference_rows(rows[0], "pairs.jsonl:1")
    assert isinstance(read, PreferenceRow)
    assert (read.margin, read.tools, read.template_kwargs) == (2.5, TOOLS, {"thinking": False})
    assert read.prompt == [{"role": "user", "content": "Capital of Ireland?"}]
    assert (rows[0]["score_chosen"], rows[0]["sample_chosen"], rows[0]["sample_rejected"]) == (2.5, 0, 1)


def test_everything_is_counted(gen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, report = pair(gen, "--min_margin=0.5")
    assert_adds_up(report)
    assert report["answers"]["dropped"] == {
        reasons.TIED: 2,
        reasons.CUT_OFF: 1,
        reasons.EMPTY: 1,
        reasons.NO_SCORE: 1,
        reasons.NOT_PICKED: 1,
        reasons.SAME_TEXT: 1,
    }
    assert report["answers"]["read"] == 11
    assert report["prompts"]["dropped"] == {reasons.TIED: 1}
    printed = capsys.readouterr().out
    for reason in report["answers"]["dropped"]:
        assert reason in printed
    assert f"{len(rows)} pairs in" in printed


def test_margins_are_the_differences_of_the_scores_as_written(tmp_path: Path) -> None:
    write_gen(tmp_path / "gen", {"a?": ("one", "two"), "b?": ("three", "four"), "c?": ("five", "six")})
    write_gen_scores(tmp_path / "gen", (1.9884, 0.1, 0.3, 0.2, 0.3, 0.1))
    rows, report = pair(tmp_path / "gen", "--min_margin=0.1")
    assert [row["margin"] for row in rows] == [1.8884, 0.1, 0.2]  # in binary fractions 1.8883999999999999 and 0.0999..
    assert report["margin"] == {"smallest": 0.1, "median": 0.2, "largest": 1.8884}


def test_the_limit_in_force_is_named(gen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gen_scores(gen, [float(number) for number in range(len(SCORES))])
    _, report = pair(gen)
    assert report["rules"]["max_per_prompt"] == 1
    assert report["pairs"]["dropped"][reasons.ENOUGH] > 0
    assert f"{reasons.ENOUGH} (1)" in capsys.readouterr().out
    _, report = pair(gen, "--strategy=adjacent")
    assert report["rules"]["max_per_prompt"] is None


def test_the_same_command_writes_the_same_bytes(gen: Path) -> None:
    pair(gen, "--strategy=best_random", "--seed=3")
    files = {path.name: path.read_bytes() for path in gen.parent.glob("pairs*")}
    pair(gen, "--strategy=best_random", "--seed=3")
    assert {path.name: path.read_bytes() for path in gen.parent.glob("pairs*")} == files


def test_scores_are_chosen_by_name(gen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gen_scores(gen, [-score if score is not None else None for score in SCORES], name="reversed")
    output = f"--output={gen.parent / 'pairs.jsonl'}"
    assert main(["pair", str(gen), output]) == 2
    assert "quality, reversed" in capsys.readouterr().err
    rows, report = pair(gen, "--score=reversed")
    assert sides(rows)[0] == ("Cork", "It is Dublin, and then ...")
    assert report["score"]["name"] == "reversed"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--strategy=delta"], "two folders"),
        (["--strategy=human", "--score=quality"], "reads no scores"),
        (["--strategy=human", "--min_margin=1"], "min_margin"),
        (["--dedupe=2"], "dedupe"),
        (["--score=qualty"], "did you mean 'quality'"),
        (["--margin=1"], "did you mean '--min_margin'"),
    ],
)
def test_bad_options_are_refused(gen: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str) -> None:
    assert main(["pair", str(gen), f"--output={gen.parent / 'pairs.jsonl'}", *words]) == 2
    assert named in capsys.readouterr().err
    assert not (gen.parent / "pairs.jsonl").exists()


def test_a_file_that_somebody_else_has_written_stays(gen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = gen.parent / "mine.jsonl"
    path.write_text("precious\n")
    assert main(["pair", str(gen), f"--output={path}"]) == 2
    assert "has not written it" in capsys.readouterr().err
    assert path.read_text() == "precious\n"


def test_delta_matches_prompts_of_two_folders(tmp_path: Path) -> None:
    write_gen(tmp_path / "strong", {"a?": ("good a", "good a"), "b?": ("good b", "same")})
    write_gen(tmp_path / "weak", {"b?": ("bad b", "same"), "c?": ("bad c", "worse c")})
    output = tmp_path / "pairs.jsonl"
    words = ["pair", str(tmp_path / "strong"), str(tmp_path / "weak"), "--strategy=delta", f"--output={output}"]
    assert main(words) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert sides(rows) == [("good b", "bad b")]
    assert "score_chosen" not in rows[0]
    report = json.loads((tmp_path / "pairs.report.json").read_text())
    assert_adds_up(report)
    assert report["answers"]["dropped"] == {reasons.ONE_FOLDER: 3, reasons.SIDES_ALIKE: 2, reasons.SAME_TEXT: 1}
    assert report["prompts"]["dropped"] == {reasons.ONE_FOLDER: 2}


def test_folders_without_answers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gen(tmp_path / "gen", {"Capital of Peru?": (None, None)})
    assert main(["pair", str(tmp_path / "gen"), f"--output={tmp_path / 'pairs.jsonl'}"]) == 2
    assert "no answers to pair" in capsys.readouterr().err


LONG = "Well, that is a most interesting question, and the answer to it is surely the city of"


def test_length_control_removes_what_a_judge_of_length_prefers(tmp_path: Path) -> None:
    write_gen(tmp_path / "gen", {"Ireland?": ("Dublin", f"{LONG} Dublin"), "Peru?": (f"{LONG} Lima", "Lima")})
    write_gen_scores(tmp_path / "gen", (1, 18, 18, 1))
    rows, report = pair(tmp_path / "gen")
    assert (len(rows), report["length"]["longer"]) == (2, 2)
    rows, report = pair(tmp_path / "gen", "--max_length_gap=5")
    assert (rows, report["pairs"]["dropped"]) == ([], {reasons.LENGTH_GAP: 2})
    assert_adds_up(report)


def test_a_length_bias_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gen(tmp_path / "gen", {f"{n}?": ("a", "a longer one") for n in range(12)})
    write_gen_scores(tmp_path / "gen", (0, 1) * 12)
    pair(tmp_path / "gen")
    assert "warning: the chosen answer is longer in 100 % of the pairs" in capsys.readouterr().out


def test_lengths_of_answers_without_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gen(tmp_path / "gen", {"Ireland?": ("Dublin", f"{LONG} Dublin")}, tokens=False)
    write_gen_scores(tmp_path / "gen", (1, 0))
    _, report = pair(tmp_path / "gen")
    assert (report["length"]["unit"], report["length"]["mean_chosen"]) == ("words", 1)
    _, report = pair(tmp_path / "gen", "--length_unit=characters")
    assert report["length"]["mean_chosen"] == 6
    assert main(["pair", str(tmp_path / "gen"), f"--output={tmp_path / 'pairs.jsonl'}", "--length_unit=tokens"]) == 2
    assert "--length_unit" in capsys.readouterr().err


# --- a person


@pytest.fixture
def person(gen: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Runs `--strategy human` with lines from a pipe."""

    def types(*lines: str, options: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return pair(gen, "--strategy=human", "--max_per_prompt=1", *options)

    return types


def choices_of(gen: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (gen.parent / "pairs.choices.jsonl").read_text().splitlines()][1:]


def test_a_person_chooses_and_continues(
    gen: Path, person: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, report = person("what", "1", "quit")
    assert "type 1 or 2" in capsys.readouterr().out
    assert_adds_up(report)
    assert len(rows) + report["pairs"]["dropped"].get(reasons.CUT_OFF, 0) == 1
    (made,) = choices_of(gen)
    assert made["choice"] == made["left"], "1 is the answer on the left"
    _, report = person("tie", "2")
    assert "1 of 3 choices made before" in capsys.readouterr().out
    assert [one["choice"] for one in choices_of(gen)][1] == "tie"
    assert choices_of(gen)[2]["choice"] != choices_of(gen)[2]["left"]
    assert reasons.UNDECIDED not in report["pairs"]["dropped"]
    assert_adds_up(report)
    before = (gen.parent / "pairs.jsonl").read_bytes()
    person()
    assert (gen.parent / "pairs.jsonl").read_bytes() == before


def test_answers_are_shown_side_by_side_in_a_shuffled_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {f"{n}?": (f"zero {n} [red]", f"one {n} \x1b[31m") for n in range(12)}
    write_gen(tmp_path / "gen", texts)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n" * 12))
    pair(tmp_path / "gen", "--strategy=human")
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown
    assert r"one 0 \x1b[31m" in shown
    assert "zero 0 [red]" in shown
    assert {one["left"] for one in choices_of(tmp_path / "gen")} == {"a", "b"}


def test_answers_without_spaces_are_shown_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gen(tmp_path / "gen", {"a?": ("漢字" * 100, "short")})
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    pair(tmp_path / "gen", "--strategy=human")
    shown = capsys.readouterr().out
    assert shown.count("漢") == shown.count("字") == 100


def test_a_line_that_was_written_half_is_asked_again(gen: Path, person: Callable[..., Any]) -> None:
    person("1", "2", "quit")
    path = gen.parent / "pairs.choices.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    person("1", "1")
    assert choices_of(gen)[0]["choice"] in ("a", "b")
    assert len(choices_of(gen)) == 3


def test_choices_about_other_answers_are_refused(
    gen: Path, person: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    person("1", "quit")
    write_gen(tmp_path / "other", {"Capital of Peru?": ("Lima", "Cusco")})
    words = ["--strategy=human", f"--output={gen.parent / 'pairs.jsonl'}"]
    assert main(["pair", str(tmp_path / "other"), *words]) == 2
    assert "other answers" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from jdpo.cli.main import main

left = int(sys.argv[1])

def killed(frame, event, arg):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

import jdpo.pairing.pair_files, jdpo.pairing.answers_read, rich.table
sys.setprofile(killed)
main(sys.argv[2:])
"""


@pytest.mark.full
def test_killed_anywhere_and_run_again(tmp_path: Path) -> None:
    """Kills at 20 points, spread over the calls of functions that a whole command makes."""
    texts = {f"{n}?": (f"right {n}", f"wrong {n}", f"other {n} ...") for n in range(40)}
    write_gen(tmp_path / "gen", texts)
    write_gen_scores(tmp_path / "gen", (2, 0, 1) * 40)
    pair(tmp_path / "gen", "--strategy=adjacent", output="pairs.jsonl")
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("pairs*")}
    for path in tmp_path.glob("pairs*"):
        path.unlink()
    words = ["pair", str(tmp_path / "gen"), "--strategy=adjacent", f"--output={tmp_path / 'pairs.jsonl'}"]
    killed = 0
    for point in range(20):
        # From the first calls to far after the last ones, denser at the beginning.
        process = subprocess.run([sys.executable, "-c", KILLED, str(int(200 * 1.45**point)), *words], timeout=300)
        killed += process.returncode == -signal.SIGKILL
        if point % 4 == 3:
            assert main(words) == 0
            assert {path.name: path.read_bytes() for path in tmp_path.glob("pairs*")} == whole
    assert killed >= 12, "most points are within the command"


def test_dropped_is_never_what_pairs_are_read_as(gen: Path) -> None:
    rows, _ = pair(gen, "--strategy=adjacent", "--allow_cut_off")
    read = [found for row in rows for found in preference_rows(row, "row")]
    assert read
    assert not [found for found in read if isinstance(found, Dropped)]


def test_inspect_and_dpo_read_the_pairs(
    toy_model: Path, tmp_path: Path, run_words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    write_gen(tmp_path / "gen", {f"{n}?": ("green bread", "slow music") for n in range(8)})
    write_gen_scores(tmp_path / "gen", (2, 0.5) * 8)
    pair(tmp_path / "gen", output="sampled.jsonl")
    datasets = f"datasets={tmp_path / 'sampled.jsonl'}"
    assert main(["inspect", "--task", "dpo", f"model_name_or_path={toy_model}", datasets]) == 0
    assert "1.5" in capsys.readouterr().out, "the margin of every pair"
    words = run_words(datasets=f"[{{path: {tmp_path / 'sampled.jsonl'}, min_margin: 1}}]", margin_gamma=1)
    assert main(["dpo", *words, "--dry_run"]) == 0
