"""What a run settles between reading its rows and its first step: how much at once, and the programs for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.reference_cache.scores import ReferenceCache
from jdpo.models.remat import remat_order
from jdpo.processes import most_of_processes
from jdpo.sharding.axes import num_batch_shards
from jdpo.training.fit.assembly import Assembly, assemble
from jdpo.training.fit.compilation import Programs, Shapes, compile_for, shapes_of
from jdpo.training.fit.host_memory import host_memory
from jdpo.training.fit.memory_fit import (
    MAX_TOKENS_PER_DEVICE,
    TOKEN_STEP,
    Fit,
    choose_fit,
    is_exhausted,
    memory_limit,
    program_bytes,
)
from jdpo.training.reference.reference_source import Reference
from jdpo.training.setup.batches import Batches, PackedBatches, PaddedBatches
from jdpo.training.setup.run_setup import Say, Setup
from jdpo.words import memory

LOOKED_AHEAD = 256
"""Steps whose shapes are compiled in the order in which they come."""


class Preparation(NamedTuple):
    """What the steps of a run need.

    Attributes:
      assembly: model, objective and state.
      batches: of the training rows.
      programs: the training step for each of their shapes.
      fit: what was settled on.
    """

    assembly: Assembly
    batches: Batches
    programs: Programs
    fit: Fit


def prepare_steps(
    setup: Setup, reference: Reference, pool: ThreadPoolExecutor, say: Say, *, remembered: Fit | None = None
) -> Preparation:
    """Settles how much a device computes at once and what is recomputed, where the config leaves it open.

    Args:
      setup: the run.
      reference: where the reference's log-probs come from.
      pool: threads that compile.
      say: takes lines for the person who started the run.
      remembered: what an earlier start of the same run settled on; a resumed run is then the uninterrupted one to the
        last bit.
    """
    search = _Search(setup, reference)
    fit = remembered or search.settle(say)
    assembly, batches = search.assembly(fit.remat), search.batches(fit.max_tokens_per_device)
    if setup.config.packing:
        lengths = sorted({int(batch.gather.shape[-1]) for batch in batches.shapes()})
        backends = {assembly.attention(length): length for length in lengths}
        say(f"attention: {', '.join(f'{name} up to {length} tokens' for name, length in backends.items())}")
    if setup.config.micro_batch_size is None and batches.tokens_per_device > fit.max_tokens_per_device:
        say(
            f"note: the longest of the {setup.task.unit} alone takes {batches.tokens_per_device:,} tokens per device "
            f"at once, more than max_tokens_per_device {fit.max_tokens_per_device:,}"
        )
    programs = Programs(assembly.lower_step, pool)
    known = set(map(shapes_of, batches.shapes()))
    for (remat, shapes), (batch, program) in search.tried.items():
        if remat == fit.remat and shapes in known and program is not None:
            programs.keep(batch, program)
    return Preparation(assembly, batches, programs, fit)


def rows_of_step(setup: Setup, step: int) -> np.ndarray:
    """The rows of a training step."""
    return setup.row_plan.step(step)


def make_batches(
    setup: Setup,
    data: PreparedData,
    steps: Iterable[np.ndarray],
    *,
    max_tokens_per_device: int,
    cache: ReferenceCache | None,
) -> Batches:
    """Batches of the rows of `steps`, packed or padded as the config says."""
    config = setup.config
    options: dict[str, Any] = {
        "num_shards": num_batch_shards(setup.mesh),
        "max_tokens_per_device": max_tokens_per_device,
        "micro_batch_size": config.micro_batch_size,
        "cache": cache,
    }
    if config.packing:
        return PackedBatches(setup.task, data, steps, **options)
    return PaddedBatches(
        setup.task,
        data,
        steps,
        global_batch_size=config.global_batch_size,
        max_length=config.max_length,
        pad_token_id=setup.tokenizer.pad_token_id,
        **options,
    )


def shapes_in_order(batches: Batches, steps: Iterable[np.ndarray]) -> list[Any]:
    """A batch of nothing for every shape, those of the first steps first."""
    first = [batches.like(indices) for indices, _ in zip(steps, range(LOOKED_AHEAD), strict=False)]
    return first if len(first) < LOOKED_AHEAD else [*first, *batches.shapes()]


class _Search:
    """Tries policies and budgets, each at most once."""

    def __init__(self, setup: Setup, reference: Reference) -> None:
        self._setup, self._reference = setup, reference
        self._assemblies: dict[str, Assembly] = {}
        self._batches: dict[int, Batches] = {}
        self.tried: dict[tuple[str, Shapes], tuple[Any, Any]] = {}  # (policy, shapes) -> batch and program

    def assembly(self, remat: str) -> Assembly:
        if remat not in self._assemblies:
            self._assemblies[remat] = assemble(self._setup, reference=self._reference.mode, remat=remat)
        return self._assemblies[remat]

    def batches(self, max_tokens: int) -> Batches:
        if max_tokens not in self._batches:
            setup = self._setup
            steps = (rows_of_step(setup, step) for step in range(setup.num_steps))
            self._batches[max_tokens] = make_batches(
                setup, setup.train_data, steps, max_tokens_per_device=max_tokens, cache=self._reference.train
            )
        return self._batches[max_tokens]

    def settle(self, say: Say) -> Fit:
        config = self._setup.config
        platform = jax.default_backend()
        most = config.max_tokens_per_device or MAX_TOKENS_PER_DEVICE.get(platform, MAX_TOKENS_PER_DEVICE["gpu"])
        policies = remat_order(platform) if config.remat == "auto" else (config.remat,)
        fixed = bool(config.max_tokens_per_device or config.micro_batch_size)
        if fixed and len(policies) == 1:
            return Fit(policies[0], most)
        limit = memory_limit()
        if fixed:
            fit = choose_fit(lambda remat, _: self._bytes(remat, most), policies=policies, most_tokens=1, limit=limit)
            fit = fit._replace(max_tokens_per_device=most)
        else:
            # A step that is smaller than the budget needs no more than it has, and is laid out as it was.
            batches = self.batches(most)
            most = min(most, -(-batches.tokens_per_device // TOKEN_STEP) * TOKEN_STEP)
            self._batches[most] = batches
            fit = choose_fit(self._bytes, policies=policies, most_tokens=most, limit=limit)
        say(_said(fit, limit, by_tokens=config.micro_batch_size is None))
        return fit

    def _bytes(self, remat: str, max_tokens: int) -> float:
        """Bytes that the step needs of a device's memory, by the process that finds most; see `_bytes_of`."""
        return most_of_processes(max(self._bytes_of(remat, batch) for batch in self.batches(max_tokens).demanding()))

    def _bytes_of(self, remat: str, batch: Any) -> float:
        """The same for batches of one shape; inf where it does not even compile for lack of memory."""
        key = remat, shapes_of(batch)
        if key not in self.tried:
            program = None
            try:
                program = compile_for(self.assembly(remat).lower_step, batch)
            except jax.errors.JaxRuntimeError as error:
                if not is_exhausted(error):
                    raise
            self.tried[key] = batch, program
        program = self.tried[key][1]
        return math.inf if program is None else program_bytes(program)


def _said(fit: Fit, limit: int, *, by_tokens: bool) -> str:
    at_once = f"at most {fit.max_tokens_per_device:,} tokens per device at once, " if by_tokens else ""
    needed = "more memory than a device has" if fit.bytes_needed is None else memory(fit.bytes_needed)
    text = f"step: {at_once}remat {fit.remat}, needs {needed} of {memory(limit)} per device"
    if fit.bytes_needed is None or fit.bytes_needed > limit:
        text += (
            "; this may not fit: use more devices, a shorter max_length, or an optimizer that keeps less "
            "(docs/memory.md)"
        )
    bound = host_memory().bound if jax.default_backend() == "cpu" else ""
    return f"{text} (the host's memory is limited by {bound})" if bound else text


FITTED_KEYS = (
    "attention",
    "attention_block_kv",
    "attention_block_q",
    "max_tokens_per_device",
    "micro_batch_size",
    "offload_optimizer",
    "packing",
    "remat",
)
"""Keys that may change when a run goes on, and by which a step takes more memory or less."""


def remembered_fit(saved: dict[str, Any] | None, now: dict[str, Any], limit: int) -> Fit | None:
    """The fit of an earlier start where that was made on such a machine with the same settings, else None.

    Args:
      saved: what `fit_to_remember` gave.
      now: the `circumstances` of this start.
      limit: bytes that a device has now; with fewer than then, what was settled on must still fit.
    """
    if saved is None or any(saved.get(key) != value for key, value in now.items()):
        return None
    needed = saved.get("bytes_needed")
    if needed is not None and limit < min(needed, saved["limit"]):
        return None
    return Fit(saved["remat"], saved["max_tokens_per_device"], needed)


def fit_to_remember(fit: Fit, now: dict[str, Any], limit: int) -> dict[str, Any]:
    """What run.json keeps of it."""
    return {**fit._asdict(), "limit": limit, **now}


def circumstances(setup: Setup, reference: Reference) -> dict[str, Any]:
    """What a fit depends on beside what makes the run the same run."""
    config = dataclasses.asdict(setup.config)
    return {f"asked_{key}": config[key] for key in FITTED_KEYS} | {
        "reference": reference.mode,
        "device": setup.mesh.devices.flat[0].device_kind,
        "mesh": list(setup.mesh.devices.shape),
        "jax": jax.__version__,
    }
