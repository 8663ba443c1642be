"""Packed equals padded: the same losses, metrics and gradients, however pairs are packed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jdpo.config import MeshConfig
from jdpo.data.batching.loader import collate_completions, collate_pairs
from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import StepPlan, plan_step
from jdpo.data.batching.packing_shapes import PackedShape
from jdpo.losses import LOSSES
from jdpo.losses.settings import loss_settings
from jdpo.models.model_config import LayerKind, ModelConfig, RopeConfig
from jdpo.models.transformer import Transformer, init_params, make_apply_fn
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import micro_batch_sharding, place
from jdpo.sharding.rules import LOGICAL_RULES
from jdpo.training.step.objectives import (
    CompletionObjective,
    PackedLogps,
    PreferenceObjective,
)
from jdpo.training.step.train_step import loss_and_grads
from jdpo.types import MaskedPair, TokenizedCompletion, TokenizedPair, completions_of

VOCAB, MOST = 40, 12
CONFIG = ModelConfig(
    family="llama",
    vocab_size=VOCAB,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
    o_bias=False,
    qk_norm="head",
    layers=tuple(LayerKind(rope=RopeConfig(theta=100.0), window=window) for window in (None, 5)),
    max_positions=64,
)

NUM_PAIRS = 6


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random_pairs(seed: int, mixes: list[tuple[int, int, int]]) -> list[TokenizedPair]:
    rng = np.random.default_rng(seed)
    return [
        TokenizedPair(*(rng.integers(0, VOCAB, size).astype(np.int32) for size in sizes), origin=f"row {index}")
        for index, sizes in enumerate(mixes)
    ]


def masked(pairs: list[TokenizedPair], seed: int) -> list[MaskedPair]:
    """Marks about half of the completions' tokens as learnt, always including the last."""
    rng = np.random.default_rng(seed)
    rows = []
    for pair in pairs:
        masks = [rng.random(len(ids)) < 0.5 for ids in (pair.chosen_ids, pair.rejected_ids)]
        for mask in masks:
            mask[-1] = True
        rows.append(MaskedPair(*pair[:3], *masks, pair.origin))
    return rows


def packed(
    rows: list[Any],
    *,
    num_rows: int,
    num_micro: int = 1,
    garbage: int | None = None,
    sequences_per_row: int = 4,
    **options: Any,
) -> Any:
    """Packs into one shape for all mixes, so that one program is compiled, with garbage in unused places."""
    slots = np.array([sum(len(part) for part in row[:3]) for row in rows])
    if isinstance(rows[0], TokenizedCompletion):
        slots = np.array([len(row.tokens) for row in rows])
    sides = 1 if isinstance(rows[0], TokenizedCompletion) else 2
    bins = plan_step(slots, num_rows=num_rows, max_slots=3 * MOST * NUM_PAIRS // num_micro)
    shape = PackedShape(
        max(num_micro, bins.num_micro),
        num_rows,
        NUM_PAIRS,
        3 * MOST * NUM_PAIRS,
        num_attention_rows=sides * NUM_PAIRS,
        sequences_per_row=sequences_per_row,
        length=2 * MOST,
        num_scored=150,
    )
    batch = pack_step(rows, np.arange(len(rows)), StepPlan(bins, shape), **options)
    if garbage is not None:
        batch = spoilt(batch, sides, np.random.default_rng(garbage))
    return batch


def spoilt(batch: Any, sides: int, rng: np.random.Generator) -> Any:
    """Returns the batch with other values, in range, in all unused places."""
    num_slots, (num_sequences, length) = batch.tokens.shape[-1], batch.gather.shape[-2:]
    used = (batch.readers < num_sequences * length).any(-2)
    real = np.arange(length) < batch.lengths.sum(-1, keepdims=True)
    scored = batch.logp_pair < sides * batch.pair_weight.shape[-1]

    def fill(values: np.ndarray, keep: np.ndarray, most: int) -> np.ndarray:
        return np.where(keep, values, rng.integers(0, most, values.shape)).astype(values.dtype)

    return batch._replace(
        tokens=fill(batch.tokens, used, VOCAB),
        positions=fill(batch.positions, used, 50),
        scatter=fill(batch.scatter, used, num_sequences * length),
        gather=fill(batch.gather, real, num_slots),
        logp_slot=fill(batch.logp_slot, scored, num_slots),
        logp_target=fill(batch.logp_target, scored, VOCAB),
    )


MODEL = Transformer(CONFIG, compute_dtype=jnp.float64, param_dtype=jnp.float64)


def params(seed: int) -> Any:
    values = init_params(MODEL, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(seed + 1), leaf.shape), values)


def on_mesh(mesh: Any, run: Any, *args: Any) -> Any:
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
        return run(*args)


LENGTHS = st.tuples(st.integers(0, MOST), st.integers(1, MOST), st.integers(1, MOST))
CASES = [
    ("sigmoid", {}),
    ("ipo", {"rpo_alpha": 0.3}),
    ("sigmoid_norm", {"ld_alpha": 0.4}),
    (tuple(name for name, spec in LOSSES.items() if "reference" not in spec.needs and name != "sft"), {}),
    (("sigmoid", "aot", "bco_pair", "sft"), {"bco_running_delta": True}),
    ("nca_pair", {"use_weighting": True}),
]


def assert_equal_steps(one: Any, other: Any, at: np.ndarray, num_real: int, tolerance: float) -> None:
    assert float(other.loss) == pytest.approx(float(one.loss), rel=tolerance, abs=tolerance)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one.grads), jax.tree.leaves(other.grads), strict=True):
        scale = max(float(jnp.abs(a).max()), 1e-3)
        np.testing.assert_allclose(b, a, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))
    for name, values in one.rows.items():
        np.testing.assert_allclose(
            np.asarray(other.rows[name]).reshape(-1)[at],
            np.asarray(values).reshape(-1)[:num_real],
            rtol=tolerance,
            atol=tolerance,
            err_msg=name,
        )


def places_of(batch: Any) -> np.ndarray:
    """Returns the index of each data row among the flattened items."""
    real = np.flatnonzero(batch.pair_weight.reshape(-1))
    return real[np.argsort(batch.pair_row.reshape(-1)[real])]


@pytest.mark.parametrize(
    ("loss_type", "options", "devices", "dtype"),
    [
        # Two of the other cases change weights and add terms, as test_family_steps.py does, too.
        *((*CASES[index], 1, "float64") for index in (0, 2, 3, 4)),
        (*CASES[0], 8, "float64"),
        *(pytest.param(*CASES[index], 1, "float64", marks=pytest.mark.full) for index in (1, 5)),
        pytest.param(*CASES[0], 1, "float32", marks=pytest.mark.full),
        pytest.param(*CASES[4], 8, "float64", marks=pytest.mark.full),
        *(pytest.param(*case, 8, "float32", marks=pytest.mark.full) for case in CASES),
    ],
    ids=str,
)
def test_packed_equals_padded(loss_type: Any, options: dict[str, Any], devices: int, dtype: str) -> None:
    """Compares losses, metrics, gradients and running state to 1e-9 (3e-5 in float32) for any mix of lengths."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1) if devices == 8 else MeshConfig(), jax.devices()[:devices])
    model, tolerance = MODEL.clone(compute_dtype=dtype, param_dtype=dtype), 1e-9 if dtype == "float64" else 3e-5
    chosen = loss_settings(loss_type, beta=0.3, **options)[0]
    padded = PreferenceObjective(make_apply_fn(model), chosen)
    flat = PreferenceObjective(PackedLogps(model, mesh), chosen)
    run_padded, run_packed = (jax.jit(partial(loss_and_grads, objective)) for objective in (padded, flat))
    policy, reference = (jax.tree.map(lambda leaf: leaf.astype(dtype), params(seed)) for seed in (0, 5))

    @given(st.lists(LENGTHS, min_size=1, max_size=NUM_PAIRS), st.integers(0, 999))
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    def check(mixes: list[tuple[int, int, int]], seed: int) -> None:
        pairs = random_pairs(seed, mixes)
        rows: Any
        for rows in (pairs, masked(pairs, seed)):
            one = collate_pairs(rows, num_slots=NUM_PAIRS, length=2 * MOST, pad_token_id=0)
            one = jax.tree.map(lambda array: jnp.asarray(array[None]), one)
            other = packed(rows, num_rows=devices, garbage=seed)
            expected = run_padded(policy, reference, one, padded.init_state)
            on_device = place(other, micro_batch_sharding(mesh))
            found = on_mesh(mesh, run_packed, policy, reference, on_device, flat.init_state)
            assert_equal_steps(expected, found, places_of(other), len(rows), tolerance)
            if expected.loss_state is not None:
                np.testing.assert_allclose(found.loss_state, expected.loss_state, rtol=1e-6)

    check()


def test_packed_supervised_rows_equal_padded() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    padded, flat = CompletionObjective(make_apply_fn(MODEL)), CompletionObjective(PackedLogps(MODEL, mesh))
    run_padded, run_packed = (jax.jit(partial(loss_and_grads, objective)) for objective in (padded, flat))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        rows = []
        for index in range(NUM_PAIRS):
            size = int(rng.integers(2, 2 * MOST + 1))
            mask = rng.random(size) < 0.6
            mask[-1] = True
            rows.append(TokenizedCompletion(rng.integers(0, VOCAB, size).astype(np.int32), mask, f"row {index}"))
        one = collate_completions(rows, num_slots=NUM_PAIRS, length=2 * MOST, pad_token_id=0)
        one = jax.tree.map(lambda array: jnp.asarray(array[None]), one)
        other = packed(rows, num_rows=1, num_micro=2, garbage=seed, sequences_per_row=1)
        expected = run_padded(params(0), None, one)
        found = on_mesh(mesh, run_packed, params(0), None, place(other, micro_batch_sharding(mesh)))
        assert_equal_steps(expected, found, places_of(other), NUM_PAIRS, 1e-9)


def test_masked_tokens_are_read_and_not_scored() -> None:
    """Sums log-probs over the learnt tokens of whole sequences only; the length is their number."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    pairs = random_pairs(7, [(4, 9, 5), (2, 6, 12), (5, 1, 3)])
    rows = masked(pairs, seed=7)
    logps_fn = PackedLogps(MODEL, mesh)

    def scores(batch: Any) -> np.ndarray:
        found = jax.jit(lambda p, b: logps_fn(p, b, False)[0])
        return np.asarray(on_mesh(mesh, found, params(0), jax.tree.map(lambda array: array[0], batch)))[0]

    whole, some = packed(list(pairs), num_rows=1), packed(list(rows), num_rows=1)
    of_whole, of_some = scores(whole), scores(some)
    for index, row in enumerate(rows):
        for side, (_, mask) in enumerate(completions_of(row)):
            every = of_whole[whole.logp_pair[0, 0] == 2 * int(places_of(whole)[index]) + side]
            learnt = of_some[some.logp_pair[0, 0] == 2 * int(places_of(some)[index]) + side]
            np.testing.assert_allclose(learnt, every[mask], rtol=1e-12)
    assert sum(int((~mask).sum()) for row in rows for _, mask in completions_of(row)) > 3


@pytest.mark.parametrize("with_masks", [False, True])
def test_cached_reference_travels_with_the_tokens(with_masks: bool) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    chosen = loss_settings("sigmoid", beta=0.3)[0]
    objective = PreferenceObjective(PackedLogps(MODEL, mesh), chosen)
    pairs: Any = random_pairs(3, [(4, 3, 7), (0, 5, 2), (6, 1, 1), (2, 8, 3)])
    pairs = masked(pairs, seed=3) if with_masks else pairs
    logps_fn = PackedLogps(MODEL, mesh)
    live = packed(pairs, num_rows=1)
    scores = on_mesh(
        mesh, jax.jit(lambda p, b: logps_fn(p, b, False)[0]), params(5), jax.tree.map(lambda a: a[0], live)
    )
    of_pairs = []
    for index, pair in enumerate(pairs):
        sides = []
        for side, (ids, mask) in enumerate(completions_of(pair)):
            values = np.asarray(scores[0])[live.logp_pair[0, 0] == 2 * int(places_of(live)[index]) + side]
            of_side = np.full(len(ids), np.nan)
            of_side[np.flatnonzero(mask)[-len(values) :]] = values
            sides.append(of_side)
        of_pairs.append(tuple(sides))
    cached = packed(pairs, num_rows=1, reference_logps=of_pairs)
    run = jax.jit(partial(loss_and_grads, objective))
    expected = on_mesh(mesh, run, params(0), params(5), live)
    found = on_mesh(mesh, run, params(0), None, cached)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found.grads, expected.grads)


def test_every_loss_has_a_case_or_reads_the_same_features() -> None:
    """Checks the cases: packing affects sums, lengths, tails and weights, so every loss that needs lengths has one."""
    named = {name for loss_type, _ in CASES for name in ([loss_type] if isinstance(loss_type, str) else loss_type)}
    assert {name for name, spec in LOSSES.items() if "lengths" in spec.needs} <= named
