"""What a run would be, from everything but its weights."""

from __future__ import annotations

import math
from typing import Any

import jax

from jdpo.config import ReferenceSettings, TrainConfig
from jdpo.devices import leave_out_missing_tpus
from jdpo.training.fit.assembly import Assembly, assemble
from jdpo.training.run_dir import check_output_dir
from jdpo.training.setup.numerics import numerics, resolve_dtype
from jdpo.training.setup.run_setup import Log, build
from jdpo.training.setup.validation import Mode
from jdpo.words import memory


def dry_run(config: TrainConfig, log: Log) -> None:
    """Checks all that a run checks before it loads weights, and says what it would be.

    Args:
      log: takes lines for the user.

    Raises:
      ValueError: anything that does not fit.
    """
    leave_out_missing_tpus()
    config = resolve_dtype(config)
    with numerics(config):
        check_output_dir(config)
        setup = build(config, log, weights=False)
        live = setup.task.uses_reference and isinstance(config, ReferenceSettings) and config.reference == "live"
        mode: Mode = "live" if live else "none"  # auto and cached compute a reference's log-probs before they train
        remat = "none" if config.remat == "auto" else config.remat
        log(describe_kept(assemble(setup, reference=mode, remat=remat)))


def describe_kept(assembly: Assembly) -> str:
    """What lies on a device from the first step to the last, beside activations and batches, in a line."""
    parts = {
        "weights that are trained": bytes_a_device(assembly.state.params),
        "state of the optimizer": bytes_a_device(assembly.state.opt_state),
        "frozen weights": bytes_a_device((assembly.frozen, assembly.state.reference_params)),
        "gradients": bytes_a_device(assembly.state.params),
    }
    listed = ", ".join(f"{memory(size)} {name}" for name, size in parts.items() if size)
    return f"kept on each device: {memory(sum(parts.values()))} ({listed}), besides activations"


def bytes_a_device(tree: Any) -> int:
    """Bytes that the leaves, of a shape, a dtype and a sharding, take on the device that has most of them."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
