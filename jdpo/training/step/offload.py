"""Optimizers whose state is in host memory: it is moved to the device and back, for one weight after the other."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jdpo.sharding.placement import on_device, placed_like

Tree = Any


def weight_by_weight(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies a rule to one weight at a time, so that few moments are on the device at once.

    By default XLA moves all moments to the device before it updates the first weight, which takes more of its memory
    than keeping them there. Here the moments of a weight are moved when those of the weight before are on their way
    back. XLA's scheduler does not always keep to this order; the memory analysis of the program tells.

    Args:
      rule: treats each weight on its own (unlike clipping by global norm); its state mirrors the weights, and may have
        scalars in addition.
    """
    rule = optax.with_extra_args_support(rule)

    def update(grads: Tree, state: Any, params: Tree, **extra: Any) -> tuple[Tree, Any]:
        structure: Any = jax.tree.structure(params)  # jax's type of structures has no stubs
        outer: Any
        parts, outer = jax.tree.flatten(state, is_leaf=lambda node: structure == jax.tree.structure(node))
        mirrors = [bool(structure == jax.tree.structure(part)) for part in parts]
        updates: list[Any] = []
        stored: list[list[Any]] = []  # by weight: the new parts of the state
        for place in range(structure.num_leaves):
            old = [_only(part, place) if mirror else part for part, mirror in zip(parts, mirrors, strict=True)]
            # The barrier makes the next moments wait for those before, so that few are on the device.
            if stored:
                old = _after(old, stored[-1])
            # Arithmetic on host memory is not possible within a jitted function.
            state = outer.unflatten(on_device(old))
            of_weight, state = rule.update(_only(grads, place), state, _only(params, place), **extra)
            updates += jax.tree.leaves(of_weight)
            stored.append(placed_like(outer.flatten_up_to(state), old))
        whole = [
            # Each weight started from the old scalars, so the count of updates has risen by one, whichever is taken.
            structure.unflatten([jax.tree.leaves(new[index])[0] for new in stored]) if mirror else stored[-1][index]
            for index, mirror in enumerate(mirrors)
        ]
        return structure.unflatten(updates), outer.unflatten(whole)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _only(tree: Tree, place: int) -> Tree:
    """Returns the tree with only one of its leaves, which keeps its path."""
    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([leaf if index == place else None for index, leaf in enumerate(leaves)])


def _after(tree: Tree, others: Tree) -> Tree:
    """Returns the tree, which is not used before `others` are computed."""
    return jax.lax.optimization_barrier((tree, others))[0]
