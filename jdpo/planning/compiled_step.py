"""Compiles a planned step for a machine that does not have to be here."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from jdpo.config import TrainConfig
from jdpo.devices import compiling_for
from jdpo.planning.compile_only import compile_only_devices, on_nodes, without_cudnn_checks
from jdpo.planning.machines import Machine
from jdpo.planning.planned_step import PlannedStep, plan_step
from jdpo.training.fit.memory_fit import is_exhausted
from jdpo.training.setup.numerics import numerics, resolve_dtype


class Compilation(NamedTuple):
    """The result of compiling a program, also where the compiler refused it for lack of memory.

    Attributes:
      program: None if it was refused.
      error: None if it was not.
      text: the optimized program.
      live_ranges: the compiler's list of what is needed when; empty where it wrote none.
      buffers: its list of what is where in memory.
      memory_report: its summary of the memory; empty where it wrote none.
      seconds: on this machine, which may do other work at the same time.
    """

    program: Any
    error: jax.errors.JaxRuntimeError | None
    text: str
    live_ranges: str
    buffers: str
    memory_report: str
    seconds: float

    @property
    def reported_bytes(self) -> int | None:
        """The bytes of a device's memory that the compiler tells, also of a program that it refused."""
        found = re.search(r"^Memory Space: default.*\nTotal bytes: (\d+)", self.memory_report, re.MULTILINE)
        if found:
            return int(found.group(1))
        # "HLO temporaries (42.18G) exceeds available HBM", or of other versions "Used 42.18G of 15.75G hbm".
        told = re.search(r"\(([\d.]+)([MG])\) exceeds|Used ([\d.]+)([MG]) of", str(self.error))
        if told is None:
            return None
        number, unit = (group for group in told.groups() if group is not None)
        return int(float(number) * 2 ** {"M": 20, "G": 30}[unit])


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
        config = resolve_dtype(dataclasses.replace(config, mesh=on_nodes(config.mesh, machine)))
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
            lowered_in = time.perf_counter() - began
            compilation = compile_with_dump(lowered)
    if compilation.error is not None:
        raise compilation.error
    return compiled_step(machine, planned, compilation, lowered_in)


def compiled_step(
    machine: Machine, planned: PlannedStep, compilation: Compilation, seconds_to_lower: float = 0.0
) -> CompiledStep:
    """Returns a step with what the compiler made of it."""
    return CompiledStep(
        machine,
        planned,
        tuple(planned.assembly.setup.mesh.devices.flat),
        compilation.text,
        compilation.program.memory_analysis(),
        seconds_to_lower,
        compilation.seconds,
    )


def compile_with_dump(lowered: Any) -> Compilation:
    """Compiles a lowered function and reads what the compiler writes about it.

    Raises:
      jax.errors.JaxRuntimeError: the compilation failed, and not for lack of memory.
    """
    program, error, began = None, None, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # The compiler itself writes the text: JAX cannot print programs with calls of SparseCores, which it reads back
        # from a form that has no place for all of their operands.
        try:
            with _without_program_cache():
                program = lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as refusal:
            if not is_exhausted(refusal):
                raise
            error = refusal
        seconds = time.perf_counter() - began
        texts = (
            # The step is the largest of what is compiled.
            max(
                (file.read_text(encoding="utf-8") for file in Path(folder).glob(f"*after_optimizations{end}.txt")),
                key=len,
                default="",
            )
            for end in ("", "-live-range", "-buffer-assignment", "-memory-usage-report")
        )
        text, live_ranges, buffers, memory_report = texts
    return Compilation(program, error, text, live_ranges, buffers, memory_report, seconds)


@contextlib.contextmanager
def _without_program_cache() -> Iterator[None]:
    """Turns JAX's cache of programs off: the compiler writes nothing about a program that is found there."""
    config: Any = jax.config  # its values have no annotations
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting once
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def compiling_on(machine: Machine) -> Iterator[None]:
    """Makes everything that chooses by platform choose for a machine."""
    with compiling_for(machine.target), without_cudnn_checks() if machine.is_gpu else contextlib.nullcontext():
        yield
