"""An expert that every token goes through, next to those that the router selects.

Axes: n sequences, t positions, d model, f width of the expert, r=1 the score.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from jdpo.models.layers import ACTIVATIONS, Projection
from jdpo.models.model_config import Activation


class SharedExpert(nn.Module):
    """The MLP down(act(gate(x)) * up(x)), times sigmoid(score(x)), one number per token (Qwen2-MoE, arXiv 2407.10671).

    It has no part in the routing, nor in the router's statistics.
    """

    d_model: int
    d_ff: int
    activation: Activation
    compute_dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_ntd: jax.Array) -> jax.Array:
        dtypes = (self.compute_dtype, self.param_dtype)

        def widen(name: str) -> jax.Array:
            return Projection("ntd,df->ntf", (self.d_model, self.d_ff), ("embed", "mlp"), *dtypes, name=name)(x_ntd)

        hidden_ntf = ACTIVATIONS[self.activation](widen("gate")) * widen("up")
        # As in `MLP`: split along the width, so that devices communicate only after "down".
        hidden_ntf = nn.with_logical_constraint(hidden_ntf, ("batch", "act_length", "act_mlp"))
        y_ntd = Projection("ntf,fd->ntd", (self.d_ff, self.d_model), ("mlp", "embed"), *dtypes, name="down")(hidden_ntf)
        # A single output cannot be divided.
        score_ntr = Projection("ntd,dr->ntr", (self.d_model, 1), ("embed", None), *dtypes, name="score")(x_ntd)
        return nn.sigmoid(score_ntr) * y_ntd
