"""The training step of a run, from its config and the model's config.json alone: no tokenizer, weights or rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jdpo.config import ReferenceSettings, TrainConfig
from jdpo.data.batching.packing_plan import ItemSizes, item_sizes
from jdpo.models.families import read_model_config
from jdpo.models.model_config import ModelConfig
from jdpo.sharding.mesh import check_batch_size, make_mesh
from jdpo.training.fit.assembly import Assembly, assemble
from jdpo.training.setup.adaptation import adaptation_of
from jdpo.training.setup.batches import Batches, make_batches
from jdpo.training.setup.model_setup import make_model
from jdpo.training.setup.run_setup import Setup
from jdpo.training.setup.tasks import Task, task_for
from jdpo.training.setup.validation import Mode, check_expert_settings
from jdpo.training.step.objectives import Batch
from jdpo.types import TokenizedCompletion, TokenizedPair

NUM_STEPS = 1000
"""Steps of the planned run; they enter the learning rate's schedule as a number, and no shape."""


class PlannedStep(NamedTuple):
    """A training step that can be lowered.

    Attributes:
      assembly: model, objective and shapes of the state.
      batch: arrays [k, m, ...] of the step's shapes, with the lengths of all sequences filled in.
      tokens_per_device: slots of a device's part of a micro-batch.
      remat: what the backward pass recomputes.
    """

    assembly: Assembly
    batch: Batch
    tokens_per_device: int
    remat: str

    @property
    def source_config(self) -> ModelConfig:
        """The sizes of the model."""
        return self.assembly.setup.source_config


class _Vocabulary(NamedTuple):
    """The part of a tokenizer that the layout of a model needs: the number of its tokens."""

    size: int
    added_tokens: tuple[str, ...] = ()


def plan_step(
    config: TrainConfig,
    devices: Sequence[Any],
    lengths: Sequence[Sequence[int]],
    *,
    num_layers: int | None = None,
    platform: str,
    memory: float = math.inf,
) -> PlannedStep:
    """Lays out the step of a run whose rows have these lengths, over and over.

    Where the config leaves `remat` or the tokens at once open, they are those that a run compiles first, of the model
    with all of its layers. A run keeps them if the compiled step fits.

    Args:
      config: with compute_dtype resolved; `model_name_or_path` is a folder with config.json.
      devices: of the mesh; those of `compile_only_devices`, or real ones.
      lengths: of each row, the tokens of prompt, chosen and rejected, or of a supervised row; at least one row.
      num_layers: in place of the model's; a layer's share of the program does not depend on their number.
      platform: of the devices: "cpu", "gpu" or "tpu".
      memory: bytes of a device.

    Raises:
      ValueError: settings that do not fit the devices, or lengths that do not fit the command.
    """
    task = task_for(config)
    live = isinstance(config, ReferenceSettings) and config.reference == "live" and task.uses_reference
    mode: Mode = "live" if live else "none"
    indices = np.arange(config.global_batch_size)
    rows = planned_rows(config, task, lengths, config.global_batch_size)
    mesh = make_mesh(config.mesh, devices)

    def plan(setup: Setup, max_tokens: int) -> Batches:
        return planned_batches(setup, rows, [indices], max_tokens, live=live)

    remat: str = config.remat
    max_tokens = config.max_tokens_per_device
    if remat == "auto" or max_tokens is None:
        try:
            from jdpo.planning.planned_fit import planned_fit
        except ImportError as error:  # an older checkout, which `benchmarks/aot.py --code` measures
            raise ValueError(
                f"this version of jdpo has no estimates of what a run chooses ({error}): give remat, such as "
                "remat=full, and max_tokens_per_device"
            ) from error

        whole = setup_without_rows(config, task, mesh)
        fit = planned_fit(
            assemble(whole, reference=mode, remat="full" if remat == "auto" else remat),
            functools.partial(plan, whole),
            platform=platform,
            memory=memory,
        )
        remat, max_tokens = fit.remat, fit.max_tokens_per_device
    setup = setup_without_rows(config, task, mesh, num_layers)
    batches = plan(setup, max_tokens)
    batch = batches.make(indices).batch
    return PlannedStep(assemble(setup, reference=mode, remat=remat), batch, batches.tokens_per_device, remat)


def planned_rows(config: TrainConfig, task: Task, lengths: Sequence[Sequence[int]], number: int) -> Any:
    """Returns so many rows of these lengths, over and over, in place of a run's tokenized rows.

    Raises:
      ValueError: a row does not fit the command or max_length, or the config does not pack rows.
    """
    if not config.packing:
        raise ValueError("packing false: only packed steps are planned; leave packing out")
    if not len(lengths):
        raise ValueError("expected the lengths of at least one row, found none")
    # Of a million rows few differ in their lengths.
    kinds = {tuple(of_row): _row(task, of_row, config.max_length) for of_row in {tuple(of_row) for of_row in lengths}}
    return _RepeatedRows([kinds[tuple(of_row)] for of_row in lengths], number)


def planned_batches(setup: Setup, rows: Any, steps: Sequence[np.ndarray], max_tokens: int, *, live: bool) -> Batches:
    """Returns the batches of `planned_rows`.

    Args:
      steps: the rows of every step.
      max_tokens: slots of a device's part of a micro-batch, at most.
      live: True if the reference runs in the step; else its log-probs travel with the batch, if there is one.
    """
    cache: Any = _ZeroLogps() if setup.task.uses_reference and not live else None
    return make_batches(setup, rows, steps, max_tokens_per_device=max_tokens, cache=cache)


def setup_without_rows(config: TrainConfig, task: Task, mesh: Mesh, num_layers: int | None = None) -> Setup:
    """Returns the setup of a run without rows, tokenizer and folders, which no program depends on."""
    source_config = read_model_config(Path(config.model_name_or_path))
    if num_layers is not None:
        source_config = dataclasses.replace(
            source_config, num_layers=num_layers, layers=_first_layers(source_config, num_layers)
        )
    check_batch_size(config.global_batch_size, mesh)
    check_expert_settings(config.router_aux_loss_coef, source_config, mesh)
    nothing: Any = None
    vocabulary: Any = _Vocabulary(source_config.vocab_size)
    model = make_model(config, source_config, vocabulary)
    return Setup(
        config=config,
        mesh=mesh,
        sources=nothing,
        tokenizer=nothing,
        source_config=source_config,
        model=model,
        adaptation=adaptation_of(config.lora, model, None),
        dequantized=False,
        task=task,
        reference_folder=None,
        reference_adapter=None,
        train_data=nothing,
        eval_data=None,
        started=None,
        reference_started=None,
        row_plan=nothing,
        num_steps=config.max_steps or NUM_STEPS,
        steps_per_epoch=NUM_STEPS,
        sample_prompts=(),
    )


def _first_layers(config: ModelConfig, num_layers: int) -> tuple[Any, ...]:
    """Returns the kinds of the first layers; where the model has fewer, they are repeated from the start."""
    return tuple(config.layers[index % config.num_layers] for index in range(num_layers))


def _row(task: Task, lengths: Sequence[int], max_length: int) -> Any:
    """Returns a tokenized row of these lengths."""
    expected = ("prompt, chosen and rejected, such as 512,300,300", 3) if task.loss is not None else ("a row", 1)
    if len(lengths) != expected[1] or min(lengths) < 1:
        raise ValueError(
            f"lengths {','.join(map(str, lengths))}: expected the tokens of {expected[0]}, as this is a config of "
            f"`jdpo {task.command}`"
        )
    longest = sum(lengths) if task.loss is None else lengths[0] + max(lengths[1:])
    if longest > max_length:
        raise ValueError(
            f"lengths {','.join(map(str, lengths))}: a sequence of {longest} tokens is longer than max_length "
            f"{max_length}: give a larger max_length, or shorter rows"
        )
    parts = [np.zeros(length, np.int32) for length in lengths]
    if task.loss is None:
        return TokenizedCompletion(parts[0], np.ones(lengths[0], bool), origin="planned")
    prompt, chosen, rejected = parts
    return TokenizedPair(prompt, chosen, rejected, origin="planned")


class _RepeatedRows:
    """As many rows as asked for, from a few that are repeated; in place of a run's tokenized rows."""

    def __init__(self, rows: Sequence[Any], number: int) -> None:
        self._rows, self._number = rows, number

    def __getitem__(self, index: int) -> Any:
        return self._rows[index % len(self._rows)]

    def sizes(self) -> ItemSizes:
        """Returns the sizes of all rows."""
        return item_sizes(self._rows).of(np.arange(self._number) % len(self._rows))

    @property
    def margins(self) -> np.ndarray:
        """A score margin for each row, for losses that read them."""
        return np.ones(self._number, np.float32)


class _ZeroLogps:
    """Log-probs of a reference, all 0; in place of a run's cache of them."""

    dtype = np.dtype(np.float32)

    def row(self, index: int, row: Any) -> tuple[np.ndarray, ...]:
        """Returns the log-probs of the tokens of each completion of a row."""
        return tuple(np.zeros(len(ids), np.float32) for ids in (row.chosen_ids, row.rejected_ids))
