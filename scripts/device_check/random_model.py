"""A run on a model of random weights and rows of random words: everything that steps need, without files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from speed_data import fitted, read_lengths

from jdpo.config import DPOConfig, LoraConfig, MeshConfig
from jdpo.data.batching.packing_plan import ItemSizes, pair_sizes
from jdpo.models.families import read_model_config
from jdpo.models.lora.base_weights import Base
from jdpo.models.transformer import Transformer, abstract_params, init_params
from jdpo.planning.planned_step import setup_without_rows
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.mesh import make_mesh
from jdpo.training.continuing import first_state
from jdpo.training.fit.assembly import Assembly
from jdpo.training.setup.adaptation import num_params
from jdpo.training.setup.numerics import resolve_dtype
from jdpo.training.setup.run_setup import Setup
from jdpo.training.setup.tasks import task_for
from jdpo.training.setup.weight_placement import load_start
from jdpo.training.step.train_step import Frozen, TrainState
from jdpo.types import TokenizedPair

MAX_LENGTH = 2048

DIFFERENT_STEPS = 4
"""Steps with rows of their own, after which they repeat: few programs, which take most of the time of a check."""


class RandomPairs:
    """Pairs of random tokens with given lengths, in place of a run's tokenized rows."""

    def __init__(self, lengths: np.ndarray, vocab_size: int) -> None:
        """
        Args:
          lengths: int [pairs, 3], tokens of prompt, chosen and rejected.
        """
        self._lengths, self._vocab_size = lengths, vocab_size

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> TokenizedPair:
        rng = np.random.default_rng(index)
        ids = (rng.integers(0, self._vocab_size, length, np.int32) for length in self._lengths[index])
        return TokenizedPair(*ids, origin=f"pair {index}")

    def sizes(self) -> ItemSizes:
        """Returns the sizes of all pairs."""
        return pair_sizes(self._lengths)

    @property
    def margins(self) -> np.ndarray:
        """A score margin for each pair, for losses that read them."""
        return np.ones(len(self), np.float32)


class RandomLogps:
    """Log-probs of tokens under a model of random weights, in place of the cache of a reference."""

    dtype = np.dtype(np.float32)

    def __init__(self, vocab_size: int) -> None:
        self._mean = -np.log(vocab_size)

    def row(self, index: int, pair: TokenizedPair) -> tuple[np.ndarray, ...]:
        """Returns the log-probs of the chosen and of the rejected completion."""
        return tuple(np.full(len(ids), self._mean, np.float32) for ids in (pair.chosen_ids, pair.rejected_ids))


class InTurn:
    """Steps of consecutive pairs, from the start again after the last; in place of a run's order of rows."""

    def __init__(self, num_pairs: int, batch_size: int) -> None:
        self._num_pairs, self._batch_size = num_pairs, batch_size

    def step(self, step: int) -> np.ndarray:
        """Returns the rows of a step."""
        return (step * self._batch_size + np.arange(self._batch_size)) % self._num_pairs


def lengths_of(rows: str, *, num_pairs: int, tiny: bool) -> np.ndarray:
    """Returns the lengths of pairs, int [num_pairs, 3].

    Args:
      rows: a table of benchmarks/lengths, or three numbers such as 512/300/300.
      tiny: an eighth of all lengths.
    """
    if "/" in rows:
        table = np.array([[int(length) for length in rows.split("/")]])
    else:
        table = read_lengths(rows)
        table = fitted(table[table[:, 0] < MAX_LENGTH], MAX_LENGTH)
    table = np.random.default_rng(0).permutation(table)
    lengths = np.resize(table, (num_pairs, 3))
    return np.maximum(lengths // 8, 2) if tiny else lengths


def parameters_of(folder: Path) -> int:
    """Returns the number of parameters of a model, from its config.json."""
    return num_params(abstract_params(Transformer(read_model_config(folder))))


def make_setup(
    folder: Path, *, rows: str, lora: bool, num_steps: int, tokens_per_step: int, tiny: bool, **settings: Any
) -> Setup:
    """Returns the setup of a run.

    Args:
      folder: of the model, with config.json.
      rows: see `lengths_of`.
      tokens_per_step: about how many slots a device has in a step, over all its micro-batches.
      settings: further ones of the config.
    """
    shards = num_batch_shards(make_mesh(MeshConfig()))
    mean = float(lengths_of(rows, num_pairs=512, tiny=tiny).sum(1).mean())
    batch_size = max(round(tokens_per_step / mean), 1) * shards
    config = DPOConfig(
        model_name_or_path=str(folder),
        datasets="random pairs",
        output_dir="none",
        max_length=MAX_LENGTH,
        global_batch_size=batch_size,
        lora=LoraConfig(r=16, alpha=32, target_modules="all-linear") if lora else None,
        learning_rate=1e-6,
        max_steps=num_steps,
        **settings,
    )
    config = resolve_dtype(config)
    setup = setup_without_rows(config, task_for(config), make_mesh(config.mesh))
    num_pairs = min(num_steps, DIFFERENT_STEPS) * batch_size
    pairs: Any = RandomPairs(lengths_of(rows, num_pairs=num_pairs, tiny=tiny), setup.model.config.vocab_size)
    order: Any = InTurn(num_pairs, batch_size)
    return dataclasses.replace(setup, train_data=pairs, row_plan=order, steps_per_epoch=num_steps)


def random_state(setup: Setup, assembly: Assembly) -> tuple[TrainState, Frozen]:
    """Draws weights on the devices, each only its own part, and makes the state of step 0."""
    key = jax.random.key(0)
    if setup.adaptation is None:
        draw = jax.jit(lambda key: init_params(setup.model, key), out_shardings=setup.shardings)
        return first_state(setup, assembly, draw(key)), Frozen()
    # Drawn in the dtype of the base, as a large model in float32 would not fit.
    dtype = setup.adaptation.base_dtype.rest
    model = setup.model.clone(param_dtype=dtype)
    shardings = setup.adaptation.base_shardings(model, setup.mesh).params
    params = jax.jit(lambda key: init_params(model, key), out_shardings=shardings)(key)
    return first_state(setup, assembly, load_start(setup)), Frozen(Base(params, {}), None)
