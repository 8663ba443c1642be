"""The arms of the speed benchmark: one command each, run in a process of its own (`speed_run.py`).

Every arm writes a metrics.jsonl, a line per step (`step`, `step_seconds`, `loss`, `logps/chosen`, `logps/rejected`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from machine import ROOT
from speed_cases import Case

LEARNING_RATE, BETA = 1e-5, 0.1
WARMUP = 1
MAIN, ONE_PAIR, CHECKPOINTED, GATE = "main", "one pair", "checkpointed", "gate"
"""The purposes of an arm: the bars; TRL without padding; TRL with least memory; comparing every step's figures."""


class Folder(NamedTuple):
    """The folders of a case's inputs and of its arms' outputs: all rows for jdpo, for others those of the steps."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def rows(self) -> Path:
        return self.root / "rows.jsonl"

    @property
    def compared_rows(self) -> Path:
        return self.root / "compared-rows.jsonl"

    @property
    def compared_ids(self) -> Path:
        return self.root / "compared-ids.jsonl"


class Arm(NamedTuple):
    """A trainer with its settings.

    Attributes:
      name: as in the report.
      trainer: jdpo, trl or tunix.
      reference: live or cached.
      command: what runs it, without its output folder.
      num_measured: steps that are measured: the last ones.
      skipped: steps between the warm-up and those: jdpo loads its programs in the background of its first steps, a
        GPU's kernels are chosen in a first pass.
      role: what the arm is for.
      out_flag: the flag that takes the folder it writes to.
      endless: whether it trains on past the last step that is wanted, and is then told to stop.
      before: a command to be run once before the first round: `jdpo reference`.
      cold: whether a run comes before the first round that compiles what is needed and is not measured.
      rounds: rounds at most.
    """

    name: str
    trainer: str
    reference: str
    command: tuple[str, ...]
    num_measured: int
    skipped: int = 0
    role: str = MAIN
    out_flag: str = "--out"
    endless: bool = False
    before: tuple[str, ...] = ()
    cold: bool = False
    rounds: int = 99

    @property
    def num_lines(self) -> int:
        """The number of steps to run."""
        return WARMUP + self.skipped + self.num_measured

    @property
    def key(self) -> str:
        return f"{self.trainer} {self.reference} {self.role}"


class TrlWay(NamedTuple):
    """TRL's settings for memory and speed."""

    attention: str
    liger: bool
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.attention}{' + Liger' if self.liger else ''}, {self.micro_batch} pairs at once"


def jdpo_arm(python: str, case: Case, folder: Folder, reference: str, *, filler: int, steps: int) -> Arm:
    """Returns `jdpo dpo` on one pass over the whole table, for which it plans shapes; stopped after the last step."""
    words = _jdpo_words(case, folder, folder.rows, reference)
    return Arm(
        name=f"jdpo, {reference} reference",
        trainer="jdpo",
        reference=reference,
        command=(python, "-m", "jdpo.cli.main", "dpo", *words),
        num_measured=steps,
        skipped=filler,
        out_flag="--output_dir",
        endless=True,
        before=(python, "-m", "jdpo.cli.main", "reference", *words) if reference == "cached" else (),
        cold=True,
    )


def gate_arm(python: str, case: Case, folder: Folder, *, steps: int) -> Arm:
    """Returns `jdpo dpo` on TRL's own file: it is not timed, but its figures are compared with TRL's."""
    words = _jdpo_words(case, folder, folder.compared_rows, "live")
    return Arm(
        name="jdpo on TRL's rows, live reference",
        trainer="jdpo",
        reference="live",
        command=(python, "-m", "jdpo.cli.main", "dpo", *words),
        num_measured=steps,
        role=GATE,
        out_flag="--output_dir",
        endless=True,
        rounds=1,
    )


def _jdpo_words(case: Case, folder: Folder, rows: Path, reference: str) -> list[str]:
    settings = {
        "model_name_or_path": folder.model,
        "datasets": rows,
        "cache_dir": folder.root / f"jdpo-{reference}-cache",
        "max_length": case.max_length,
        "global_batch_size": case.batch,
        "shuffle": "false",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "beta": BETA,
        "compute_dtype": "float32" if case.device == "cpu" else "bfloat16",
        "logging_steps": 1,
        "reference": reference,
        "num_train_epochs": 1,
    }
    return [*(f"{key}={value}" for key, value in settings.items()), *case.jdpo]


def trl_arm(
    python: str,
    case: Case,
    folder: Folder,
    reference: str,
    way: TrlWay,
    *,
    steps: int,
    role: str = MAIN,
    passes: int = 1,
    rounds: int = 99,
) -> Arm:
    """Returns TRL's DPOTrainer; of several passes over the measured rows, the last is measured."""
    flags = {
        "model": folder.model,
        "rows": folder.compared_rows,
        "warmup": WARMUP,
        "steps": steps,
        "passes": passes,
        "batch": case.batch,
        "micro_batch": way.micro_batch,
        "max_length": case.max_length,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
        "attention": way.attention,
        "reference": "live" if reference == "live" else "precomputed",
        "device": case.device,
        "dtype": case.shape.dtype,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    switches = {"--liger": way.liger, "--checkpointing": role == CHECKPOINTED, "--tokens": True}
    words += [switch for switch, on in switches.items() if on]
    at_once = {1: "one pair at a time, ", case.batch: ""}.get(way.micro_batch, f"{way.micro_batch} pairs at a time, ")
    how = f"{way.attention}{' + Liger' if way.liger else ''}{', checkpointing' if role == CHECKPOINTED else ''}"
    return Arm(
        name=f"TRL, {flags['reference']} reference, {at_once}{how}",
        trainer="trl",
        reference=reference,
        command=(python, str(ROOT / "benchmarks/speed_trl.py"), *words),
        num_measured=steps,
        skipped=steps * (passes - 1),
        role=role,
        rounds=rounds,
    )


def tunix_arm(python: str, case: Case, folder: Folder, *, steps: int) -> Arm:
    """Returns Tunix's DPOTrainer, which has only a live reference."""
    flags = {
        "model": folder.model,
        "ids": folder.compared_ids,
        "steps": WARMUP + steps,
        "batch": case.batch,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    command = (python, str(ROOT / "benchmarks/speed_tunix.py"), *words)
    return Arm("Tunix, live reference", "tunix", "live", command, steps, rounds=1)  # it runs most steps twice
