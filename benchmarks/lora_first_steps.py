"""The first steps of LoRA DPO in bfloat16, over meshes and orders of devices: does any of them stay at ln 2?

    python benchmarks/lora_first_steps.py [--seeds N] [--steps N] [--learning-rate X] [--out FILE]

B starts at 0, so that the first step depends on the sign of the gradient of B alone (Adam makes every step of a weight
as large as the learning rate), and A has no gradient at all. marin (issue 4903) saw runs that stayed at ln 2 on some
orders of the chips of a v5p-8. Here the step that `jdpo dpo` runs trains a small Llama on preferences that can be
learned, on 1, 2, 4 and 8 CPU devices: matrix products in bfloat16, adapters and moments in float32, AdamW without
warm-up, the reference live and cached by another program. Per mesh: the loss of the first and the last step, the share
of the first gradient of B whose sign differs from that of a float32 program, and by how much A moves in the first step.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from machine import machine_line

from jdpo.config import MeshConfig
from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import item_sizes, plan_run
from jdpo.losses.settings import loss_settings
from jdpo.models.lora.adapters import Lora, abstract_adapters, adapter_axes, init_adapters
from jdpo.models.lora.base_weights import Base, BaseDtype, base_axes
from jdpo.models.lora.targets import find_sites
from jdpo.models.model_config import LayerKind, ModelConfig, RopeConfig
from jdpo.models.transformer import Transformer, Weights, init_params
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import micro_batch_sharding, place, state_shardings
from jdpo.sharding.rules import param_shardings
from jdpo.training.fit.assembly import compile_step
from jdpo.training.reference.packed_scoring import packed_logps
from jdpo.training.step.objectives import PackedLogps, PreferenceObjective
from jdpo.training.step.train_step import Frozen, TrainState
from jdpo.types import PackedBatch, TokenizedPair

CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=192,
    norm_eps=1e-6,
    layers=(LayerKind(rope=RopeConfig(theta=1e4)),) * 2,
    tie_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    max_positions=256,
)
PAIRS = 16


class Case(NamedTuple):
    """A mesh of some devices in an order, and where the reference is computed."""

    mesh: MeshConfig
    order: tuple[int, ...]
    live: bool = True
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        sizes = (f"{axis} {getattr(self.mesh, axis)}" for axis in ("data", "fsdp", "tensor"))
        split = ", ".join(size for size in sizes if not size.endswith(" 1")) or "one device"
        in_order = "" if self.order == tuple(range(len(self.order))) else f", order {' '.join(map(str, self.order))}"
        return split + in_order


def cases() -> list[Case]:
    """Returns the cases, the float32 one that signs are compared with first."""

    def case(data: int, fsdp: int, tensor: int, order: tuple[int, ...] | None = None, **options: Any) -> Case:
        return Case(
            MeshConfig(data=data, fsdp=fsdp, tensor=tensor), order or tuple(range(data * fsdp * tensor)), **options
        )

    return [
        case(1, 1, 1, dtype="float32"),
        case(1, 1, 1),
        case(1, 1, 1, live=False),
        case(1, 2, 1),
        case(1, 1, 2),
        *(case(1, 4, 1, order) for order in (None, (3, 2, 1, 0), (1, 2, 3, 0), (0, 2, 1, 3))),
        case(1, 4, 1, live=False),
        case(4, 1, 1),
        case(1, 2, 2),
        case(1, 8, 1),
        case(1, 8, 1, (5, 2, 7, 0, 3, 6, 1, 4)),
        case(2, 2, 2),
        case(2, 2, 2, live=False),
    ]


class Outcome(NamedTuple):
    """What a run showed.

    Attributes:
      losses: of every step.
      moved_a: the largest change of an A in the first step.
      gradient_b: the first gradient of all Bs, up to a factor.
      noise: the largest difference of policy and reference before the first update, in nats per completion.
    """

    losses: np.ndarray
    moved_a: float
    gradient_b: np.ndarray
    noise: float


def batches(seed: int, num_steps: int) -> list[PackedBatch]:
    """Returns batches for up to eight shards: chosen answers have mostly words of the upper half, rejected ones not."""
    rng = np.random.default_rng(seed)

    def answer(upper: bool) -> np.ndarray:
        half = rng.random(12) < (0.8 if upper else 0.2)
        return (rng.integers(0, 32, 12) + 32 * half).astype(np.int32)

    made = []
    for _ in range(num_steps):
        pairs = [
            TokenizedPair(rng.integers(0, 64, 6).astype(np.int32), answer(True), answer(False), str(row))
            for row in range(PAIRS)
        ]
        everything = np.arange(PAIRS)
        plan = plan_run(item_sizes(pairs), [everything], num_shards=8, max_tokens_per_device=1024)
        made.append(pack_step(pairs, everything, plan.step(everything)))
    return made


def run(case: Case, *, seeds: int, num_steps: int, learning_rate: float) -> list[Outcome]:
    """Trains with each seed; all have one program."""
    devices = jax.devices()
    mesh = make_mesh(case.mesh, [devices[index] for index in case.order])
    model = Transformer(CONFIG, compute_dtype=jnp.dtype(case.dtype), attention="xla", remat="full")
    lora = Lora(r=8, alpha=16, use_rslora=False, sites=find_sites(model))
    optimizer = optax.adamw(learning_rate, weight_decay=0.0)
    abstract = abstract_adapters(lora, jnp.float32)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        abstract,
        jax.eval_shape(optimizer.init, abstract),
        jax.ShapeDtypeStruct((2,), jnp.uint32),
    )
    base = base_of(model, 0)
    shardings = state_shardings(state, abstract, param_shardings(adapter_axes(lora), abstract, mesh), mesh)
    axes = base_axes(model, lora.sites, BaseDtype(jnp.dtype(case.dtype)))
    frozen = Frozen(
        Base(param_shardings(axes.params, base.params, mesh), {}),
        {} if case.live else None,
    )
    compiled = compile_step(
        objective=PreferenceObjective(PackedLogps(model, mesh), loss_settings("sigmoid", beta=0.1)[0], lora=lora),
        optimizer=optimizer,
        schedule=optax.constant_schedule(learning_rate),
        mesh=mesh,
        state_shardings=shardings,
        frozen_shardings=frozen,
    )

    def outcome(seed: int) -> Outcome:
        adapters = init_adapters(lora, jax.random.key(seed), jnp.float32)
        base = base_of(model, seed)
        start = TrainState(np.int32(0), adapters, optimizer.init(adapters), np.zeros(2, np.uint32))
        start = jax.device_put(jax.device_get(start), shardings)
        placed = jax.device_put(Frozen(base, frozen.reference), frozen)
        losses, first = [], None
        for batch in batches(seed, num_steps):
            given = place(batch if case.live else cached(model, base, batch), micro_batch_sharding(mesh))
            start, report = compiled.train_step(start, placed, given)
            losses.append(float(report.loss))
            first = first or jax.device_get((start, report))
        assert first is not None
        after, report = first
        changes = jax.tree.map(lambda new, old: np.abs(new - old), after.params, jax.device_get(adapters))
        moved = [float(leaf.max()) for leaf in leaves_called("a", changes)]
        # The first moments are the gradients, up to a factor.
        of_b = [leaf.ravel() for leaf in leaves_called("b", after.opt_state[0].mu)]
        rewards = [np.abs(report.rows[f"rewards/{side}"]).max() for side in ("chosen", "rejected")]
        return Outcome(np.array(losses), max(moved), np.concatenate(of_b), float(max(rewards)) / 0.1)

    return [outcome(seed) for seed in range(seeds)]


def leaves_called(name: str, tree: Any) -> list[Any]:
    """Returns the leaves of a tree of adapters with this last name."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == name]


def base_of(model: Transformer, seed: int) -> Base:
    """Returns a base whose layers change their input about as much as those of a trained model do."""
    params = init_params(model.clone(compute_dtype=jnp.float32), jax.random.key(100 + seed))
    # Norm scales stay 1.
    larger = jax.tree.map(lambda leaf: leaf if (leaf == 1).all() else 5 * leaf, params)
    return Base(jax.tree.map(lambda leaf: leaf.astype(model.compute_dtype), jax.device_get(larger)), {})


def cached(model: Transformer, base: Base, batch: PackedBatch) -> PackedBatch:
    """Returns the batch with the reference's log-probs, by the program of the reference cache on one device."""
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), ("data", "fsdp", "expert", "tensor"))
    logps = packed_logps(model, one)(Weights(base.params, {}, {}), batch)
    return batch._replace(logp_reference=np.asarray(jax.device_get(logps)))


def row(case: Case, found: list[Outcome], exact: list[Outcome]) -> str:
    """Returns the row of a case in the table."""
    first, last = ([outcome.losses[index] for outcome in found] for index in (0, -1))
    flipped = [
        float(np.mean(np.sign(ours.gradient_b) != np.sign(theirs.gradient_b)))
        for ours, theirs in zip(found, exact, strict=True)
    ]
    cells = [
        case.name,
        case.dtype,
        "live" if case.live else "cached",
        f"{max(outcome.noise for outcome in found):.1e}",
        f"{min(first):.5f} to {max(first):.5f}",
        " ".join(f"{loss:.4f}" for loss in last),
        f"{100 * max(flipped):.2f} %",
        f"{max(outcome.moved_a for outcome in found):.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Prints the table; the exit code is 1 if the last losses of a seed differ by a fifth of what was learned."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="also write the table there")
    options = parser.parse_args()
    lines = [
        f"{machine_line()}; {options.seeds} seeds, {options.steps} steps of {PAIRS} pairs, learning rate "
        f"{options.learning_rate:g}, rank 8.",
        "",
        f"| mesh | compute dtype | reference | log-ratio before the first update | first loss | loss of step "
        f"{options.steps} by seed | signs of the first gradient of B unlike float32's | largest first step of A |",
        "| --- | --- | --- | ---: | --- | --- | ---: | ---: |",
    ]
    exact: list[Outcome] = []
    last = []
    for case in cases():
        found = run(case, seeds=options.seeds, num_steps=options.steps, learning_rate=options.learning_rate)
        exact = exact or found
        lines.append(row(case, found, exact))
        print(lines[-1], flush=True)
        last.append([outcome.losses[-1] for outcome in found])
    spread = np.ptp(np.array(last), axis=0)  # of a seed, over all cases
    learned = np.log(2) - np.mean(last, axis=0)
    lines += ["", f"Spread of the last loss over all cases, by seed: {', '.join(f'{x:.4f}' for x in spread)}"]
    lines[-1] += f"; learned since ln 2: {', '.join(f'{x:.4f}' for x in learned)}."
    print(lines[-1])
    if options.out:
        options.out.write_text("\n".join(["# First steps of LoRA DPO", "", *lines, ""]), encoding="utf-8")
    return int((spread > 0.2 * learned).any())


if __name__ == "__main__":
    raise SystemExit(main())
