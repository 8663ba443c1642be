"""Rows, batches and objective of `jdpo sft` and `jdpo dpo`, whose loop is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jdpo.config import ModelSettings, PreferenceSettings
from jdpo.data.batching.loader import collate_completions, collate_pairs
from jdpo.losses.pair_losses import metric_names
from jdpo.losses.settings import LossSettings, loss_settings
from jdpo.models.lora.adapters import Lora
from jdpo.models.transformer import Transformer, make_apply_fn, make_routed_apply_fn
from jdpo.training.step.objectives import Batch, CompletionObjective, Objective, PackedLogps, PreferenceObjective
from jdpo.types import AnyPair, TokenizedCompletion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A training command.

    Attributes:
      command: "sft" or "dpo".
      unit: what a row is called in metrics and messages.
      sequences: sequences that the model sees per row.
      metrics: names of the metrics of an evaluation, without their eval_.
      loss: the preference losses and their options; None for supervised fine-tuning.
      collate: (rows, *, num_slots, length, pad_token_id) -> a padded batch of numpy arrays.
      count_tokens: counts the real tokens of a row, over all its sequences.
    """

    command: str
    unit: str
    sequences: int
    metrics: tuple[str, ...]
    loss: LossSettings | None
    collate: Callable[..., Batch]
    count_tokens: Callable[[Any], int]

    @property
    def uses_reference(self) -> bool:
        """True if the loss compares with a reference."""
        return self.loss is not None and self.loss.needs_reference

    @property
    def reads_scores(self) -> bool:
        """True if the loss reads the scores of a pair's two answers."""
        return self.loss is not None and self.loss.needs_scores

    def objective(
        self,
        model: Transformer,
        mesh: Mesh,
        *,
        packing: bool,
        router_aux_loss_coef: float | None = None,
        lora: Lora | None = None,
    ) -> Objective:
        """Returns what a step minimises.

        Args:
          packing: True for packed batches, False for padded ones.
          router_aux_loss_coef: for models with experts; None: the model's own coefficient.
          lora: the adapters, where they alone are trained.
        """
        # Packed rows never hold all logits; padded rows do, as the plain definition of the loss does.
        run: Callable[..., Any] = PackedLogps(model, mesh)
        if not packing:
            run = make_apply_fn(model) if model.config.moe is None else make_routed_apply_fn(model)
        # Models without experts have no router whose load could be balanced.
        coef = None
        if model.config.moe is not None:
            coef = model.config.moe.aux_loss_coef if router_aux_loss_coef is None else router_aux_loss_coef
        if self.loss is None:
            return CompletionObjective(run, coef, lora)
        return PreferenceObjective(run, self.loss, coef, lora)


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
        )
    return Task(
        command="sft",
        unit="rows",
        sequences=1,
        metrics=("loss",),
        loss=None,
        collate=collate_completions,
        count_tokens=count_completion_tokens,
    )


def count_pair_tokens(pair: AnyPair) -> int:
    """Counts the real tokens of the two sequences of a pair: 2P + C + R."""
    return 2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def count_completion_tokens(row: TokenizedCompletion) -> int:
    """Counts the real tokens of a supervised row."""
    return len(row.tokens)
