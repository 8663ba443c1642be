"""Plans one target after the other, in a process of their own where a compiler runs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import jax

from jdpo.config import TrainConfig
from jdpo.data.prepared.prepare import cache_folder
from jdpo.planning.compile_only import missing_package
from jdpo.planning.machines import Machine, machine_of
from jdpo.planning.plan_command.given_lengths import Lengths
from jdpo.planning.plan_command.outlook import Outlook, outlook
from jdpo.planning.plan_command.planner_process import PlannerProcess
from jdpo.planning.plan_command.question import Question
from jdpo.planning.plan_target import plan_target
from jdpo.planning.target_plan import TargetPlan
from jdpo.safe_text import terminal_lines


def check_compilers(machines: list[Machine]) -> None:
    """Refuses targets of which none can be planned here.

    Raises:
      ValueError: all of them are TPUs, and their compiler is not installed.
    """
    if all(not machine.is_gpu and missing_package(machine) for machine in machines):
        names = ", ".join(machine.name for machine in machines)
        raise ValueError(
            f"planning for {names} needs libtpu, the compiler for TPUs, which is not installed here: "
            "`pip install libtpu` adds it, and it needs no TPU"
        )


def target_outlook(
    question: Question, config: TrainConfig, machine: Machine, process: PlannerProcess, place: str
) -> Outlook:
    """Returns the outlook of a run on a machine, also if planning fails: that must not end the plans of others.

    Args:
      config: of the run; `model_name_or_path` is a folder with config.json.
      process: in which compilers run, since they may crash.
      place: of the machine among all of them, for the user, such as "1 of 3".
    """
    compiled = missing_package(machine) is None
    _log(machine.name, f"{place}, {_usual_time(machine) if compiled else 'without a compiler'}")
    arguments = machine.name, config, question.rows.sample(config.seed), cache_folder(config.cache_dir)
    try:
        plan = process.call(_plan, *arguments) if compiled else _plan(*arguments)
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return Outlook(machine=machine, plan=None, failure=f"{kind}{error}")
    return outlook(
        machine,
        plan,
        question.run,
        adapters=bool(config.lora),
        price_per_hour=None if question.prices is None else question.prices.per_hour(machine),
    )


def _usual_time(machine: Machine) -> str:
    one = "4 to 30 seconds" if machine.is_gpu else "1 to 3 minutes"
    return f"up to 3 compilations, which usually take {one} each; a plan that was made before comes from the cache"


def _plan(name: str, config: TrainConfig, lengths: list[Lengths], cache_dir: Path) -> TargetPlan:
    """Plans for a machine by its name, in this process or another, and logs to standard error."""
    jax.config.update("jax_platforms", "cpu")  # the devices are those that programs are compiled for
    return plan_target(config, machine_of(name), lengths, cache_dir=cache_dir, log=partial(_log, name))


def _log(name: str, text: str) -> None:
    """Writes a line about a target to standard error."""
    print(terminal_lines(f"{name}: {text}"), file=sys.stderr, flush=True)
