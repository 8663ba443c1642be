"""The entries of a run's rows in the reference cache, and their descriptions."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jdpo.config import ReferenceSettings, without_queries
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.reference_cache.cache_key import CacheEntry, about_rows, key_of, parts_of
from jdpo.data.reference_cache.scores import CacheFolder, Shards, cache_root
from jdpo.processes import ask_server, differing
from jdpo.training.setup.folder_digests import adapter_digest, folder_digest
from jdpo.training.setup.run_setup import Setup

Role = Literal["training", "evaluation"]


class RowSet(NamedTuple):
    """The rows of one entry of the cache.

    Attributes:
      role: what the rows are for.
      data: the rows.
      parts: everything that their log-probs depend on.
      folder: where the log-probs are kept.
      shards: what the folder contained when the run started.
    """

    role: Role
    data: PreparedData
    parts: dict[str, Any]
    folder: CacheFolder
    shards: Shards

    @property
    def complete(self) -> bool:
        """True if all shards were there and none was damaged."""
        return bool(self.shards.whole.all()) and not self.shards.damaged_files

    def examine_whole(self) -> Shards | None:
        """Examines the folder again; returns None unless all shards are there and undamaged."""
        shards = self.folder.examine()
        return shards if shards.whole.all() and not shards.damaged_files else None


def find_rows(setup: Setup) -> list[RowSet]:
    """Finds the cached log-probs of the training rows and, where there are any, of the evaluation rows.

    Raises:
      ValueError: the processes of the run do not have the same rows or reference.
    """
    config = setup.config
    started = setup.started if setup.reference_folder is None else setup.reference_started
    weights = weights_of_reference(setup)
    # Log-probs are float32 or wider, also where the model computes in bfloat16.
    dtype = np.dtype(np.float64 if config.compute_dtype == "float64" else np.float32)
    rows: dict[Role, PreparedData | None] = {"training": setup.train_data, "evaluation": setup.eval_data}
    sets = []
    for role, data in rows.items():
        if data is None:
            continue
        parts = parts_of(
            weights=weights,
            rows=data.digest,
            compute_dtype=config.compute_dtype,
            model=dataclasses.asdict(setup.model.config),
            # Embedding rows that the run starts are drawn from its seed, and log-probs depend on them.
            started=None if started is None else {"seed": config.seed, "ids": started.ids.tolist()},
        )
        key = key_of(parts)
        # Different keys on different hosts would mix log-probs of different references.
        _check_same_everywhere(key)
        folder = CacheFolder(cache_root(config.cache_dir), key, num_rows=len(data), dtype=dtype)
        shards = folder.examine()
        if shards.damaged_files:
            # A client of a network file system may take an old file for the one that was put in its place.
            ask_server(folder.path)
            shards = folder.examine()
        sets.append(RowSet(role, data, parts, folder, shards))
    return sets


def weights_of_reference(setup: Setup) -> str:
    """Returns what identifies the reference's weights: digests, and how they are rounded when they are loaded."""
    adaptation, used = setup.adaptation, setup.model.compute_dtype
    weights = folder_digest(setup.reference_folder or setup.model_folder)
    if adaptation is None:
        kept = setup.model.param_dtype
    else:
        kept = used if setup.reference_folder is not None else adaptation.base_dtype.rest
    # Rounding at loading changes log-probs, so that it is part of what identifies the weights.
    if jnp.promote_types(kept, used) != kept:  # rounded when they are loaded, not only when they are used
        weights += f" in {jnp.dtype(kept).name}"
    if adaptation is None or setup.reference_folder is not None:
        return weights
    if adaptation.base_dtype.int8:
        weights += " in int8"
    if setup.reference_adapter is not None:
        trained = jnp.dtype(setup.model.param_dtype).name
        weights += f" with the adapter {adapter_digest(setup.reference_adapter)} in {trained}"
    return weights


def entry_of(setup: Setup, rows: RowSet) -> CacheEntry:
    """Returns the description of an entry, for which the datasets are read."""
    config = setup.config
    assert isinstance(config, ReferenceSettings), type(config)
    named = config.reference_model is not None
    name, revision = (
        (config.reference_model, config.reference_revision)
        if named
        else (config.model_name_or_path, config.model_revision)
    )
    about = about_rows(
        config.datasets if rows.role == "training" or config.eval_fraction else config.eval_datasets,
        role=rows.role,
        model=f"{name} ({revision})" if revision else without_queries(name),
        tokenizer=setup.tokenizer.digest,
        chat_template=config.chat_template,
        chat_template_kwargs=config.chat_template_kwargs,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        eval_fraction=config.eval_fraction,
    )
    return CacheEntry(rows.parts, about)


def _check_same_everywhere(key: str) -> None:
    if differing({"key": key}):
        raise ValueError(
            "the processes of this run do not have the same reference model or rows on their disks, so they cannot "
            "share a cache of its log-probs; give every host the same files"
        )
