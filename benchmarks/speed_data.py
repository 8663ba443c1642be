"""The rows of the speed benchmarks: random words in real lengths.

Every trainer reads the same rows. A word is a token (`w17` is id 17), so a row has exactly the lengths that its table
says, whoever tokenizes it. Nothing here imports torch or jax.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from speed_model import SPECIAL

LENGTHS = Path(__file__).resolve().parent / "lengths"
ORDERS = 200


class Selection(NamedTuple):
    """Rows of a benchmark, in the order in which jdpo trains on them: warm-up, filler, measured, the rest.

    Attributes:
      lengths: int [rows, 3], uncut tokens of prompt, chosen and rejected.
      left_out: rows of the table whose prompt fills max_length: every trainer drops them.
      num_warmup, num_filler, num_measured: how many rows each part has.
    """

    lengths: np.ndarray
    left_out: int
    num_warmup: int
    num_filler: int
    num_measured: int

    @property
    def measured(self) -> np.ndarray:
        """Indices of the measured rows."""
        return self.num_warmup + self.num_filler + np.arange(self.num_measured)

    @property
    def compared(self) -> np.ndarray:
        """Indices of the rows that the other trainers get: warm-up and measured."""
        return np.concatenate([np.arange(self.num_warmup), self.measured])


def read_lengths(name: str) -> np.ndarray:
    """Reads a committed table, int [rows, 3]."""
    return np.loadtxt(LENGTHS / f"{name}.csv", delimiter=",", skiprows=1, dtype=np.int64)


def select(lengths: np.ndarray, *, batch: int, max_length: int, warmup: int, filler: int, steps: int) -> Selection:
    """Orders all usable rows of a table: those of `warmup` steps, of `filler` steps, the measured ones, the rest.

    What is measured is an evenly spaced sample by length, so that a few steps represent the table; in that of many
    random orders in which padding weighs most nearly what it does in random steps of the whole table. The warm-up is
    made of rows around the first quartile: it is not measured, only compared. The filler is as long as there are rows.
    """
    fit = lengths[lengths[:, 0] < max_length]
    cut = fitted(fit, max_length)
    order = np.argsort(cut.sum(1), kind="stable")
    assert len(order) >= batch * (warmup + steps), (len(order), batch, warmup, steps)
    rng = np.random.default_rng(0)
    start = max(len(order) // 4 - batch * warmup, 0)
    first = order[start : start + batch * warmup]
    rest = np.setdiff1d(order, first, assume_unique=True)
    rest = rest[np.argsort(cut[rest].sum(1), kind="stable")]
    centres = ((np.arange(batch * steps) + 0.5) * len(rest) / (batch * steps)).astype(int)
    measured = rest[centres]
    others = rng.permutation(np.setdiff1d(rest, measured))
    usual = typical_padding(cut, batch)
    orders = [rng.permutation(measured) for _ in range(ORDERS)]
    ordered = min(orders, key=lambda order: abs(padding(cut[order], batch) - usual))
    num_filler = min(filler, len(others) // batch) * batch
    chosen = np.concatenate([first, others[:num_filler], ordered, others[num_filler:]])
    return Selection(fit[chosen], len(lengths) - len(fit), len(first), num_filler, len(measured))


def padding(cut: np.ndarray, batch: int) -> float:
    """Returns the places that a padding trainer computes, relative to the tokens, with rows in this order.

    >>> padding(np.array([[2, 1, 3], [1, 1, 1]]), 2)  # two pairs, four sequences, padded to 5
    2.222...
    """
    steps = cut[: len(cut) // batch * batch].reshape(-1, batch, 3)
    longest = (steps[..., :1] + steps[..., 1:]).max((1, 2))
    return float(2 * batch * longest.sum() / steps.sum())


def typical_padding(cut: np.ndarray, batch: int) -> float:
    """Returns the padding of steps of random rows: a mean over shuffles of the table."""
    rng = np.random.default_rng(1)
    return float(np.mean([padding(rng.permutation(cut), batch) for _ in range(ORDERS)]))


def fitted(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Cuts lengths as every trainer does: completions lose their tokens beyond max_length.

    >>> fitted(np.array([[5, 2, 9]]), 8).tolist()
    [[5, 2, 3]]
    """
    space = max_length - lengths[:, :1]
    return np.concatenate([lengths[:, :1], np.minimum(lengths[:, 1:], space)], axis=1)


class Ids(NamedTuple):
    """Token ids of a row, uncut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def synthesize(lengths: np.ndarray, vocab_size: int, *, seed: int = 0) -> list[Ids]:
    """Makes random rows of exactly these lengths; the sides of a pair differ from their first token on."""
    rng = np.random.default_rng(seed)
    low = len(SPECIAL)
    assert lengths[:, 0].min() >= 1, "a prompt of no tokens"
    assert lengths[:, 1:].min() >= 2, "an answer needs a word and its end"

    def words(count: int) -> list[int]:
        return rng.integers(low, vocab_size, count).tolist()

    rows = []
    for prompt, chosen, rejected in lengths.tolist():
        first, second = words(chosen - 1), words(rejected - 1)
        if first[0] == second[0]:
            second[0] = low + (second[0] - low + 1) % (vocab_size - low)
        rows.append(Ids(words(prompt), [*first, 1], [*second, 1]))
    return rows


def write_rows(rows: Sequence[Ids], path: Path) -> None:
    """Writes rows as conversations, one JSON object per line, for both TRL and jdpo."""
    with path.open("w", encoding="utf-8") as lines:
        for row in rows:
            record = {"prompt": [_message("user", row.prompt)]}
            record |= {side: [_message("assistant", getattr(row, side)[:-1])] for side in ("chosen", "rejected")}
            lines.write(json.dumps(record) + "\n")


def _message(role: str, ids: Sequence[int]) -> dict[str, str]:
    return {"role": role, "content": " ".join(f"w{index}" for index in ids)}


def write_ids(rows: Sequence[Ids], max_length: int, path: Path) -> None:
    """Writes token ids as the model sees them, completions cut, in the form of `trl_oracle.write_tokens`."""
    with path.open("w", encoding="utf-8") as lines:
        for row in rows:
            space = max_length - len(row.prompt)
            cut = {"prompt_ids": row.prompt, "chosen_ids": row.chosen[:space], "rejected_ids": row.rejected[:space]}
            lines.write(json.dumps(cut, separators=(",", ":")) + "\n")
