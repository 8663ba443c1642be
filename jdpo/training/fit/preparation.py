"""Prepares the steps of a run: fits them to the devices' memory, plans their batches, and compiles their programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from jdpo.data.reference_cache.scores import ReferenceCache
from jdpo.devices import target
from jdpo.models.remat import remat_order
from jdpo.training.fit.assembly import Assembly
from jdpo.training.fit.compilation import Programs, shapes_of
from jdpo.training.fit.estimates import StepEstimate, batch_bytes, estimate_step, tokens_at_once
from jdpo.training.fit.fit_search import MAX_TOKENS_PER_DEVICE, choose_fit
from jdpo.training.fit.host_memory import host_memory
from jdpo.training.fit.memory_fit import TOKEN_STEP, Fit
from jdpo.training.fit.padding_note import padding_note
from jdpo.training.run_record import FitRecord
from jdpo.training.setup.batches import Batches, PackedBatches, make_batches
from jdpo.training.setup.run_setup import Log, Setup
from jdpo.training.setup.validation import Mode
from jdpo.training.step.objectives import Batch
from jdpo.words import memory


class Preparation(NamedTuple):
    """The fitted steps of a run.

    Attributes:
      fit: how much a device computes at once, and what its backward pass recomputes.
      assembly: model, objective and state under that policy.
      batches: batches of the training rows.
      programs: the training step, for each shape of the batches.
    """

    fit: Fit
    assembly: Assembly
    batches: Batches
    programs: Programs


def remat_policies(setup: Setup) -> tuple[str, ...]:
    """Returns the remat policies that a run may use; the one that needs the least memory is the last."""
    remat = setup.config.remat
    return tuple(remat_order(target().platform)) if remat == "auto" else (remat,)


def prepare_steps(
    setup: Setup,
    assemblies: Mapping[str, Assembly],
    cache: ReferenceCache | None,
    pool: ThreadPoolExecutor,
    log: Log,
    *,
    limit: int,
    recalled: Fit | None = None,
) -> Preparation:
    """Chooses how much a device computes at once and what is recomputed, where the config leaves that open.

    Args:
      assemblies: the programs of the run, by remat policy; the one that needs the least memory last.
      cache: the reference's log-probs of the training rows, where they are cached.
      pool: threads that compile.
      log: takes lines for the user.
      limit: bytes of a device's memory that a step may take, see `memory_limit`.
      recalled: the fit of an earlier start of the same run; a resumed run then is the uninterrupted one, bitwise.
    """

    def plan(max_tokens: int) -> Batches:
        steps = map(setup.row_plan.step, range(setup.num_steps))
        return make_batches(setup, setup.train_data, steps, max_tokens_per_device=max_tokens, cache=cache)

    if recalled is not None:
        fit, batches, compiled = recalled, plan(recalled.max_tokens_per_device), dict[Batch, Any]()
    else:
        fit, batches, compiled = fit_steps(setup, assemblies, plan, log, limit=limit)
    # An earlier version may have chosen a policy that is not tried any more.
    assembly = assemblies.get(fit.remat) or next(iter(assemblies.values())).with_remat(fit.remat)
    log_batches(setup, assembly, batches, fit, log)
    # Programs of budgets that were only tried would take memory for nothing.
    known = set(map(shapes_of, batches.shapes()))
    compiled = {batch: program for batch, program in compiled.items() if batch in known}
    return Preparation(fit, assembly, batches, Programs(assembly.lower_step, pool, compiled))


def fit_steps(
    setup: Setup, assemblies: Mapping[str, Assembly], plan: Callable[[int], Batches], log: Log, *, limit: int
) -> tuple[Fit, Batches, dict[Batch, Any]]:
    """Fits the steps to the memory of the devices, by trial compilations where the config leaves a choice.

    Args:
      plan: tokens per device at most -> the batches of the run.

    Returns:
      the fit, its batches, and the programs of its policy that were compiled.
    """
    config, platform = setup.config, target().platform
    most = config.max_tokens_per_device or MAX_TOKENS_PER_DEVICE.get(platform, MAX_TOKENS_PER_DEVICE["gpu"])
    fixed_tokens = bool(config.max_tokens_per_device or config.micro_batch_size)
    widest = plan(most)
    # A step that is smaller than the budget needs no more than it has, and its batches stay as they are.
    needed = -(-widest.tokens_per_device // TOKEN_STEP) * TOKEN_STEP
    if not fixed_tokens:
        most = needed = min(most, needed)
    # The config decides everything, so that nothing needs to be compiled to find out.
    if fixed_tokens and len(assemblies) == 1:
        return Fit(next(iter(assemblies)), most), widest, {}
    batches_of = functools.cache(lambda tokens: widest if fixed_tokens or tokens == most else plan(tokens))
    lowered = functools.cache(lambda remat, batch: assemblies[remat].lower_step(batch))  # two budgets may share a shape
    assembly = next(iter(assemblies.values()))

    def largest(remat: str, tokens: int) -> Batch:
        shapes = map(shapes_of, batches_of(tokens).demanding())
        return max(shapes, key=lambda batch: batch_bytes(assembly, remat, batch))

    def lower(remat: str, tokens: int) -> tuple[Batch, Any]:
        batch = largest(remat, tokens)
        return batch, lowered(remat, batch)

    policies = tuple(assemblies)
    estimate = estimate_step(assembly, policies, largest(policies[-1], most))
    fit, compiled = choose_fit(
        lower,
        estimate,
        tokens_at_once=functools.partial(tokens_at_once, assembly),
        policies=policies,
        most_tokens=needed,
        limit=limit,
        fixed_tokens=fixed_tokens,
    )
    # With micro_batch_size the tokens follow from the rows.
    fit = fit._replace(max_tokens_per_device=most) if fixed_tokens else fit
    log(_describe_fit(fit, limit, estimate, by_tokens=config.micro_batch_size is None))
    return fit, batches_of(fit.max_tokens_per_device), compiled


def log_batches(setup: Setup, assembly: Assembly, batches: Batches, fit: Fit, log: Log) -> None:
    """Logs which attention backends run, a row that is longer than the budget, and a batch that is mostly padding."""
    if setup.config.packing:
        lengths = sorted({int(batch.gather.shape[-1]) for batch in batches.shapes()})
        backends = {assembly.attention(length): length for length in lengths}
        log(f"attention: {', '.join(f'{name} up to {length} tokens' for name, length in backends.items())}")
    if setup.config.micro_batch_size is None and batches.tokens_per_device > fit.max_tokens_per_device:
        log(
            f"note: the longest of the {setup.task.unit} alone takes {batches.tokens_per_device:,} tokens per device "
            f"at once, more than max_tokens_per_device {fit.max_tokens_per_device:,}"
        )
    if isinstance(batches, PackedBatches):
        note = padding_note(batches.plan, setup.row_plan.step, setup.num_steps, unit=setup.task.unit)
        if note is not None:
            log(note)


def _describe_fit(fit: Fit, limit: int, estimate: StepEstimate, *, by_tokens: bool) -> str:
    at_once = f"at most {fit.max_tokens_per_device:,} tokens per device at once, " if by_tokens else ""
    needed = "more memory than a device has" if fit.bytes_needed is None else memory(fit.bytes_needed)
    text = f"step: {at_once}remat {fit.remat}, needs {needed} of {memory(limit)} per device"
    own = estimate.seconds(fit.remat, fit.max_tokens_per_device)
    # At as many tokens: it is the policies that are compared, and none of the others was compiled.
    times = {remat: estimate.seconds(remat, fit.max_tokens_per_device) / own for remat in estimate.bytes_per_token}
    if others := ", ".join(f"{remat} {times[remat]:.2f}" for remat in times if remat != fit.remat):
        text += f" (estimated time per token, relative to {fit.remat}: {others})"
    if fit.bytes_needed is None or fit.bytes_needed > limit:
        text += (
            "; this may not fit: use more devices, a shorter max_length, or an optimizer that keeps less "
            "(docs/memory.md)"
        )
    bound = host_memory().bound if target().platform == "cpu" else ""
    return f"{text} (the host's memory is limited by {bound})" if bound else text


# --- the fit of an earlier start of the run

FITTED_KEYS = (
    "attention",
    "attention_block_kv",
    "attention_block_q",
    "compiler_options",
    "max_tokens_per_device",
    "micro_batch_size",
    "offload_optimizer",
    "packing",
    "remat",
)
"""Keys that may change when a run continues, and that change the memory of a step."""


def recalled_fit(saved: FitRecord | None, conditions: Mapping[str, Any], limit: int) -> Fit | None:
    """Returns the fit of an earlier start, if that ran on such a machine with the same settings, else None.

    Args:
      saved: the fit in run.json.
      conditions: the `fit_conditions` of this start.
      limit: bytes that a device has now; if fewer than then, the fit must still be within them.
    """
    if saved is None or any(saved.conditions.get(key) != value for key, value in conditions.items()):
        return None
    needed = saved.bytes_needed
    # On a smaller device the old fit is kept only if it still fits.
    # The fit may have needed more than the limit of then, if nothing smaller was left to try.
    if needed is not None and limit < min(needed, saved.limit):
        return None
    return Fit(saved.remat, saved.max_tokens_per_device, needed)


def fit_record(fit: Fit, conditions: Mapping[str, Any], limit: int) -> FitRecord:
    """Returns a fit as run.json holds it."""
    return FitRecord(**fit._asdict(), limit=limit, conditions=conditions)


def fit_conditions(assembly: Assembly, reference: Mode) -> dict[str, Any]:
    """Returns what a fit depends on, in addition to what makes the run the same run."""
    setup = assembly.setup
    config = dataclasses.asdict(setup.config)
    return {f"asked_{key}": config[key] for key in FITTED_KEYS} | {
        "reference": reference,
        "device": setup.mesh.devices.flat[0].device_kind,
        "mesh": list(setup.mesh.devices.shape),
        # None for no options, which is what files of older versions say.
        "compiler_options": dict(assembly.options) or None,
        "jax": jax.__version__,
    }
