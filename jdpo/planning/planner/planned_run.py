"""A run on a machine, from its config, the model's config.json and the lengths of its rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jdpo.config import MeshConfig, ReferenceSettings, TrainConfig
from jdpo.models.families import read_model_config
from jdpo.models.model_config import ModelConfig
from jdpo.planning.planned_step import PlannedStep, planned_batches, planned_rows, setup_without_rows
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.mesh import make_mesh
from jdpo.training.fit.assembly import Assembly, assemble
from jdpo.training.fit.estimates import batch_bytes
from jdpo.training.setup.batches import Batches
from jdpo.training.setup.tasks import Task, task_for
from jdpo.training.setup.validation import Mode, fixed_mode

MOST_STEPS = 64
"""Steps that are laid out; more tell little more about shapes and padding."""


class StepSizes(NamedTuple):
    """Sums over the steps that are laid out.

    Attributes:
      tokens: of the rows, a pair's prompt counted once.
      slots: that are computed.
    """

    tokens: int
    slots: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PlannedRun:
    """A run on a machine whose steps can be laid out with any number of tokens at once.

    Attributes:
      config: with compute_dtype resolved, and the mesh of the plan.
      assembly: under the remat policy that needs the least memory.
      mode: where the reference's log-probs come from.
      rows: in place of tokenized rows.
      steps: the rows of each step that is laid out.
    """

    config: TrainConfig
    assembly: Assembly
    mode: Mode
    rows: Any
    steps: tuple[np.ndarray, ...]

    @functools.cached_property
    def batches(self) -> Callable[[int], Batches]:
        """Returns the batches with so many slots of a device's part of a micro-batch at most."""
        setup, live = self.assembly.setup, self.mode == "live"
        # Bins of many rows take seconds, and several callers ask for the same ones.
        return functools.cache(lambda tokens: planned_batches(setup, self.rows, self.steps, tokens, live=live))

    def step(self, remat: str, max_tokens: int) -> PlannedStep:
        """Returns the step that needs the most memory under a policy."""
        batches = self.batches(max_tokens)
        most = max(self.steps, key=lambda indices: batch_bytes(self.assembly, remat, batches.like(indices)))
        return PlannedStep(self.assembly.with_remat(remat), batches.make(most).batch, batches.tokens_per_device, remat)

    def sizes(self, max_tokens: int) -> StepSizes:
        """Returns how many slots the steps compute, and for how many tokens."""
        made = [self.batches(max_tokens).make(indices).rows for indices in self.steps]
        return StepSizes(sum(rows.real_slots for rows in made), sum(rows.num_slots for rows in made))


def planned_run(config: TrainConfig, devices: Sequence[Any], lengths: Sequence[Sequence[int]]) -> PlannedRun:
    """Lays out a run on devices.

    Args:
      config: with compute_dtype resolved; `model_name_or_path` is a folder with config.json.
      devices: of the mesh.
      lengths: of each row, the tokens of prompt, chosen and rejected, or of a supervised row.

    Raises:
      ValueError: settings that do not fit each other or the devices, or lengths that do not fit the command.
    """
    task = task_for(config)
    reference = config if isinstance(config, ReferenceSettings) else None
    mode, _ = planned_mode(reference, task, repeats_rows=config.num_train_epochs > 1)
    mesh_config = choose_mesh(config, devices, read_model_config(Path(config.model_name_or_path)))
    config = dataclasses.replace(config, mesh=mesh_config)
    setup = setup_without_rows(config, task, make_mesh(mesh_config, devices))
    other = None if reference is None else reference.reference_model
    if other is not None and other != config.model_name_or_path:
        setup = dataclasses.replace(setup, reference_folder=Path(other))  # weights of its own, of the same shape
    size = config.global_batch_size
    drawn = _drawn(lengths, size, config.seed)
    steps = tuple(np.arange(max(len(drawn), size)).reshape(-1, size))
    rows = planned_rows(config, task, drawn, max(len(drawn), size))
    remat = "full" if config.remat == "auto" else config.remat
    # A cached reference and none at all are the same to a program: nothing of it runs in the step.
    assembly = assemble(setup, reference=mode if mode == "live" else "none", remat=remat)
    return PlannedRun(config=config, assembly=assembly, mode=mode, rows=rows, steps=steps)


def planned_mode(settings: ReferenceSettings | None, task: Task, *, repeats_rows: bool) -> tuple[Mode, bool]:
    """Returns where a first run takes the reference's log-probs from, and whether that is a choice of `auto`.

    Args:
      settings: None for a supervised run.
      repeats_rows: True if the run passes over its rows more than once, which pays for a cache.
    """
    if settings is None:
        return "none", False
    asked = settings.reference
    mode = fixed_mode(asked, needs_reference=task.uses_reference, sync_ref_model=settings.sync_ref_model)
    if mode is not None or asked == "cached":
        return mode or "cached", False
    return ("cached" if repeats_rows else "live"), True


def choose_mesh(config: TrainConfig, devices: Sequence[Any], model: ModelConfig) -> MeshConfig:
    """Returns the mesh of a plan: the config's, which by default is `fsdp` over the slice and `data` across slices.

    That is what a run would have, and decision 0018 says why weights are divided over one axis. Only where it cannot
    split the global batch, and the config leaves both `fsdp` and `tensor` open, is a `tensor` axis chosen: the smallest
    with which it can. An `expert` axis is as configured.
    """
    asked = config.mesh

    def splits(mesh: Mesh) -> bool:
        return config.global_batch_size % num_batch_shards(mesh) == 0

    if splits(make_mesh(asked, devices)) or asked.fsdp != -1 or asked.tensor != 1:
        return asked
    for tensor in (2, 4, 8, 16):
        wider = dataclasses.replace(asked, tensor=tensor)
        if model.num_kv_heads % tensor or len(devices) % tensor:
            break
        if splits(make_mesh(wider, devices)):
            return wider
    return asked  # the run is refused, and told which batch sizes can be split


def _drawn(lengths: Sequence[Sequence[int]], size: int, seed: int) -> Sequence[Sequence[int]]:
    """Returns the lengths of the rows of the steps that are laid out, drawn evenly; those of the longest among them."""
    number = len(lengths)
    if number <= size:
        return lengths
    order = np.random.default_rng(seed).permutation(number)[: MOST_STEPS * size]
    drawn = [lengths[index] for index in order[: len(order) // size * size]]
    longest = max(lengths, key=sum)
    if longest not in drawn:  # its step may be the one that needs the most memory
        drawn[0] = longest
    return drawn
