"""Compiles a planned step for a machine that need not be at hand."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.config import TrainConfig
from jdpo.devices import compiling_for
from jdpo.planning.compile_only import compile_only_devices, without_cudnn_checks
from jdpo.planning.machines import Machine
from jdpo.planning.planned_step import PlannedStep, plan_step
from jdpo.training.setup.numerics import numerics, resolve_dtype


class CompiledStep(NamedTuple):
    """A step compiled for a machine.

    Attributes:
      devices: in the order of the mesh, as the program numbers them.
      text: the optimized program.
      memory: `compiled.memory_analysis()`.
      seconds_to_lower: to trace the step and to lower it.
      seconds_to_compile: on this machine, which may do other work at the same time.
    """

    machine: Machine
    planned: PlannedStep
    devices: tuple[Any, ...]
    text: str
    memory: Any
    seconds_to_lower: float
    seconds_to_compile: float


def compile_step_for(
    machine: Machine, config: TrainConfig, lengths: Sequence[Sequence[int]], *, num_layers: int | None = None
) -> CompiledStep:
    """Compiles the training step of a run for a machine.

    Args:
      config: `model_name_or_path` is a folder with config.json; see `plan_step`.
      lengths: of each row, the tokens of prompt, chosen and rejected, or of a supervised row.
      num_layers: in place of the model's.

    Raises:
      ValueError: the compiler is not installed, or settings do not fit; see `plan_step`.
      jax.errors.JaxRuntimeError: the compiler refuses the program, as when it needs more memory than a device has.
    """
    devices = compile_only_devices(machine)
    with compiling_on(machine):
        config = resolve_dtype(config)
        with numerics(config):
            planned = plan_step(
                config,
                devices,
                lengths,
                num_layers=num_layers,
                platform=machine.target.platform,
                memory=machine.chip.hbm_bytes,
            )
            began = time.perf_counter()
            lowered = planned.assembly.lower_step(planned.batch)
            lowered_at = time.perf_counter()
            program, text = _compiled(lowered)
            compiled_at = time.perf_counter()
    return CompiledStep(
        machine,
        planned,
        tuple(planned.assembly.setup.mesh.devices.flat),
        text,
        program.memory_analysis(),
        lowered_at - began,
        compiled_at - lowered_at,
    )


def _compiled(lowered: Any) -> tuple[Any, str]:
    """Compiles a lowered function; returns the program and its text."""
    with tempfile.TemporaryDirectory() as folder:
        # The compiler itself writes the text: JAX cannot print programs with calls of SparseCores, which it reads back
        # from a form that has no place for all of their operands.
        program = lowered.compile(compiler_options={"xla_dump_to": folder})
        written = [file.read_text(encoding="utf-8") for file in Path(folder).glob("*after_optimizations.txt")]
    # The step is the largest of what is compiled; from the cache of programs nothing is written.
    return program, max(written, key=len) if written else program.as_text()


@contextlib.contextmanager
def compiling_on(machine: Machine) -> Iterator[None]:
    """Makes everything that chooses by platform choose for a machine."""
    with compiling_for(machine.target), without_cudnn_checks() if machine.is_gpu else contextlib.nullcontext():
        yield
