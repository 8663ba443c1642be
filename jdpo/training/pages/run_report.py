"""report.html: the folder of a run, or of several, as one page. Running, stopped, failed and damaged ones, too."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from jdpo.checkpoint.steps import complete_steps
from jdpo.config import CONFIGS
from jdpo.file_locks import is_locked
from jdpo.reports.findings import Finding, RunFacts
from jdpo.reports.html_files import write_html
from jdpo.reports.metrics_file import scan_metrics
from jdpo.reports.run_page.page_rendering import MOST_RUNS, run_page
from jdpo.reports.run_page.page_run import PageFile, PageRun, RunStatus
from jdpo.training.logs.facts_of_run import assess, read_data_summary
from jdpo.words import listed

RUN_FILES = {
    "model/": "the trained model, as a Hugging Face folder",
    "metrics.jsonl": "one JSON object per logged step and evaluation",
    "samples.jsonl": "answers to sample_prompts",
    "data.json": "what the rows are like",
    "resolved_config.yaml": "every key of the run; can be run again",
    "run.json": "the command, digests of what went in, time spent, results",
    "checkpoints/": "what a resumed run starts from",
    "plots/": "curves as PNG files",
    "profile/": "a trace for XProf",
    "train_dataset.jsonl": "training rows that Python code gave",
    "train_dataset.arrow": "training rows that Python code gave",
    "eval_dataset.jsonl": "held-out rows that Python code gave",
    "eval_dataset.arrow": "held-out rows that Python code gave",
    "tensorboard/": "events for TensorBoard",
    "wandb/": "files of Weights & Biases",
    "trackers/": "what each tracker has been sent",
}
"""Files and folders of a run, and what they are."""

OF_A_RUN = ("run.json", "metrics.jsonl", "resolved_config.yaml")
"""A folder with any of these is that of a run."""


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes the page of one run, or of several next to each other.

    Args:
      runs: their folders.

    Raises:
      ValueError: a folder is not that of a run, there are more than MOST_RUNS, or the page cannot be written.
    """
    if len(runs) > MOST_RUNS:
        raise ValueError(f"a page compares at most {MOST_RUNS} runs, but {len(runs)} were given; leave some out")
    for run in runs:
        check_run(run)
    names = distinct_names(runs)
    write_html(run_page([read_page_run(run, name) for run, name in zip(runs, names, strict=True)]), out)


def check_run(path: Path) -> None:
    """Refuses what is not the folder of a run, and names the folder that is probably meant.

    Raises:
      ValueError: with what is there instead.
    """
    if any((path / name).is_file() for name in OF_A_RUN):
        return
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; expected the output_dir of a run")
    # `model`, `checkpoints/STEP` and the like are two levels below at most.
    around = [one for one in list(path.absolute().parents)[:2] if (one / "run.json").is_file()]
    inside = sorted(one.parent for one in path.glob("*/run.json"))
    inside = inside or sorted(one.parent for one in path.glob("*/*/run.json"))
    hint = ""
    if around:
        hint = f". It is part of a run: give {around[0]}"
    elif inside:
        hint = f". Runs are in it: {listed([str(one) for one in inside], 5)}"
    raise ValueError(f"{path} is not the folder of a run: it has none of {', '.join(OF_A_RUN)}{hint}")


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """Returns a name for each folder: the last parts of its path, as few as make all of them differ.

    >>> distinct_names([Path("/a/one/dpo"), Path("/a/two/dpo")]), distinct_names([Path("/a/one/dpo")])
    (['one/dpo', 'two/dpo'], ['dpo'])
    """
    parts = [run.absolute().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a run was given twice: {', '.join(map(str, runs))}")


def read_page_run(path: Path, name: str, status: RunStatus | None = None, reason: str = "") -> PageRun:
    """Reads the folder of a run; files that are missing or damaged are left out, and named on the page.

    Args:
      status: None: as the files have it.
      reason: of a run that failed.
    """
    notes: list[str] = []
    record = _json_object(path / "run.json", notes)
    config_text, config = _config(path / "resolved_config.yaml", notes)
    lines = _metrics(path / "metrics.jsonl", notes)
    command = record.get("command")
    if status is None:
        status, reason = _status(path, record)
    checkpoints = complete_steps(path / "checkpoints") if (path / "checkpoints").is_dir() else []
    last = max([line["step"] for line in lines[-1:]] + checkpoints, default=0)
    sentences, found, facts = _findings(path, status, last, lines, notes)
    return PageRun(
        name=name,
        path=str(path.absolute()),
        command=command if command in CONFIGS else "",
        version=str(record.get("jdpo", "")),
        status=status,
        reason=reason,
        step=last,
        num_steps=None if facts is None else facts.num_steps or None,
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        lines=lines,
        samples=_samples(path / "samples.jsonl", notes),
        data=_data(path, notes),
        config=config,
        config_text=config_text,
        record=record,
        files=_files(path),
        checkpoints=checkpoints,
        notes=notes,
        verdict=sentences,
        findings=found,
        start_loss=None if facts is None else facts.start_loss,
    )


def _status(path: Path, record: dict[str, Any]) -> tuple[RunStatus, str]:
    if record.get("finished") is True:
        return "finished", ""
    # A start of the run deletes how the one before it ended, so the lock is looked at only where nothing is said.
    match record.get("ended"):
        case "failed":
            return "failed", str(record.get("end_reason") or "")
        case "stopped":
            return "stopped", ""
        case _:
            return ("running" if is_locked(path / ".lock") else "unfinished"), ""


def _findings(
    path: Path, status: RunStatus, step: int, lines: Sequence[dict[str, Any]], notes: list[str]
) -> tuple[Sequence[str], Sequence[Finding], RunFacts | None]:
    try:
        found = assess(path, "stopped" if status == "unfinished" else status, step=step, lines=lines)
    except ValueError as error:
        notes.append(f"There is no verdict: {error}.")
        return [], [], None
    return (found.sentences, found.findings, found.facts) if lines else ([], [], found.facts)


def _text(path: Path, notes: list[str], *, expected: bool = True) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if expected:
            notes.append(f"{path.name} is missing.")
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror or error}.")
    return ""


def _json_object(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path, notes)
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text), dict):
            return found
    if text:
        notes.append(f"{path.name} is damaged.")
    return {}


def _config(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    text = _text(path, notes)
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        if isinstance(found := yaml.safe_load(text), dict):
            return text, found
    if text:
        notes.append(f"{path.name} is damaged.")
    return "", {}


def _metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        # A run that has just begun has none, which is no fault.
        if any((path.parent / "checkpoints").glob("*")):
            notes.append(f"{path.name} is missing: no step is logged.")
        return []
    try:
        found = scan_metrics(path)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror or error}.")
        return []
    if found.damage:
        notes.append(f"{path.name} is damaged ({found.summary()}); its readable lines are shown.")
    return found.lines


def _samples(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    found, num_damaged = [], 0
    # The last line may be torn, as the run may be writing it now.
    for text in _text(path, notes, expected=False).split("\n")[:-1]:
        line = None
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.append(line)
        else:
            num_damaged += 1
    if num_damaged:
        notes.append(f"{path.name} is damaged: {num_damaged} of its lines are left out.")
    return found


def _data(path: Path, notes: list[str]) -> dict[str, Any] | None:
    found = read_data_summary(path)
    if found is None and (path / "data.json").exists():
        notes.append("data.json is damaged, or of another version of jdpo.")
    return found


def _files(path: Path) -> list[PageFile]:
    found = []
    for name, about in RUN_FILES.items():
        place = path / name
        if place.is_file() or (name.endswith("/") and place.is_dir()):
            found.append(PageFile(name, sum(map(_size, [place] if place.is_file() else _inside(place))), about))
    return found


def _inside(folder: Path) -> Iterator[Path]:
    # os.walk passes over a folder that is deleted meanwhile, such as an old checkpoint; Path.rglob raises.
    for inner, _, names in os.walk(folder):
        yield from (Path(inner, name) for name in names)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):  # deleted in this moment, by a running run
        if path.is_file():
            return path.stat().st_size
    return 0
