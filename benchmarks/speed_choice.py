"""Chooses the arms of the speed benchmark: TRL in the way that proves fastest in a trial, and what cannot run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from speed_arms import (
    CHECKPOINTED,
    ONE_PAIR,
    Arm,
    Folder,
    TrlWay,
    gate_arm,
    jdpo_arm,
    trl_arm,
    tunix_arm,
)
from speed_cases import Case
from speed_run import ArmFailed, missing, run_arm


@dataclasses.dataclass
class Plan:
    """The arms that will run, with notes for the report.

    Attributes:
      arms: in the order of a round.
      notes: what is left out, and why.
      trials: how TRL's way was found.
    """

    arms: list[Arm] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    trials: list[str] = dataclasses.field(default_factory=list)


def wanted_trainers(arguments: argparse.Namespace, case: Case) -> list[str]:
    """Returns the case's trainers that the command line does not exclude."""
    return [name for name in case.trainers if name in arguments.trainers]


def choose_arms(
    arguments: argparse.Namespace, case: Case, folder: Folder, *, filler: int, ways: dict[Any, TrlWay]
) -> Plan:
    """Returns the arms that can run; `ways` keeps trials for cases that differ only in the head."""
    wanted, plan, steps = wanted_trainers(arguments, case), Plan(), arguments.steps
    arms: dict[str, list[Arm]] = {"live": [], "cached": []}
    further: list[Arm] = []
    if "jdpo" in wanted:
        for reference in case.references:
            arms[reference].append(jdpo_arm(sys.executable, case, folder, reference, filler=filler, steps=steps))
    if "trl" in wanted and (way := fastest_way(arguments.trl_python, case, folder, plan, ways)) is not None:
        for reference in case.references:
            arms[reference].append(
                trl_arm(arguments.trl_python, case, folder, reference, way, steps=steps, passes=num_passes(case.device))
            )
        further += more_of_trl(arguments.trl_python, case, folder, way, steps)
        if "jdpo" in wanted:
            further.append(gate_arm(sys.executable, case, folder, steps=steps))
    if "tunix" in wanted:
        why = missing(arguments.tunix_python, ("tunix.sft.dpo.dpo_trainer",))
        if why is None and case.device == "cpu":
            arms["live"].append(tunix_arm(arguments.tunix_python, case, folder, steps=steps))
        else:
            plan.notes.append(
                f"Tunix: {why or 'two float32 copies of the weights in addition to its dense logits; CPU only'}"
            )
    plan.arms = [*arms["live"], *arms["cached"], *further]
    return plan


def more_of_trl(python: str, case: Case, folder: Folder, way: TrlWay, steps: int) -> list[Arm]:
    """Returns TRL without padding, and with the least memory at a whole step; one round each, without bars."""
    if not case.more_trl:
        return []
    passes = num_passes(case.device)
    slim = trl_arm(python, case, folder, "live", way, steps=steps, role=CHECKPOINTED, passes=passes, rounds=1)
    if case.trl_micro_batches is not None:  # sizes were tried
        return [slim]
    alone = way._replace(micro_batch=1)
    return [trl_arm(python, case, folder, "live", alone, steps=steps, role=ONE_PAIR, passes=passes, rounds=1), slim]


def num_passes(device: str) -> int:
    """Returns the number of passes over the measured rows; the last counts, as GPU kernels are chosen in the first."""
    return 2 if device == "gpu" else 1


def fastest_way(python: str, case: Case, folder: Folder, plan: Plan, ways: dict[Any, TrlWay]) -> TrlWay | None:
    """Finds TRL's fastest settings with a live reference: attention first, then micro-batches. None if none run."""
    if (why := missing(python, ("trl", "torch"))) is not None:
        plan.notes.append(f"TRL: {why}")
        return None
    known = case.table, case.shape.d_model
    if known in ways:
        plan.trials.append(f"TRL's way is that of the trial at the same rows above: {ways[known]}.")
        return ways[known]
    sizes = case.trl_micro_batches or (case.batch,)
    middle = sizes[len(sizes) // 2]
    tried = {way: try_way(python, case, folder, way, plan) for way in attention_ways(python, case, middle, plan)}
    best = quickest(tried)
    if best is not None:
        others = [best._replace(micro_batch=size) for size in sizes if size != middle]
        tried |= {way: try_way(python, case, folder, way, plan) for way in others}
        best = ways[known] = quickest(tried) or best
    times = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in tried.items() if seconds is not None)
    plan.trials.append(f"TRL's step in a trial: {times or 'none ran'}.")
    return best


def attention_ways(python: str, case: Case, micro_batch: int, plan: Plan) -> list[TrlWay]:
    """Returns the installed attention kernels to try, by whether Liger is used."""
    attentions, ligers = ["sdpa", "eager"], [False]
    if case.device == "gpu":
        for package in ("flash_attn", "liger_kernel"):
            if (why := missing(python, (package,))) is not None:
                plan.notes.append(f"TRL with {package}: {why}")
            elif package == "flash_attn":
                attentions.append("flash_attention_2")
            else:
                ligers.append(True)
    return [TrlWay(attention, liger, micro_batch) for attention in attentions for liger in ligers]


def try_way(python: str, case: Case, folder: Folder, way: TrlWay, plan: Plan) -> float | None:
    """Returns the seconds of one step after a warm-up; None, and a note, if it fails."""
    arm = trl_arm(python, case, folder, "live", way, steps=1, passes=num_passes(case.device))
    out: Path = folder.root / f"trial-{way.attention}{'-liger' if way.liger else ''}-{way.micro_batch}" / "round0"
    try:
        return float(run_arm(arm, out, device=case.device).measured[-1]["step_seconds"])
    except ArmFailed as failed:
        plan.notes.append(f"{way} in TRL's trial: {failed.last}")
        return None


def quickest(tried: dict[TrlWay, float | None]) -> TrlWay | None:
    ran = {way: seconds for way, seconds in tried.items() if seconds is not None}
    return min(ran, key=lambda way: ran[way]) if ran else None
