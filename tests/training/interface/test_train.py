"""`jdpo.train` with rows and callbacks: it resumes, repeats, stops, samples, and trains the same bits."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file

import jdpo
from jdpo.cli.main import main
from jdpo.config import DPOConfig, load_config
from jdpo.reports.metrics_file import read_metrics
from jdpo.training.interface.callbacks import Callbacks, RunView
from jdpo.training.interrupt import StopRequest
from tests.conftest import chat_pairs
from tests.run_stops import EachStep, SignalAt

Words = Callable[..., list[str]]
ROWS, HELD_OUT = chat_pairs(24), chat_pairs(8, seed=1)
QUESTION = ROWS[0]["prompt"]


@pytest.fixture
def config(run_words: Words) -> Callable[..., DPOConfig]:
    """Returns the config of three steps, without rows."""

    def make(**overrides: object) -> DPOConfig:
        words = run_words(**{"eval_steps": 2, "reference": "live"} | overrides)
        return load_config(DPOConfig, None, [word for word in words if not word.startswith("datasets=")])

    return make


class Watch(jdpo.Callback):
    """Keeps what a run tells, and stops it after an evaluation."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.run: jdpo.RunView | None = None

    def on_start(self, run: jdpo.RunView) -> None:
        self.events.append(("start", run.step))
        for one in ("a text", QUESTION):
            with pytest.raises(ValueError, match=r"write run\.sample\(\[prompt\]\)"):
                run.sample(one)  # type: ignore[arg-type]
        self.run = run

    def on_log(self, run: jdpo.RunView, metrics: Mapping[str, float]) -> None:
        self.events.append(("log", run.step))
        assert metrics["loss"] > 0

    def on_evaluate(self, run: jdpo.RunView, metrics: Mapping[str, float]) -> None:
        self.events.append(("evaluate", run.step))
        if run.step and metrics["eval_loss"] < 0.6:
            run.stop("good\nenough")

    def on_end(self, run: jdpo.RunView) -> None:
        self.events.append(("end", run.step))


class Ask(Watch):
    """Asks the model of a run after each evaluation, too."""

    def on_evaluate(self, run: jdpo.RunView, metrics: Mapping[str, float]) -> None:
        super().on_evaluate(run, metrics)
        (answers,) = run.sample([QUESTION], n=2, max_new_tokens=4)
        (greedy,) = run.sample([QUESTION], temperature=0, max_new_tokens=4)
        for drawn in (
            run.sample([QUESTION], top_k=1, max_new_tokens=4),
            run.sample([QUESTION], top_p=1e-6, max_new_tokens=4),
        ):
            assert drawn[0][0].tokens == greedy[0].tokens
        assert [answer.sample for answer in answers] == [0, 1]
        assert run.model.logps(QUESTION, "yes").total < 0


class OfAnotherTrainer(jdpo.Callback):
    """Has a method that jdpo never calls."""

    def on_step_end(self, run: jdpo.RunView) -> None:
        raise AssertionError


def test_a_callback_watches_a_run_and_stops_it(
    config: Callable[..., DPOConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch()
    stopped = jdpo.train(config(), train_dataset=ROWS, eval_dataset=Dataset.from_list(HELD_OUT), callbacks=[watch])
    assert watch.events == [("start", 0), ("evaluate", 0), ("log", 1), ("log", 2), ("evaluate", 2), ("end", 2)]
    assert (stopped.step, stopped.stopped, stopped.interrupted, stopped.exit_code) == (2, "good\nenough", False, 0)
    assert (stopped.model_dir, stopped.metrics.index.tolist()) == (None, [0, 1, 2])
    assert r"stopped (good\nenough) at step 2" in repr(stopped)
    assert r"stopped by a callback: good\nenough; step 2 is saved" in capsys.readouterr().err
    assert watch.run is not None
    with pytest.raises(ValueError, match=r"copy what is needed later"):
        _ = watch.run.params
    with pytest.raises(ValueError, match="eval_dataset has changed since it started: row 8 differs"):
        jdpo.train(config(), train_dataset=ROWS, eval_dataset=Dataset.from_list([*HELD_OUT[:7], ROWS[0]]))


@pytest.mark.ci
def test_a_run_with_callbacks_repeats_without_them_from_its_folder_to_the_same_bits(
    config: Callable[..., DPOConfig], tmp_path: Path
) -> None:
    for _ in range(2):  # the second call resumes
        done = jdpo.train(config(), train_dataset=ROWS, eval_dataset=Dataset.from_list(HELD_OUT), callbacks=[Ask()])
    run, again = tmp_path / "run", tmp_path / "again"
    # The callback asks to stop after the last step, too, where there is nothing to stop.
    assert (done.step, done.stopped, done.model_dir) == (3, None, run / "model")
    assert done.metrics.loc[3, ["loss", "eval_loss"]].notna().all()
    assert main(["dpo", str(run / "resolved_config.yaml"), f"--output_dir={again}"]) == 0
    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, again))
    assert {name: found[name].tobytes() for name in found} == {name: expected[name].tobytes() for name in expected}
    figures = [
        [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (run, again)
    ]
    assert figures[0] == figures[1]


def test_an_error_of_a_callback_ends_the_run_after_it_is_saved(
    config: Callable[..., DPOConfig], tmp_path: Path
) -> None:
    steps: list[int] = []

    def fail(run: jdpo.RunView) -> None:
        steps.append(run.step)
        if run.step == 1:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jdpo.train(config(eval_steps="null"), train_dataset=ROWS, callbacks=[EachStep(fail)])
    assert steps == [0, 1]
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


@pytest.mark.ci
def test_a_run_that_dies_before_its_first_checkpoint_begins_again(
    config: Callable[..., DPOConfig], tmp_path: Path
) -> None:
    class Die(jdpo.Callback):
        def on_evaluate(self, run: jdpo.RunView, metrics: Mapping[str, float]) -> None:
            raise SystemExit  # as a second Ctrl-C does: nothing is saved

    with pytest.raises(SystemExit):
        jdpo.train(config(), train_dataset=ROWS, eval_dataset=HELD_OUT, callbacks=[Die()])
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0]
    jdpo.train(config(), train_dataset=ROWS, eval_dataset=HELD_OUT)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 3]


def interrupt_after_the_first_step(run: jdpo.RunView) -> None:
    if run.step == 1:
        raise KeyboardInterrupt


@pytest.mark.ci
@pytest.mark.parametrize("callback", [SignalAt(1, signal.SIGINT), EachStep(interrupt_after_the_first_step)])
def test_ctrl_c_saves_and_returns(callback: jdpo.Callback, config: Callable[..., DPOConfig]) -> None:
    before = signal.getsignal(signal.SIGINT)
    result = jdpo.train(config(eval_steps="null"), train_dataset=ROWS, callbacks=[callback])
    assert (result.step, result.interrupted, result.exit_code) == (1, True, 130)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "no rows to train on"),
        ({"train_dataset": ROWS, "callbacks": [print]}, r"callbacks\[0\]: expected an object"),
        ({"train_dataset": ROWS, "callbacks": [Watch]}, r"write Watch\(\)"),
        (
            {"train_dataset": ROWS, "callbacks": [OfAnotherTrainer()]},
            "calls no method on_step_end; it calls on_start",
        ),
        ({"train_dataset": ROWS, "callbacks": jdpo.Callback()}, r"write callbacks=\[\.\.\.\]"),
        ({"train_dataset": [{"text": np.float64}]}, r"train_dataset\[0\]"),
    ],
)
def test_a_wrong_call_is_refused(given: dict[str, object], problem: str, config: Callable[..., DPOConfig]) -> None:
    with pytest.raises(ValueError, match=problem):
        jdpo.train(config(eval_steps="null"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "advice"), [({"beta": 0.1}, r"DPOConfig\(\*\*config\)"), ("run.yaml", "load_config")]
)
def test_what_is_no_config_is_refused(wrong: object, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"expected a jdpo\.\w+Config or .*{advice}"):
        jdpo.train(wrong, train_dataset=ROWS)  # type: ignore[arg-type]


def test_a_callback_need_not_say_why_it_stops_a_run() -> None:
    stop = StopRequest()
    setup: Any = SimpleNamespace(num_steps=2, config=SimpleNamespace(output_dir="run"))
    RunView(setup, stop, 1).stop()
    assert stop.reason == "no reason given"


def test_an_interrupt_of_a_callback_stops_the_run_like_ctrl_c_and_the_second_one_at_once() -> None:
    seen: list[int] = []

    def interrupt(run: jdpo.RunView) -> None:
        seen.append(run.step)
        raise KeyboardInterrupt

    calls, stop = Callbacks([EachStep(interrupt), EachStep(lambda run: seen.append(-run.step))]), StopRequest()
    setup: Any = SimpleNamespace(num_steps=3, config=SimpleNamespace(output_dir="run"))
    calls.begin(setup, stop, 1, {})
    assert (seen, stop.signalled(), stop.exit_code) == ([1, -1], True, 130)
    with pytest.raises(KeyboardInterrupt):
        calls.after_step(2, None, {})


def test_rows_are_named_once(run_words: Words) -> None:
    with pytest.raises(ValueError, match="both name rows"):
        jdpo.train(load_config(DPOConfig, None, run_words()), train_dataset=ROWS)
