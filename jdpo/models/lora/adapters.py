"""LoRA (arXiv 2106.09685): small trained matrices next to frozen kernels, x W + scale (x A) B.

The trained and saved tree has the structure of the params: {"a", "b"} at the path of each adapted projection, in the
decoder's own layout. Where Hugging Face keeps several projections in one module, its adapter has one A for all of
them: here the first projection has "a" and "b", the others only "b".

Axes: r rank; *lead, the kernel's leading axes (layers of a stack, experts); *in and *out, its input and output axes.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdpo.models.lora.base_weights import Base
from jdpo.models.lora.sites import EXPERT_AXIS, Path, Site, get_at, tree_of
from jdpo.models.transformer import Params, Weights

Adapters = Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Settings of LoRA; hashable.

    Attributes:
      r: rank of every adapter.
      alpha: numerator of the scale.
      use_rslora: scale by alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r.
      sites: the adapted projections.
    """

    r: int
    alpha: float
    use_rslora: bool
    sites: tuple[Site, ...]

    @property
    def scale(self) -> float:
        """The factor of (x A) B.

        >>> Lora(r=16, alpha=32, use_rslora=True, sites=()).scale
        8.0
        """
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class _Leaf(NamedTuple):
    """A trained matrix: its path, shape and logical axes, and for an A the number of inputs that it sums over."""

    path: Path
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_inputs: int | None


def _leaves(lora: Lora) -> Iterator[_Leaf]:
    for site in lora.sites:
        if site.leader == site.path:
            shape, axes = (*site.lead, *site.inputs, lora.r), (*site.lead_axes, *site.input_axes, None)
            yield _Leaf((*site.path, "a"), shape, axes, math.prod(site.inputs))
        shape, axes = (*site.lead, lora.r, *site.outputs), (*site.lead_axes, None, *site.output_axes)
        yield _Leaf((*site.path, "b"), shape, axes, None)


def abstract_adapters(lora: Lora, dtype: Any) -> Adapters:
    """Returns the shapes and dtypes of the trained tree."""
    return tree_of({leaf.path: jax.ShapeDtypeStruct(leaf.shape, dtype) for leaf in _leaves(lora)})


def adapter_axes(lora: Lora) -> Adapters:
    """Returns the logical axis names of the trained tree: the kernel's for inputs and outputs, None for the rank."""
    return tree_of({leaf.path: leaf.axes for leaf in _leaves(lora)})


def init_adapters(lora: Lora, key: jax.Array, dtype: Any) -> Adapters:
    """Initializes A uniformly in +-1 / sqrt(inputs), as PEFT does, and B to zero, so that the model is unchanged.

    An A depends only on the key and its path, neither on the mesh nor on which other projections are adapted.
    """

    def init(leaf: _Leaf) -> jax.Array:
        if leaf.num_inputs is None:
            return jnp.zeros(leaf.shape, dtype)
        # A key per path, so that adding a site does not change the others.
        # A CRC, because Python's own hash of a text differs from process to process.
        of_leaf = jax.random.fold_in(key, zlib.crc32("/".join(leaf.path).encode()))
        # PEFT's kaiming_uniform with a = sqrt(5) has this bound: sqrt(6 / ((1 + 5) inputs)).
        bound = 1 / math.sqrt(leaf.num_inputs)
        # Drawn in float32 and then rounded, so that bfloat16 adapters start from the same numbers.
        return jax.random.uniform(of_leaf, leaf.shape, jnp.float32, -bound, bound).astype(dtype)

    return tree_of({leaf.path: init(leaf) for leaf in _leaves(lora)})


def weights_of(lora: Lora, base: Base, adapters: Adapters) -> Weights:
    """Returns the weights that the model runs on: the base, and the A and scaled B of each projection.

    Args:
      adapters: the trained tree, or an empty one for the base alone.
    """
    if not adapters:
        # Without adapters this is the reference, on the very same frozen arrays.
        return Weights(base.params, base.scales, {})
    found = {}
    for site in lora.sites:
        found[(*site.path, "a")] = get_at(adapters, (*site.leader, "a"))
        b = get_at(adapters, (*site.path, "b"))
        # Scaled in float32 or wider, as in a merge: in bfloat16 the product would be rounded once more.
        found[(*site.path, "b")] = b.astype(jnp.promote_types(b.dtype, jnp.float32)) * lora.scale
    return Weights(base.params, base.scales, tree_of(found))


def num_adapter_params(lora: Lora) -> int:
    """Returns the number of trained parameters."""
    return sum(math.prod(leaf.shape) for leaf in _leaves(lora))


def num_active_params(lora: Lora, experts_per_token: int) -> int:
    """Counts the trained parameters that each token is multiplied with.

    Args:
      experts_per_token: experts that a token is sent to, for models with experts.
    """
    num_active = 0
    for site in lora.sites:
        # Each expert has its own adapter, and a token meets only the experts that it is sent to.
        num_all = num_adapter_params(dataclasses.replace(lora, sites=(site,)))
        num_experts = dict(zip(site.lead_axes, site.lead, strict=True)).get(EXPERT_AXIS)
        num_active += num_all if num_experts is None else num_all * experts_per_token // num_experts
    return num_active
