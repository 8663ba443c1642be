"""`jdpo compare` and `jdpo eval` on toys: a model with itself, and with another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jdpo.cli.main import main
from jdpo.quickstart.tiny_llama import write_model
from tests.conftest import chat_pairs, sentence, write_jsonl

Capture = pytest.CaptureFixture[str]

PLAIN_BUT_EQUAL = {"accuracy", "win_rate", "win_rate.length_controlled"}
"""Figures about both models at once, of which equal models have one half."""


@pytest.fixture(scope="module")
def place(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of one tokenizer, pairs, prompts and facts."""
    folder = tmp_path_factory.mktemp("comparison")
    rng = np.random.default_rng(0)
    # The words of the toy, so that the tokenizers are equal.
    write_model(folder / "other", [sentence(rng, 12) for _ in range(50)], hidden_size=64, num_layers=2, seed=1)
    write_jsonl(folder / "a.jsonl", chat_pairs(14))
    write_jsonl(folder / "b.jsonl", chat_pairs(6, seed=1))
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in chat_pairs(6, seed=2)])
    facts = [{"question": "the river", "answer": "slow"}, {"prompt": "a road", "answer": " paper"}]
    write_jsonl(folder / "facts.jsonl", facts)
    return folder


def words(place: Path, *more: str) -> list[str]:
    return [
        *("--pairs", str(place / "a.jsonl"), str(place / "b.jsonl"), "--facts", str(place / "facts.jsonl")),
        *("--cache_dir", str(place / "cache"), "--max_length", "64", *more),
    ]


@pytest.fixture(scope="module")
def compared(place: Path, toy_model: Path) -> tuple[list[str], Path]:
    """A comparison of the toy with itself and with the other model, and the command that made it."""
    command = [
        *("compare", str(toy_model), str(toy_model), str(place / "other"), "--output_dir", str(place / "cmp")),
        *words(place, "--prompts", str(place / "prompts.jsonl"), "--max_new_tokens", "8", "--by", "length"),
    ]
    assert main(command) == 0
    return command, place / "cmp"


def document_of(folder: Path) -> Any:
    return json.loads((folder / "compare.json").read_text())


def test_a_model_compared_with_itself(compared: tuple[list[str], Path]) -> None:
    same = document_of(compared[1])["comparisons"][0]
    assert {"accuracy", "kl", "kl_reverse", "win_rate", "facts.probability", "answers.length"} <= set(same["figures"])
    for name, figure in same["figures"].items():
        for values in (figure["all"], *figure["datasets"].values()):
            difference = values["difference"]
            if difference is None and name in ("margin", "kl", "kl_reverse", "kl_per_token", "chosen_fell"):
                difference = values["after"]
            if difference is not None:
                assert difference["value"] == 0, name
                assert difference["low"] <= 0 <= difference["high"], name
            if name in PLAIN_BUT_EQUAL:
                assert values["after"]["value"] == 0.5, name
                assert values["after"]["low"] < 0.5 < values["after"]["high"], name
    assert not any(same["verdict"][kind] for kind in ("better", "worse", "changed"))


def test_another_model_differs(compared: tuple[list[str], Path]) -> None:
    document = document_of(compared[1])
    other = document["comparisons"][1]
    figures = other["figures"]
    assert figures["kl"]["all"]["after"]["low"] > 0
    assert figures["kl"]["all"]["num_prompts"] == 6
    assert set(figures["margin"]["datasets"]) == {"a", "b"}
    assert figures["margin"]["all"]["num_rows"] == 20
    assert other["num_answers"] == len(other["answers"]) == 6
    assert [round(one["after"], 9) for one in other["facts"]] != [round(one["before"], 9) for one in other["facts"]]
    assert document["settings"]["betas"] == [0.1, 0.1]
    assert document["before"]["dtype"] == "float32"
    assert document["settings"]["device"].endswith(" x cpu")
    assert len(document["settings"]["digests"]["pairs"]) == 2
    assert document["before"]["digest"] == document["comparisons"][0]["after"]["digest"] != other["after"]["digest"]
    assert any("length rule" in line for line in document["warnings"])


def test_rows_hold_every_value(compared: tuple[list[str], Path]) -> None:
    figures = document_of(compared[1])["comparisons"][1]["figures"]
    table = pq.read_table(compared[1] / "rows.parquet").to_pylist()
    of_other = [row for row in table if row["model"] == 2]
    pairs = [row for row in of_other if row["kind"] == "pair"]
    answers = [row for row in of_other if row["kind"] == "answer"]
    assert (len(pairs), len(answers), len(of_other)) == (20, 6, 28)
    assert np.mean([row["margin"] for row in pairs]) == pytest.approx(figures["margin"]["all"]["after"]["value"])
    assert np.mean([row["kl_on_after"] for row in answers]) == pytest.approx(figures["kl"]["all"]["after"]["value"])
    assert np.mean([row["won"] for row in answers]) == pytest.approx(figures["win_rate"]["all"]["after"]["value"])


def test_a_second_run_keeps_answers_and_conditions_decide(compared: tuple[list[str], Path], capsys: Capture) -> None:
    command, folder = compared
    files = [*folder.glob("answers-*/answers-*.gz"), *folder.glob("wins-*/scores/*.jsonl")]
    assert len(files) == 5
    before, content = [path.stat().st_mtime_ns for path in files], (folder / "compare.json").read_text()
    assert main([*command, "--fail_if", "kl > 1e-9", "facts.accuracy < -0.5"]) == 1
    assert [path.stat().st_mtime_ns for path in files] == before
    assert (folder / "compare.json").read_text() == content
    shown = capsys.readouterr()
    assert shown.err.count("--fail_if") == 1  # of the other model alone
    assert "other: kl > 1e-9" in shown.err
    assert "KL(after || before)" in shown.out


def test_eval_agrees_with_compare(
    compared: tuple[list[str], Path], place: Path, toy_model: Path, capsys: Capture
) -> None:
    expected = document_of(compared[1])["comparisons"][1]["figures"]
    capsys.readouterr()
    assert main(["eval", str(place / "other"), "--reference", str(toy_model), *words(place, "--json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: expected[name] for name in found["figures"]} == found["figures"]
    assert main(["eval", str(place / "other"), *words(place)]) == 0
    alone = capsys.readouterr().out
    assert "Chosen log-prob" in alone
    assert "implicit reward" not in alone


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["only"], "at least two models"),
        (["a", "b"], "give --pairs, --prompts or --facts"),
        (["a", "b", "--pairs", "p.jsonl", "--fail_if", "kl > 1"], "--prompts"),
        (["a", "b", "--pairs", "p.jsonl", "--by", "length"], "--prompts"),
        (["a", "b", "--pairs", "p.jsonl", "--rubric", "r.md"], "--judge"),
        (["a", "b", "--pairs", "p.jsonl", "--judge", "http://x/v1", "--reward", "m"], "not allowed with"),
        (["a", "b", "--pairs", "p.jsonl", "--beta", "0"], "above 0"),
        (["a", "b", "--facts", "f.jsonl", "--temperature", "0"], "--temperature is an option of --prompts"),
        (["a", "b", "--prompts", "p.jsonl", "--max_length", "9"], "--max_length is an option of --pairs"),
        (["a", "b", "--pairs", "p.jsonl", "--output_dir", __file__], "is a file"),
        (["a", "b", "--pairs", "p.jsonl", "--fale_if", "kl > 1"], "'--fail_if'"),
    ],
)
def test_wrong_commands_are_refused_before_a_model_is_loaded(more: list[str], message: str, capsys: Capture) -> None:
    assert main(["compare", "--output_dir", "cmp", *more]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_found_before_another_is_loaded(
    place: Path, toy_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    missing = str(tmp_path / "missing")
    assert main(["compare", str(toy_model), missing, *words(place), "--output_dir", str(tmp_path / "cmp")]) == 2
    assert main(["eval", missing, "--reference", str(toy_model), *words(place)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all(missing in line for line in told)


def test_prompts_that_no_model_can_answer_are_counted(place: Path, toy_model: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "river " * 1500}])
    words = ["--facts", str(place / "facts.jsonl"), "--prompts", str(prompts), "--output_dir", str(tmp_path / "cmp")]
    words += ["--max_new_tokens", "8"]
    assert main(["compare", str(toy_model), str(place / "other"), *words]) == 0
    document = document_of(tmp_path / "cmp")
    assert "kl" not in document["comparisons"][0]["figures"]
    assert any("1 of 1 answers are missing" in line and "positions" in line for line in document["warnings"])


@pytest.mark.parametrize(
    ("by", "message"),
    [("exact:color", "no column"), ("rule:no_such_module:f", "no module"), ("reward:{toy}", "not a reward model")],
)
def test_what_cannot_judge_is_found_before_there_are_answers(
    place: Path, toy_model: Path, tmp_path: Path, capsys: Capture, by: str, message: str
) -> None:
    more = ["--prompts", str(place / "prompts.jsonl"), "--by", by.format(toy=toy_model)]
    output_dir = tmp_path / "cmp"
    assert main(["compare", str(toy_model), str(toy_model), *words(place, *more), "--output_dir", str(output_dir)]) == 2
    assert message in capsys.readouterr().err
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("more", "advice"), [([], "no more positions"), (["--max_length", "64"], "--max_length takes")]
)
def test_cut_pairs_are_counted_with_what_helps(
    toy_model: Path, tmp_path: Path, capsys: Capture, more: list[str], advice: str
) -> None:
    row = {"prompt": "a road", "chosen": " river" * 300, "rejected": " paper"}
    pairs = write_jsonl(tmp_path / "long.jsonl", [row])
    assert main(["eval", str(toy_model), "--pairs", str(pairs), "--cache_dir", str(tmp_path), *more]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1 pair of 1 were cut" in told
    assert advice in told


def test_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch, place: Path, capsys: Capture) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert main(["eval", str(place / "other"), *words(place)]) == 2
    assert "jdpo eval runs in one process, and this one is one of 2" in capsys.readouterr().err
    assert main(["chat", str(place / "other")]) == 2
    assert "jdpo chat runs" in capsys.readouterr().err


def test_facts_must_be_facts(tmp_path: Path, capsys: Capture) -> None:
    facts = write_jsonl(tmp_path / "facts.jsonl", [{"question": "a", "answer": "b"}, {"question": "c"}])
    assert main(["eval", "model", "--facts", str(facts)]) == 2
    assert "facts.jsonl:2" in capsys.readouterr().err


@pytest.mark.full
def test_eval_gives_the_metrics_of_the_run(place: Path, toy_model: Path, capsys: Capture) -> None:
    run = place / "run"
    values = {
        "model_name_or_path": toy_model,
        "datasets": place / "a.jsonl",
        "eval_datasets": place / "b.jsonl",
        "output_dir": run,
        "cache_dir": place / "cache",
        "max_length": 64,
        "global_batch_size": 8,
        "max_steps": 3,
        "eval_steps": 3,
        "learning_rate": 1e-3,
        "beta": 0.3,
        "remat": "none",
        "export_dtype": "float32",
    }
    assert main(["dpo", *(f"{key}={value}" for key, value in values.items())]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = next(line for line in reversed(lines) if "eval_rewards/margins" in line)
    for model in (run, run / "checkpoints" / "3", run / "model"):
        capsys.readouterr()
        words = ["--pairs", str(place / "b.jsonl"), "--cache_dir", str(place / "cache"), "--max_length", "64", "--json"]
        assert main(["eval", str(model), "--reference", str(toy_model), *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["beta"] == 0.3  # of the run
        value = {name: figure["all"]["after"]["value"] for name, figure in found["figures"].items()}
        assert value["margin"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-3)
        assert value["accuracy"] == pytest.approx(expected["eval_rewards/accuracies"])
        assert value["logps.chosen"] == pytest.approx(expected["eval_logps/chosen"], rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_a_killed_comparison_continues(compared: tuple[list[str], Path], tmp_path: Path, seed: int) -> None:
    command, whole = compared
    again = [str(tmp_path / "cmp") if word == str(whole) else word for word in command]
    delay = float(np.random.default_rng(seed).uniform(3, 25))
    process = subprocess.Popen([sys.executable, "-m", "jdpo.cli.main", *again], stderr=subprocess.DEVNULL)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert main(again) == 0
    assert (tmp_path / "cmp" / "compare.json").read_text() == (whole / "compare.json").read_text()
    assert not list((tmp_path / "cmp").rglob("*.tmp"))
