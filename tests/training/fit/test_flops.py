"""FLOPs by hand, and against XLA's count in compiled programs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.chips import peak_flops
from jdpo.config import MeshConfig
from jdpo.data.batching.loader import collate_completions, collate_pairs
from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import StepPlan, item_sizes, plan_run, plan_step
from jdpo.data.batching.packing_shapes import PackedShape
from jdpo.losses.settings import loss_settings
from jdpo.models.attention.work import causal_pairs, computed_pairs
from jdpo.models.lora.adapters import Lora, abstract_adapters, num_adapter_params
from jdpo.models.lora.base_weights import Base
from jdpo.models.lora.targets import find_sites
from jdpo.models.model_config import DeltaConfig, LayerKind, ModelConfig, MoEConfig
from jdpo.models.remat import REMAT_ORDER
from jdpo.models.transformer import Transformer, abstract_params, make_apply_fn
from jdpo.sharding.mesh import make_mesh
from jdpo.training.fit.flops import Arithmetic, step_flops
from jdpo.training.step.head_chunks import max_kept_logits
from jdpo.training.step.objectives import PackedLogps, PreferenceObjective
from jdpo.training.step.train_step import loss_and_grads
from jdpo.types import TokenizedCompletion, TokenizedPair
from tests.conftest import small_llama

CONFIG = small_llama(vocab_size=1000, d_model=8, head_dim=4, d_ff=16, windows=(None, 3), max_positions=64)
# query and output 8 x 16 each, key and value 8 x 8 each, three of the MLP 8 x 16; two layers
N, HEAD, WIDTH = 2 * (2 * 128 + 2 * 64 + 3 * 128), 8 * 1000, 4 * 4


def pairs_of(*lengths: tuple[int, int, int]) -> list[TokenizedPair]:
    return [
        TokenizedPair(*(np.zeros(size, np.int32) for size in sizes), origin=str(i)) for i, sizes in enumerate(lengths)
    ]


def packed(rows: list[Any], shape: PackedShape) -> Any:
    slots = item_sizes(rows).slots
    return pack_step(
        rows, np.arange(len(rows)), StepPlan(plan_step(slots, num_rows=shape.num_rows, max_slots=10**6), shape)
    )


def in_micro_batches(batch: Any) -> Any:
    return jax.tree.map(lambda array: array[None], batch)


# One pair, P 2, C 3, R 1. Causal pairs of prompt, chosen and rejected: 1 + 2, 3 + 4 + 5 and 3, and with a window of 3
# 1 + 2, 3 + 3 + 3 and 3.
TOKENS, SCORED, SEEN = 6, 4, 18 + 15
PAIR = pairs_of((2, 3, 1))
SHAPE = PackedShape(1, 1, 2, 64, 4, 1, 16, 64)


def test_only_experts_that_a_token_is_routed_to_count_and_padding_has_none() -> None:
    moe = MoEConfig(num_experts=8, experts_per_token=3, d_ff=5, normalize=True, aux_loss_coef=0.1)
    dense, sparse = CONFIG.layers
    mixed = dataclasses.replace(CONFIG, layers=(dense, dataclasses.replace(sparse, mlp="experts")), moe=moe)
    of_experts = 3 * (3 * 8 * 5)
    shared = N - 3 * 128 + 8 * 8  # a router instead of one MLP
    batch = packed(PAIR, SHAPE)
    both, without = (
        step_flops(config, batch, Arithmetic("xla", "none"))
        for config in (mixed, dataclasses.replace(mixed, moe=dataclasses.replace(moe, d_ff=0)))
    )
    assert without.logical == 6 * shared * TOKENS + 6 * HEAD * SCORED + 12 * WIDTH * SEEN
    assert both.logical - without.logical == both.executed - without.executed == 6 * of_experts * TOKENS
    # A shared expert has three maps and a score, and every token goes through it.
    with_shared = dataclasses.replace(mixed, moe=dataclasses.replace(moe, shared_d_ff=4))
    added = step_flops(with_shared, batch, Arithmetic("xla", "none")).logical - both.logical
    assert added == 6 * 8 * (3 * 4 + 1) * TOKENS
    again = step_flops(mixed, batch, Arithmetic("xla", "full")).executed - both.executed
    again -= step_flops(CONFIG, batch, Arithmetic("xla", "full")).executed
    again += step_flops(CONFIG, batch, Arithmetic("xla", "none")).executed
    # The router and all maps of the experts replace the MLP of a dense layer.
    assert again == 2 * ((8 * 8 - 2 * 128) * batch.tokens.size + of_experts * TOKENS)


def with_delta(config: ModelConfig, delta: DeltaConfig) -> ModelConfig:
    """Returns the config with a DeltaNet in its first layer."""
    return dataclasses.replace(config, layers=(LayerKind(rope=None, mixer="delta"), *config.layers[1:]), delta=delta)


def test_a_delta_net_has_its_own_projections_and_no_pairs() -> None:
    delta = DeltaConfig(num_key_heads=2, num_value_heads=6, key_head_dim=3, value_head_dim=5, conv_width=4)
    # Query and key, value, gate and output, and a decay and a beta for each value head; the second layer as before.
    projections = 8 * (2 * 2 * 3 + 3 * 6 * 5 + 2 * 6)
    matrices = N - (2 * 128 + 2 * 64) + projections
    for batch in (packed(PAIR, SHAPE), in_micro_batches(collate_pairs(PAIR, num_slots=3, length=9, pad_token_id=0))):
        found = step_flops(with_delta(CONFIG, delta), batch, Arithmetic("xla", "full")).logical
        # Predict, write, read.
        assert found == 6 * matrices * TOKENS + 6 * HEAD * SCORED + 12 * WIDTH * 15 + 6 * 3 * (6 * 3 * 5) * TOKENS


@pytest.mark.parametrize("live_reference", [False, True])
def test_logical_flops_by_hand_whatever_the_layout(live_reference: bool) -> None:
    program = Arithmetic("xla", "full", live_reference=live_reference)
    expected = 6 * N * TOKENS + 6 * HEAD * SCORED + 12 * WIDTH * SEEN
    if live_reference:
        expected = expected * 4 // 3
    layouts = (
        packed(PAIR, SHAPE),
        packed(PAIR, PackedShape(1, 2, 3, 128, 6, 1, 32, 64)),
        in_micro_batches(collate_pairs(PAIR, num_slots=3, length=9, pad_token_id=0)),
    )
    for batch in layouts:
        assert step_flops(CONFIG, batch, program).logical == expected


def test_logical_flops_of_supervised_rows() -> None:
    rows = [TokenizedCompletion(np.zeros(4, np.int32), np.array([True, False, True, True]), "")]
    expected = 6 * N * 4 + 6 * HEAD * 2 + 12 * WIDTH * (10 + 9)
    padded = in_micro_batches(collate_completions(rows, num_slots=2, length=6, pad_token_id=0))
    for batch in (packed(rows, SHAPE), padded):
        assert step_flops(CONFIG, batch, Arithmetic("xla", "none")).logical == expected


def test_executed_flops_by_hand() -> None:
    """Has 64 slots, 4 scored tokens (one of two chunks of 32), and 4 attention sequences of 16 places, all computed."""
    batch = packed(PAIR, SHAPE)
    seen = 2 * 4 * 16 * 16  # of two layers
    least = 6 * N * 64 + 8 * HEAD * 32 + 12 * WIDTH * seen

    def executed(remat: str, **options: Any) -> float:
        return step_flops(CONFIG, batch, Arithmetic("xla", remat, **options)).executed

    again = 2 * (N - 2 * 128) * 64  # except for the last matrix of each layer
    assert executed("none") == least
    assert executed("dots") == least + 2 * WIDTH * seen  # the scores
    assert executed("attention") == least + 2 * WIDTH * seen + again
    assert executed("full") == executed("offload") == least + 4 * WIDTH * seen + again
    forward = 2 * N * 64 + 2 * HEAD * 32 + 4 * WIDTH * seen
    assert executed("none", live_reference=True) == least + forward
    assert executed("none", live_reference=True, first_pass=True) == least + 2 * forward
    kept = executed("none", max_kept_logits=64 * 1000)  # of all 64 positions, and not computed again
    assert kept - least == 6 * HEAD * 64 - 8 * HEAD * 32
    assert executed("none", max_kept_logits=64 * 1000 - 1) == least
    tiled = step_flops(CONFIG, batch, Arithmetic("blockwise", "none")).executed
    assert tiled == least + 2 * WIDTH * seen  # one tile holds everything; it computes the scores a second time


def test_executed_flops_of_a_padded_step() -> None:
    batch = in_micro_batches(collate_pairs(PAIR, num_slots=3, length=9, pad_token_id=0))
    tokens = 3 * 2 * 9
    found = step_flops(CONFIG, batch, Arithmetic("xla", "none")).executed
    assert found == 6 * (N + HEAD) * tokens + 12 * WIDTH * 2 * tokens * 9


def test_each_shard_runs_the_chunks_of_its_own_rows() -> None:
    rows = pairs_of((2, 70, 30), (2, 3, 1))
    batch = packed(rows, PackedShape(1, 2, 1, 128, 2, 1, 96, 128))
    assert (batch.logp_pair < 2).sum(-1).tolist() == [[100, 4]]
    wide = dataclasses.replace(CONFIG, vocab_size=10**6)  # so that only the head counts
    head = 8 * 8 * 10**6
    for num_shards, scored in ((2, 128 + 64), (1, 2 * 128)):
        found = step_flops(wide, batch, Arithmetic("xla", "none", num_shards=num_shards)).executed
        assert found == pytest.approx(head * scored, rel=2e-2)


def test_pairs_of_tiles() -> None:
    """Marks every tile that a causal mask does not hide completely."""

    def marked(lengths: list[int], length: int, block: int, window: int | None, skips: bool) -> int:
        total = 0
        for size in lengths:
            places = -(-(size if skips else length) // block) * block
            query, key = np.indices((places, places))
            seen = (query >= key) & (True if window is None else query - key < window)
            tiles = seen.reshape(places // block, block, places // block, block).any((1, 3))
            total += int(tiles.sum()) * block**2
        return total

    lengths = np.array([300, 0, 17, 129])
    # Tiles of blockwise attention are no larger than they must be for a small window.
    for window, block in ((None, 112), (1, 64), (33, 64), (128, 112), (200, 112)):
        arguments: dict[str, Any] = {"num_heads": 64, "window": window}
        found = computed_pairs("blockwise", lengths, 300, **arguments)
        assert found == marked([300, 0, 17, 129], 300, block, window, True)
        found = computed_pairs("blockwise", lengths, 300, on_cpu=False, **arguments)
        assert found == marked([300] * 4, 300, block, window, True)
        assert computed_pairs("splash", lengths, 300, **arguments) == marked([0] * 4, 384, 384, window, False)
        assert computed_pairs("cudnn", lengths, 300, **arguments) == marked([300, 0, 17, 129], 300, 128, window, True)
        assert computed_pairs("xla", lengths, 300, **arguments) == 4 * 300**2
        assert causal_pairs(np.arange(300), window) <= marked([300], 300, 1, window, True)


# --- against XLA

MEASURED = dataclasses.replace(
    CONFIG, d_model=128, num_heads=4, head_dim=32, d_ff=384, vocab_size=512, layers=CONFIG.layers[:1] * 2
)


def counted(objective: Any, batch: Any, model: Transformer, mesh: Any, lora: Lora | None = None) -> float:
    """Returns XLA's FLOPs of value and gradients, which count the body of every loop once."""
    base = Base(abstract_params(model), {})
    params, reference = (base.params, base.params) if lora is None else (abstract_adapters(lora, jnp.float32), {})

    def run(base: Base, params: Any, reference: Any, batch: Any) -> Any:
        return loss_and_grads(dataclasses.replace(objective, lora=lora), params, reference, batch, base=base)

    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(base, params, reference, batch)
    return float(lowered.compile().cost_analysis()["flops"])


PARALLEL = {"gated_mlp": False, "parallel_residual": True}
GATE = {"attention_gate": True}
POST_NORMS = {"norm_placement": "both", "attention_softcap": 5.0, "logit_softcap": 3.0}


@pytest.mark.parametrize(
    "own",
    [PARALLEL, POST_NORMS, pytest.param(GATE, marks=pytest.mark.full)],
    ids=["parallel", "post_norms", "attention_gate"],
)
@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.full)])
def test_executed_flops_of_other_layers_equal_xlas_count(own: dict[str, Any], remat: str) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    one_layer = dataclasses.replace(MEASURED, num_layers=1, layers=MEASURED.layers[:1], vocab_size=8, **own)
    model = Transformer(one_layer, remat=remat, attention="xla", compute_dtype=jnp.float32)
    pairs = pairs_of((40, 60, 50), (30, 60, 90), (60, 20, 70))
    plan = plan_run(item_sizes(pairs), [np.arange(3)], num_shards=1, max_tokens_per_device=4096)
    batch = pack_step(pairs, np.arange(3), plan.step(np.arange(3)))
    objective = PreferenceObjective(PackedLogps(model, mesh), loss_settings("sigmoid", beta=0.1)[0])
    expected = step_flops(one_layer, batch, Arithmetic("xla", remat, live_reference=True)).executed
    assert counted(objective, batch, model, mesh) == pytest.approx(expected, rel=0.05)


@pytest.mark.full
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_executed_flops_of_a_delta_net_equal_xlas_count(remat: str) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    delta = DeltaConfig(num_key_heads=4, num_value_heads=8, key_head_dim=32, value_head_dim=32, conv_width=4)
    one_layer = dataclasses.replace(MEASURED, num_layers=1, layers=MEASURED.layers[:1], vocab_size=8, d_ff=16)
    model = Transformer(with_delta(one_layer, delta), remat=remat, attention="xla", compute_dtype=jnp.float32)
    # Rows of one chunk: XLA counts the loop over chunks as one round.
    pairs = pairs_of(*((20, 40, 44),) * 8)
    plan = plan_run(item_sizes(pairs), [np.arange(8)], num_shards=1, max_tokens_per_device=4096)
    batch = pack_step(pairs, np.arange(8), plan.step(np.arange(8)))
    objective = PreferenceObjective(PackedLogps(model, mesh), loss_settings("sigmoid", beta=0.1)[0])
    expected = step_flops(model.config, batch, Arithmetic("xla", remat, live_reference=True)).executed
    assert counted(objective, batch, model, mesh) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("remat", "adapted"),
    [
        ("none", False),
        ("full", True),
        *(pytest.param(remat, False, marks=pytest.mark.full) for remat in REMAT_ORDER if remat != "none"),
        pytest.param("none", True, marks=pytest.mark.full),
    ],
)
def test_executed_flops_of_packed_rows_equal_xlas_count(remat: str, adapted: bool) -> None:
    # With adapters, gradients of frozen weights would show here.
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = Transformer(MEASURED, remat=remat, attention="xla", compute_dtype=jnp.float32)
    pairs = pairs_of((40, 60, 50), (30, 60, 90), (60, 20, 70))
    sizes, everything = item_sizes(pairs), np.arange(3)
    plan = plan_run(sizes, [everything], num_shards=1, max_tokens_per_device=4096)
    batch = pack_step(pairs, everything, plan.step(everything))
    objective = PreferenceObjective(PackedLogps(model, mesh), loss_settings("sigmoid", beta=0.1)[0])
    # Two layers are a loop of two rounds, of which XLA counts one.
    one_layer = dataclasses.replace(MEASURED, num_layers=1, layers=MEASURED.layers[:1])
    lora = Lora(r=8, alpha=8, use_rslora=False, sites=find_sites(model)) if adapted else None
    adapters = num_adapter_params(lora) // 2 if lora else None
    kept = max_kept_logits(jax.devices()[0].device_kind)
    program = Arithmetic("xla", remat, live_reference=True, max_kept_logits=kept, adapters=adapters)
    expected = step_flops(one_layer, batch, program).executed
    assert batch.logp_pair.shape[-1] == 384
    assert batch.logp_pair.size * MEASURED.vocab_size <= kept
    assert counted(objective, batch, model, mesh, lora) == pytest.approx(expected, rel=0.05)


def test_executed_flops_of_padded_rows_equal_xlas_count() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = Transformer(MEASURED, compute_dtype=jnp.float32)
    pairs = pairs_of((40, 60, 50), (30, 60, 90), (60, 20, 70))
    batch = in_micro_batches(collate_pairs(pairs, num_slots=4, length=144, pad_token_id=0))
    objective = PreferenceObjective(make_apply_fn(model), loss_settings("sigmoid", beta=0.1)[0])
    one_layer = dataclasses.replace(MEASURED, num_layers=1, layers=MEASURED.layers[:1])
    expected = step_flops(one_layer, batch, Arithmetic("xla", "none", live_reference=True)).executed
    assert counted(objective, batch, model, mesh) == pytest.approx(expected, rel=0.05)


# --- peaks


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("TPU v2", "bfloat16", 22.5),
        ("TPU v3", "bfloat16", 61.5),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU7x", "bfloat16", 1153.5),
        ("TPU v4", "float32", None),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-PCIE-32GB", "float16", 112),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "float16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA GeForce RTX 4090", "float32", 82.6),
        ("NVIDIA L40S", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA H200", "float64", None),
        ("cpu", "float32", None),
    ],
)
def test_peaks(kind: str, dtype: str, tera: float | None) -> None:
    assert peak_flops(kind, dtype) == (None if tera is None else pytest.approx(tera * 1e12))
