"""Options that the step of a run is compiled with, where the compiler's own defaults are not the best for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdpo.devices import target
from jdpo.processes import is_first
from jdpo.sharding.placement import replicated

_logger = logging.getLogger(__name__)

Value = bool | int | float | str

# SparseCores, which are next to the TensorCore of a chip, gather weights and sum gradients while it multiplies. By
# default the TensorCore does so itself. Summing over a whole axis is one option, gathering over one, two and three axes
# of the torus are three. The last three are what offloading to SparseCores needs.
_SPARSE_CORES: dict[str, Value] = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
    "xla_sc_enable_instruction_fusion": False,
}

# By default, products of gathered weights may become loops over the parts that each device has, which write and read
# their sums in every turn. Weights are gathered whole instead.
_WHOLE_WEIGHTS: dict[str, Value] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}

# Sums of gradients stay in the loop over micro-batches. The pass that would move them out of it expects an addition
# after each sum, where a step of several micro-batches has a slice or a conversion: libtpu 0.0.52 ends in an error.
_SUMS_IN_LOOP: dict[str, Value] = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}

OPTIONS: dict[str, dict[str, Value]] = {
    "gpu": {
        # The last gradients of a layer are summed during the next layer of the backward pass. Otherwise nothing runs
        # meanwhile, as every turn of the loop over layers ends with its own collectives. One does not work without the
        # other. The same for gathering weights hides a little more, but copies them in every turn, which takes longer.
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
    },
    "TPU v5 lite|TPU v5e": {
        # The sum of gradients runs next to matrix products, as gathering weights does by default. Two options: one
        # splits it into a start and a done, the other lets products run in between.
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        **_WHOLE_WEIGHTS,
        **_SUMS_IN_LOOP,
    },
    # libtpu refuses there to let products run between the start and the done of a TensorCore's collective.
    "TPU v5p?": _WHOLE_WEIGHTS | _SPARSE_CORES | _SUMS_IN_LOOP,
    "TPU v6 lite|TPU v6e": _WHOLE_WEIGHTS | _SPARSE_CORES | _SUMS_IN_LOOP,
    "tpu": _SUMS_IN_LOOP,
}
"""Platform, or pattern of the kinds of devices as in `jdpo.chips` -> options of its compiler, which are all about
communication. The first that fits counts."""


def compiler_options(mesh: Mesh, asked: Mapping[str, Value | None] | None = None) -> dict[str, Value]:
    """Returns the options that programs for a mesh are compiled with: OPTIONS, changed as the config asks.

    An option that the compiler refuses is left out, and a line names it: the options of one version of a compiler need
    not be those of the next.

    Args:
      asked: options to add or to replace; None as a value leaves the option at the compiler's default.
    """
    merged = options_of(mesh) | dict(asked or {})
    options = {name: value for name, value in merged.items() if value is not None}
    while options:
        try:
            _compile_nothing(mesh, options)
        except jax.errors.JaxRuntimeError as error:
            message = str(error).partition("\n")[0]
            # Whole names, as some are the beginning of another. A compiler that dislikes how options go together may
            # name none of them; then those of the config are left out, and the others if it still does.
            refused = [name for name in options if re.search(rf"\b{re.escape(name)}\b", message)]
            for name in refused or [name for name in asked or () if name in options] or list(options):
                if is_first():
                    _logger.warning("compiler option %s=%s is left out: %s", name, options[name], message)
                del options[name]
        else:
            break
    return options


def options_of(mesh: Mesh) -> dict[str, Value]:
    """Returns the OPTIONS of a mesh's devices; none for a single device, which communicates with no other."""
    names = (target().platform, mesh.devices.flat[0].device_kind)
    found = (options for key, options in OPTIONS.items() if any(re.fullmatch(key, name) for name in names))
    return dict(next(found, {})) if mesh.size > 1 else {}


def _compile_nothing(mesh: Mesh, options: Mapping[str, Any]) -> None:
    """Compiles a program of one operation, since a compiler reads its options before any program."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    jax.jit(jnp.negative).lower(scalar).compile(compiler_options=dict(options))
