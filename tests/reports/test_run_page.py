"""report.html: values lie where they belong, peaks stay, hostile texts stay texts, and a browser loads nothing."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.reports.findings import Finding
from jdpo.reports.html_files import write_html
from jdpo.reports.run_page.curves import Curve, RunCurves, smoothed, thinned
from jdpo.reports.run_page.next_commands import next_commands
from jdpo.reports.run_page.page_rendering import run_page
from jdpo.reports.run_page.page_run import PageFile, PageRun
from tests.html_page import HtmlPage, assert_only_text, chromium
from tests.reports.simulated_runs import simulated

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\x1b[31m\u202e{{ 7 * 7 }}</p></style> &amp;'


def page_run(name: str = "first", **changes: Any) -> PageRun:
    """A run with every part that the page shows."""
    lines = simulated(lambda done: done, held_out_margin=lambda done: 0.5 * done)
    for line in lines:
        if "learning_rate" in line:
            line |= {"tokens_per_second": 900.0, "padding": 0.04, "peak_memory_gib": 1.5, "num_tokens": line["step"]}
    run = PageRun(
        name=name,
        path=f"/runs/{name}",
        command="dpo",
        version="0.2.0",
        status="finished",
        reason="",
        step=200,
        num_steps=200,
        written="today",
        lines=lines,
        samples=[sample(step, f"answer {step // 100}") for step in (0, 50, 100, 200)],
        data={"train": part()},
        config={
            "model_name_or_path": "org/model",
            "output_dir": name,
            "learning_rate": 5e-6,
            "beta": 0.1,
            "lora": None,
        },
        config_text="learning_rate: 5e-6\n",
        record={"inputs": {"the evaluation rows": "ab" * 32}, "timing": {"step": 30.0, "compile": 10.0, "other": 0.0}},
        files=[PageFile("model/", 10_000_000, "the trained model")],
        checkpoints=[100, 200],
        verdict=["The run is finished after 200 steps."],
        findings=[Finding("a", "warning", "The learning rate is high", "5e-6 at step 1", "Lower learning_rate.")],
        start_loss=math.log(2),
    )
    return dataclasses.replace(run, **changes)


def sample(step: int, text: str) -> dict[str, Any]:
    prompt = [{"role": "user", "content": "What is the capital of Ireland?"}]
    message = {"role": "assistant", "content": text}
    return {"step": step, "prompt_id": "p0", "prompt": prompt, "message": message, "finish_reason": "stop"}


def part() -> dict[str, Any]:
    """A part of data.json."""
    count = {"rows": 0, "share": 0.0, "first": None}
    lengths = {"values": 9, "mean": 4.0, "minimum": 3.0, "p5": 3.0, "p25": 3.0, "median": 4.0, "p75": 4.0, "p95": 5.0}
    lengths |= {"p99": 5.0, "maximum": 5.0, "edges": [3.0, 4.0, 6.0], "bars": [4, 5]}
    edges = ("no_bos", "bos_twice", "bos_inside", "bos_in_answer", "no_end", "end_twice", "end_inside")
    return {
        "digest": "ab",
        "rows_read": 9,
        "rows_kept": 9,
        "rows_dropped": 0,
        "dropped": [],
        "notes": [],
        "data_sets": [  # plain: as it is
            {"name": "pairs.jsonl", "schemas": {}, "rows_read": 9, "rows_kept": 9, "rows_dropped": 0, "tokens": 99}
        ],
        "tokens": {"prompt": 9, "sequences": 99, "prompt_share": 0.5, "longest": 9, "longest_row": "pairs.jsonl:3"},
        "lengths": dict.fromkeys(("prompt", "chosen", "rejected", "sequence"), lengths),
        "answer_cut": count,
        "cut": {"chosen": count, "rejected": count},
        "edges": dict.fromkeys(edges, count),
        "too_long_for_model": count,
        "repeats": dict.fromkeys(("same_prompt", "same_row", "contradictions"), count),
        "length_bias": None,
        "margins": None,
        "text": {},
    }


def words(page: str) -> str:
    return HtmlPage(page).words


# --- curves


def test_values_lie_at_the_updates_that_the_weights_had() -> None:
    lines = [
        {"step": 0, "epoch": 0.0, "eval_loss": 0.7},
        {"step": 1, "epoch": 0.1, "loss": 0.69},
        {"step": 10, "epoch": 1.0, "loss": 0.6},
        {"step": 10, "epoch": 1.0, "eval_loss": 0.65},
        {"step": 20, "epoch": 2.0, "loss": math.nan},
        {"step": 25, "epoch": 2.5, "loss": 0.5},
    ]
    curves = RunCurves(lines)
    # Steps 2 to 10 were computed after 1 to 9 updates.
    assert curves["loss"].x.tolist() == [0.0, 5.0, 22.0]
    assert curves["loss"].steps.tolist() == [1, 10, 25]
    assert curves["eval_loss"].x.tolist() == [0.0, 10.0]
    assert curves.num_not_finite == 1
    assert "epoch" not in curves
    # An older run has no line of step 1: its first value is a mean over steps 1 to 10.
    assert RunCurves(lines[2:3])["loss"].x.tolist() == [4.5]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 20))
def test_thinning_keeps_ends_and_peaks(values: list[float], buckets: int) -> None:
    y = np.array(values)
    curve = Curve(np.arange(len(y), dtype=float), y, np.arange(len(y), dtype=float))
    drawn = thinned(curve, buckets)
    assert len(drawn) <= max(2 * buckets + 2, 2)
    assert (drawn.y.min(), drawn.y.max()) == (y.min(), y.max())
    assert (drawn.x[0], drawn.x[-1]) == (0, len(y) - 1)
    assert (np.diff(drawn.x) > 0).all()
    assert (y[drawn.x.astype(int)] == drawn.y).all()


def test_smoothing_moves_neither_the_start_nor_a_slope() -> None:
    x = np.arange(200.0)
    line = Curve(x, 3 * x, x)
    # A mean over as many points before as after leaves a straight line as it is; at the end there are fewer after.
    np.testing.assert_allclose(smoothed(line).y[:190], line.y[:190])
    noisy = dataclasses.replace(line, y=np.random.default_rng(0).normal(size=200))
    assert smoothed(noisy).y[0] == noisy.y[0]
    assert smoothed(noisy).y[20:].std() < 0.5 * noisy.y.std()


# --- pages


def test_the_page_of_a_run_has_all_its_parts() -> None:
    page = run_page([page_run()])
    text = words(page)
    for phrase in (
        "finished: 200 steps",
        "The run is finished after 200 steps.",
        "The learning rate is high",
        "loss 0.",  # the table of figures
        "ln 2: policy = reference",
        "steps 0 to 50 answer 0 step 100 answer 1 step 200 answer 2",
        "learning_rate 5e-6 1e-6",  # a key, its value and its default
        "training steps 30 s (75 %)",
        "peak memory of a device 1.50 GiB",
        "Training rows: 9 of 9 kept",
        "jdpo chat /runs/first/model",
        "jdpo export /runs/first OUT --step 200",
        "ab" * 32,
    ):
        assert phrase in text, phrase
    assert "jdpo dpo /runs/first/resolved_config.yaml" not in text  # there is nothing to resume
    # Every curve begins in the plot, whose left edge is at 46.
    starts = [float(start) for start in re.findall(r' d="M([\d.]+) ', page)]
    assert starts
    assert all(46 <= start <= 390 for start in starts)


def test_a_run_that_goes_on_or_has_ended_early_says_so() -> None:
    text = words(run_page([page_run(status="running", step=120)]))
    assert "running: step 120 of 200" in text
    assert "reload" in text
    stopped = page_run(status="stopped", step=120, files=(), record={"started_in": "/work dir"})
    text = words(run_page([stopped]))
    assert "stopped: step 120 of 200" in text
    assert "cd '/work dir' && jdpo dpo /runs/first/resolved_config.yaml" in text
    assert "continues after step 200" in text
    failed = page_run(status="failed", reason="FloatingPointError: step 3 gave loss nan", step=3)
    assert "failed: step 3 of 200 FloatingPointError" in words(run_page([failed]))


def test_a_run_without_anything_still_has_a_page() -> None:
    empty = PageRun(
        name="empty",
        path="/runs/empty",
        command="",
        version="",
        status="unfinished",
        reason="",
        step=0,
        num_steps=None,
        written="today",
        lines=[],
        notes=["run.json is missing."],
    )
    text = words(run_page([empty]))
    assert "not finished: step 0" in text
    assert "run.json is missing." in text
    assert "No step is logged." in text
    assert "No step is logged yet." in words(run_page([dataclasses.replace(empty, status="running")]))
    # A part of data.json of another version is left out.
    assert "Training rows" not in words(run_page([dataclasses.replace(empty, data={"train": {"rows": 3}})]))


def test_runs_are_compared() -> None:
    second = page_run(
        "second", config={"model_name_or_path": "org/model", "output_dir": "second", "learning_rate": 1e-6}
    )
    third = page_run("third", record={"inputs": {"the evaluation rows": "cd" * 32}})
    page = run_page([page_run(), second])
    text = words(page)
    assert "Comparison of 2 runs" in text
    assert "learning_rate 5e-6 1e-6 1e-6" in text
    assert "Last evaluation, held-out rows" in text
    assert "cannot be compared" not in text
    assert re.search(r"loss (0\.\d+) \1 \(0\)", text)  # the same figures, so no difference
    assert text.index("learning_rate 5e-6") < text.index("model_name_or_path org/model org/model")
    assert "cannot be compared" in words(run_page([page_run(), third]))
    for one in (second, third):
        one.lines[:] = [line for line in one.lines if "eval_loss" not in line]
    assert "cannot be compared" not in words(run_page([second, third]))  # no held-out rows, so nothing to compare
    checkboxes = [value for value in HtmlPage(page).ids if value.startswith("show-")]
    assert {"show-run-1", "show-run-2", "show-held-out"} <= set(checkboxes)
    assert len(checkboxes) == len(set(checkboxes))


def test_each_part_of_compared_runs_is_under_its_own_run() -> None:
    bare = dataclasses.replace(page_run("bare"), verdict=[], findings=[], record={})
    nan = dataclasses.replace(page_run("nan"), verdict=["It broke."])
    nan.lines.append({"step": 300, "epoch": 9.0, "loss": math.nan})
    text = words(run_page([bare, nan]))
    assert "nan It broke." in text
    assert "bare It broke." not in text
    assert "1 values of nan are NaN" in text
    assert re.search("Time and memory nan training steps", text)


def test_hostile_texts_are_shown_as_texts() -> None:
    hostile = page_run(
        HOSTILE,
        reason=HOSTILE,
        status="failed",
        samples=[sample(1, HOSTILE)],
        config={"model_name_or_path": HOSTILE, HOSTILE: HOSTILE},
        config_text=HOSTILE,
        record={"inputs": {HOSTILE: HOSTILE}, "files": {HOSTILE: "ab"}, "started_in": HOSTILE},
        lines=[{"step": 1, "loss": 0.5, HOSTILE: 1.0}, {"step": 2, "loss": 0.4, HOSTILE: 2.0}],
        notes=[HOSTILE],
        verdict=[HOSTILE],
        findings=[Finding(HOSTILE, "error", HOSTILE, HOSTILE, HOSTILE)],
    )
    for runs in ([hostile], [hostile, page_run()]):
        page = run_page(runs)
        seen = assert_only_text(page)
        assert "{{ 7 * 7 }}" in seen.text
        assert "\x1b" not in page
        assert "\u202e" not in page
        assert seen.text.count("<script>alert(1)</script>") >= 12


def test_commands_are_written_out_for_any_name() -> None:
    found = [one.words for one in next_commands(page_run("{run}", config={"model_name_or_path": "m/{0}"}))]
    assert any("'m/{0}'" in words and "'/runs/{run}'/model " in words for words in found)


def many_lines(num_lines: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    names = [*simulated(lambda done: done)[0], "padding", "tokens_per_second", "step_seconds", "logps/rejected"]
    values = np.abs(rng.normal(size=(num_lines, len(names)))) + 0.1
    values[777, :] = 50.0
    lines = [dict(zip(names, row, strict=True)) for row in values.tolist()]
    return [{**line, "step": 10 * number} for number, line in enumerate(lines, start=1)]


def test_the_page_of_a_long_run_is_small() -> None:
    run = page_run(lines=many_lines(5000))
    page = run_page([run])
    # As many points as fit, however many lines there are; see also benchmarks/run_report.py.
    assert len(page) < 700_000
    assert len(run_page([dataclasses.replace(run, lines=run.lines[:2500])])) > 0.8 * len(page)
    several = run_page([dataclasses.replace(run, name=f"run {number}") for number in range(8)])
    assert len(page) < len(several) < 3_000_000


@pytest.mark.ci
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
@pytest.mark.parametrize("num_runs", [1, 3])
def test_a_browser_has_nothing_to_complain_about(num_runs: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    runs = [page_run(f"{number} {HOSTILE}", samples=[sample(1, HOSTILE)]) for number in range(num_runs)]
    write_html(run_page(runs), page)
    document, log = chromium(page, tmp_path / "profile")
    assert "Pairs ranked right" in document
    assert "CONSOLE" not in log
