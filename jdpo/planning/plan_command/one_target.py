"""Plans one target, in whichever process."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from jdpo.config import TrainConfig
from jdpo.planning.machines import machine_of
from jdpo.planning.plan_command.given_lengths import Lengths
from jdpo.planning.target_plan import TargetPlan
from jdpo.safe_text import terminal_lines


def plan_by_name(name: str, config: TrainConfig, lengths: list[Lengths], cache_dir: Path) -> TargetPlan:
    """Plans a machine by its name, and logs to standard error; a function of a module, as another process needs it."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are those that programs are compiled for
    from jdpo.planning.plan_target import plan_target

    return plan_target(config, machine_of(name), lengths, cache_dir=cache_dir, log=partial(log_target, name))


def log_target(name: str, text: str) -> None:
    """Writes a line about a target to standard error."""
    print(terminal_lines(f"{name}: {text}"), file=sys.stderr, flush=True)
