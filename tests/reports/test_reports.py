"""metrics.jsonl, plots and progress lines."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jdpo.reports.metrics_file import read_metrics
from jdpo.reports.plots import write_plots
from jdpo.reports.progress import RunDisplay, print_lines
from jdpo.reports.writers import JsonlWriter


def test_lines_are_written_at_once_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        writer = JsonlWriter(path)
        writer.write({"step": step, "loss": 0.1 + 0.2})
        assert read_metrics(path)[-1] == {"step": step, "loss": 0.1 + 0.2}
        writer.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def lines(num: int = 30) -> list[dict[str, float]]:
    def values(step: int, prefix: str = "") -> dict[str, float]:
        names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
        return {prefix + name: np.sin(step + len(name)) for name in (*names, "logps/chosen", "logps/rejected")}

    training = [{"step": step, **values(step)} for step in range(1, num + 1)]
    return [*training, {"step": num, **values(num, "eval_")}]


def test_plots_are_pngs_of_every_panel(tmp_path: Path) -> None:
    paths = write_plots(lines(), tmp_path / "plots", title="a run")
    assert {path.name for path in paths} == {"loss.png", "rewards.png", "margins.png", "accuracy.png", "logps.png"}
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    only_loss = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}]
    assert [path.name for path in write_plots(only_loss, tmp_path / "sft", title="sft")] == ["loss.png"]


def test_the_name_of_a_model_is_no_formula_in_a_plot(tmp_path: Path) -> None:
    (path, *_) = write_plots(lines(3), tmp_path / "plots", title="jdpo dpo: a$\\frac{$\x1b 東京")
    assert path.read_bytes().startswith(b"\x89PNG")


RATES = {"pairs_per_second": 12.0, "tokens_per_second": 3500.4}


def test_without_a_terminal_progress_is_plain_lines() -> None:
    out = io.StringIO()
    with RunDisplay(first_step=2, num_steps=4, unit="pairs", console=Console(file=out, width=200)) as display:
        display.step(3, {"loss": 0.5, "rewards/margins": 0.25, "rewards/accuracies": 0.75}, RATES)
        display.step(4, {"loss": 0.4, "rewards/margins": 0.5, "rewards/accuracies": 1.0}, RATES | {"mfu": 0.523})
    first, last = out.getvalue().splitlines()
    assert first.startswith("step 3/4  loss 0.5  margin 0.25  accuracy 0.75  12 pairs/s  3,500 tokens/s  0:00:0")
    assert "3,500 tokens/s  MFU 52%  0:00:00 left" in last
    assert last.endswith("0:00:00 left")


def test_messages_break_between_words_in_a_terminal_and_nowhere_else() -> None:
    path = "/cache/" + 50 * "x"
    text = f"[b] :smile: a message that is longer than a line\n  rows in {path} \x1b[31m\n\nend"
    printed = {}
    for is_terminal in (True, False):
        out = io.StringIO()
        print_lines(Console(file=out, width=40, force_terminal=is_terminal, color_system=None, soft_wrap=True), text)
        printed[is_terminal] = out.getvalue()
    assert printed[False] == text.replace("\x1b", r"\x1b") + "\n"
    assert printed[True].splitlines() == [
        "[b] :smile: a message that is longer",
        "  than a line",
        "  rows in",
        f"    {path}",
        r"    \x1b[31m",
        "",
        "end",
    ]


def test_levels_have_colours_in_a_terminal_and_nowhere_else() -> None:
    for colours, begin in (("standard", "\x1b[1;31merror:\x1b[0m [b]x"), ("auto", "error: [b]x")):
        out = io.StringIO()
        console = Console(
            file=out, width=80, force_terminal=colours == "standard", color_system=colours, no_color=False
        )
        print_lines(console, "error: [b]x\n  not an error: y")
        assert out.getvalue() == f"{begin}\n  not an error: y\n"


METRICS = {"loss": 0.51234, "rewards/margins": 0.2512, "rewards/accuracies": 0.875}


def last_frame(width: int, metrics: dict[str, float], step: int = 12, num_steps: int = 3456) -> str:
    """Returns the progress bar after a step in a terminal of so many columns."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    with RunDisplay(first_step=0, num_steps=num_steps, unit="pairs", console=console) as display:
        display.step(step, metrics, RATES | {"mfu": 0.5})
    frames = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", out.getvalue()) if "training" in line]
    return frames[-1].rstrip()


def test_in_a_terminal_a_bar_shows_step_time_left_and_figures() -> None:
    frame = last_frame(160, METRICS, 2, 2)
    assert re.fullmatch(
        r"training ━{24} 2/2 0:00:00 left loss 0.5123  margin 0.2512  accuracy 0.875  12 pairs/s  "
        r"3,500 tokens/s  MFU 50%",
        frame,
    )


@pytest.mark.parametrize(
    ("width", "shown"), [(80, ["loss", "margin"]), (100, ["loss", "margin", "accuracy", "pairs/s"])]
)
def test_a_narrow_bar_drops_metrics_before_step_and_time_left(width: int, shown: list[str]) -> None:
    frame = last_frame(width, METRICS)
    assert re.match(r"training [━╸╺ ]{10} +12/3456 \d+:\d\d:\d\d left", frame)
    assert len(frame) <= width
    assert "…" not in frame
    assert [name for name in ("loss", "margin", "accuracy", "pairs/s", "tokens/s", "MFU") if name in frame] == shown


def test_a_narrow_terminal_still_shows_step_and_time_left() -> None:
    frame = last_frame(48, METRICS)
    assert re.search(r"12/3456 \d+:\d\d:\d\d left$", frame)


def test_the_time_left_does_not_count_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with RunDisplay(first_step=0, num_steps=11, unit="pairs", console=Console(file=out, width=200)) as display:
        with display.compiling():
            now[0] += 600
        now[0] += 2
        display.step(1, {"loss": 0.5}, RATES)
    assert out.getvalue().rstrip().endswith("0:00:20 left")
