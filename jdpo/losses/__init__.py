"""Preference losses as pure functions, which need only jax, numpy and einops."""

from jdpo.loss_specs import LOSSES, LossSpec
from jdpo.losses.coupled import LossState, init_loss_state
from jdpo.losses.dpo import dpo_loss, make_dpo_loss
from jdpo.losses.linear import linear_token_logps
from jdpo.losses.logprobs import packed_token_logps, sequence_logps, token_logps
from jdpo.losses.preference import PreferenceLoss, preference_loss

__all__ = [
    "LOSSES",
    "LossSpec",
    "LossState",
    "PreferenceLoss",
    "dpo_loss",
    "init_loss_state",
    "linear_token_logps",
    "make_dpo_loss",
    "packed_token_logps",
    "preference_loss",
    "sequence_logps",
    "token_logps",
]
