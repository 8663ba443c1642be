"""Rematerialization: which values the forward pass keeps, and which the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jdpo.models.attention import ATTENTION_RESIDUALS
from jdpo.models.attention.cudnn import FORWARD_PRIMITIVE
from jdpo.models.layers import PROJECTION
from jdpo.types import HOST_MEMORY

Policy = Callable[..., Any]

LAYER_INPUT = "layer_input"
"""Name of the residual stream at the input of a layer."""

ROUTING = "routing"
"""Name of the selected experts of tokens."""

_policies = jax.checkpoint_policies


def _of_attention_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps output and log-sum-exp of cuDNN's forward kernel, to which JAX gives no name."""
    return bool(primitive.name == FORWARD_PRIMITIVE)


# The routing is always kept, since it is small. Computed again, it could differ if two experts are almost equally
# probable, and the backward pass would be that of another function.
_ATTENTION = _policies.save_from_both_policies(
    _policies.save_only_these_names(ATTENTION_RESIDUALS, ROUTING), _of_attention_kernel
)

REMAT_POLICIES: dict[str, Policy] = {
    # By name, since a policy that keeps the result of every product would keep both x W and (x A) B of an adapted
    # projection, of which the backward pass needs the sum alone.
    "dots": _policies.save_from_both_policies(_policies.save_only_these_names(PROJECTION), _ATTENTION),
    "attention": _ATTENTION,
    "full": _policies.save_only_these_names(ROUTING),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[ROUTING],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst=HOST_MEMORY,
    ),
}
"""Policies of `jax.checkpoint` by name: what a layer keeps in addition to its input. "none" keeps everything.

    dots        the outputs of all projections, and of attention with its log-sum-exp; norms, rotations and the
                activation function are computed again
    attention   attention's output and log-sum-exp
    full        nothing except the routing of tokens to experts, which every policy keeps
    offload     the same, and the input is kept in the host's memory
"""

REMAT_ORDER = ("none", "dots", "attention", "full")
"""From the policy that keeps the most to the one that keeps the least, without "offload", which not every platform
supports."""


def remat_order(platform: str) -> tuple[str, ...]:
    """Returns the policies worth trying; each needs less memory than the one before it.

    "none" is not among them. It needs twice the memory of "dots" and is slower: it writes and reads inputs of products
    that take next to no time to compute again where they are used. On CPU, this holds for "dots" as well.
    """
    return ("attention", "full") if platform == "cpu" else REMAT_ORDER[1:]


def check_remat(remat: str) -> None:
    """Checks the name of a policy.

    Raises:
      ValueError: the name is unknown.
    """
    names = ("none", *REMAT_POLICIES)
    if remat not in names:
        raise ValueError(f"remat: expected one of {', '.join(names)}, found {remat!r}")


def named_layer_input(x: jax.Array) -> jax.Array:
    """Names the input of a layer, by which "offload" finds it."""
    return checkpoint_name(x, LAYER_INPUT)
