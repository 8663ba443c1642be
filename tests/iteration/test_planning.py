"""Questions, commands and decisions of a loop, without running it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.cli.main import main
from jdpo.config import DatasetConfig, to_yaml
from jdpo.generation.prompts import make_question, read_prompts
from jdpo.iteration.loop import planned_commands
from jdpo.iteration.loop_settings import LoopSettings
from jdpo.iteration.prompt_rounds import read_split, split_prompts, write_questions
from jdpo.iteration.replay import num_replayed, write_replay
from jdpo.iteration.stopping import Compared, Interval, why_stop
from tests.conftest import write_jsonl

Make = Callable[..., LoopSettings]

# --- prompts


def test_no_prompt_is_asked_twice_or_held_out(make_loop: Make) -> None:
    split = read_split(make_loop(prompts_per_round=5))
    assert [len(asked) for asked in split.rounds] == [5, 5, 5]
    assert len(split.held_out) == 2
    ids = [one.prompt_id for asked in (split.held_out, *split.rounds) for one in asked]
    assert len(set(ids)) == len(ids) == 17
    assert split.unused == 3
    assert read_split(make_loop(prompts_per_round=5)) == split
    assert read_split(make_loop(prompts_per_round=5, seed=1)).rounds != split.rounds


def test_held_out_prompts_and_pairs_are_kept_apart(make_loop: Make, prompts_file: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*rows[:2], {"prompt": [{"role": "user", "content": "New?"}]}])
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{**rows[5], "chosen": "6", "rejected": "7"}])
    split = read_split(make_loop(held_out_prompts=held_out, compare__pairs=pairs))
    assert len(split.held_out) == 3
    assert split.removed == 3
    asked = [one.prompt[0]["content"] for round_asked in split.rounds for one in round_asked]  # type: ignore[index]
    assert not {"What is 0 + 1?", "What is 1 + 1?", "What is 5 + 1?"} & set(asked)
    assert len(asked) == 15


@pytest.mark.parametrize("changes", [{"prompts_per_round": 7}, {"rounds": 19}])
def test_too_few_prompts_are_refused(make_loop: Make, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"too few for .* It is enough for (2|18) rounds"):
        read_split(make_loop(**changes))


def test_prompts_that_are_all_held_out_are_named(make_loop: Make, prompts_file: Path) -> None:
    with pytest.raises(ValueError, match="without the 20 that are held out"):
        read_split(make_loop(held_out_prompts=prompts_file))


@given(st.integers(2, 60), st.integers(1, 5), st.integers(0, 9))
def test_a_longer_file_keeps_most_places(count: int, rounds: int, seed: int) -> None:
    loop = LoopSettings(
        model_name_or_path="m", prompts="p", output_dir="o", rounds=rounds, seed=seed, held_out=0.2,
        score={"by": "length"}, compare={"by": "reward:r"},
    )  # fmt: skip
    questions = [make_question(f"{n}?", "p") for n in range(count)]
    try:
        split = split_prompts(questions, None, loop)
    except ValueError:
        assert count - max(1, round(count * 0.2)) < rounds
        return
    ids = [one.prompt_id for asked in (split.held_out, *split.rounds) for one in asked]
    assert len(set(ids)) == len(ids) == count - split.unused
    assert split_prompts(questions[::-1], None, loop) == split


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Plain text"},
        {"prompt": [{"role": "user", "content": "Hi"}], "answer": "Hello", "chosen": "x", "rejected": "y"},
        {"prompt": "Why?", "messages": [{"role": "user", "content": "Other"}, {"role": "assistant", "content": "A"}]},
        {"question": "Why?", "system": "Be brief.", "chosen": "a", "rejected": "b"},
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"prompt": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"prompt": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_written_prompts_read_the_same(row: dict[str, Any], tmp_path: Path) -> None:
    given_questions = read_prompts(DatasetConfig(path=str(write_jsonl(tmp_path / "given.jsonl", [row])))).questions
    write_questions(tmp_path / "round.jsonl", given_questions)
    (again,) = read_prompts(DatasetConfig(path=str(tmp_path / "round.jsonl"))).questions
    assert again._replace(origin="", columns=None) == given_questions[0]._replace(origin="", columns=None)
    assert (again.columns or {}).get("answer") == row.get("answer")


# --- replay


def test_replay_is_the_share_of_all_training_pairs(tmp_path: Path) -> None:
    assert num_replayed(80, 500, 0.2) / (80 + num_replayed(80, 500, 0.2)) == 0.2
    older = [write_jsonl(tmp_path / f"{n}.jsonl", [{"n": n, "row": row} for row in range(30)]) for n in range(2)]
    new = write_jsonl(tmp_path / "new.jsonl", [{"n": 2, "row": row} for row in range(40)])
    assert write_replay(tmp_path / "replay.jsonl", new, older, 0.2, seed=0) == 10
    rows = [json.loads(line) for line in (tmp_path / "replay.jsonl").read_text().splitlines()]
    assert len({(row["n"], row["row"]) for row in rows}) == 10
    assert {row["n"] for row in rows} == {0, 1}
    before = (tmp_path / "replay.jsonl").read_bytes()
    write_replay(tmp_path / "replay.jsonl", new, older, 0.2, seed=0)
    assert (tmp_path / "replay.jsonl").read_bytes() == before


# --- commands


def words_of(loop: LoopSettings) -> list[dict[str, list[str]]]:
    return [{one.stage: list(one.words) for one in stages} for stages in planned_commands(loop)]


def test_each_round_starts_from_the_model_before(make_loop: Make) -> None:
    first, second, _ = words_of(make_loop(replay=0.2, dpo="{beta: 0.2, lora: {r: 4}}"))
    out = make_loop().output_dir
    assert first["generate"][1] == first["compare"][1] == "MODEL"
    assert second["generate"][1] == second["compare"][1] == first["compare"][2] == f"{out}/round-000/run/model"
    assert f"--model_name_or_path={out}/round-000/run/model" in second["dpo"]
    assert "--beta=0.2" in second["dpo"]
    assert '--lora={"r": 4}' in second["dpo"]
    assert f'--datasets=["{out}/round-000/pairs.jsonl"]' in first["dpo"]
    assert f'--datasets=["{out}/round-001/pairs.jsonl", "{out}/round-001/replay.jsonl"]' in second["dpo"]
    assert {"--seed=0"} & set(first["generate"])
    assert {"--seed=1"} & set(second["generate"])


def test_the_reference_is_the_previous_or_the_initial_model(make_loop: Make) -> None:
    previous, initial = words_of(make_loop())[1]["dpo"], words_of(make_loop(reference="initial"))[1]["dpo"]
    assert not [word for word in previous if "reference_model" in word]
    assert "--reference_model=MODEL" in initial


def test_the_judge_sees_held_out_prompts_only(make_loop: Make) -> None:
    for stages in words_of(make_loop()):
        assert [word for word in stages["compare"] if ".jsonl" in word] == [
            f"--prompts={make_loop().output_dir}/held_out.jsonl"
        ]
        assert not [
            word for stage in ("generate", "score", "pair", "dpo") for word in stages[stage] if "held_out.jsonl" in word
        ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compare__by": ""}, "missing key 'compare"),
        ({"compare__by": "lenth"}, r"^--by lenth: no such scorer; did you mean 'length'"),
        ({"score__by": "judge:http://localhost:1/v1/"}, "same_scorer"),
        ({"compare__by": "reward:rm", "score__by": "reward:rm"}, "same_scorer"),
        ({"compare__by": "reward:./models/../rm", "score__by": "reward:rm/"}, "same_scorer"),
        ({"dpo": "{datasets: x}"}, "^dpo: the loop sets datasets"),
        ({"held_out": 0}, "held_out"),
        ({"roundz": 3}, "did you mean 'rounds'"),
        ({"pair__strategy": "human"}, "best_worst, best_random or adjacent"),
        ({"replay": 1}, "less than 1"),
        ({"generate__n": 1}, "generate.n"),
    ],
)
def test_settings_are_checked(make_loop: Make, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_loop(**changes)


def test_the_scorer_may_judge_if_that_is_wanted(make_loop: Make) -> None:
    judge = "judge:http://localhost:1/v1"
    assert make_loop(score__by=judge, same_scorer=True).same_scorer
    assert make_loop(score__by=judge, score__judge_model="another").score.by == judge


# --- stopping


def compared(low: float, high: float, kl: float = 1.0) -> Compared:
    return Compared(Interval((low + high) / 2, low, high), kl)


@pytest.mark.parametrize(
    ("found", "number", "why"),
    [
        (compared(0.3, 0.5), 0, "not_better"),
        (compared(0.3, 0.501), 0, None),
        (compared(0.55, 0.7), 0, None),
        (compared(0.55, 0.7, kl=20.1), 0, "max_kl"),
        (compared(0.55, 0.7, kl=20), 0, None),
        (compared(0.55, 0.7), 2, "rounds"),
        (compared(0.3, 0.4), 2, "not_better"),
        (None, 1, "no_pairs"),
    ],
)
def test_the_loop_stops(make_loop: Make, found: Compared | None, number: int, why: str | None) -> None:
    stop = why_stop(found, number, make_loop(max_kl=20))
    assert (None if stop is None else stop.why) == why
    if stop is not None:
        assert stop.keeps == (why == "rounds")


# --- the command


def test_help_of_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["iterate", "--help", "replay"]) == 0
    assert "earlier rounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compare__by": "exact:color"}, "no column"),
        ({"compare__by": "rule:no_such_module:f"}, "no module"),
        ({"score__rubric": "r.md"}, "--rubric"),
        ({"compare__facts": "missing.jsonl"}, "missing.jsonl"),
        ({"output_dir": __file__}, "is a file"),
    ],
)
def test_what_the_last_stage_needs_is_found_first(
    make_loop: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], named: str
) -> None:
    config = tmp_path / "loop.yaml"
    config.write_text(to_yaml(make_loop(**changes)))
    assert main(["iterate", str(config), "--dry_run"]) == 2
    assert named in capsys.readouterr().err


def test_pairs_to_compare_on_are_pairs(make_loop: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_pairs = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "Held out?", "completion": "Yes."}])
    config = tmp_path / "loop.yaml"
    config.write_text(to_yaml(make_loop(compare__pairs=no_pairs, compare__by="exact:answer", same_scorer=True)))
    assert main(["iterate", str(config), "--dry_run"]) == 2
    assert "held.jsonl:1: the columns fit no known format" in (message := capsys.readouterr().err)
    assert "in the config" not in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "MODEL"),
        ({"model_name_or_path": "{toy}", "compare__by": "reward:{toy}"}, "reward model"),
        ({"model_name_or_path": "{run}"}, "run/model, the model that it has exported"),
    ],
)
def test_models_are_found_before_anything_runs(
    make_loop: Make,
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    named: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_model, run / "model")
    (run / "run.json").write_text("{}")
    config = tmp_path / "loop.yaml"
    config.write_text(
        to_yaml(make_loop(**{key: value.format(toy=toy_model, run=run) for key, value in changes.items()}))
    )
    assert main(["iterate", str(config)]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "loop").exists()
