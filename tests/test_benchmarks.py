"""The speed benchmarks' own arithmetic: rows of exact lengths, model folders, the report and the prediction."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from ladder_flops import RUNGS, attention_flops, predicted_flops  # noqa: E402
from speed_arms import Arm, ArmRun  # noqa: E402
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
from speed_report import Result, render_case  # noqa: E402
from trl_parity import compare_tokens, tokenized_rows  # noqa: E402

from jdpo.models.families import read_model_config  # noqa: E402
from jdpo.models.hf_weights import check_tensors  # noqa: E402
from jdpo.models.safetensors_folder import tensor_entries  # noqa: E402

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
    rows = synthesize(np.full((200, 3), 2), vocab_size=5)  # two words: half of all sides would start alike
    assert all(row.chosen[0] != row.rejected[0] for row in rows)
    assert {token for row in rows for token in row.rejected[:-1]} == {3, 4}


def test_measured_rows_stand_for_the_table() -> None:
    table = read_lengths("long_pairs")
    selection = select(table, batch=4, max_length=1024, warmup=1, steps=6, epoch=16)
    assert selection.lengths.shape == (64, 3)
    assert selection.left_out == (table[:, 0] >= 1024).sum() == 34
    assert (selection.lengths[:, 0] < 1024).all()
    usable = fitted(table[table[:, 0] < 1024], 1024)
    measured = fitted(selection.lengths[4 : 4 * 7], 1024)
    assert measured.sum(1).mean() == pytest.approx(usable.sum(1).mean(), rel=0.05)
    assert len(select(table, batch=60, max_length=1024, warmup=1, steps=2, epoch=99).lengths) == 240  # of 266 rows
    assert padding(measured, 4) == pytest.approx(typical_padding(usable, 4), rel=0.05)
    rows = [tuple(row) for row in selection.lengths.tolist()]
    available = [tuple(row) for row in table.tolist()]
    assert all(rows.count(row) <= available.count(row) for row in rows)  # no row twice


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
    found = predicted_flops(shape, np.array([[4, 2, 1]]), padded=8, packed=7)
    square = {t: 4 * t * t * 2 for t in (5, 6, 7, 8)}
    assert found == {
        "padded": 8 * 44 * 16 + 4 * 2 * square[8],
        "packed": 8 * 44 * 11 + 4 * 2 * square[7],
        "shared prompt": 8 * 44 * 7 + 4 * 2 * square[7],
        "chunked head": 8 * 34 * 7 + 10 * 10 * 3 + 4 * 2 * square[7],
        "cached reference": 6 * 34 * 7 + 8 * 10 * 3 + 3 * 2 * square[7],
        "attention": 6 * 34 * 7 + 8 * 10 * 3 + 3.5 * (square[6] + square[5]) / 2,
    }


# --- report

CASE = Case(
    name="a case", shape=TINY, table="hh", batch=4, max_length=64, bars=(("trl", 4.0), ("tunix", 3.0)), tolerance=1e-3
)


def result(trainer: str, seconds: list[list[float]], *, reference: str = "live", loss: float = 0.7, gib: int) -> Result:
    runs = []
    for of_round in seconds:
        lines = [
            {"step": i + 1, "step_seconds": s, "loss": loss, "logps/chosen": -10.0, "logps/rejected": -20.0}
            for i, s in enumerate(of_round)
        ]
        runs.append(ArmRun(lines, {}, 5.0, gib * 2**30, gib * 2**29))
    return Result(Arm(f"{trainer} {reference}", trainer, reference, ()), runs, [])


def test_report_says_ratios_over_the_steps_behind_the_warm_up() -> None:
    results = {
        "jdpo live": result("jdpo", [[9.0, 1.0, 2.0], [9.0, 3.0, 2.0]], gib=1),
        "trl live": result("trl", [[1.0, 10.0, 9.0], [1.0, 10.0, 11.0]], gib=2),
        "tunix live": result("tunix", [[1.0, 6.0, 6.0], [1.0, 6.0, 6.0]], gib=4),
    }
    lines, passed = render_case(CASE, results, 1, ["facts"], ["nothing: because"])
    text = "\n".join(lines)
    assert passed
    assert "| trl live / jdpo live | 5.00 | 5.00 | 4 | reached |" in text
    assert "| tunix live / jdpo live | 3.00 | 3.00 | 3 | reached |" in text
    assert "| peak resident memory: trl live / jdpo live | 2.00 |  | 2 | reached |" in text
    assert "| jdpo live | 2 (1.75 to 2.25) | 4.00 | 2 | 5.0, 5.0 | 512, 1024 |  |" in text
    assert "Left out: nothing: because" in text


@pytest.mark.parametrize(
    ("trl", "said"),
    [
        (result("trl", [[1.0, 7.9, 7.9]], gib=2), "| 3.95 | 3.95 | 4 | **missed** |"),
        (result("trl", [[1.0, 9.0, 9.0]], gib=1), "| 1.00 |  | 2 | **missed** |"),
        (result("trl", [[1.0, 9.0, 9.0]], gib=2, loss=0.701), "**NOT EQUAL**"),
        (result("trl", [[1.0, 9.0, 9.0]], gib=2, loss=float("nan")), "**NOT EQUAL**"),
    ],
    ids=["too slow", "too much memory", "another loss", "no loss"],
)
def test_report_fails_where_a_bar_or_the_gate_is_missed(trl: Result, said: str) -> None:
    ours = result("jdpo", [[9.0, 2.0, 2.0]], gib=1)
    lines, passed = render_case(CASE, {"jdpo live": ours, "trl live": trl}, 1, [], [])
    assert not passed
    assert said in "\n".join(lines)
    assert render_case(CASE, {"jdpo live": ours}, 1, [], [])[1]


def test_cached_is_held_against_precomputed_and_not_against_live() -> None:
    results = {
        "jdpo cached": result("jdpo", [[9.0, 1.0, 1.0]], reference="cached", gib=1),
        "trl live": result("trl", [[9.0, 8.0, 8.0]], gib=2),
        "trl cached": result("trl", [[9.0, 3.0, 3.0]], reference="cached", gib=2),
    }
    lines, passed = render_case(CASE, results, 1, [], [])
    text = "\n".join(lines)
    assert not passed
    assert "| trl cached / jdpo cached | 3.00 | 3.00 | 4 | **missed** |" in text
    assert "| trl live / jdpo cached" not in text
    assert "| the faster of each: TRL / jdpo | 3.00 | 3.00 |  |  |" in text


# --- the whole way


def one_device() -> dict[str, str]:
    """The environment of a user with one CPU, not of this test suite."""
    values = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return values | {"PYTHONPATH": str(BENCHMARKS.parent), "JAX_PLATFORMS": "cpu"}


@pytest.mark.full
def test_speed_runs_the_whole_way_at_toy_size(tmp_path: Path) -> None:
    command = ["--tiny", "--trainers", "jdpo", "--cases", "hh", "--rounds", "1", "--steps", "1", "--epoch", "2"]
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
