"""The loop around its stages, which here are functions that write the files which the commands would write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.iteration.loop import iterate
from jdpo.iteration.loop_settings import LoopSettings
from jdpo.iteration.round_plan import Command, RoundFolder

Make = Callable[..., LoopSettings]
WON = (0.6, 0.52, 0.7)


class Stages:
    """Runs the stages of a loop.

    Args:
      won: (value, low, high) of the win rate of each round.
      pairs: number of pairs of each round.
      kl: of each round.
      dies: the process is killed at this call, before or after the stage has written its files.
    """

    def __init__(
        self,
        *,
        won: tuple[tuple[float, float, float], ...] = (WON,) * 3,
        pairs: tuple[int, ...] = (8, 8, 8),
        kl: tuple[float, ...] = (1.0,) * 3,
        dies: tuple[int, str] = (0, ""),
        code: tuple[str, int] = ("", 0),
    ) -> None:
        self.won, self.pairs, self.kl, self.dies, self.code = won, pairs, kl, dies, code
        self.ran: list[str] = []

    def __call__(self, command: Command, lock: int) -> int:
        os.fstat(lock)  # it is open
        # The model before is of another round; the output, or the scored folder, comes after it.
        word = [word for word in command.words if "round-" in word and not word.endswith("model")][-1]
        number = int(word.partition("round-")[2][:3])
        self.ran.append(f"{number} {command.stage}")
        if self.dies == (len(self.ran), "before"):
            raise KeyboardInterrupt
        self.write(command, number)
        if self.dies == (len(self.ran), "after"):
            raise KeyboardInterrupt
        return self.code[1] if self.code[0] == self.ran[-1] else 0

    def write(self, command: Command, number: int) -> None:
        outputs = (Path(word.partition("=")[2]) for word in command.words if word.startswith("--output"))
        path = next(outputs, Path("score"))
        if command.stage == "pair":
            path.write_text("".join(f'{{"round": {number}, "pair": {pair}}}\n' for pair in range(self.pairs[number])))
        elif command.stage == "compare":
            path.mkdir(exist_ok=True)
            won = dict(zip(("value", "low", "high"), self.won[number], strict=True))
            figures = {"win_rate": won, "kl": {"value": self.kl[number], "low": None, "high": None}}
            found = {name: {"all": {"after": value}} for name, value in figures.items()}
            (path / "compare.json").write_text(json.dumps({"comparisons": [{"figures": found}]}))


def run(loop: LoopSettings, stages: Stages) -> tuple[int, list[str], dict[str, Any]]:
    lines: list[str] = []
    code = iterate(loop, stages, lines.append)
    result = Path(loop.output_dir) / "iterate.json"
    return code, lines, json.loads(result.read_text()) if result.exists() else {}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_rounds(make_loop: Make) -> None:
    code, lines, result = run(make_loop(replay=0.2), (stages := Stages()))
    assert code == 0
    assert stages.ran[:6] == ["0 generate", "0 score", "0 pair", "0 dpo", "0 compare", "1 generate"]
    assert len(stages.ran) == 15
    out = Path(make_loop().output_dir)
    assert lines[-1] == f"done: all 3 rounds are done; the model is {out}/round-002/run/model"
    assert result["model"] == f"{out}/round-002/run/model"
    assert result["stopped"]["why"] == "rounds"
    assert [(found["pairs"], found["replayed"]) for found in result["rounds"]] == [(8, 0), (10, 2), (10, 2)]
    replayed = [(out / f"round-00{number}" / "replay.jsonl").read_text() for number in (1, 2)]
    assert replayed[0] != replayed[1], "each round draws its own"
    commands = (out / "round-001" / "commands.sh").read_text().splitlines()
    assert [line.split()[:2] for line in commands] == [
        ["jdpo", stage] for stage in ("generate", "score", "pair", "dpo", "compare")
    ]
    asked = [(out / f"round-00{number}" / "prompts.jsonl").read_text().splitlines() for number in range(3)]
    assert len({line for lines in asked for line in lines}) == 18


@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_at_every_stage_and_continued(make_loop: Make, tmp_path: Path, when: str) -> None:
    whole = tmp_path / "whole"
    assert run(make_loop(replay=0.2, rounds=2), Stages())[0] == 0
    Path(make_loop().output_dir).rename(whole)
    for call in range(1, 11):
        loop = make_loop(replay=0.2, rounds=2)
        with pytest.raises(KeyboardInterrupt):
            run(loop, Stages(dies=(call, when)))
        code, _, _ = run(loop, (stages := Stages()))
        assert code == 0
        # A stage that had finished but was not recorded is run again; the commands then find their own files.
        assert len(stages.ran) == 11 - call
        assert content(Path(loop.output_dir)) == content(whole)
        Path(loop.output_dir).rename(tmp_path / f"{when}-{call}")


def test_a_failed_stage_gives_its_exit_code(make_loop: Make) -> None:
    code, lines, _ = run(make_loop(), (stages := Stages(code=("1 dpo", 75))))
    assert code == 75
    assert "round 1: dpo ended with exit code 75" in lines[-1]
    assert stages.ran[-1] == "1 dpo"
    _, _, result = run(make_loop(), (stages := Stages()))
    assert stages.ran[0] == "1 dpo"
    assert result["stopped"]["why"] == "rounds"


def test_a_model_that_is_no_better_is_not_the_result(make_loop: Make) -> None:
    _, lines, result = run(make_loop(), (stages := Stages(won=(WON, (0.4, 0.3, 0.5), WON))))
    assert stages.ran[-1] == "1 compare"
    assert "round 1 won 40 % (95 % interval 30 to 50 %)" in lines[-1]
    assert result["model"] == f"{make_loop().output_dir}/round-000/run/model"
    assert run(make_loop(), (again := Stages()))[1][-1] == lines[-1], "asked again, it says the same"
    assert again.ran == []


def test_the_divergence_is_bounded(make_loop: Make) -> None:
    _, lines, result = run(make_loop(max_kl=5), Stages(kl=(6.0, 1.0, 1.0)))
    assert "6 nats per answer, more than max_kl 5" in lines[-1]
    assert result["model"] == "MODEL"
    _, _, result = run(make_loop(max_kl=7), Stages())
    assert result["stopped"]["why"] == "rounds", "the bound may be raised"


def test_a_round_without_pairs_ends_the_loop(make_loop: Make) -> None:
    _, lines, result = run(make_loop(), (stages := Stages(pairs=(8, 0, 8))))
    assert stages.ran[-1] == "1 pair"
    assert "round 1 made no pairs" in lines[-1]
    assert result["stopped"]["why"] == "no_pairs"
    assert run(make_loop(), (again := Stages()))[1][-1] == lines[-1], "asked again, it says the same"
    assert again.ran == []


@pytest.mark.parametrize(
    ("changes", "named"), [({"seed": 1}, "seed"), ({"replay": 0.5}, "replay"), ({"rounds": 4}, "prompts_per_round")]
)
def test_another_loop_in_the_same_folder_is_refused(make_loop: Make, changes: dict[str, Any], named: str) -> None:
    run(make_loop(), Stages())
    with pytest.raises(ValueError, match=named):
        run(make_loop(**changes), Stages())


def test_other_answers_in_the_prompts_are_noticed(make_loop: Make, prompts_file: Path) -> None:
    run(make_loop(), Stages())
    prompts_file.write_text(prompts_file.read_text().replace('"answer": "7"', '"answer": "8"'))
    with pytest.raises(ValueError, match="content of the prompts"):
        run(make_loop(), Stages())


def test_more_rounds_may_be_added(make_loop: Make) -> None:
    assert run(make_loop(rounds=1, prompts_per_round=6), Stages())[0] == 0
    run(make_loop(rounds=2, prompts_per_round=6), (stages := Stages()))
    assert stages.ran[0] == "1 generate"
    assert json.loads((Path(make_loop().output_dir) / "settings.json").read_text())["rounds"] == 2


def test_other_folders_and_running_loops_are_refused(make_loop: Make) -> None:
    folder = Path(make_loop().output_dir)

    class Nested(Stages):
        def write(self, command: Command, number: int) -> None:
            with pytest.raises(ValueError, match="still running"):
                run(make_loop(), Stages())
            super().write(command, number)

    assert run(make_loop(rounds=1), Nested())[0] == 0
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        run(make_loop(), Stages())


def test_a_comparison_without_a_win_rate_is_named(make_loop: Make) -> None:
    class Unjudged(Stages):
        def write(self, command: Command, number: int) -> None:
            super().write(command, number)
            path = RoundFolder(Path(make_loop().output_dir) / "round-000").cmp / "compare.json"
            if path.exists():
                path.write_text('{"comparisons": [{"figures": {}}]}')

    with pytest.raises(ValueError, match="no figure win_rate"):
        run(make_loop(), Unjudged())
