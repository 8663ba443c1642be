"""The router's loss in a step covers all real tokens of the global batch in any layout."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.config import MeshConfig
from jdpo.data.batching.loader import collate_completions, collate_pairs
from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import StepPlan, plan_step
from jdpo.data.batching.packing_shapes import PackedShape
from jdpo.losses.settings import loss_settings
from jdpo.models.model_config import LayerKind, ModelConfig, MoEConfig, RopeConfig
from jdpo.models.transformer import (
    Transformer,
    abstract_params,
    init_params,
    logical_axes,
    make_routed_apply_fn,
)
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import micro_batch_sharding, place
from jdpo.sharding.rules import LOGICAL_RULES, param_shardings
from jdpo.training.step.objectives import (
    CompletionObjective,
    Objective,
    PackedLogps,
    PreferenceObjective,
)
from jdpo.training.step.train_step import Frozen, LossAndGrads, evaluate, loss_and_grads
from jdpo.types import TokenizedCompletion, TokenizedPair

VOCAB, MOST, NUM_PAIRS, COEF = 40, 6, 8, 0.7
KINDS = [
    LayerKind(rope=RopeConfig(theta=100.0), mlp=mlp) for mlp in ("experts", "dense", "experts")
]  # two layers scanned, one not
CONFIG = ModelConfig(
    family="qwen3_moe",
    vocab_size=VOCAB,
    num_layers=3,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    norm_eps=1e-6,
    tie_embeddings=False,
    qk_norm="head",
    layers=tuple(KINDS),
    max_positions=64,
    moe=MoEConfig(num_experts=8, experts_per_token=3, d_ff=10, normalize=True, aux_loss_coef=0.1),
)
MODEL = Transformer(CONFIG, compute_dtype=jnp.float64, param_dtype=jnp.float64)
LOSS = loss_settings("sigmoid", beta=0.3)[0]
SIZES = [(4, 3, 5), (0, 5, 5), (6, 3, 1), (3, 6, 4), (5, 2, 4), (1, 4, 6)]  # few lengths, as `by_hand` compiles each


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def make_params(seed: int) -> Any:
    values = init_params(MODEL, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(seed + 1), leaf.shape), values)


def make_pairs() -> list[TokenizedPair]:
    rng = np.random.default_rng(0)
    return [TokenizedPair(*(rng.integers(0, VOCAB, n).astype(np.int32) for n in sizes), origin="") for sizes in SIZES]


def make_rows() -> list[TokenizedCompletion]:
    rows = []
    for pair in make_pairs():
        mask = np.arange(len(pair.prompt_ids) + len(pair.chosen_ids)) >= max(len(pair.prompt_ids), 1)
        rows.append(TokenizedCompletion(np.concatenate([pair.prompt_ids, pair.chosen_ids]), mask, ""))
    return rows


def padded(rows: list[Any], num_micro: int = 1) -> Any:
    """Returns a batch [k, m, ...] with two padding rows, which hold one token each."""
    collate = collate_pairs if isinstance(rows[0], TokenizedPair) else collate_completions
    batch = collate(rows, num_slots=NUM_PAIRS, length=2 * MOST, pad_token_id=0)
    return jax.tree.map(lambda array: array.reshape(num_micro, -1, *array.shape[1:]), batch)


def packed(rows: list[Any], num_rows: int = 1, num_micro: int = 2) -> Any:
    slots = np.array([sum(map(len, row[:3])) if isinstance(row, TokenizedPair) else len(row.tokens) for row in rows])
    bins = plan_step(slots, num_rows=num_rows, max_slots=-(-int(slots.sum()) // (num_micro * num_rows)) + MOST)
    sides = 2 if isinstance(rows[0], TokenizedPair) else 1
    shape = PackedShape(max(num_micro, bins.num_micro), num_rows, NUM_PAIRS, 64, sides * NUM_PAIRS, 1, 2 * MOST, 60)
    return pack_step(rows, np.arange(len(rows)), StepPlan(bins, shape))


def objective_of(kind: str, mesh: Any = None) -> Objective:
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    # Another remat policy, so that packed and padded also differ in this.
    apply_fn, logps_fn = make_routed_apply_fn(MODEL), PackedLogps(MODEL.clone(remat="full"), mesh)
    run = logps_fn if kind.startswith("packed") else apply_fn
    return PreferenceObjective(run, LOSS, COEF) if kind.endswith("dpo") else CompletionObjective(run, COEF)


@functools.cache
def step_of(kind: str) -> Any:
    """Returns value and gradients of an objective on one device, traced once for all tests."""
    return jax.jit(partial(loss_and_grads, objective_of(kind)))


def run(kind: str, batch: Any) -> LossAndGrads:
    reference = make_params(5) if kind.endswith("dpo") else None
    found: LossAndGrads = step_of(kind)(make_params(0), reference, batch)
    return found


def assert_equal(found: LossAndGrads, expected: LossAndGrads) -> None:
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-10)
    assert float(found.aux_loss) == pytest.approx(float(expected.aux_loss), rel=1e-10)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected.grads), jax.tree.leaves(found.grads), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-10, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def whole_dpo() -> LossAndGrads:
    """The step on padded pairs in one micro-batch."""
    with jax.enable_x64(True):
        return run("padded dpo", padded(make_pairs()))


def by_hand(sequences: list[np.ndarray]) -> float:
    """Computes the loss from sequences run one by one, without padding."""
    apply_fn = jax.jit(make_routed_apply_fn(MODEL))
    assignments, probabilities, tokens = np.zeros(8), np.zeros(8), 0.0
    for ids in sequences:
        stats = apply_fn(make_params(0), ids[None], np.ones((1, len(ids)), bool)).router
        assert np.asarray(stats.assignments).sum() == 2 * 3 * len(ids)  # two layers, three experts per token
        assert np.asarray(stats.probabilities).sum() == pytest.approx(2 * len(ids))
        assignments += np.asarray(stats.assignments)[0]
        probabilities += np.asarray(stats.probabilities)[0]
        tokens += 2 * len(ids)
    return float(8 * np.sum(assignments / tokens * probabilities / tokens))


def test_the_loss_covers_the_real_tokens_of_both_sequences(whole_dpo: LossAndGrads) -> None:
    sequences = [np.concatenate([pair.prompt_ids, side]) for pair in make_pairs() for side in pair[1:3]]
    assert float(whole_dpo.aux_loss) == pytest.approx(by_hand(sequences), rel=1e-12)


def test_the_reported_loss_of_pairs_excludes_it_and_the_trained_one_includes_it(whole_dpo: LossAndGrads) -> None:
    weighted = np.asarray(whole_dpo.rows["loss"])[0, : len(SIZES)].mean()
    assert float(whole_dpo.loss) == pytest.approx(float(weighted), rel=1e-12)
    direction = make_params(9)
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), whole_dpo.grads, direction)))

    def minimised(sign: int) -> float:
        moved = jax.tree.map(lambda p, d: p + sign * 1e-7 * d, make_params(0), direction)
        found = step_of("padded dpo")(moved, make_params(5), padded(make_pairs()))
        return float(found.loss + COEF * found.aux_loss)

    assert along == pytest.approx((minimised(1) - minimised(-1)) / 2e-7, rel=1e-5)


def test_micro_batches_change_nothing(whole_dpo: LossAndGrads) -> None:
    assert_equal(run("padded dpo", padded(make_pairs(), 4)), whole_dpo)


def test_packing_changes_nothing(whole_dpo: LossAndGrads) -> None:
    """Checks that a prompt shared by both sides is routed once and counts twice."""
    batch = packed(make_pairs())
    assert batch.tokens.shape[0] >= 2
    assert_equal(run("packed dpo", batch), whole_dpo)


@pytest.mark.parametrize(
    ("sizes", "num_micro"),
    [
        ({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, 1),
        pytest.param({"data": 2, "fsdp": 1, "expert": 4}, 1, marks=pytest.mark.full),
        pytest.param({"data": 1, "fsdp": 4, "tensor": 2}, 1, marks=pytest.mark.full),
        # Gradients are summed over the micro-batches on each of two slices, and then over these.
        pytest.param({"slices": 2, "fsdp": 2, "expert": 2}, 2, marks=pytest.mark.full),
        pytest.param({"data": 2, "fsdp": 1, "expert": 2, "tensor": 2}, 3, marks=pytest.mark.full),
        pytest.param({"data": 8, "fsdp": 1}, 2, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_meshes_change_nothing(whole_dpo: LossAndGrads, sizes: dict[str, int], num_micro: int) -> None:
    mesh = make_mesh(MeshConfig(**sizes))
    shardings = param_shardings(logical_axes(MODEL), abstract_params(MODEL), mesh)
    by_row = micro_batch_sharding(mesh)
    step = jax.jit(
        partial(loss_and_grads, objective_of("packed dpo", mesh)), in_shardings=(shardings, shardings, by_row)
    )
    batch = place(packed(make_pairs(), num_rows=8, num_micro=num_micro), by_row)
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
        assert_equal(step(make_params(0), make_params(5), batch), whole_dpo)


@pytest.mark.full
def test_supervised_rows_packed_and_padded() -> None:
    expected = run("padded sft", padded(make_rows()))
    assert float(expected.aux_loss) == pytest.approx(by_hand([row.tokens for row in make_rows()]), rel=1e-12)
    assert_equal(run("padded sft", padded(make_rows(), 4)), expected)
    assert_equal(run("packed sft", packed(make_rows())), expected)


def test_an_evaluation_leaves_sums_that_add_up() -> None:
    rows = make_rows()
    report = jax.jit(partial(evaluate, objective=objective_of("packed sft")))(
        make_params(0), Frozen(None, None), packed(rows)
    )
    assert float(report.router.tokens.sum()) == 2 * sum(len(row.tokens) for row in rows)
    assert report.router.assignments.shape == (1, 8)


def test_without_weight_the_loss_is_reported_and_has_no_gradient() -> None:
    objective = CompletionObjective(make_routed_apply_fn(MODEL), 0.0)
    assert not objective.coupled
    assert CompletionObjective(make_routed_apply_fn(MODEL), 0.1).coupled
    shapes = jax.eval_shape(partial(loss_and_grads, objective), make_params(0), None, padded(make_rows(), 4))
    assert shapes.aux_loss.shape == ()
