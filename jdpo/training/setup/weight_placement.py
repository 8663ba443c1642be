"""Loads weights onto the mesh: the trained ones, the frozen base under adapters, and the frozen reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdpo.models.lora.adapters import init_adapters, weights_of
from jdpo.models.lora.base_weights import Base, quantize
from jdpo.models.lora.peft_folder import load_adapters, read_adapter
from jdpo.models.lora.sites import KERNEL, Path, Site, get_at, tree_of
from jdpo.models.transformer import Transformer, Weights, abstract_params, logical_axes
from jdpo.models.weights.embedding_rows import StartedRows
from jdpo.models.weights.loading import load_params, resize_embeddings
from jdpo.sharding.rules import param_shardings
from jdpo.training.setup.adaptation import Adaptation
from jdpo.training.setup.model_setup import ModelSetup
from jdpo.training.setup.run_setup import Setup
from jdpo.training.step.train_step import Frozen

Params = Any


# --- what is trained


def load_start(setup: Setup) -> Params:
    """Loads what is trained, as training starts from it, onto the mesh, in the master dtype.

    These are all weights, with embedding rows for added tokens; or adapters, new ones or those to continue from.
    """
    adaptation = setup.adaptation
    if adaptation is None:
        return _load_grown(setup, setup.model_folder, setup.started)
    dtype = setup.model.param_dtype
    if adaptation.folder is not None:
        return load_adapters(read_adapter(adaptation.folder, adaptation.sites), setup.shardings, dtype)
    # Jitted with shardings, so that every device draws only its own part.
    start = jax.jit(lambda key: init_adapters(adaptation.lora, key, dtype), out_shardings=setup.shardings)
    return start(jax.random.key(setup.config.seed))


def _load_grown(setup: Setup, folder: FilePath, rows: StartedRows | None, dtype: Any = None) -> Params:
    """The weights of a folder with embedding rows for every token, the started rows among them."""
    source_model = setup.model.clone(config=setup.source_config)
    axes, shapes = logical_axes(source_model), abstract_params(source_model)
    dtype = setup.model.param_dtype if dtype is None else dtype
    params = load_params(folder, source_model, param_shardings(axes, shapes, setup.mesh), dtype=dtype)
    if rows is None:
        # Rows are started exactly where the vocabulary grows.
        assert setup.model.config.vocab_size == setup.source_config.vocab_size, setup.model.config
        return params
    grown, model = resize_embeddings(params, source_model, setup.model.config.vocab_size, rows)
    assert model == setup.model, (model, setup.model)
    # Placed again, as a larger vocabulary may be divided by a mesh axis that the model's own was not divided by.
    return jax.device_put(grown, setup.whole_shardings)


# --- what is frozen


def load_frozen(setup: Setup, start: Params | None, *, live: bool, moves: bool, with_base: bool = True) -> Frozen:
    """Loads everything that steps read and do not change.

    Args:
      start: see `load_reference`.
      live: True if a frozen reference runs in the step.
      moves: True if the reference moves in training; it is then part of the state.
      with_base: False if nothing will read the base under adapters.
    """
    reference = load_reference(setup, start) if live and not moves else None
    return Frozen(load_base(setup) if with_base else None, reference)


def load_base(setup: ModelSetup) -> Base | None:
    """Loads the base under adapters, directly into its dtype and shards; None where all weights are trained."""
    if setup.adaptation is None:
        return None
    return load_base_folder(setup.model_folder, setup.adaptation, setup.model, setup.mesh)


def load_base_folder(folder: FilePath, adaptation: Adaptation, model: Transformer, mesh: Mesh) -> Base:
    """Loads a model folder as the base under adapters, directly into its dtype and shards."""
    dtype, shardings = adaptation.base_dtype, adaptation.base_shardings(model, mesh)
    if not dtype.int8:
        return Base(load_params(folder, model, shardings.params, dtype=dtype.rest), {})
    quantizer = Quantizer(adaptation.sites, shardings, dtype.rest)
    wide = jnp.promote_types(dtype.rest, jnp.float32)  # read in float32, so that they are rounded only once
    params = load_params(folder, model, shardings.params, dtype=wide, transform=quantizer)
    return Base(params, tree_of(quantizer.scales))  # scales that loading the params has filled in


class Quantizer:
    """Converts the kernels of a base to int8 as they are loaded, and frees their floats at once."""

    def __init__(self, sites: Sequence[Site], shardings: Base, rest: Any) -> None:
        """
        Args:
          sites: the projections whose kernels become int8.
          shardings: of the leaves of the base.
          rest: dtype of all other leaves.
        """
        self._sites = {(*site.path, KERNEL): site for site in sites}
        self._shardings, self._rest = shardings, rest
        self.scales: dict[Path, jax.Array] = {}

    def __call__(self, path: Path, leaf: jax.Array) -> jax.Array:
        """Returns what replaces a leaf; the scales of a kernel are then in `scales`."""
        if path not in self._sites:
            return leaf.astype(self._rest)
        to = tuple(get_at(tree, path) for tree in self._shardings)
        # Converted one by one, so that at most one kernel exists in both dtypes.
        kernel, self.scales[path] = jax.jit(quantize, static_argnums=1, out_shardings=to)(leaf, self._sites[path])
        jax.block_until_ready(kernel)
        leaf.delete()
        return kernel


def load_reference(setup: Setup, start: Params | None, *, moves: bool = False) -> Params:
    """Loads the reference: weights in the compute dtype, to which the model casts them anyway; with lora, adapters.

    With lora, the reference is the base alone, {}, or the base with the adapter that training continues from, as it was
    loaded; any other `reference_model` has Weights of its own.

    Args:
      start: what is trained, as training starts from it, if it is loaded already; it is copied, never aliased.
      moves: True if the reference moves in training.
    """
    if setup.adaptation is None:
        if setup.reference_folder is not None:
            start = _load_grown(setup, setup.reference_folder, setup.reference_started)
        return _copied(load_start(setup) if start is None else start, setup, reference_dtype(setup.model, moves=moves))
    if setup.reference_folder is not None:
        # In the compute dtype at once: nothing trains these weights, so they need no master copy.
        return Weights(
            _load_grown(setup, setup.reference_folder, setup.reference_started, setup.model.compute_dtype), {}, {}
        )
    if setup.reference_adapter is None and not moves:
        return {}
    return _copied(load_start(setup) if start is None else start, setup, setup.model.param_dtype)


def _copied(params: Params, setup: Setup, dtype: Any) -> Params:
    # Copied, as the step donates the params: an alias would be overwritten by the first update.
    copy = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: jnp.copy(leaf).astype(dtype), tree), out_shardings=setup.shardings
    )
    return copy(params)


def reference_dtype(model: Transformer, *, moves: bool) -> Any:
    """Returns the dtype of the reference: the master dtype if it moves, in which small moves do not vanish."""
    return model.param_dtype if moves else model.compute_dtype


def whole_weights(setup: ModelSetup, params: Params, base: Base | None) -> Params | Weights:
    """Returns the weights that the model runs on, whether all of them or adapters are trained."""
    if setup.adaptation is None or isinstance(params, Weights):
        return params
    assert base is not None
    return weights_of(setup.adaptation.lora, base, params)


def load_reference_weights(setup: Setup) -> Params | Weights:
    """Loads the reference as the model runs on it, whether all weights or adapters are trained."""
    reference = load_reference(setup, None)
    # A reference of its own needs no base.
    own = setup.reference_folder is not None
    return whole_weights(setup, reference, None if own else load_base(setup))


def abstract_frozen(setup: Setup, *, live: bool, moves: bool) -> Frozen:
    """Returns shape, dtype and sharding of every leaf of `load_frozen`."""
    adaptation, model = setup.adaptation, setup.model
    whole = _placed(_in_dtype(abstract_params(model), model.compute_dtype), setup.whole_shardings)
    if adaptation is None:
        return Frozen(None, whole if live and not moves else None)
    base = _placed(adaptation.abstract_base(model), adaptation.base_shardings(model, setup.mesh))
    if not live or moves:
        return Frozen(base, None)
    if setup.reference_folder is not None:
        return Frozen(base, Weights(whole, {}, {}))
    return Frozen(base, {} if setup.reference_adapter is None else _placed(setup.trained, setup.shardings))


def _in_dtype(shapes: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def _placed(shapes: Params, shardings: Params) -> Params:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
