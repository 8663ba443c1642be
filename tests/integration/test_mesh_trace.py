"""Ten steps give one trace on every mesh and for every micro-batch size; and the collectives of a compiled step.

The bars are those of benchmarks/mesh_parity.py: 3e-5 relative in float32, 1e-9 in float64, on sequences of 256 to 400
tokens under AdamW at 1e-4.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jdpo.config import DPOConfig, load_config
from jdpo.sharding.placement import micro_batch_sharding, place
from jdpo.training.fit.assembly import Assembly, assemble
from jdpo.training.run import start_state
from jdpo.training.setup.batches import make_batches
from jdpo.training.setup.numerics import resolve_dtype
from jdpo.training.setup.run_setup import build, describe
from jdpo.training.setup.weight_placement import load_frozen
from jdpo.training.step.train_step import TrainState

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "mesh_parity.py"


@pytest.fixture(scope="module")
def parity() -> Iterator[ModuleType]:
    """The benchmark's own cases and bars, so that test and benchmark cannot disagree on them."""
    spec = importlib.util.spec_from_file_location("mesh_parity", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mesh_parity"] = module  # NamedTuples look up their annotations in sys.modules
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mesh_parity"]


def assert_same(parity: ModuleType, found: Any, expected: Any, dtype: str) -> None:
    apart = parity.distance(found, expected)
    assert apart.loss <= parity.LOSS_BAR[dtype], apart
    assert apart.params <= parity.PARAMS_BAR[dtype], apart


def assert_moved(losses: np.ndarray) -> None:
    """Asserts that the trace leaves its start; otherwise the comparison would show nothing."""
    assert abs(losses[-1] / losses[0] - 1) > 0.05, losses


@pytest.mark.ci  # a process of its own for one device, and sequences of 400 tokens
def test_trace_on_eight_devices_is_that_of_one(parity: ModuleType, tmp_path: Path) -> None:
    inputs = parity.write_inputs(tmp_path, hidden_size=64, num_rows=20, global_batch_size=8)
    one_device = parity.Case("dpo", "float32", 1, (1, 1, 1), 3)
    expected = parity.run_apart([one_device], inputs, tmp_path)[one_device]
    assert_moved(expected.loss)
    case = parity.Case("dpo", "float32", 8, (2, 2, 2), 1, slices=2)
    found = parity.run_here(case, inputs, tmp_path / "eight" / "run")
    assert_same(parity, found, expected, "float32")


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_mesh_and_micro_batch_size(parity: ModuleType, dtype: str, tmp_path: Path) -> None:
    cases = [case for case in parity.all_cases() if case.dtype == dtype]
    by_process = sorted(cases, key=lambda case: case.num_devices)
    traces = parity.run_apart(by_process, parity.write_inputs(tmp_path), tmp_path)
    for command in ("dpo", "sft"):
        first, *others = [case for case in cases if case.command == command]
        assert_moved(traces[first].loss)
        for case in others:
            assert_same(parity, traces[case], traces[first], dtype)


@pytest.fixture(scope="module")
def assembly(cut_words: Any, tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    """A prepared run on fsdp=4 x tensor=2 with two micro-batches; its model has one key/value head."""
    settings = {"mesh.fsdp": 4, "mesh.tensor": 2, "micro_batch_size": 1}
    words = cut_words(tmp_path_factory.mktemp("mesh") / "run", **settings)
    config = resolve_dtype(load_config(DPOConfig, None, words[1:]))
    return assemble(build(config, lambda text: None), reference="live", remat="full")


@pytest.fixture(scope="module")
def state(assembly: Assembly) -> TrainState:
    return start_state(assembly.setup, assembly, live=True)[0]


def test_weights_and_moments_are_split_on_the_devices(assembly: Assembly, state: TrainState) -> None:
    shapes = {
        jax.tree_util.keystr(path): (leaf.shape, leaf.addressable_shards[0].data.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    }

    def of(*parts: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [shape for name, shape in shapes.items() if all(f"'{part}'" in name for part in parts)]

    # Each shape occurs three times: the weight and its two moments. [layers, embed, heads, head width] and so on.
    assert of("query", "kernel") == [((2, 64, 2, 32), (2, 16, 1, 32))] * 3
    assert of("down", "kernel") == [((2, 192, 64), (2, 96, 16))] * 3
    assert of("key", "kernel") == [((2, 64, 1, 32), (2, 16, 1, 32))] * 3  # one head cannot be split over two
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert held < 0.2 * total, "a device holds little more than an eighth"


def test_replicated_weights_are_logged(assembly: Assembly) -> None:
    description = describe(assembly.setup)
    assert "kept whole on each device, as the mesh does not divide them" in description
    assert "['stack']['layer_0']['attention']['key']['kernel']: kv_heads=1 over tensor=2" in description
    assert "query" not in description


def test_compiled_step(assembly: Assembly, state: TrainState) -> None:
    setup = assembly.setup
    frozen = load_frozen(setup, state.params, live=True, moves=False)
    rows = setup.row_plan.step(0)
    batches = make_batches(setup, setup.train_data, [rows], max_tokens_per_device=16384, cache=None)
    batch = place(batches.make(rows).batch, micro_batch_sharding(setup.mesh))
    lowered = assembly.compiled.train_step.lower(state, frozen, batch)
    text = lowered.as_text()
    # Without a mesh in context a constraint lowers to nothing, and XLA would choose by itself.
    assert text.count("sharding_constraint") > 20, text.count("sharding_constraint")
    compiled = lowered.compile()
    hlo = compiled.as_text()
    # Chosen and rejected of a pair stay on one shard: nothing is redistributed, except looked-up columns of tokens.
    exchanges = [line for line in hlo.splitlines() if re.search(r" all-to-all(-start)?\(", line)]
    assert exchanges
    assert all("embed/shard_map" in line for line in exchanges), exchanges
    # Neither the token table nor its gradient is put together, in float32 or narrower; tensor=2 splits its rows.
    table = f"[{setup.model.config.vocab_size // 2},{setup.model.config.d_model}]"
    whole = [line for line in hlo.splitlines() if re.search(rf"= [^(]*{re.escape(table)}.* all-(gather|reduce)", line)]
    assert not whole, whole
    assert "all-reduce" in hlo, "gradients are summed over the mesh"
    assert "input_output_alias" in hlo
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.95 * held, "the old state's memory becomes the new one's"
