"""An optimizer whose state lies in the host's memory: brought to the device and back, one weight's after the other."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jdpo.sharding.placement import on_device, placed_like

Tree = Any


def one_by_one(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same rule, one weight at a time, so that few moments are on the device at once.

    Left to itself, XLA brings all of them before it updates the first weight: then more is on the device at once than
    if they had stayed there. Here a weight's moments come when those of the weight before are on their way back. XLA's
    scheduler has the last word: it does not always heed the order, which the memory analysis of the program tells.

    Args:
      rule: one that treats each weight on its own (not clipping by global norm), with state that mirrors the weights
        and may hold scalars beside that.
    """
    rule = optax.with_extra_args_support(rule)

    def update(grads: Tree, state: Any, params: Tree, **extra: Any) -> tuple[Tree, Any]:
        structure = jax.tree.structure(params)
        parts, outer = jax.tree.flatten(state, is_leaf=lambda node: jax.tree.structure(node) == structure)
        mirrors = [jax.tree.structure(part) == structure for part in parts]
        updates: list[Any] = []
        stored: list[list[Any]] = []  # by weight: the new parts of the state
        for place in range(structure.num_leaves):
            old = [_only(part, place) if mirror else part for part, mirror in zip(parts, mirrors, strict=True)]
            if stored:
                old = _after(old, stored[-1])
            state = outer.unflatten(on_device(old))
            of_weight, state = rule.update(_only(grads, place), state, _only(params, place), **extra)
            updates += jax.tree.leaves(of_weight)
            stored.append(placed_like(outer.flatten_up_to(state), old))
        whole = [
            structure.unflatten([jax.tree.leaves(new[index])[0] for new in stored]) if mirror else stored[-1][index]
            for index, mirror in enumerate(mirrors)
        ]
        return structure.unflatten(updates), outer.unflatten(whole)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _only(tree: Tree, place: int) -> Tree:
    """The tree with one of its leaves and nothing in place of the others, so that the leaf keeps its path."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([leaf if index == place else None for index, leaf in enumerate(leaves)])


def _after(tree: Tree, others: Tree) -> Tree:
    """The tree, not to be touched before the others are computed."""
    return jax.lax.optimization_barrier((tree, others))[0]
