"""Preference losses as pure functions; jax, numpy and einops are all they need."""

from jdpo.losses.logprobs import sequence_logps, token_logps
from jdpo.losses.objective import dpo_loss, make_dpo_loss, preference_metrics
from jdpo.losses.preference import LOSSES, LossSpec, PreferenceLoss, preference_loss

__all__ = [
    "LOSSES",
    "LossSpec",
    "PreferenceLoss",
    "dpo_loss",
    "make_dpo_loss",
    "preference_loss",
    "preference_metrics",
    "sequence_logps",
    "token_logps",
]
