"""Reads the settings of experts."""

from __future__ import annotations

import math
from typing import Any

from jdpo.models.model_config import MoEConfig

_SHARED_WIDTH = "shared_expert_intermediate_size"
_OTHER_EXPERTS = {
    _SHARED_WIDTH: None,
    "n_shared_experts": None,
    "num_shared_experts": None,
    "scoring_func": "softmax",
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1.0,
}
"""Settings of related families for shared experts or another choice of experts, with the value that means none."""


def experts_of(hf_config: Any, num_experts: int, *, d_ff: int, normalize: bool, has_shared: bool = False) -> MoEConfig:
    """Reads the settings of experts.

    Args:
      has_shared: True if every token goes through a shared expert, too, whose width config.json gives.

    Raises:
      ValueError: a token has more experts than there are, or the experts are of another kind.
    """
    for key, expected in _OTHER_EXPERTS.items():
        value = None if has_shared and key == _SHARED_WIDTH else getattr(hf_config, key, None)
        # 0, null and false all mean that the mechanism is off.
        if value and value != expected:
            raise ValueError(
                f"{key}: {value!r} is not supported, and transformers' {hf_config.model_type} does not know it; "
                f"expected {expected!r}"
            )
    chosen = hf_config.num_experts_per_tok
    if not 1 <= chosen <= num_experts:
        raise ValueError(f"num_experts_per_tok: expected 1 to {num_experts}, the number of experts, found {chosen}")
    coef = hf_config.router_aux_loss_coef
    if not 0 <= coef < math.inf:
        raise ValueError(f"router_aux_loss_coef: expected 0 or more, found {coef}")
    shared_d_ff = getattr(hf_config, _SHARED_WIDTH) if has_shared else None
    if shared_d_ff is not None and shared_d_ff < 1:
        raise ValueError(f"{_SHARED_WIDTH}: expected 1 or more, found {shared_d_ff}")
    return MoEConfig(
        num_experts=num_experts,
        experts_per_token=chosen,
        d_ff=d_ff,
        normalize=normalize,
        shared_d_ff=shared_d_ff,
        aux_loss_coef=float(coef),
    )
