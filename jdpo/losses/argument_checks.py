"""Checks of the arguments of losses. Values of arrays are checked only where they are known, so not under jit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdpo.types import CHOSEN, REJECTED, AnyArray, PackedBatch, PreferenceBatch
from jdpo.words import did_you_mean

Array = jax.Array

_SIDES = {CHOSEN: "chosen", REJECTED: "rejected"}
_MOST_NAMED = 5


def check_batch(batch: PreferenceBatch) -> None:
    """Checks the type and the shapes of a padded batch.

    Raises:
      ValueError: it is not a PreferenceBatch, or an array has the wrong shape.
    """
    if missing := [name for name in PreferenceBatch._fields if not hasattr(batch, name)]:
        raise ValueError(
            f"batch: expected a jdpo.PreferenceBatch(tokens, attention_mask, completion_mask) of arrays [b, 2, t], "
            f"found a {type(batch).__name__} without {', '.join(missing)}"
        )
    shape = jnp.shape(batch.tokens)
    if len(shape) != 3 or shape[1] != 2 or 0 in shape:
        raise ValueError(f"batch.tokens must be [b, 2, t], chosen at 0 and rejected at 1, found {shape}")
    for name in ("attention_mask", "completion_mask"):
        if (found := jnp.shape(getattr(batch, name))) != shape:
            raise ValueError(f"batch.{name} must have the shape {shape} of batch.tokens, found {found}")
    for name in ("weights", "score_margins"):
        values = getattr(batch, name)
        if values is not None and jnp.shape(values) != shape[:1]:
            raise ValueError(f"batch.{name} must be [b], one for each of {shape[0]} pairs, found {jnp.shape(values)}")


def check_packed(batch: PackedBatch) -> None:
    """Checks the shapes of a packed batch.

    Raises:
      ValueError: it has an axis of micro-batches or no pairs, or an array has the wrong shape.
    """
    if len(jnp.shape(batch.tokens)) != 2:
        raise ValueError(
            f"a packed batch must have rows of slots [m, s], found tokens {jnp.shape(batch.tokens)}. Run micro-batches "
            "[k, m, s] one after the other, as jax.lax.scan does, with the normalizer of all of them"
        )
    if batch.readers.shape[-2] != 2:
        raise ValueError(
            f"expected packed pairs of 2 sides, found {batch.readers.shape[-2]} (axis -2 of batch.readers)"
        )
    for name, shape in (("logp_reference", batch.logp_slot.shape), ("pair_score_margin", batch.pair_weight.shape)):
        values = getattr(batch, name)
        if values is not None and jnp.shape(values) != shape:
            raise ValueError(f"batch.{name} must have the shape {shape}, found {jnp.shape(values)}")


def check_scores(score_margins: AnyArray | None, weights: AnyArray | None) -> None:
    """Checks that score margins, float [b], are given and above 0 in every pair whose weight is not 0.

    Args:
      weights: float [b], or None for all 1.

    Raises:
      ValueError: they are not given, or not above 0; the message names the first such pair.
    """
    if score_margins is None:
        raise ValueError(
            "the loss reads scores: expected score_margins, float [b], by how much each chosen answer was scored "
            "higher than the rejected one"
        )
    values, pair_weights = values_of(score_margins), values_of(weights)
    # With unknown weights, a bad value may belong to a padding pair.
    if values is None or (pair_weights is None and weights is not None):
        return
    # Not `values <= 0`, which is False for NaN.
    bad = ~(values > 0) if pair_weights is None else ~(values > 0) & (pair_weights != 0)
    if bad.any():
        pair = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"score_margins must be above 0, found {values[pair]:g} for pair {pair}. Drop the pair, or give it weight 0"
        )


def check_completions(batch: PreferenceBatch) -> None:
    """Checks that both sides of each pair whose weight is not 0 have a completion token to score.

    Position 0 does not count, because no position before it predicts its token.

    Raises:
      ValueError: a side has none; the message names pairs and sides.
    """
    mask, weights = values_of(batch.completion_mask), values_of(batch.weights)
    if mask is None or (weights is None and batch.weights is not None):
        return
    empty = ~mask[..., 1:].astype(bool).any(-1)
    if weights is not None:
        empty &= (weights != 0)[:, None]
    if empty.any():
        raise ValueError(
            f"batch.completion_mask has no token to score for {_places(empty)}: expected True on at least one "
            "completion token after position 0 of each side. Mask the completion, drop the pair, or give it weight 0"
        )


def check_lengths(chosen_lengths: Array | None, rejected_lengths: Array | None, weights: Array | None) -> None:
    """Checks that completion lengths, int [b] each, are at least 1 in each pair whose weight is not 0.

    Raises:
      ValueError: a length is below 1; the message names pairs and sides.
    """
    of_pairs = values_of(weights)
    if of_pairs is None and weights is not None:
        return
    given = {CHOSEN: values_of(chosen_lengths), REJECTED: values_of(rejected_lengths)}
    for side, lengths in given.items():
        if lengths is None:
            continue
        empty = np.zeros((len(lengths), 2), bool)  # [b, side], the form that `_places` names
        empty[:, side] = lengths < 1 if of_pairs is None else (lengths < 1) & (of_pairs != 0)
        if empty.any():
            raise ValueError(
                f"{_SIDES[side]}_lengths must be at least 1 (the tokens of a completion), found less for "
                f"{_places(empty)}. Drop the pair, or give it weight 0 in pair_weights"
            )


def values_of(array: AnyArray | None) -> np.ndarray | None:
    """Returns the values of an array, or None if they are not known: it is traced, or partly on other hosts."""
    # Under jit there are no values, and arrays of other hosts cannot be read: both are left to the program.
    if array is None or isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)


def _places(empty: Any) -> str:
    """Names pairs and sides of bool [b, 2].

    >>> _places(np.array([[False, True], [True, False]]))
    'the rejected side of pair 0 and the chosen side of pair 1'
    """
    found = [f"the {_SIDES[int(side)]} side of pair {int(pair)}" for pair, side in np.argwhere(empty)]
    more = [f"{len(found) - _MOST_NAMED:,} more"] if len(found) > _MOST_NAMED else []
    *first, last = found[:_MOST_NAMED] + more
    return f"{', '.join(first)} and {last}" if first else last


def unknown_name(kind: str, name: object, known: Iterable[str], listed: str) -> ValueError:
    """Returns the error for an unknown name, with the nearest known one and the list of all.

    Args:
      listed: the beginning of the list, such as "The losses are".
    """
    names = [*known]
    hint = did_you_mean(str(name), names, cutoff=0.3)
    return ValueError(f"unknown {kind} {name!r}{f'; {hint}' if hint else '.'} {listed}: {', '.join(names)}")
