"""Reads tokenized pairs, their reference log-probs and their scores, as callers of `jdpo.pack` give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdpo.types import CHOSEN, REJECTED, AnyPair, MaskedPair, TokenizedPair, completions_of


def read_pairs(rows: Sequence[Mapping[str, Any]]) -> list[AnyPair]:
    """Reads rows with token ids and, optionally, masks; all pairs returned are of one kind.

    Raises:
      ValueError: there are no rows, or a row is not as `jdpo.pack` describes; the message names it.
    """
    if isinstance(rows, Mapping):  # what a slice of a datasets.Dataset is
        raise ValueError("rows is a dict of columns: expected a list of dicts, such as dataset.select(range(8))")
    if not hasattr(rows, "__len__"):  # such as a generator
        raise ValueError(f"rows: expected a list of dicts, found {type(rows).__name__}; give list(rows)")
    if not len(rows):
        raise ValueError("rows is empty: expected at least one pair")
    pairs = [_read_pair(row, index) for index, row in enumerate(rows)]
    if not any(isinstance(pair, MaskedPair) for pair in pairs):
        return pairs
    # A row without masks is learnt whole.
    return [pair if isinstance(pair, MaskedPair) else _masked(pair) for pair in pairs]


def _masked(pair: TokenizedPair) -> MaskedPair:
    (chosen, chosen_mask), (rejected, rejected_mask) = completions_of(pair)
    return MaskedPair(pair.prompt_ids, chosen, rejected, chosen_mask, rejected_mask, pair.origin)


def _read_pair(row: Mapping[str, Any], index: int) -> AnyPair:
    name = f"rows[{index}]"
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    if not isinstance(row, Mapping):
        raise ValueError(f"{name}: expected a dict with {', '.join(keys)}, found a {type(row).__name__}")
    if missing := [key for key in keys if key not in row]:
        raise ValueError(f"{name} has no {' and no '.join(missing)}: expected a dict with {', '.join(keys)}")
    prompt, chosen, rejected = (_token_ids(row[key], f"{name}[{key!r}]") for key in keys)
    pair: AnyPair = TokenizedPair(prompt, chosen, rejected, name)
    given = [key for key in ("chosen_mask", "rejected_mask") if key in row]
    if len(given) == 1:
        raise ValueError(f"{name} has {given[0]} alone: expected chosen_mask and rejected_mask, or neither")
    if given:
        masks = [_mask(row[key], ids, f"{name}[{key!r}]") for key, ids in zip(given, (chosen, rejected), strict=True)]
        pair = MaskedPair(prompt, chosen, rejected, masks[CHOSEN], masks[REJECTED], name)
    for side, (_, mask) in zip(("chosen", "rejected"), completions_of(pair), strict=True):
        # No token predicts the first one of a completion without a prompt.
        if not mask[0 if len(prompt) else 1 :].any():
            raise ValueError(
                f"{name} has no {side} token to score: expected at least one completion token to learn that comes "
                "after another token. Drop the row"
            )
    return pair


def _token_ids(ids: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of different lengths
        raise ValueError(f"{name}: expected a list of token ids, found lists within it") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected a list of token ids, found {array.dtype} {list(array.shape)}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"{name}: expected token ids from 0 to 2**31 - 1, found {array.min()} to {array.max()}")
    return array.astype(np.int32)


def _mask(mask: Any, ids: np.ndarray, name: str) -> np.ndarray:
    array, num_tokens = np.asarray(mask), len(ids)
    if array.shape != (num_tokens,) or (num_tokens and not np.isin(array, (0, 1)).all()):
        raise ValueError(
            f"{name}: expected {num_tokens} values True or False, one per token, found {list(array.shape)}"
        )
    return array.astype(bool)


def read_reference(reference: Sequence[Sequence[Any]], pairs: Sequence[AnyPair]) -> list[tuple[np.ndarray, ...]]:
    """Reads the log-probs of the chosen and the rejected tokens of each pair.

    Raises:
      ValueError: their number or a shape does not match, or they are not floats; the message names the row.
    """
    if len(reference) != len(pairs):
        raise ValueError(f"reference_logps: expected one entry for each of {len(pairs)} rows, found {len(reference)}")
    for index, sides in enumerate(reference):
        if not hasattr(sides, "__len__") or len(sides) != len((CHOSEN, REJECTED)):
            raise ValueError(f"reference_logps[{index}]: expected (chosen, rejected), as jdpo.unpack_logps returns")
    read = [tuple(np.asarray(values) for values in sides) for sides in reference]
    for index, (sides, pair) in enumerate(zip(read, pairs, strict=True)):
        expected = [pair.chosen_ids.shape, pair.rejected_ids.shape]
        if [values.shape for values in sides] != expected or any(values.dtype.kind != "f" for values in sides):
            found = " and ".join(f"{values.dtype} {values.shape}" for values in sides)
            raise ValueError(
                f"reference_logps[{index}]: expected a float for each chosen and for each rejected token, of shapes "
                f"{expected[CHOSEN]} and {expected[REJECTED]}, found {found}"
            )
    return read


def read_margins(margins: Any, num_pairs: int) -> np.ndarray:
    """Reads one score margin for each pair.

    Raises:
      ValueError: their number does not match, or one is not a number above 0.
    """
    array = np.asarray(margins)
    if array.shape != (num_pairs,) or array.dtype.kind not in "fiu":
        raise ValueError(f"score_margins: expected {num_pairs} numbers, one per row, found {list(array.shape)}")
    # Losses take the logarithm, and under jit they cannot see the values. Not `array <= 0`, which is False for NaN.
    if bad := np.flatnonzero(~(array > 0)).tolist():
        raise ValueError(f"score_margins must be above 0, found {array[bad[0]]:g} for rows[{bad[0]}]. Drop the row")
    return array
