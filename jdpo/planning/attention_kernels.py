"""The FLOPs of attention kernels, whose programs do not tell them: by the formulas of `jdpo.models.attention.work`."""

from __future__ import annotations

from typing import NamedTuple

from jdpo.devices import target
from jdpo.models.attention.work import PRODUCTS, computed_pairs
from jdpo.planning.hlo.hlo_text import Op
from jdpo.planning.planned_step import PlannedStep
from jdpo.sharding.axes import num_batch_shards

_SPLASH = {"splash_mha_fwd": "forward", "splash_mha_dkv": "keys", "splash_mha_dq": "queries"}
_CUDNN = {"__cudnn$fmhaSoftmax": "forward", "__cudnn$fmhaSoftmaxBackward": "backward"}


class AttentionWork(NamedTuple):
    """The work of one kernel call.

    Attributes:
      backend: "cudnn" or "splash".
      pair_flops: FLOPs of one product over all pairs that a call computes, over all heads of a device.
      dtype: of the operands.
    """

    backend: str
    pair_flops: float
    dtype: str

    def flops(self, op: Op) -> float | None:
        """Returns the FLOPs of a kernel of attention, or None for any other operation."""
        products = self._products(op)
        return None if products is None else products * self.pair_flops

    def _products(self, op: Op) -> int | None:
        known = PRODUCTS.get(self.backend)
        if op.opcode != "custom-call" or known is None:
            return None
        if self.backend == "cudnn":
            part = _CUDNN.get(op.target or "")
            return None if part is None else {"forward": known.forward, "backward": known.backward}[part]
        part = next((part for name, part in _SPLASH.items() if name in f"{op.name} {op.op_name}"), None)
        if op.target != "tpu_custom_call" or part is None:
            return None
        # Keys and values: scores, their gradient, and two results. Queries: the same and one. Fused: five together.
        fused = '"use_fused_bwd_kernel": true' in op.attributes.replace('\\"', '"')
        of_keys = 5 if fused else 4
        return {"forward": known.forward, "keys": of_keys, "queries": known.backward - of_keys}[part]


def attention_work(planned: PlannedStep) -> AttentionWork:
    """Returns the work of a call of the step's attention kernels: the mean over its micro-batches, shards and layers.

    Call it while `compiling_for` the platform of the program.
    """
    assembly, batch = planned.assembly, planned.batch
    model, mesh = assembly.model, assembly.setup.mesh
    config = model.config
    length = batch.gather.shape[-1]
    backend = assembly.attention(length)
    # One call per micro-batch and shard.
    calls = batch.lengths.shape[0] * num_batch_shards(mesh)
    lengths = batch.lengths.reshape(calls, -1, *batch.lengths.shape[3:])
    pairs = sum(
        computed_pairs(
            backend,
            of_call,
            length,
            num_heads=config.num_heads,
            window=window,
            block_q=model.attention_block_q,
            block_kv=model.attention_block_kv,
            on_cpu=target().platform == "cpu",
        )
        * config.layer_windows.count(window)
        for window in set(config.layer_windows)
        for of_call in lengths
    ) / (calls * max(1, len(config.layer_windows)))
    heads = config.num_heads / mesh.shape["tensor"]
    return AttentionWork(
        backend, 2.0 * heads * config.head_dim * pairs, str(planned.assembly.setup.config.compute_dtype)
    )
