"""The device memory of a DPO step: all weights trained, or adapters next to a frozen base.

    python benchmarks/lora_memory.py [--shapes smollm2-135m llama-3.1-8b] [--tokens N] [--rank R] [--out FILE]

The step that `jdpo dpo` runs, compiled ahead of time for one device at the shapes of well-known models and asked for
its memory analysis; no weight is ever made, so 8B fits any machine. One micro-batch of pairs of 3 x 128 tokens in
packed rows, AdamW, remat full, float32 throughout except for int8 kernels: XLA's CPU backend has no bfloat16 of its
own, and its analysis of bfloat16 would count the conversions. In bfloat16 the base and activations take half.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import machine_line

from jdpo.config import MeshConfig
from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import item_sizes, plan_run
from jdpo.losses.settings import loss_settings
from jdpo.models.lora.adapters import Lora, abstract_adapters
from jdpo.models.lora.base_weights import Base, BaseDtype, abstract_base
from jdpo.models.lora.targets import find_sites
from jdpo.models.model_config import LayerKind, ModelConfig, RopeConfig
from jdpo.models.transformer import Transformer, abstract_params
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import micro_batch_sharding, replicated
from jdpo.training.fit.assembly import compile_step
from jdpo.training.fit.memory_fit import program_bytes
from jdpo.training.step.objectives import PackedLogps, PreferenceObjective
from jdpo.training.step.train_step import Frozen, TrainState
from jdpo.types import TokenizedPair

GIB = 2**30


def shape(layers: int, width: int, heads: int, kv_heads: int, d_ff: int, vocab: int, *, tied: bool) -> ModelConfig:
    """Returns the config of a Llama of these sizes."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        d_ff=d_ff,
        norm_eps=1e-5,
        layers=(LayerKind(rope=RopeConfig(theta=1e4)),) * layers,
        tie_embeddings=tied,
        qkv_bias=False,
        o_bias=False,
        max_positions=8192,
    )


SHAPES = {
    "smollm2-135m": shape(30, 576, 9, 3, 1536, 49152, tied=True),
    "llama-3.2-1b": shape(16, 2048, 32, 8, 8192, 128256, tied=True),
    "llama-3.1-8b": shape(32, 4096, 32, 8, 14336, 128256, tied=False),
}


class Arm(NamedTuple):
    """A way to train: full or adapters, float or int8 base, live or cached reference."""

    name: str
    adapted: bool
    int8: bool
    live: bool


ARMS = (
    Arm("all weights, live reference", False, False, True),
    Arm("all weights, cached reference", False, False, False),
    Arm("LoRA, live reference", True, False, True),
    Arm("LoRA, int8 base, live reference", True, True, True),
)


def one_batch(num_tokens: int, *, cached: bool) -> Any:
    """Returns one micro-batch of about so many slots."""
    ids = np.zeros(128, np.int32)
    pairs = [TokenizedPair(ids, ids, ids, "") for _ in range(max(1, num_tokens // 384))]
    everything = np.arange(len(pairs))
    plan = plan_run(item_sizes(pairs), [everything], num_shards=1, max_tokens_per_device=num_tokens)
    batch = pack_step(pairs, everything, plan.step(everything))
    scored = np.zeros(batch.logp_target.shape, np.float32)
    return batch._replace(logp_reference=scored) if cached else batch


def bytes_of(config: ModelConfig, arm: Arm, num_tokens: int, rank: int) -> dict[str, int]:
    """Returns the bytes of one step by kind."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    model, whole = Transformer(config, remat="full"), replicated(mesh)
    sites = find_sites(model)
    lora = Lora(r=rank, alpha=2 * rank, use_rslora=False, sites=sites) if arm.adapted else None
    trained = abstract_params(model) if lora is None else abstract_adapters(lora, jnp.float32)
    base: Base | None = None
    reference: Any = abstract_params(model) if arm.live else None
    if lora is not None:
        base = abstract_base(model, sites, BaseDtype(jnp.float32, int8=arm.int8))
        reference = {} if arm.live else None
    optimizer = optax.adamw(1e-6)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=trained,
        opt_state=jax.eval_shape(optimizer.init, trained),
        rng=jax.ShapeDtypeStruct((2,), jnp.uint32),
    )
    frozen = Frozen(base, reference)
    everywhere = partial(jax.tree.map, lambda leaf: whole)
    compiled = compile_step(
        objective=PreferenceObjective(PackedLogps(model, mesh), loss_settings("sigmoid", beta=0.1)[0], lora=lora),
        optimizer=optimizer,
        schedule=lambda step: 1e-6,
        mesh=mesh,
        state_shardings=everywhere(state),
        frozen_shardings=everywhere(frozen),
    )
    batch = one_batch(num_tokens, cached=not arm.live)
    by_row = micro_batch_sharding(mesh)
    batch = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=by_row), batch)
    program = compiled.train_step.lower(state, frozen, batch).compile()
    sizes = program.memory_analysis()
    return {
        "state": _size(state),
        "frozen": _size(frozen),
        "temporary": int(sizes.temp_size_in_bytes),
        "whole": int(program_bytes(program)),
    }


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def report(shapes: list[str], num_tokens: int, rank: int) -> str:
    """Returns the report as Markdown."""
    lines = [
        "# Memory of a DPO step: adapters next to a frozen base, and all weights",
        "",
        f"`python benchmarks/lora_memory.py`, {machine_line()}.",
        "",
        "From the memory analysis of the compiled step (CPU backend, float32), not measured on an accelerator. State:",
        "what is trained, with AdamW's two moments. Frozen: the base, or a reference of its own. Temporary: gradients,",
        f"activations (remat full) and buffers. One micro-batch of {num_tokens} slots; adapters of rank {rank} on all",
        "linear layers. GiB.",
        "",
    ]
    for name in shapes:
        lines += [
            f"## {name}",
            "",
            "| | state | frozen | temporary | whole step | of the first |",
            "|---|---|---|---|---|---|",
        ]
        first = None
        for arm in ARMS:
            sizes = bytes_of(SHAPES[name], arm, num_tokens, rank)
            first = first or sizes["whole"]
            figures = " | ".join(f"{size / GIB:.2f}" for size in sizes.values())
            lines.append(f"| {arm.name} | {figures} | {sizes['whole'] / first:.2f} |")
            print(f"{name}: {lines[-1]}", file=sys.stderr)
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, compiles the steps and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2-135m", "llama-3.1-8b"])
    parser.add_argument("--tokens", type=int, default=4096, help="slots of the micro-batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the report there, too")
    arguments = parser.parse_args()
    text = report(arguments.shapes, arguments.tokens, arguments.rank)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
