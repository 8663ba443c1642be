"""The commands that continue a run or use what it made, written out for its folder."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import NamedTuple

from jdpo.reports.run_page.page_run import PageRun


class NextCommand(NamedTuple):
    """A command line, and what it does."""

    what: str
    words: str


def next_commands(run: PageRun) -> list[NextCommand]:
    """Returns what to do with a run in its present state, the most useful first."""
    return [NextCommand(what, words) for what, words in _commands(run)]


def _commands(run: PageRun) -> Iterator[tuple[str, str]]:
    path, model = shlex.quote(run.path), shlex.quote(f"{run.path}/model")
    has_model = any(file.name == "model/" for file in run.files)
    if run.status in ("stopped", "unfinished", "failed") and run.command and run.config_text:
        saved = f"continues after step {run.checkpoints[-1]:,}" if run.checkpoints else "starts again at step 0"
        yield f"Resume it: the run {saved}.", _from_its_folder(run, f"jdpo {run.command} {path}/resolved_config.yaml")
    if run.status == "running":
        yield "Make this page again, with the latest steps.", f"jdpo report {path}"
    if has_model:
        yield "Talk to the model.", f"jdpo chat {model}"
    if run.checkpoints:
        yield "Talk to a checkpoint.", f"jdpo chat {path}/checkpoints/{run.checkpoints[-1]}"
        yield (
            "Write a Hugging Face model folder from a checkpoint.",
            (f"jdpo export {path} OUT --step {run.checkpoints[-1]}"),
        )
    before = run.config.get("model_name_or_path")
    if has_model and isinstance(before, str):
        words = f"jdpo compare {shlex.quote(before)} {path}/model --pairs HELD_OUT --output_dir CMP"
        yield "Measure what changed, with intervals.", _from_its_folder(run, words)
    yield "Compare its curves with those of other runs.", f"jdpo report {path} OTHER_RUN"


def _from_its_folder(run: PageRun, words: str) -> str:
    """Returns a command line that reads paths of the config: these are relative to where the run was started."""
    started_in = run.record.get("started_in")
    return f"cd {shlex.quote(started_in)} && {words}" if isinstance(started_in, str) else words
