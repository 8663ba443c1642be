"""The arithmetic of the speed benchmarks: rows of exact lengths, model folders, the report and the prediction."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from answers_loop import DUBLIN, STAGES, Loop, interval  # noqa: E402
from answers_loop import render as render_loops  # noqa: E402
from attention_padding import places_of, random_steps  # noqa: E402
from generation import CELLS, Run, Size, end_tokens, report  # noqa: E402
from generation import Result as GenerationResult  # noqa: E402
from ladder_flops import RUNGS, attention_flops, predicted_flops  # noqa: E402
from speed import check_trl_tokens, measure  # noqa: E402
from speed_arms import CHECKPOINTED, GATE, MAIN, ONE_PAIR, Arm, Folder  # noqa: E402
from speed_cases import Case  # noqa: E402
from speed_data import (  # noqa: E402
    fitted,
    padding,
    read_lengths,
    select,
    synthesize,
    typical_padding,
    write_ids,
    write_rows,
)
from speed_model import (  # noqa: E402
    LLAMA_1_5B,
    LLAMA_8B,
    LLAMA_22M,
    ModelShape,
    tensor_shapes,
    tiny,
    write_model,
)
from speed_padding import planned_padding  # noqa: E402
from speed_report import render_case  # noqa: E402
from speed_run import ArmRun, Before  # noqa: E402
from speed_verdicts import PADDING_BAR, Padding, Result  # noqa: E402
from startup import CACHES, TRAININGS  # noqa: E402
from startup import report as render_startup  # noqa: E402
from token_rules import main as token_rules  # noqa: E402
from trl_parity import compare_tokens, tokenized_rows  # noqa: E402

from jdpo.data.batching.packing_plan import pair_sizes  # noqa: E402
from jdpo.models.families import read_model_config  # noqa: E402
from jdpo.models.weights.loading import check_tensors  # noqa: E402
from jdpo.models.weights.safetensors_folder import tensor_entries  # noqa: E402

TINY = tiny(LLAMA_22M)


# --- rows


def test_committed_tables_are_of_real_rows() -> None:
    long, short = read_lengths("long_pairs"), read_lengths("hh")
    assert long.shape == (300, 3)
    assert short.shape == (512, 3)
    assert min(long.min(), short.min()) >= 2
    assert np.median(long.sum(1)) > 4 * np.median(short.sum(1))


def test_rows_have_exactly_their_lengths_and_the_ids_that_jdpo_trains_on(tmp_path: Path) -> None:
    lengths = np.array([[1, 2, 3], [40, 7, 2], [3, 60, 90], [63, 5, 9]])
    rows = synthesize(lengths, TINY.vocab_size)
    assert [[len(ids) for ids in row] for row in rows] == lengths.tolist()
    assert all(row.chosen[0] != row.rejected[0] for row in rows)
    assert all(row.chosen[-1] == row.rejected[-1] == 1 for row in rows)  # the end
    assert all(3 <= token < TINY.vocab_size for row in rows for token in [*row.prompt, *row.chosen[:-1]])
    write_model(TINY, tmp_path / "model")
    write_rows(rows, tmp_path / "rows.jsonl")
    write_ids(rows, 64, tmp_path / "ids.jsonl")
    found = tokenized_rows(tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "cache", 64)
    assert [len(row.chosen_ids) for row in found] == [2, 7, 60, 1]
    compare_tokens(tmp_path / "ids.jsonl", found)
    with pytest.raises(ValueError, match="chosen_ids"):
        compare_tokens(tmp_path / "ids.jsonl", [row._replace(chosen_ids=row.chosen_ids + 1) for row in found])


def test_sides_that_would_start_alike_are_made_to_differ() -> None:
    rows = synthesize(np.full((200, 3), 2), vocab_size=5)  # with two words half of all sides would start alike
    assert all(row.chosen[0] != row.rejected[0] for row in rows)
    assert {token for row in rows for token in row.rejected[:-1]} == {3, 4}


def test_measured_rows_represent_the_table() -> None:
    table = read_lengths("long_pairs")
    selection = select(table, batch=4, max_length=1024, warmup=1, filler=10, steps=6)
    assert selection.lengths.shape == (266, 3)  # all of the table, except
    assert selection.left_out == (table[:, 0] >= 1024).sum() == 34
    assert (selection.lengths[:, 0] < 1024).all()
    assert selection.measured.tolist() == list(range(4 * 11, 4 * 17))
    assert selection.compared.tolist() == [*range(4), *range(4 * 11, 4 * 17)]
    usable = fitted(table[table[:, 0] < 1024], 1024)
    measured = fitted(selection.lengths[selection.measured], 1024)
    assert measured.sum(1).mean() == pytest.approx(usable.sum(1).mean(), rel=0.05)
    assert padding(measured, 4) == pytest.approx(typical_padding(usable, 4), rel=0.05)
    short = select(table, batch=60, max_length=1024, warmup=1, filler=99, steps=2)
    assert (short.num_filler, len(short.lengths)) == (60, 266)  # as much filler as there is
    rows = sorted(tuple(row) for row in selection.lengths.tolist())
    assert rows == sorted(tuple(row) for row in table.tolist() if row[0] < 1024)  # each once


@pytest.mark.parametrize(("table", "batch", "max_length"), [("long_pairs", 4, 1024), ("hh", 8, 512)])
def test_padding_of_the_whole_table_is_within_its_bar(table: str, batch: int, max_length: int) -> None:
    selection = select(read_lengths(table), batch=batch, max_length=max_length, warmup=1, filler=10, steps=3)
    cut = fitted(selection.lengths, max_length)
    share, of_steps = planned_padding(cut, batch, 16384)
    assert 0 < share <= PADDING_BAR
    assert len(of_steps) == -(-len(cut) // batch)
    assert ((of_steps >= 0) & (of_steps < 1)).all()


def test_padding_by_hand() -> None:
    # Steps of 9 + 7 and 6 slots, each in a row of 64.
    share, of_steps = planned_padding(np.array([[3, 2, 4], [1, 2, 4], [2, 2, 2]]), 2, 128)
    assert of_steps.tolist() == [1 - 16 / 64, 1 - 6 / 64]
    assert share == 1 - 22 / 128


@pytest.mark.parametrize("num_shards", [1, 8, 64])
@pytest.mark.parametrize(("table", "max_length"), [("hh", 1024), ("long_pairs", 2048)])
def test_attention_has_few_places_without_a_token(table: str, max_length: int, num_shards: int) -> None:
    lengths = read_lengths(table)
    sizes = pair_sizes(fitted(lengths[lengths[:, 0] < max_length], max_length))
    steps = random_steps(len(sizes.slots), 16 * num_shards, num_steps=24)
    one, joined = (
        places_of(sizes, steps, num_shards=num_shards, max_tokens=32768, sequences_per_row=most) for most in (1, None)
    )
    assert 1 <= joined.per_token <= 1.15 < 2 < one.per_token
    assert joined.length <= max_length
    # The slots of a step are no more for it.
    assert joined.slots <= one.slots + 0.005


# --- model folders


@pytest.mark.parametrize("big", [LLAMA_22M, LLAMA_8B], ids=["tied", "bfloat16"])
def test_folder_is_a_model_that_jdpo_reads_whatever_its_shards(big: ModelShape, tmp_path: Path) -> None:
    shape = tiny(big)
    assert (shape.tied, shape.dtype) == (big.tied, big.dtype)
    write_model(shape, tmp_path / "model", shard_bytes=100_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    config = read_model_config(tmp_path / "model")
    check_tensors(tmp_path / "model", tensor_entries(tmp_path / "model"), config)
    assert (config.d_model, config.num_layers, config.vocab_size) == (shape.d_model, shape.num_layers, shape.vocab_size)
    assert config.tie_embeddings == shape.tied
    assert set(tensor_entries(tmp_path / "model")) == set(tensor_shapes(shape))


def test_shapes_have_the_sizes_of_their_names() -> None:
    def size(shape: ModelShape) -> int:
        return sum(int(np.prod(dims)) for dims in tensor_shapes(shape).values())

    assert size(LLAMA_22M) == 21_730_176
    assert size(LLAMA_1_5B) == 1_543_714_304 - 28 * (1536 + 2 * 256)  # Qwen2.5-1.5B without its biases
    assert size(LLAMA_8B) == 8_030_261_248  # Llama-3.1-8B
    assert LLAMA_22M.head / (LLAMA_22M.head + LLAMA_22M.backbone) == pytest.approx(0.57, abs=0.01)
    assert dataclasses.replace(LLAMA_22M, vocab_size=4096).head / 1e6 == pytest.approx(1.57, abs=0.01)


# --- prediction


def test_predicted_flops_by_hand() -> None:
    # d 2, 1 layer, 1 head of 2, d_ff 3, V 5: N = 2 (2*2 + 2*2 + 3*3) = 34, h = 10.
    shape = ModelShape(
        d_model=2,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        d_ff=3,
        vocab_size=5,
        tied=True,
    )
    assert (shape.backbone, shape.head) == (34, 10)
    assert attention_flops(shape, 3) == 4 * 9 * 2
    # P, C, R = 4, 2, 1: repeated 11, shared 7, scored 3; sequences of 6 and 5 places.
    found = predicted_flops(shape, np.array([[4, 2, 1]]), padded=8, apart=(2, 7), shared=(1, 12))
    square = {t: 4 * t * t * 2 for t in (5, 6, 7, 8, 12)}
    assert found == {
        "padded": 8 * 44 * 16 + 4 * 2 * square[8],
        "packed": 8 * 44 * 11 + 4 * 2 * square[7],
        "shared prompt": 8 * 44 * 7 + 4 * square[12],
        "chunked head": 8 * 34 * 7 + 10 * 10 * 3 + 4 * square[12],
        "cached reference": 6 * 34 * 7 + 8 * 10 * 3 + 3 * square[12],
        "attention": 6 * 34 * 7 + 8 * 10 * 3 + 3.5 * (square[6] + square[5]) / 2,
    }


# --- report

CASE = Case(
    name="a case", shape=TINY, table="hh", batch=4, max_length=64, bars=(("trl", 4.0), ("tunix", 3.0)), tolerance=1e-3
)


def result(
    trainer: str,
    seconds: list[list[float]],
    *,
    reference: str = "live",
    role: str = MAIN,
    loss: float = 0.7,
    later_loss: float = 0.7,
    gib: int,
) -> Result:
    runs = []
    for of_round in seconds:
        lines = [
            {
                "step": i + 1,
                "step_seconds": s,
                "loss": later_loss if i else loss,
                "logps/chosen": -10.0,
                "logps/rejected": -20.0,
            }
            for i, s in enumerate(of_round)
        ]
        runs.append(ArmRun(lines, lines[1:], {}, 5.0, gib * 2**30, gib * 2**29))
    arm = Arm(f"{trainer} {reference} {role}", trainer, reference, (), len(seconds[0]) - 1, role=role)
    return Result(arm, runs, [], [])


def keyed(*results: Result) -> dict[str, Result]:
    return {one.arm.key: one for one in results}


EVERYTHING = (
    result("jdpo", [[9.0, 2.0, 2.0]], gib=1),
    result("jdpo", [[9.0, 2.0, 2.0]], reference="cached", gib=1),
    result("jdpo", [[9.0, 2.0, 2.0]], role=GATE, gib=1),
    result("trl", [[9.0, 9.0, 9.0]], gib=3),
    result("trl", [[9.0, 9.0, 9.0]], reference="cached", gib=3),
    result("trl", [[9.0, 6.0, 6.0]], role=ONE_PAIR, gib=1),
    result("trl", [[9.0, 12.0, 12.0]], role=CHECKPOINTED, gib=2),
    result("tunix", [[9.0, 7.0, 7.0]], gib=4),
)
"""Each arm once, and every bar reached."""

TRAINERS = ("jdpo", "trl", "tunix")
PADDING = Padding(0.2, 0.05, 7)


def rendered(
    *results: Result, wanted: tuple[str, ...] = TRAINERS, padding: Padding | None = PADDING
) -> tuple[str, bool]:
    lines, passed = render_case(
        CASE, keyed(*results), facts=["facts"], notes=["a note"], wanted=wanted, padding=padding
    )
    return "\n".join(lines), passed


def with_other(*changed: Result) -> list[Result]:
    """Returns EVERYTHING with some arms replaced."""
    return list((keyed(*EVERYTHING) | keyed(*changed)).values())


def test_the_report_gives_ratios_over_the_measured_steps() -> None:
    ours = result("jdpo", [[9.0, 1.0, 2.0], [9.0, 3.0, 2.0]], gib=1)
    theirs = result("trl", [[1.0, 10.0, 9.0], [1.0, 10.0, 11.0]], gib=2)
    text, passed = rendered(*with_other(ours, theirs))
    assert passed
    # Medians 10 and 2; totals 40 and 8; steps 10 / 2 and 10 / 2.
    assert "| trl live main / jdpo live main | 5.00 | 5.00 | 5.00 | 4 | reached |" in text
    assert "| tunix live main / jdpo live main | 3.50 | 3.50 | 3.50 | 3 | reached |" in text
    assert "| trl live one pair / jdpo live main | 3.00 | 3.00 | 3.00 |  |  |" in text
    assert "| peak resident memory: trl live main / jdpo live main | 2.00 |  |  | 2 | reached |" in text
    assert "least at a whole step: trl live main / jdpo live main | 2.00 |  |  | 2 | reached |" in text
    assert "| peak resident memory: trl live one pair / jdpo live main | 1.00 |  |  |  |  |" in text
    assert "| jdpo live main | 2 (1.75 to 2.25) | 4.00 | 2 | 5.0, 5.0 | 512, 1024 |  |" in text
    assert "| padding of jdpo's measured steps, by its log | 20.0% |  |  |  |  |" in text
    assert "| padding of jdpo's 7 steps of the whole table | 5.0% |  |  | at most 10% | reached |" in text
    assert "Left out: a note" in text


def test_ratio_of_each_step_is_paired() -> None:
    ours, theirs = result("jdpo", [[1.0, 1.0, 4.0, 2.0]], gib=1), result("trl", [[1.0, 9.0, 20.0, 12.0]], gib=2)
    text, _ = rendered(ours, theirs)
    assert "| trl live main / jdpo live main | 6.00 | 5.86 | 6.00 | 4 | reached |" in text


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (result("trl", [[1.0, 7.9, 7.9]], gib=3), "| 3.95 | 3.95 | 3.95 | 4 | **missed** |"),
        (result("trl", [[1.0, 9.0, 9.0]], gib=1), "| 1.00 |  |  | 2 | **missed** |"),
        (result("trl", [[1.0, 9.0, 9.0]], role=CHECKPOINTED, gib=1), "| 1.00 |  |  | 2 | **missed** |"),
        (result("trl", [[1.0, 9.0, 9.0]], gib=3, loss=0.701), "**NOT EQUAL**"),
        (result("trl", [[1.0, 9.0, 9.0]], gib=3, loss=float("nan")), "**NOT EQUAL**"),
        (result("trl", [[1.0, 9.0, 9.0]], gib=3, later_loss=0.701), "Gate of all steps: allowed 1e-03: **NOT EQUAL**"),
    ],
    ids=["too slow", "too much memory", "less memory elsewhere", "another loss", "no loss", "another loss later"],
)
def test_report_fails_where_a_bar_or_the_gate_is_missed(other: Result, expected: str) -> None:
    text, passed = rendered(*with_other(other))
    assert not passed
    assert expected in text
    assert rendered(*EVERYTHING)[1]


def test_in_bfloat16_later_steps_have_their_own_tolerance() -> None:
    case = dataclasses.replace(CASE, tolerance=1e-2, later_tolerance=3e-2)
    for loss, held in ((0.714, True), (0.735, False)):
        results = keyed(*with_other(result("trl", [[9.0, 9.0, 9.0]], later_loss=loss, gib=3)))
        assert render_case(case, results, facts=[], notes=[], wanted=TRAINERS, padding=PADDING)[1] == held


@pytest.mark.parametrize("key", [one.arm.key for one in EVERYTHING if one.arm.role != ONE_PAIR])
def test_a_bar_or_gate_whose_arm_is_missing_is_not_measured_and_not_passed(key: str) -> None:
    padding = None if key == "jdpo live main" else PADDING
    text, passed = rendered(*(one for one in EVERYTHING if one.arm.key != key), padding=padding)
    assert not passed
    assert "**not measured**" in text


def test_bars_of_excluded_trainers_do_not_count() -> None:
    ours = [one for one in EVERYTHING if one.arm.trainer == "jdpo" and one.arm.role == MAIN]
    assert rendered(*ours, wanted=("jdpo",))[1]
    text, passed = rendered(*ours)  # the other arms were requested and are missing
    assert not passed
    assert "| Tunix / jdpo, live reference | not measured |  |  | 3 | **not measured** |" in text


def test_nothing_that_ran_is_no_error_and_no_success() -> None:
    text, passed = rendered(wanted=("trl",), padding=None)
    assert not passed
    assert "nothing was measured" in text


def test_cached_is_compared_with_precomputed_and_the_fastest_with_the_fastest() -> None:
    cached = result("trl", [[9.0, 5.0, 5.0]], reference="cached", gib=3)
    text, passed = rendered(*with_other(cached))
    assert not passed
    assert "| trl cached main / jdpo cached main | 2.50 | 2.50 | 2.50 | 4 | **missed** |" in text
    assert "trl live main / jdpo cached" not in text
    assert "the faster of each: TRL / jdpo: trl cached main / jdpo live main | 2.50 |" in text
    assert "the faster of each: TRL / jdpo: trl live one pair / jdpo live main | 3.00 |" in rendered(*EVERYTHING)[0]


def test_peak_memory_counts_what_had_to_run_before() -> None:
    ours = result("jdpo", [[1.0, 1.0]], gib=1)._replace(before=[Before(3.0, 5 * 2**30)])
    assert ours.peak() == 5 * 2**30


# --- processes


def script_arm(script: str, **changes: Any) -> Arm:
    """Returns an arm that runs a few lines of Python, which write to --out, sys.argv[2]."""
    fields = {"name": "an arm", "trainer": "jdpo", "reference": "live", "num_measured": 1, **changes}
    return Arm(command=(sys.executable, "-c", script), **fields)


WRITES = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[2])
out.mkdir(parents=True)
line = {"step_seconds": 1.0, "loss": 0.7, "logps/chosen": -1.0, "logps/rejected": -2.0}
(out / "metrics.jsonl").write_text("".join(json.dumps(line | {"step": i}) + chr(10) for i in range(3)))
"""


def test_one_failing_arm_loses_nothing_but_itself(tmp_path: Path) -> None:
    good = script_arm(WRITES, skipped=1)
    bad = script_arm("print('some line'); raise SystemExit('out of luck')", reference="cached")
    unprepared = script_arm(WRITES, role=GATE)._replace(before=(sys.executable, "-c", "raise ValueError('no cache')"))
    notes: list[str] = []
    found = measure([bad, good, unprepared], CASE, Folder(tmp_path), 2, notes)
    assert list(found) == [good.key]
    assert [len(run.measured) for run in found[good.key].runs] == [1, 1]
    assert [line["step"] for line in found[good.key].runs[0].measured] == [2]
    assert notes == ["an arm: ValueError: no cache", "an arm: out of luck"]


def test_tokens_of_every_row_are_asked_of_trl(tmp_path: Path) -> None:
    expected, found = tmp_path / "expected", tmp_path / "found"
    expected.write_text("a\nb\nc\n")
    found.write_text("a\nb\nc\nb\nc\n")
    check_trl_tokens(found, expected, 1, 2)
    for wrong in ("", "a\nb\nc\nb\n", "a\nb\nc\nb\nc\na\n", "a\nb\nc\nb\nx\n"):
        found.write_text(wrong)
        with pytest.raises(ValueError, match="expected 5 rows"):
            check_trl_tokens(found, expected, 1, 2)


# --- generation


def test_tokens_per_second_are_compared_cell_by_cell() -> None:
    answers = [[5, 6, 7], [8]]
    ours = [Run(seconds, 0.5, answers) for seconds in (1.0, 2.0, 4.0)]  # 4, 2 and 1 tokens per second
    theirs = [Run(seconds, 2.0, [*answers[:1], [9]]) for seconds in (4.0, 8.0, 5.0)]  # 1, 0.5 and 0.8
    cells = {name: CELLS[name] for name in ("greedy, V=4096", "samples")}
    size = Size(TINY, 8, 12)
    text, passed = report(
        {name: GenerationResult(cell, ours, theirs, 8) for name, cell in cells.items()}, size, "torch"
    )
    assert not passed
    assert "| greedy, V=4096 | 2 [1, 4] | 0.8 [0.5, 1] | 2.50 | 4.00 | 2 | reached |" in text
    assert "| samples | 2 [1, 4] | 0.8 [0.5, 1] | 2.50 | 4.00 | 3 | **missed** |" in text
    assert "1 of 2 answers are equal, token for token" in text
    assert "jdpo 2 in the mean" in text
    assert report({"samples": GenerationResult(cells["samples"], ours, [], 8)}, size, None)[1]


def test_a_hundredth_of_the_vocabulary_ends_answers_with_stops() -> None:
    assert len(end_tokens(CELLS["samples"])) == 320
    assert all(not end_tokens(cell) for name, cell in CELLS.items() if name != "samples")


# --- tokens of generated conversations


def test_exactly_the_answers_of_generated_conversations_are_learnt(capsys: pytest.CaptureFixture[str]) -> None:
    templates = ["qwen3_reasoning", "llama3", "mistral_v3", "gpt_oss"]
    assert token_rules(["--rows", "20", "--templates", *templates]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert all(f"| {name} | {kind} |" in printed for name in templates for kind in ("pairs", "assistant_turns"))
    assert "rule jdpo: every check holds" in printed


@pytest.mark.full
def test_exactly_the_answers_are_learnt_under_every_template(capsys: pytest.CaptureFixture[str]) -> None:
    templates = BENCHMARKS.parent / "tests" / "data" / "templates"
    assert token_rules(["--rows", "60"]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert all(f"| {path.stem} | pairs |" in printed for path in templates.glob("*.jinja"))
    assert "| qwen3_5 enable_thinking=False | assistant_turns |" in printed


def test_the_common_prefix_instead_of_the_rule_fails_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert token_rules(["--rule", "prefix", "--rows", "20", "--templates", "qwen3_reasoning"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED foreign" in printed  # an earlier answer is learnt
    assert "FAILED end" in printed
    assert "rule prefix: FAILED" in printed


# --- the whole way


def one_device() -> dict[str, str]:
    """Sets the environment of a user with one CPU device, without the test suite's settings."""
    values = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return values | {"PYTHONPATH": str(BENCHMARKS.parent), "JAX_PLATFORMS": "cpu"}


@pytest.mark.full
def test_speed_runs_end_to_end_at_toy_size(tmp_path: Path) -> None:
    command = ["--tiny", "--trainers", "jdpo", "--cases", "hh", "--rounds", "1", "--steps", "1", "--filler", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "speed.py"), *command, "--report", str(tmp_path / "report.md")],
        capture_output=True,
        text=True,
        env=one_device(),
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert "| jdpo, live reference |" in text
    assert "| jdpo, cached reference |" in text
    assert "`jdpo reference` took" in text


@pytest.mark.full
@pytest.mark.torch
def test_speed_runs_next_to_trl_at_toy_size(tmp_path: Path) -> None:
    command = ["--tiny", "--trainers", "jdpo", "trl", "--cases", "hh", "--rounds", "1", "--steps", "1", "--filler", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "speed.py"), *command, "--report", str(tmp_path / "report.md")],
        capture_output=True,
        text=True,
        env=one_device(),
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert "Gate of all steps: allowed 1e-03: equal" in text
    assert "one pair at a time" in text
    assert "checkpointing" in text
    assert "the faster of each" in text
    assert "Left out" not in text


# --- the loop


def test_the_loops_report_names_what_was_forgotten() -> None:
    def loop(after: float, forgotten: float) -> Loop:
        facts = [("asked", *DUBLIN, 0.6, after), ("other", "Where is Oslo?", "Norway", 0.95, forgotten)]
        report = {"pairs": {"kept": 3}, "answers": {"read": 16}}
        return Loop(dict.fromkeys(STAGES, 2.0), report, facts)

    mean, low, high = interval([0.7, 0.8, 0.9])
    assert (round(mean, 3), round(low, 3), round(high, 3)) == (0.8, 0.552, 1.048)  # 4.303 * 0.1 / sqrt(3)
    text = render_loops([loop(0.7, 0.9), loop(0.8, 0.2), loop(0.9, 0.4)])
    assert "0.600 before; after, 0.800 (95 % interval over the seeds 0.552 to 1.000" in text
    assert "| asked | 1 | 0.600 | 0.800 (0.552 to 1.000) | 0 to 0 |" in text
    assert "lost more than 0.05 on average: 1 of 2" in text
    assert "| Where is Oslo? | Norway | other | 0.950 | 0.500 |" in text
    assert "Seconds of a loop: 10 to 10" in text


def test_start_ups_are_compared_by_the_medians_of_their_rounds() -> None:
    def round_of(cpu: float) -> list[dict[str, Any]]:
        rows = [{"name": name, "wall": 9.0, "cpu": cpu, "programs": 3, "timing": {"step": cpu}} for name in TRAININGS]
        return [{"name": "imports", "wall": 1.0, "cpu": 0.0}, *rows]

    found = {("before", cache): [round_of(cpu) for cpu in (4.0, 90.0, 5.0)] for cache in CACHES}
    found |= {("now", cache): [round_of(2.0)] * 3 for cache in CACHES}
    text = render_startup(found, ["before", "now"])
    assert "| cold | sft | before | 9.0 | 5.0 | 0.0 | 0.0 | 3 |" in text
    assert "| warm | all, CPU s | before 25.0, now 10.0 (2.50 times) |" in text
    assert "| cold | dpo again | 2.00 |" in text


@pytest.mark.full
def test_start_ups_are_measured_end_to_end() -> None:
    command = [sys.executable, str(BENCHMARKS / "startup.py"), "--rounds", "1", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=one_device())
    assert done.returncode == 0, done.stderr
    assert "| warm | beta 0.3, no export | now |" in done.stdout


@pytest.mark.ci
def test_lora_learns_the_same_in_its_first_steps_on_every_mesh() -> None:
    command = [sys.executable, str(BENCHMARKS / "lora_first_steps.py"), "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=one_device())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| fsdp 8, order 5 2 7 0 3 6 1 4 | bfloat16 | live |" in done.stdout


@pytest.mark.full
def test_the_loop_goes_the_whole_way_at_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "answers_loop.py"), "--tiny", "--seeds", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=one_device())
    # A model that has learnt little need not improve.
    assert done.returncode in (0, 1), done.stderr
    assert "P(Dublin) rose: " in done.stdout, done.stderr
    assert "| other facts | " in done.stdout


@pytest.mark.full
def test_ladder_gives_the_same_loss_on_every_rung(tmp_path: Path) -> None:
    command = ["--tiny", "--tables", "hh", "--rounds", "1", "--report", str(tmp_path / "report.md")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "ladder.py"), *command],
        capture_output=True,
        text=True,
        env=one_device(),
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {name} |" in text for name in RUNGS)


@pytest.mark.full
@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.torch)], ids=["alone", "transformers"])
def test_generation_runs_end_to_end_at_toy_size(other: bool, tmp_path: Path) -> None:
    command = ["--tiny", "--rounds", "1", "--report", str(tmp_path / "report.md"), *([] if other else ["--alone"])]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "generation.py"), *command], capture_output=True, text=True, env=one_device()
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert text.count("| reached |" if other else "| not compared |") == len(CELLS)
    assert text.count("16 of 16 answers are equal") == (2 if other else 0)
