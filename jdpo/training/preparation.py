"""What a run settles between reading its rows and its first step: how much at once, and the programs for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jdpo.data.loader import plan
from jdpo.data.prepare import PreparedData
from jdpo.data.reference_cache import ReferenceCache
from jdpo.models.remat import remat_order
from jdpo.sharding.mesh import num_batch_shards
from jdpo.training.assembly import Assembly, assemble
from jdpo.training.batches import Batches, PackedBatches, PaddedBatches
from jdpo.training.compilation import Programs, compile_for
from jdpo.training.fit import MAX_TOKENS_PER_DEVICE, TOKEN_STEP, Fit, choose_fit, memory_limit, program_bytes
from jdpo.training.reference import Reference
from jdpo.training.setup import Say, Setup

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
    programs = Programs(assembly.lower_step, pool)
    for (remat, _), (batch, program) in search.tried.items():
        if remat == fit.remat:
            programs.keep(batch, program)
    return Preparation(assembly, batches, programs, fit)


def rows_of_step(setup: Setup, step: int) -> np.ndarray:
    """The rows of a training step."""
    config = setup.config
    return plan(
        step,
        num_rows=len(setup.train_data),
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        shuffle=config.shuffle,
    )


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
        self.tried: dict[tuple[str, int], tuple[Any, Any]] = {}

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
        """Bytes of a device's memory that the largest step needs; inf where it does not even compile for lack of it."""
        if (remat, max_tokens) not in self.tried:
            batch = self.batches(max_tokens).shapes()[-1]
            try:
                program = compile_for(self.assembly(remat).lower_step, batch)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return math.inf
            self.tried[remat, max_tokens] = batch, program
        return program_bytes(self.tried[remat, max_tokens][1])


def _said(fit: Fit, limit: int, *, by_tokens: bool) -> str:
    at_once = f"at most {fit.max_tokens_per_device:,} tokens a device at once, " if by_tokens else ""
    gibibytes = "more memory than a device has" if fit.bytes_needed is None else f"{fit.bytes_needed / 2**30:.2f} GiB"
    text = f"step: {at_once}remat {fit.remat}, needs {gibibytes} of {limit / 2**30:.1f} a device"
    if fit.bytes_needed is None or fit.bytes_needed > limit:
        text += (
            "; this may not fit: use more devices, a shorter max_length, or an optimizer that keeps less "
            "(docs/memory.md)"
        )
    return text


def remembered_fit(saved: dict[str, Any] | None, now: dict[str, Any]) -> Fit | None:
    """The fit of an earlier start where that was made on the same machine with the same settings, else None."""
    if saved is None or any(saved.get(key) != value for key, value in now.items()):
        return None
    return Fit(saved["remat"], saved["max_tokens_per_device"])


def fit_to_remember(fit: Fit, now: dict[str, Any]) -> dict[str, Any]:
    """What run.json keeps of it."""
    return {"remat": fit.remat, "max_tokens_per_device": fit.max_tokens_per_device, **now}


def circumstances(setup: Setup) -> dict[str, Any]:
    """What a fit depends on beside what makes the run the same run."""
    config = dataclasses.asdict(setup.config)
    asked = {f"asked_{key}": config[key] for key in ("remat", "max_tokens_per_device", "micro_batch_size", "packing")}
    devices = {"device": setup.mesh.devices.flat[0].device_kind, "mesh": list(setup.mesh.devices.shape)}
    return asked | devices
