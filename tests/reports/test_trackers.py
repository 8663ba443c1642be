"""Trackers: which there are, what they are sent, and that none of them ends a run."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import jdpo
from jdpo import RunView
from jdpo.config import DPOConfig, SFTConfig, load_config
from jdpo.reports.metrics_file import read_metrics
from jdpo.reports.trackers.delivery import MOST_WAITING, Delivery, Line
from jdpo.reports.trackers.sent_steps import SentSteps
from jdpo.reports.trackers.tracker_registry import check_trackers, tracker_factory
from tests.reports.tracker_toys import diary, install, tensorboard_events
from tests.run_stops import EachStep

__all__ = ["diary"]  # a fixture

Words = Callable[..., list[str]]


class Noted:
    """A tracker that notes its calls, and raises at one step."""

    def __init__(self, *, fails_at: int | None = None, newest: int | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails_at, self._newest = fails_at, newest

    def newest_step(self) -> int | None:
        return self._newest

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self._fails_at:
            raise ConnectionError("no answer from https://me:pass@host/api?key=1 for TOP-SECRET-VALUE\x1b[31m")
        self.calls.append((step, dict(metrics)))

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        self.calls.append((step, *samples))

    def log_report(self, path: Path) -> None:
        self.calls.append(("report", path.name))

    def finish(self, status: str) -> None:
        self.calls.append((status,))


def delivered(
    folder: Path, tracker: Noted, lines: Sequence[Line], *, backlog: Sequence[Line] = (), new: bool = False
) -> list[str]:
    """Sends lines to a tracker in one start of a run; returns what the user was told."""
    told: list[str] = []
    delivery = Delivery("noted", SentSteps(folder / "noted.json", "project", new=new), told.append)
    delivery.start(lambda *_: tracker, backlog)
    for line in lines:
        delivery.put(line)
    delivery.end("finished", folder / "report.html", time.monotonic() + 60)
    delivery.wait(time.monotonic() + 60)
    return told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import no_such_module", "importing it fails: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from json import no_such_name", "importing it fails: ImportError: cannot import name 'no_such_name'"),
        ("raise TypeError('descriptors cannot be created')", "TypeError: descriptors cannot be created"),
    ],
)
def test_a_tracker_that_does_not_import_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(content)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_trackers(["wandb"])


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / name).exists()])
    with pytest.raises(ValueError, match=rf"pip install 'jdpo\[{name}\]'"):
        check_trackers([name])


def test_trackers_of_other_packages_are_found_by_name(
    diary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trackers(["diary"])
    with pytest.raises(ValueError, match="names diary 2 times"):
        check_trackers(["diary", "diary"])
    assert tracker_factory("diary").__name__ == "Diary"
    with pytest.raises(ValueError, match=r"did you mean 'diary'\? The trackers are: angry, diary, mlflow, tensorboard"):
        check_trackers(["dairy"])
    with pytest.raises(ValueError, match=r"'\[wandb, diary\]'"):
        check_trackers(["wandb,diary"])
    broken = install(tmp_path / "broken", {"broken": "broken_tracker:Tracker"}, {"broken_tracker": "import no_such"})
    monkeypatch.syspath_prepend(broken)
    with pytest.raises(ValueError, match="toy-trackers is installed, but importing it fails"):
        check_trackers(["broken"])


def test_each_value_is_sent_once_whatever_is_made_again(tmp_path: Path) -> None:
    lines = [
        Line(0, samples=[("why?", "so")]),
        Line(1, {"loss": 0.7}),
        Line(2, {"loss": 0.6}),
        Line(2, {"eval_loss": 0.65}),
        Line(3, {"loss": 0.5}),
    ]
    # Killed between the two lines of step 2, and resumed from step 1.
    first = Noted()
    assert delivered(tmp_path, first, lines[:3], new=True) == []
    assert first.calls == [
        (0, ("why?", "so")),
        (1, {"loss": 0.7}),
        (2, {"loss": 0.6}),
        ("report", "report.html"),
        ("finished",),
    ]
    second = Noted()
    delivered(tmp_path, second, lines[2:], backlog=lines[:2])
    assert second.calls[:-2] == [(2, {"eval_loss": 0.65}), (3, {"loss": 0.5})]
    # The tracker lost what it had not stored when it was killed, and says so.
    third = Noted(newest=1)
    delivered(tmp_path, third, lines[4:], backlog=lines[:4])
    assert third.calls[:-2] == [(2, {"loss": 0.6}), (2, {"eval_loss": 0.65}), (3, {"loss": 0.5})]
    # In another run, or another project, there is nothing to continue.
    again = SentSteps(tmp_path / "noted.json", "project", new=False)
    assert again.resumed
    assert again.missing(3, ["loss"]) == []
    for fresh in (
        SentSteps(tmp_path / "noted.json", "other", new=False),
        SentSteps(tmp_path / "b.json", "p", new=True),
    ):
        assert not fresh.resumed
        assert fresh.missing(1, ["loss"]) == ["loss"]
        assert fresh.id != again.id


@pytest.mark.parametrize("text", ["{", '{"id": "../x", "project": "p", "step": 1, "sent": []}', '{"id": "0a"}'])
def test_a_damaged_file_of_sent_steps_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "noted.json").write_text(text)
    with pytest.raises(ValueError, match=r"noted\.json"):
        SentSteps(tmp_path / "noted.json", "p", new=False)


def test_a_tracker_that_raises_loses_its_line_alone_and_shows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_API_KEY", "TOP-SECRET-VALUE")
    tracker = Noted(fails_at=2)
    lines = [Line(1, {"loss": 0.7}), Line(2, {"loss": 0.6}), Line(2, {"eval_loss": 0.6}), Line(3, {"loss": 0.5})]
    warning, at_end = delivered(tmp_path, tracker, lines, new=True)
    assert [call[0] for call in tracker.calls] == [1, 3, "report", "finished"]
    assert (
        "tracker noted failed at step 2: ConnectionError: no answer from https://host/api for $TOY_API_KEY" in warning
    )
    assert "2 calls failed" in at_end
    for secret in ("pass", "SECRET-VALUE", "\x1b"):
        assert secret not in warning + at_end


def test_a_line_that_failed_is_sent_when_the_run_resumes(tmp_path: Path) -> None:
    lines = [Line(1, {"loss": 0.7}), Line(2, {"loss": 0.6})]
    delivered(tmp_path, Noted(fails_at=2), lines, new=True)
    tracker = Noted()
    delivered(tmp_path, tracker, [Line(3, {"loss": 0.5})], backlog=lines)
    assert tracker.calls[:-2] == [(2, {"loss": 0.6}), (3, {"loss": 0.5})]


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path: Path) -> None:
    free, hangs = threading.Event(), threading.Event()

    class Hanging(Noted):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            hangs.set()
            free.wait()
            super().log(step, metrics)

    tracker, told = Hanging(), []
    delivery = Delivery("noted", SentSteps(tmp_path / "noted.json", "p", new=True), told.append)
    delivery.start(lambda *_: tracker, [])
    delivery.put(Line(1, {"loss": 1.0}))
    assert hangs.wait(60)
    for step in range(2, MOST_WAITING + 5):  # MOST_WAITING wait, and three more
        delivery.put(Line(step, {"loss": 1.0}))
    delivery.end("finished", None, time.monotonic())
    delivery.wait(time.monotonic())
    (warning,) = told
    assert "3 lines came faster" in warning
    assert "did not finish" in warning
    free.set()


def test_a_tracker_that_lacks_a_resumed_run_gets_all_of_it(tmp_path: Path) -> None:
    lines = [Line(0, samples=[("why?", "so")]), Line(1, {"loss": 0.7}), Line(2, {"loss": 0.6})]
    delivered(tmp_path, Noted(), lines[:2], new=True)
    before, tracker = SentSteps(tmp_path / "noted.json", "project", new=False), Noted()

    def make(id: str, resumed: bool) -> Noted:
        if resumed:
            raise LookupError(id)
        return tracker

    told: list[str] = []
    delivery = Delivery("noted", SentSteps(tmp_path / "noted.json", "project", new=False), told.append)
    delivery.start(make, lines[:2])
    delivery.put(lines[2])
    delivery.end("stopped", None, time.monotonic() + 60)
    delivery.wait(time.monotonic() + 60)
    assert tracker.calls == [(0, ("why?", "so")), (1, {"loss": 0.7}), (2, {"loss": 0.6}), ("stopped",)]
    assert "does not have this run" in told[0]
    assert SentSteps(tmp_path / "noted.json", "project", new=False).id != before.id


@pytest.mark.parametrize("error", [KeyError("x"), OSError("no server"), SystemExit(3)])
def test_a_tracker_that_cannot_start_refuses_the_run(tmp_path: Path, error: BaseException) -> None:
    def broken(id: str, resumed: bool) -> Noted:
        raise error

    delivery = Delivery("noted", SentSteps(tmp_path / "noted.json", "p", new=True), print)
    with pytest.raises(ValueError, match=f"report_to noted cannot start: {type(error).__name__}"):
        delivery.start(broken, [])


def test_a_run_that_fails_and_resumes_tells_each_step_once(
    diary: Path, run_words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    def train(*, until: int | None = None, **more: Any) -> None:
        def fail(at: RunView) -> None:
            if at.step == until:
                raise RuntimeError("the room is on fire")

        size = {"max_steps": 4, "save_steps": 2, "export_at_end": False}
        words = run_words(**size, sample_prompts='["winter"]', sample_max_new_tokens=2, **more)
        config = load_config(SFTConfig, None, [*words, "run_project=toys", "run_tags=[a, b]"])
        jdpo.train(config, callbacks=[EachStep(fail)])

    with pytest.raises(RuntimeError, match="fire"):
        train(until=3, report_to="diary")
    shutil.rmtree(run / "checkpoints" / "3")  # as if killed before it was whole: step 3 is made again
    train(report_to="[diary, tensorboard, angry]")
    first, *told = (run / "diary.txt").read_text().splitlines()
    assert first == "toys/run starts"
    ends = [line for line in told if "step" not in line and "report" not in line]
    assert ends == ["the run has failed", "toys/run goes on", "the run has finished"]
    lines = read_metrics(run / "metrics.jsonl")
    assert [line for line in told if "loss" in line] == [
        f"step {line['step']}: loss {line['loss']:.3f}" for line in lines
    ]
    assert [line.split(":")[0] for line in told if "->" in line] == ["step 0", "step 4"]
    # TensorBoard was added when the run was resumed, and has all of it.
    values = [(event.step, value) for event in tensorboard_events(run / "tensorboard") for value in event.summary.value]
    losses = {step: value.simple_value for step, value in values if value.tag == "loss"}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert sum(value.tag == "loss" for _, value in values) == 4
    texts = {(step, value.tag): value.tensor.string_val[0].decode() for step, value in values if "text" in value.tag}
    assert [step for step, tag in texts if tag.startswith("samples/0")] == [0, 4]
    assert "tags:" in texts[0, "run/text_summary"]
    state = json.loads((run / "trackers" / "diary.json").read_text())
    assert state["step"] == 4
    # One that raises at every call ends nothing.
    said = " ".join("".join(capsys.readouterr()).split())
    assert said.count("warning: tracker") == 2
    assert "tracker angry failed at step 0: RuntimeError: no log_samples!" in said
    assert "tracker angry is incomplete: 8 calls failed" in said


def test_names_for_trackers_without_a_tracker_are_refused(run_words: Words) -> None:
    with pytest.raises(ValueError, match="run_group 'sweep' has no effect"):
        jdpo.train(load_config(DPOConfig, None, run_words(run_group="sweep")))
