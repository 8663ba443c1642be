"""One training step of adapters on a frozen base: over meshes, with an int8 base, and the memory that it takes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jdpo.config import MeshConfig
from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import item_sizes, plan_run
from jdpo.losses.settings import loss_settings
from jdpo.models.lora.adapters import Lora, abstract_adapters, adapter_axes, init_adapters, weights_of
from jdpo.models.lora.base_weights import Base, BaseDtype, abstract_base, as_float, base_axes, quantize
from jdpo.models.lora.merge import merge
from jdpo.models.lora.sites import KERNEL, get_at, tree_of
from jdpo.models.lora.targets import find_sites
from jdpo.models.transformer import Transformer, init_params
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import micro_batch_sharding, place, state_shardings
from jdpo.sharding.rules import param_shardings
from jdpo.training.fit.assembly import Compiled, compile_step
from jdpo.training.step.objectives import PackedLogps, PreferenceObjective
from jdpo.training.step.train_step import Frozen, StepReport, TrainState
from jdpo.types import PackedBatch, TokenizedPair
from tests.conftest import small_llama

MODEL = Transformer(small_llama(num_layers=2), attention="xla", remat="full")
SITES = find_sites(MODEL)
LORA = Lora(r=4, alpha=8, use_rslora=False, sites=SITES)
OPTIMIZER = optax.adam(1e-2)


def random_pairs(num_pairs: int) -> list[TokenizedPair]:
    rng = np.random.default_rng(0)

    def ids() -> np.ndarray:
        return rng.integers(0, 64, int(rng.integers(3, 9)), np.int32)

    return [TokenizedPair(ids(), ids(), ids(), str(row)) for row in range(num_pairs)]


@pytest.fixture(scope="module")
def batch() -> PackedBatch:
    """Eight pairs, for one device or a mesh of up to eight."""
    pairs, everything = random_pairs(8), np.arange(8)
    plan = plan_run(item_sizes(pairs), [everything], num_shards=8, max_tokens_per_device=4096)
    return pack_step(pairs, everything, plan.step(everything))


@pytest.fixture(scope="module")
def base() -> Base:
    return jax.device_get(Base(init_params(MODEL, jax.random.key(0)), {}))


@pytest.fixture(scope="module")
def adapters() -> Any:
    """Returns adapters after their start: B is not zero."""
    start = init_adapters(LORA, jax.random.key(1), jnp.float32)
    return jax.device_get(
        jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), start)
    )


def in_int8(base: Base) -> Base:
    kernels, scales = {}, {}
    for site in SITES:
        path = (*site.path, KERNEL)
        kernels[path], scales[path] = quantize(jnp.asarray(get_at(base.params, path)), site)

    def of_leaf(path: Any, leaf: Any) -> Any:
        return kernels.get(tuple(key.key for key in path), leaf)

    return jax.device_get(Base(jax.tree_util.tree_map_with_path(of_leaf, base.params), tree_of(scales)))


class Prepared(NamedTuple):
    """A step on a mesh and its inputs."""

    compiled: Compiled
    state: TrainState
    frozen: Frozen
    batch: PackedBatch


def prepare(
    mesh: Mesh, base: Base, adapters: Any, reference: Any, batch: PackedBatch, model: Transformer = MODEL
) -> Prepared:
    dtype = BaseDtype(jnp.float32, int8=bool(base.scales))
    of_base = Base(*map(lambda axes, tree: param_shardings(axes, tree, mesh), base_axes(MODEL, SITES, dtype), base))
    of_adapters = param_shardings(adapter_axes(LORA), abstract_adapters(LORA, jnp.float32), mesh)
    state = TrainState(np.int32(0), adapters, jax.device_get(OPTIMIZER.init(adapters)), np.zeros(2, np.uint32))
    shardings = state_shardings(state, adapters, of_adapters, mesh)
    frozen_shardings = Frozen(of_base, {} if not reference else of_adapters)
    compiled = compile_step(
        objective=PreferenceObjective(PackedLogps(model, mesh), loss_settings("sigmoid", beta=0.1)[0], lora=LORA),
        optimizer=OPTIMIZER,
        schedule=lambda step: 1e-2,
        mesh=mesh,
        state_shardings=shardings,
        frozen_shardings=frozen_shardings,
    )
    return Prepared(
        compiled,
        jax.device_put(state, shardings),
        jax.device_put(Frozen(base, reference), frozen_shardings),
        place(batch, micro_batch_sharding(mesh)),
    )


def run(prepared: Prepared) -> tuple[TrainState, StepReport]:
    state, report = prepared.compiled.train_step(prepared.state, prepared.frozen, prepared.batch)
    return jax.device_get(state), jax.device_get(report)


ONE, EIGHT = MeshConfig(data=1, fsdp=1), MeshConfig(data=2, fsdp=2, tensor=2)


def mesh_of(config: MeshConfig) -> Mesh:
    return make_mesh(config, jax.devices()[: 1 if config is ONE else 8])


def assert_same_step(found: Any, expected: Any, before: Any) -> None:
    """Asserts that two steps are equal up to float32 rounding."""
    (state, report), (wanted, wanted_report) = found, expected
    assert report.loss == pytest.approx(wanted_report.loss, rel=1e-5)
    assert report.grad_norm == pytest.approx(wanted_report.grad_norm, rel=1e-4)
    # The first moments are the gradients; Adam's first step depends on their sign alone.
    moments = zip(*(jax.tree.leaves(each.opt_state[0].mu) for each in (state, wanted)), strict=True)
    for ours, theirs in moments:
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    moved = jax.tree.map(lambda new, old: bool(np.any(new != old)), state.params, before)
    assert all(jax.tree.leaves(moved))


def test_one_device_and_eight_make_the_same_step(base: Base, adapters: Any, batch: PackedBatch) -> None:
    alone = run(prepare(mesh_of(ONE), base, adapters, {}, batch))
    prepared = prepare(mesh_of(EIGHT), base, adapters, {}, batch)
    query = prepared.state.params["stack"]["layer_0"]["attention"]["query"]
    assert [query[name].addressable_shards[0].data.shape for name in "ab"] == [(2, 32, 4), (2, 4, 2, 16)], "as the base"
    assert_same_step(run(prepared), alone, adapters)
    # The base is not donated and stays bitwise unchanged.
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(prepared.frozen.base.params), base.params)
    assert prepared.state.params["stack"]["layer_0"]["mlp"]["down"]["a"].is_deleted(), "what is trained is given up"


@pytest.mark.parametrize("split", [ONE, MeshConfig(data=1, fsdp=4, tensor=2)], ids=["one", "eight"])
def test_the_first_step_moves_b_and_leaves_a_exactly_as_it_is(
    split: MeshConfig, base: Base, batch: PackedBatch
) -> None:
    """A has no gradient while B is 0, not even rounding noise, which Adam would turn into full steps."""
    start = jax.device_get(init_adapters(LORA, jax.random.key(1), jnp.float32))
    model = MODEL.clone(compute_dtype=jnp.bfloat16)
    state, report = run(prepare(mesh_of(split), base, start, {}, batch, model))
    assert report.loss == pytest.approx(math.log(2), abs=1e-6)
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(start), strict=True):
        if path[-1].key == "a":
            np.testing.assert_array_equal(new, old)
        else:
            assert np.abs(new - old).max() == pytest.approx(1e-2, rel=1e-3)  # the learning rate


def test_the_step_has_one_base_as_input_and_none_as_output(base: Base, adapters: Any, batch: PackedBatch) -> None:
    prepared = prepare(mesh_of(ONE), base, adapters, {}, batch)
    program = prepared.compiled.train_step.lower(prepared.state, prepared.frozen, prepared.batch).compile()
    sizes = program.memory_analysis()
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves((prepared.state, prepared.frozen.base, prepared.batch)))
    of_base = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    assert sizes.argument_size_in_bytes == pytest.approx(taken, abs=of_base // 10), "policy and live reference share it"
    assert sizes.output_size_in_bytes < of_base // 2


def test_the_initial_adapter_equals_its_reference(base: Base, adapters: Any, batch: PackedBatch) -> None:
    snapshot = jax.tree.map(np.copy, adapters)
    prepared = prepare(mesh_of(ONE), base, adapters, snapshot, batch)
    _, report = run(prepared)
    assert report.loss == pytest.approx(math.log(2), abs=1e-6)
    assert report.grad_norm > 1e-3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(prepared.frozen.reference), snapshot)


def test_int8_makes_the_step_of_the_dequantized_numbers(base: Base, adapters: Any, batch: PackedBatch) -> None:
    quantized = in_int8(base)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (base, quantized)]
    assert sizes[1] < 0.4 * sizes[0], "kernels take a quarter; embedding and head stay"
    shapes = abstract_base(MODEL, SITES, BaseDtype(jnp.float32, int8=True))
    same = jax.tree.map(lambda leaf, to: (leaf.shape, leaf.dtype) == (to.shape, to.dtype), quantized, shapes)
    assert all(jax.tree.leaves(same))
    paths = {(*site.path, KERNEL): site for site in SITES}
    numbers = {
        path: np.asarray(as_float(*(get_at(tree, path) for tree in quantized), site, jnp.float32))
        for path, site in paths.items()
    }
    plain = Base(
        jax.tree_util.tree_map_with_path(lambda path, leaf: numbers.get(tuple(k.key for k in path), leaf), base.params),
        {},
    )
    on_int8, on_floats = (run(prepare(mesh_of(ONE), each, adapters, {}, batch)) for each in (quantized, plain))
    assert_same_step(on_int8, on_floats, adapters)
    on_eight = run(prepare(mesh_of(EIGHT), quantized, adapters, {}, batch))
    assert_same_step(on_eight, on_floats, adapters)


def test_merged_weights_score_as_the_adapters_do(base: Base, adapters: Any, batch: PackedBatch) -> None:
    mesh = mesh_of(ONE)
    logps_fn = PackedLogps(MODEL, mesh)
    micro = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)
    with jax.set_mesh(mesh):
        merged = jax.jit(lambda base, adapters: merge(LORA, base, adapters, sites=SITES, dtype=jnp.float32))(
            base, adapters
        )
        apart = jax.jit(lambda base, adapters: logps_fn(weights_of(LORA, base, adapters), micro, False)[0])(
            base, adapters
        )
        together = jax.jit(lambda params: logps_fn(params, micro, False)[0])(merged)
        alone = jax.jit(lambda params: logps_fn(params, micro, False)[0])(base.params)
    np.testing.assert_allclose(together, apart, atol=2e-5)
    assert np.abs(np.asarray(alone) - np.asarray(apart)).max() > 0.05
