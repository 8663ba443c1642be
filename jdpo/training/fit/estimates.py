"""Estimates of a step that need no compilation: its memory and its time per token, by remat policy.

They say which policy and how many tokens at once to compile first. What then fits is decided by the compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdpo.chips import chip_of
from jdpo.devices import target
from jdpo.models.delta.delta_work import kept_by_rule, projection_width, rule_products, value_width
from jdpo.models.model_config import DeltaConfig, ModelConfig
from jdpo.sharding.axes import num_batch_shards
from jdpo.training.fit.assembly import Assembly
from jdpo.training.fit.flops import layer_products, products_again
from jdpo.training.step.objectives import Batch
from jdpo.types import PackedBatch

GRADIENT_BYTES = 4
"""Bytes per trained parameter of its gradient, and of the sum of gradients."""

ACCUMULATED_BYTES = 16
"""Bytes per trained parameter that each micro-batch moves: its gradient is written and read, the sum is read and
written."""

LAYERS_AT_WORK = 2
"""Layers whose weights are gathered, and whose whole backward pass is in memory, at the same time."""

MOVED = {"none": 4.5, "dots": 0.0, "attention": 0.0, "full": 0.0, "offload": 0.0}
"""Bytes that a policy moves per byte that it keeps in addition to the next policy, beyond what that one moves.

Values that are kept are copied into the arrays of all layers and out of them. For "dots" that is as much as to write
what is computed again, but "none" keeps what the next operation could compute as it reads. Compiled programs of three
models moved 4.4 to 4.7 bytes per byte (benchmarks/results/2026-11-30-remat.md).
"""


MOVED_PER_WIDTH = 40
"""Numbers that a layer moves in memory per token under any policy, per unit of d + f, as read from such programs."""


class Speeds(NamedTuple):
    """FLOPs of matrix products, bytes of memory, and bytes to and from other devices, that a device does per second."""

    flops: float
    memory: float
    wire: float


CPU = Speeds(flops=1e11, memory=2e10, wire=2e10)
"""Two cores, roughly: only proportions decide."""

LIKELY_CHIPS = {"gpu": "NVIDIA H200", "tpu": "TPU v5 lite"}
"""Chips in place of those whose speeds are unknown."""


def kept_bytes(config: ModelConfig, remat: str, *, itemsize: int, places: float, tensor: int = 1) -> float:
    """Returns the bytes per token that all layers keep for the backward pass; the formulas of docs/memory.md.

    Args:
      remat: a policy's name.
      itemsize: bytes per number of the compute dtype.
      places: places of attention per token.
      tensor: devices that share heads and the MLP's width.
    """
    d, f, k = config.d_model, _mlp_width(config), config.head_dim
    h, g = config.num_heads / tensor, config.num_kv_heads / tensor
    f /= tensor
    total = 0.0 if remat == "offload" else itemsize * d
    of_attention = 0.0
    if remat in ("attention", "dots", "none"):
        of_attention += places * h * (itemsize * k + max(4, itemsize))
    if remat in ("dots", "none"):
        total += itemsize * (d + 2 * f)
        of_attention += itemsize * ((1 + config.attention_gate) * h * k + 2 * g * k)
    if remat == "none":
        total += itemsize * (4 * d + 4 * f)
        of_attention += itemsize * (places * (h + 2 * g) * k - 2 * g * k)
        of_attention += itemsize * config.attention_gate * 2 * h * k  # its sigmoid, and what it multiplies
    num_attention = len(config.layer_windows)
    of_delta = 0.0 if config.delta is None else _kept_by_delta(config.delta, remat, itemsize, places) / tensor
    return total * config.num_layers + of_attention * num_attention + of_delta * config.num_delta_layers


def _kept_by_delta(config: DeltaConfig, remat: str, itemsize: int, places: float) -> float:
    """Returns the bytes per token of a DeltaNet, without the output of its last projection."""
    kept = 0.0
    # The rule's output is not kept: its gradient computes the states again, and with them the output.
    if remat in ("dots", "none"):
        kept += itemsize * projection_width(config)
    if remat == "none":
        # The norm's input and output, and the gated output.
        kept += places * kept_by_rule(config, itemsize) + 3 * itemsize * value_width(config)
    return kept


def _mlp_width(config: ModelConfig) -> float:
    """The mean width of the MLPs that a token goes through; half of it where there is no gate."""
    sparse = sum(kind.mlp != "dense" for kind in config.layers)
    dense = (len(config.layers) - sparse) * config.d_ff * (1 if config.gated_mlp else 0.5)
    experts = 0
    if config.moe is not None:
        experts = sparse * (config.moe.experts_per_token * config.moe.d_ff + (config.moe.shared_d_ff or 0))
    return (dense + experts) / len(config.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """The memory that a device needs for a step, by policy; linear in the tokens of its part of a micro-batch.

    Attributes:
      fixed_bytes: whatever does not grow with the tokens.
      bytes_per_token: the rest, by policy.
      seconds_per_token: of what the layers multiply and move, by policy.
      moved_per_token: the part of these seconds in which they move values in memory.
      seconds_per_micro_batch: of what each micro-batch moves in memory, however many tokens it has.
      wire_seconds: of what each micro-batch moves between devices while they multiply.
    """

    fixed_bytes: float
    bytes_per_token: Mapping[str, float]
    seconds_per_token: Mapping[str, float]
    moved_per_token: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds_per_micro_batch: float = 0.0
    wire_seconds: float = 0.0

    def num_bytes(self, remat: str, tokens: float) -> float:
        """Returns the bytes of a device's memory for a micro-batch of this many tokens."""
        return self.fixed_bytes + tokens * self.bytes_per_token[remat]

    def seconds(self, remat: str, tokens: int) -> float:
        """Returns the time per token of a micro-batch of this many tokens."""
        layers = max(tokens * self.seconds_per_token[remat], self.wire_seconds)
        return (layers + self.seconds_per_micro_batch) / tokens


def estimate_step(assembly: Assembly, policies: Iterable[str], batch: Batch) -> StepEstimate:
    """Estimates the training step of a run under each of the policies.

    Args:
      batch: the shape that needs the most memory.
    """
    setup, model = assembly.setup, assembly.model
    config, mesh = model.config, setup.mesh
    tensor, itemsize = mesh.shape["tensor"], jnp.dtype(model.compute_dtype).itemsize
    speeds = speeds_of(mesh.devices.flat[0].device_kind, target().platform, mesh.size)
    trained, frozen = local_size(assembly.state.params), local_size(assembly.frozen)
    state_bytes = local_bytes((assembly.state, assembly.frozen))
    products, (places, length) = layer_products(config) / tensor, _attention_places(batch)

    def kept(remat: str) -> float:
        return kept_bytes(config, remat, itemsize=itemsize, places=places, tensor=tensor)

    # Each query sees half of its sequence; scores and weighted values are two products.
    attention_again = places * config.num_heads / tensor * config.head_dim * length * len(config.layer_windows)
    rule_forward, rule_backward = _rule_products(config, places, length)
    # Frozen weights have no gradient.
    passes = 3 if setup.adaptation is None else 2

    def moved_seconds(remat: str) -> float:
        moved = MOVED_PER_WIDTH * itemsize * (config.d_model + _mlp_width(config)) * config.num_layers / tensor
        moved += MOVED[remat] * (kept(remat) - kept("dots"))
        return moved / speeds.memory

    def seconds(remat: str) -> float:
        multiplied = passes * products + products_again(config, remat) / tensor
        multiplied += attention_again if remat in ("full", "offload") else 0
        multiplied += ((1 + (remat != "none")) * rule_forward + rule_backward) / tensor
        return 2 * multiplied / speeds.flops + moved_seconds(remat)

    gathered = itemsize * LAYERS_AT_WORK * products / config.num_layers
    gathered += itemsize * config.d_model * config.vocab_size / tensor
    # Every weight is gathered for the forward pass and again for the backward pass, and its gradient is reduced.
    weights = local_size(assembly.state.params, whole=True) + local_size(assembly.frozen, whole=True)
    wire = 2 * itemsize * weights + GRADIENT_BYTES * local_size(assembly.state.params, whole=True)
    return StepEstimate(
        fixed_bytes=state_bytes + GRADIENT_BYTES * trained + (gathered if mesh.size > 1 else 0),
        bytes_per_token={
            remat: batch_bytes(assembly, remat, batch) / tokens_at_once(assembly, batch) for remat in policies
        },
        seconds_per_token={remat: seconds(remat) for remat in policies},
        moved_per_token={remat: moved_seconds(remat) for remat in policies},
        seconds_per_micro_batch=(ACCUMULATED_BYTES * trained + passes * itemsize * (trained + frozen)) / speeds.memory,
        wire_seconds=wire / tensor / speeds.wire if mesh.size > 1 else 0.0,
    )


def _rule_products(config: ModelConfig, places: float, length: int) -> tuple[float, float]:
    """Returns the multiplications per token of the delta rule in all layers, forward and backward."""
    if config.delta is None:
        return 0.0, 0.0
    of_layer = rule_products(config.delta, length)
    num_places = places * config.num_delta_layers
    return num_places * of_layer.forward, num_places * of_layer.backward


def batch_bytes(assembly: Assembly, remat: str, batch: Batch) -> float:
    """Estimates the bytes of a device's memory that grow with the batch: what is kept, and what is at work."""
    model, mesh = assembly.model, assembly.setup.mesh
    config, itemsize, tokens = model.config, jnp.dtype(model.compute_dtype).itemsize, tokens_at_once(assembly, batch)
    places, _ = _attention_places(batch)

    def kept(remat: str) -> float:
        return kept_bytes(config, remat, itemsize=itemsize, places=places, tensor=mesh.shape["tensor"])

    scored = batch.logp_slot.size / batch.tokens.size if isinstance(batch, PackedBatch) else 1
    # Hidden states of all tokens before and after the last norm, those of scored tokens, and their gradients.
    at_work = LAYERS_AT_WORK * kept("none") / config.num_layers + (4 + 2 * scored) * itemsize * config.d_model
    return tokens * (kept(remat) + at_work)


def tokens_at_once(assembly: Assembly, batch: Batch) -> int:
    """Returns the tokens, or slots, of a device's part of a micro-batch."""
    return math.prod(batch.tokens.shape[1:]) // num_batch_shards(assembly.setup.mesh)


def _attention_places(batch: Batch) -> tuple[float, int]:
    """Returns the places of attention per token, and the places of a row of them."""
    if isinstance(batch, PackedBatch):
        return batch.gather.size / batch.tokens.size, batch.gather.shape[-1]
    return 1.0, batch.tokens.shape[-1]


def speeds_of(device_kind: str, platform: str, num_devices: int) -> Speeds:
    """Returns the speeds of a device by its data sheet; where it is unknown, those of a chip of the same kind."""
    if platform == "cpu":
        return CPU
    for kind in (device_kind, LIKELY_CHIPS.get(platform, LIKELY_CHIPS["gpu"])):
        chip = chip_of(kind)
        if chip is None:
            continue
        # Two axes of a torus, in one direction each, since most slices of v5e and v6e do not close to rings; a node has
        # eight GPUs, which reach each other at once.
        wire = 2 * chip.link if platform == "tpu" else chip.link if num_devices <= 8 else chip.across
        speeds = Speeds(flops=chip.peak("bfloat16") or math.nan, memory=chip.hbm_bandwidth, wire=wire)
        # Figures that the table lacks are nan, with which no time could be compared.
        if all(map(math.isfinite, speeds)):
            return speeds
    raise AssertionError(device_kind)


def local_bytes(tree: Any) -> int:
    """Returns the bytes that a device holds of a tree of shapes with shardings, on the device itself."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind in (None, "device", "unpinned_host")
    )


def local_size(tree: Any, *, whole: bool = False) -> int:
    """Returns the number of elements of a tree that a device holds, or that there are on all devices together."""
    return sum(
        math.prod(leaf.shape if whole else leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)
    )
