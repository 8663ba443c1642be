"""What the backward pass finds kept from the forward pass, and what it computes again (rematerialization)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jdpo.models.attention import ATTENTION_RESIDUALS
from jdpo.models.attention.cudnn import FORWARD_PRIMITIVE
from jdpo.types import HOST_MEMORY

Policy = Callable[..., Any]

LAYER_INPUT = "layer_input"
"""Name of the residual stream where it enters a layer."""

ROUTING, EXPERT_PRODUCT = "routing", "expert_product"
"""Names of the experts that tokens go to, and of what the experts' maps give."""

_policies = jax.checkpoint_policies


def _of_attention_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps what cuDNN's forward kernel gives, output and log-sum-exp: JAX puts no name on it."""
    return bool(primitive.name == FORWARD_PRIMITIVE)


# Who goes where is always kept, as it takes next to nothing: computed again, it could come out otherwise where two
# experts are all but equal, and the backward pass would be that of another function.
_ATTENTION = _policies.save_from_both_policies(
    _policies.save_only_these_names(ATTENTION_RESIDUALS, ROUTING), _of_attention_kernel
)

REMAT_POLICIES: dict[str, Policy] = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_from_both_policies(_policies.save_only_these_names(EXPERT_PRODUCT), _ATTENTION),
    ),
    "attention": _ATTENTION,
    "full": _policies.save_only_these_names(ROUTING),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[ROUTING],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst=HOST_MEMORY,
    ),
}
"""What is kept of a layer beside its input, as `jax.checkpoint` takes it; under "none", everything.

    dots        the outputs of all projections, and of attention with its log-sum-exp; norms, rotations and the
                activation function are computed again
    attention   attention's output and log-sum-exp
    full        nothing but which experts tokens go to, as under all
    offload     the same, and the input waits in the host's memory
"""

REMAT_ORDER = ("none", "dots", "attention", "full")
"""From the fastest to the one that takes the least memory of the device, but for "offload", which not all can do."""


def remat_order(platform: str) -> tuple[str, ...]:
    """The policies worth trying, the fastest first.

    On CPU memory is what is slow: to write activations down and read them back takes longer than to compute them again.
    """
    return ("attention", "full") if platform == "cpu" else REMAT_ORDER


def check_remat(remat: str) -> None:
    """Refuses names that stand for nothing.

    Raises:
      ValueError: an unknown name.
    """
    names = ("none", *REMAT_POLICIES)
    if remat not in names:
        raise ValueError(f"remat: expected one of {', '.join(names)}, found {remat!r}")


def named_layer_input(x: jax.Array) -> jax.Array:
    """Where a layer begins: the name by which "offload" finds its input."""
    return checkpoint_name(x, LAYER_INPUT)
