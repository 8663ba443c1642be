"""`sample_prompts`: the answers of a run to the same prompts as it trains, which change nothing of its training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jdpo
from jdpo.cli.main import main
from jdpo.config import DPOConfig, SampleSettings, load_config
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.reports.metrics_file import read_metrics
from jdpo.training.answer_samples import cut_samples
from jdpo.training.run import train
from jdpo.training.setup.sample_prompts import read_sample_prompts
from tests.run_stops import SignalAt

Words = Callable[..., list[str]]
SAMPLED = {"sample_prompts": '["winter river", "seven"]', "sample_steps": 3, "sample_max_new_tokens": 6}
STOPPED_AT = 9


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.full
def test_a_run_that_samples_and_is_stopped_ends_as_one_that_does_not(
    cut_words: Words, uninterrupted: Path, same_run: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    words = cut_words(tmp_path / "run", **SAMPLED)

    assert train(load_config(DPOConfig, None, words[1:]), callbacks=[SignalAt(STOPPED_AT)]).step == STOPPED_AT
    before = lines_of(tmp_path / "run")
    assert [line["step"] for line in before] == [0, 0, 3, 3, 6, 6, 9, 9]
    with (tmp_path / "run" / "samples.jsonl").open("a", encoding="utf-8") as file:
        # What a kill after the next sampling leaves: a step that no checkpoint has, and the start of a line.
        file.write(json.dumps(before[-1] | {"step": 10}) + '\n{"step": 10, "pro')
    assert main(words) == 0
    lines = lines_of(tmp_path / "run")
    assert lines[:8] == before
    assert [line["step"] for line in lines[8:]] == [12, 12]
    assert set(lines[0]) == {"step", "prompt_id", "prompt", "message", "finish_reason", "logp"}
    assert lines[0]["message"] != lines[8]["message"]
    same_run(tmp_path / "run", uninterrupted)


def trace_of(run: Path) -> list[dict[str, float]]:
    """Returns the metrics without times and memory."""
    times = ("_per_second", "_seconds", "_gib", "mfu")
    return [
        {name: line[name] for name in line if not name.endswith(times)} for line in read_metrics(run / "metrics.jsonl")
    ]


def test_training_is_the_same_and_the_last_answers_are_those_of_the_exported_adapter(
    run_words: Words, tmp_path: Path
) -> None:
    adapters = {"lora.r": 2, "learning_rate": 3e-2, "max_steps": 2, "seed": 5}
    run, without = tmp_path / "run", tmp_path / "without"
    assert main(["sft", *run_words(**adapters, **SAMPLED, report_to="tensorboard")]) == 0
    assert main(["sft", *run_words(**adapters, output_dir=without)]) == 0
    assert trace_of(run) == trace_of(without)
    weights = "model/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (without / weights).read_bytes()
    assert not (without / "samples.jsonl").exists()
    first, last = lines_of(run)[:2], lines_of(run)[-2:]
    assert [line["step"] for line in (*first, *last)] == [0, 0, 2, 2]
    assert [line["message"] for line in first] != [line["message"] for line in last]
    answers = jdpo.load(run).generate([line["prompt"] for line in last], max_new_tokens=6, seed=5)
    for line, (answer,) in zip(last, answers, strict=True):
        own = answer._asdict()
        assert {name: line[name] for name in line if name in own and name != "logp"} == {
            name: own[name] for name in ("prompt_id", "message", "finish_reason")
        }
        assert line["logp"] == pytest.approx(answer.logp, abs=1e-3)
    (events,) = (run / "tensorboard").iterdir()
    assert b"samples/1" in events.read_bytes()


def test_a_damaged_file_of_answers_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert cut_samples(path, 3) is None
    path.write_bytes(b'{"step": 1}\n\x00\x00\n{"step": 3}\n{"step": 4}\n')
    note = cut_samples(path, 3)
    assert note is not None
    assert "line 2" in note
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    (kept,) = tmp_path.glob("samples.damaged-*.jsonl")
    assert b"\x00" in kept.read_bytes()
    assert cut_samples(path, None) is None
    assert path.read_bytes() == b""


def test_prompts_that_cannot_be_answered_are_refused_before_training(toy_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(toy_model, chat_template=None)

    def read(**settings: Any) -> int:
        return len(read_sample_prompts(SampleSettings(**settings), tokenizer, lambda line: None, max_positions=256))

    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "winter"}\n{"prompt": "winter"}\n{"prompt": "seven"}\n', encoding="utf-8")
    assert read() == 0
    assert read(sample_prompts=str(path)) == 2
    assert read(sample_prompts=["winter"], sample_max_new_tokens=8) == 1
    for settings, message in (
        ({"sample_steps": 2}, "sample_steps 2 needs sample_prompts"),
        ({"sample_prompts": [str(path)]}, "it is a file; write it without"),
        ({"sample_prompts": "winter river?"}, "write it as a list"),
        ({"sample_prompts": [" ".join(["winter"] * 400)]}, r"sample_prompts\[0\].* 256 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**settings)
    path.write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(1001)), encoding="utf-8")
    with pytest.raises(ValueError, match="more than 1,000 prompts"):
        read(sample_prompts=str(path))
