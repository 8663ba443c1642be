"""The answer of a plan: the table in wide and narrow terminals, JSON, and settings to paste."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jdpo.config import CONFIGS, TrainConfig, load_config
from jdpo.planning.machines import machine_of
from jdpo.planning.plan_command.outlook import Outlook, outlook
from jdpo.planning.plan_command.pasted_settings import pasted_settings
from jdpo.planning.plan_command.plan_document import plan_document
from jdpo.planning.plan_command.plan_view import MOST_ERROR_LINES, print_plan
from jdpo.planning.plan_command.planner_process import PlannerCrashed, PlannerProcess
from jdpo.planning.plan_command.prices import Prices
from jdpo.planning.plan_command.question import Question
from jdpo.planning.plan_command.row_lengths import alike
from jdpo.planning.plan_command.run_length import RunLength
from jdpo.planning.target_plan import MemoryByKind, TargetPlan

GIB = 2**30
RUN = RunLength(num_steps=360, reference="cached", reference_steps=120, why="1 epoch of 46,080 pairs")
PRICES = Prices(path=Path("prices.yaml"), currency="EUR", per_chip={"v5e": 1.0}, per_target={})


def plan_of(name: str, **changes: Any) -> TargetPlan:
    machine = machine_of(name)
    found = TargetPlan(
        target=name,
        device_kind=machine.kind,
        num_devices=machine.num_devices,
        num_hosts=machine.num_hosts,
        num_slices=machine.slices,
        fits=True,
        missing_bytes=0,
        how="compiled",
        error=None,
        mesh={"data": machine.slices, "fsdp": machine.devices_per_slice, "expert": 1, "tensor": 1},
        max_tokens_per_device=4096,
        remat="full",
        optimizer="adamw",
        pairs_per_micro_batch=32,
        micro_batches=4,
        memory=MemoryByKind(
            weights=2 * GIB, gradients=2 * GIB, moments=4 * GIB, reference=0, activations=3 * GIB, head=GIB, other=0
        ),
        hbm_bytes=16 * GIB,
        limit_bytes=15 * GIB,
        wire_inside_bytes=3 * GIB,
        wire_across_bytes=GIB,
        padding=1.25,
        step_seconds=(10.0, 20.0),
        rests_on="The compiled program at full speed, and at half of it.",
        tokens_per_step=100_000,
        mfu=(0.2, 0.4),
        num_compilations=2,
        from_cache=False,
    )
    return dataclasses.replace(found, **changes)


REFUSED = {
    "fits": False,
    "missing_bytes": 3 * GIB,
    "error": "RESOURCE_EXHAUSTED: Used 18.2G of 15.7G hbm. [bold]\x1b[31m\n" + "more\n" * 20,
    "step_seconds": None,
    "mfu": None,
    "suggestions": ("optimizer: adamw_bf16 needs 4 GiB less",),
}


def question_of(*words: str, prices: Prices | None = None, run: RunLength = RUN) -> Question:
    keys = ["model_name_or_path=some/model", "datasets=x", "output_dir=x", "global_batch_size=128", *words]
    config: TrainConfig = load_config(CONFIGS["dpo"], None, keys)
    return Question(
        command="dpo",
        model="some/model",
        rows_per_step=128,
        optimizer=config.optimizer,
        rows_per_device=config.micro_batch_size,
        rows=alike((256, 384, 384), source="--lengths"),
        run=run,
        prices=prices,
    )


def outlooks_of(question: Question) -> list[Outlook]:
    prices = question.prices
    machines = [machine_of(name) for name in ("v5e-16", "2xv5e-16", "v5p-8", "h100x8")]
    plans = [
        plan_of("v5e-16", **REFUSED),
        plan_of("2xv5e-16"),
        plan_of("v5p-8", optimizer="adamw_bf16"),
        plan_of("h100x8", how="estimated", wire_inside_bytes=None, wire_across_bytes=None, num_compilations=0),
    ]
    found = [
        outlook(machine, plan, question.run, price_per_hour=None if prices is None else prices.per_hour(machine))
        for machine, plan in zip(machines, plans, strict=True)
    ]
    return [*found, Outlook(machine=machine_of("v6e-16"), plan=None, failure="RuntimeError: INTERNAL: no")]


def shown(question: Question, *, width: int = 110) -> str:
    out = io.StringIO()
    print_plan(question, outlooks_of(question), Console(file=out, width=width, highlight=False))
    return out.getvalue()


def rows_of(text: str) -> dict[str, str]:
    """The lines of the table, by their target."""
    table = text.split("\n\n")[1].splitlines()
    return {line.split()[0]: line.rstrip() for line in table}


def test_the_table_of_a_wide_terminal() -> None:
    rows = rows_of(shown(question_of(prices=PRICES)))
    assert rows["target"].split() == ["target", "fits", "how", "mesh", "optimizer", "memory", "step", "run", "cost"]
    assert "no, 3.00 GiB short" in rows["v5e-16"]
    assert "adamw_bf16" in rows["v5p-8"]
    assert "not planned" in rows["v6e-16"]
    assert rows["h100x8"].split()[1:3] == ["yes", "formula"]
    # 360 steps of 10 to 20 s, and the log-probs of 120 steps' rows in a quarter to a third of that.
    for text in ("data 2 x fsdp 16", "80 %", "10-20 s", "1.1-2.2 h", "35-71 EUR"):
        assert text in rows["2xv5e-16"]
    assert "EUR" not in rows["v5p-8"]
    assert max(map(len, rows.values())) <= 110


def test_a_narrow_terminal_has_fewer_columns_and_the_same_facts() -> None:
    text = shown(question_of(prices=PRICES), width=80)
    assert rows_of(text)["target"].split() == ["target", "fits", "how", "step", "run", "cost"]
    assert max(map(len, text.splitlines())) <= 80
    assert "10-20 s" in rows_of(text)["2xv5e-16"]
    assert "data 2 x fsdp 16; remat full" in text


def test_columns_of_what_is_not_known_are_left_out() -> None:
    unknown = RunLength(num_steps=None, reference="live", reference_steps=0, why="not known: give --num_rows N")
    text = shown(question_of(run=unknown))
    assert not {"run", "cost"} & {*rows_of(text)["target"].split()}
    assert "--num_rows" in text


def test_details_of_a_target() -> None:
    text = " ".join(shown(question_of(prices=PRICES)).split())
    assert "32 chips on 8 hosts, 2 slices: TPU v5 lite" in text
    assert "12.00 GiB at the peak of a step, which may use 15.00 GiB of 16.00 GiB: weights 2.00 GiB" in text
    assert "sends 3.00 GiB per step within its slice or node, 1.00 GiB across slices" in text
    assert "1.25 slots computed per token" in text
    assert "5,000-10,000 tokens per second; MFU 20-40 %" in text
    assert "RuntimeError: INTERNAL: no" in text
    assert "prices.yaml has no price for it: add v5p under per_chip_hour" in text


def test_an_error_of_the_compiler_is_shown_safely_and_in_part() -> None:
    text = shown(question_of())
    assert "[bold]\\x1b[31m" in text
    assert text.count("more\n") <= MOST_ERROR_LINES
    assert f"{21 - MOST_ERROR_LINES} more lines; --json" in text
    assert "adamw_bf16 needs 4 GiB less" in text


def test_there_is_no_colour_where_nothing_shows_it() -> None:
    assert "\x1b" not in shown(question_of(prices=PRICES))


def test_the_document_is_json_with_units_in_its_keys() -> None:
    question = question_of(prices=PRICES)
    found = json.loads(json.dumps(plan_document(question, outlooks_of(question)), allow_nan=False))
    refused, slices, dense, gpus, failed = found["targets"]
    assert [each["fits"] for each in found["targets"]] == [False, True, True, True, None]
    assert slices["peak_bytes"] == sum(slices["memory_bytes"].values()) == 12 * GIB
    assert (slices["run_seconds_low"], slices["run_seconds_high"]) == (3600 + 300, 7200 + 800)
    assert slices["cost_high"] == pytest.approx(32 * 8000 / 3600)
    assert (slices["hosts"], slices["chips"], slices["wire_across_bytes"]) == (8, 32, GIB)
    assert refused["compiler_error"] == REFUSED["error"]
    assert refused["missing_bytes"] == 3 * GIB
    assert refused["step_seconds_low"] is refused["cost_low"] is refused["settings_yaml"] is None
    assert dense["price_per_hour"] is dense["cost_low"] is None
    assert (gpus["how"], gpus["wire_inside_bytes"]) == ("estimated", None)
    assert failed["failure"] == "RuntimeError: INTERNAL: no"
    assert found["prices"]["currency"] == "EUR"


@pytest.mark.parametrize(
    ("words", "chosen", "expected"),
    [
        ((), "adamw", "adamw"),
        ((), "adamw_bf16", "adamw_bf16"),
        (("optimizer.weight_decay=0.1", "optimizer.b2=0.95"), "adamw", "{name: adamw, b2: 0.95, weight_decay: 0.1}"),
        (("optimizer.weight_decay=0.1",), "lion", "lion"),
    ],
)
def test_settings_to_paste_are_those_of_the_plan(
    tmp_path: Path, words: tuple[str, ...], chosen: str, expected: str
) -> None:
    asked = question_of(*words).optimizer
    text = pasted_settings(plan_of("2xv5e-16", optimizer=chosen), asked, None)
    assert text.splitlines()[-1] == f"optimizer: {expected}"
    file = tmp_path / "pasted.yaml"
    file.write_text(f"model_name_or_path: x\ndatasets: x\noutput_dir: x\n{text}\n", encoding="utf-8")
    read: TrainConfig = load_config(CONFIGS["dpo"], file)
    assert (read.mesh.data, read.mesh.fsdp, read.max_tokens_per_device, read.remat) == (2, 16, 4096, "full")
    assert read.optimizer.name == chosen


def test_rows_per_device_stay_as_they_are() -> None:
    question = question_of("micro_batch_size=2")
    assert "max_tokens_per_device" not in pasted_settings(plan_of("v5e-16"), question.optimizer, 2)


def test_a_crash_ends_its_own_process_alone() -> None:
    with PlannerProcess() as process:
        with pytest.raises(PlannerCrashed, match="SIGABRT"):
            process.call(os.abort)
        assert process.call(os.getpid) != os.getpid()
