"""What `jdpo sft` and `jdpo dpo` do differently: rows, batches and objective. The loop is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from jax.sharding import Mesh

from jdpo.config import ModelSettings, PreferenceSettings
from jdpo.data.batching.loader import collate_completions, collate_pairs
from jdpo.losses.pair_logps import ApplyFn
from jdpo.losses.pair_losses import metric_names
from jdpo.losses.settings import LossSettings, loss_settings
from jdpo.models.transformer import Transformer, make_apply_fn, make_routed_apply_fn
from jdpo.training.step.objectives import (
    Batch,
    Objective,
    packed_dpo_objective,
    packed_sft_objective,
    padded_dpo_objective,
    padded_sft_objective,
    with_router_loss,
)
from jdpo.training.step.packed_logps import make_packed_logps
from jdpo.types import AnyPair, TokenizedCompletion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A training command.

    Attributes:
      command: "sft" or "dpo".
      unit: what a row is called in metrics and messages.
      sequences: sequences the model sees for each row.
      metrics: names that an evaluation gives, without their eval_.
      loss: the preference losses and their options, or None.
      collate: (rows, *, num_slots, length, pad_token_id) -> a batch of numpy arrays.
      count_tokens: real tokens of a row, over all its sequences.
      objective: (model, mesh, *, packing) -> what is minimised; with the router's loss of a model with experts.
    """

    command: str
    unit: str
    sequences: int
    metrics: tuple[str, ...]
    loss: LossSettings | None
    collate: Callable[..., Batch]
    count_tokens: Callable[[Any], int]
    objective: Callable[..., Objective]

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss is not None and self.loss.needs_reference


def loss_of(settings: PreferenceSettings) -> LossSettings:
    """Returns the losses of a run.

    Raises:
      ValueError: losses and options that do not go together.
    """
    return loss_settings(settings.loss_type, loss_weights=settings.loss_weights, **settings.by_name())[0]


def task_for(settings: ModelSettings) -> Task:
    """Returns the task of a run's settings: pairs if they include a preference loss, else completions.

    Raises:
      ValueError: loss options that do not go together.
    """
    if isinstance(settings, PreferenceSettings):
        loss = loss_of(settings)
        return Task(
            command="dpo",
            unit="pairs",
            sequences=2,
            metrics=metric_names(loss),
            loss=loss,
            collate=collate_pairs,
            count_tokens=count_pair_tokens,
            objective=partial(_dpo_objective, settings=loss, router_aux_loss_coef=settings.router_aux_loss_coef),
        )
    return Task(
        command="sft",
        unit="rows",
        sequences=1,
        metrics=("loss",),
        loss=None,
        collate=collate_completions,
        count_tokens=count_completion_tokens,
        objective=partial(_sft_objective, router_aux_loss_coef=settings.router_aux_loss_coef),
    )


def _dpo_objective(
    model: Transformer, mesh: Mesh, *, packing: bool, settings: LossSettings, router_aux_loss_coef: float | None
) -> Objective:
    if packing:
        objective = packed_dpo_objective(make_packed_logps(model, mesh), settings)
    else:
        objective = padded_dpo_objective(_apply_fn(model), settings)
    return _with_router(objective, model, router_aux_loss_coef)


def _sft_objective(model: Transformer, mesh: Mesh, *, packing: bool, router_aux_loss_coef: float | None) -> Objective:
    if packing:
        objective = packed_sft_objective(make_packed_logps(model, mesh))
    else:
        objective = padded_sft_objective(_apply_fn(model))
    return _with_router(objective, model, router_aux_loss_coef)


def _apply_fn(model: Transformer) -> ApplyFn:
    return make_apply_fn(model) if model.config.moe is None else make_routed_apply_fn(model)


def _with_router(objective: Objective, model: Transformer, coef: float | None) -> Objective:
    """Adds the router's loss where there is a router; its coefficient is the model's own where none is given."""
    if model.config.moe is None:
        return objective
    return with_router_loss(objective, model.config.moe.aux_loss_coef if coef is None else coef)


def count_pair_tokens(pair: AnyPair) -> int:
    """Real tokens of the two sequences of a pair: 2P + C + R."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def count_completion_tokens(row: TokenizedCompletion) -> int:
    """Real tokens of a supervised row."""
    return len(row.tokens)
