"""TensorBoard: event files in output_dir/tensorboard, written with tensorboardX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from jdpo import safe_text
from jdpo.durable import keep_old
from jdpo.reports.trackers.tracker import Status, TrackedRun


class TensorBoardTracker:
    """Writes scalars, and texts for answers and settings. TensorBoard knows neither files nor the status of a run."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        folder = run.folder / "tensorboard"
        if run.resumed and not folder.is_dir():
            raise LookupError(folder)
        if not run.resumed and folder.exists():  # of another run, whose points would be mixed with these
            keep_old(folder, "before")
        self._writer = SummaryWriter(str(folder))
        if not run.resumed:
            about = {"name": run.name, "project": run.project, "group": run.group, "tags": [*run.tags]}
            text = yaml.safe_dump({**about, "config": dict(run.config)}, sort_keys=False, allow_unicode=True)
            # TensorBoard shows texts as Markdown, in which indented lines are code, and stay what they are.
            self._writer.add_text("run", "\n".join(f"    {line}" for line in _lines(text)), 0)
            self._writer.flush()

    def newest_step(self) -> None:
        """Returns None, as `log` flushes."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # by default two minutes later, and never if the process is killed before

    def log_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        # A tag each, so that its slider goes through the answers to one prompt.
        for number, (prompt, answer) in enumerate(samples):
            lines = (*prompt.split("\n"), "→", *answer.split("\n"))
            self._writer.add_text(f"samples/{number}", "\n\n".join(map(safe_text.markdown, lines)), step)
        self._writer.flush()

    def log_report(self, path: Path) -> None:
        """Does nothing: the report is next to the folder of TensorBoard, which shows no files."""

    def finish(self, status: Status) -> None:
        self._writer.close()


def _lines(text: str) -> list[str]:
    return safe_text.terminal_lines(text).split("\n")
