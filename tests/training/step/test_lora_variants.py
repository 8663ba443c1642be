"""One training step of adapters, built from a config: layouts, optimizer memory and dtype, references, meshes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.config import DPOConfig, MeshConfig, SFTConfig, load_config
from jdpo.models.families import read_model_config
from jdpo.models.lora.merge import merge
from jdpo.models.transformer import make_apply_fn
from jdpo.models.weights.hf_names import hf_tensors
from jdpo.models.weights.loading import load_params
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.placement import fetch, micro_batch_sharding, place
from jdpo.training.fit.assembly import assemble
from jdpo.training.logs.metrics import rows_at
from jdpo.training.reference.reference_source import settle_reference
from jdpo.training.setup.batches import make_batches
from jdpo.training.setup.numerics import numerics, resolve_dtype
from jdpo.training.setup.run_setup import Setup, build
from jdpo.training.setup.weight_placement import load_base, load_frozen, load_start
from jdpo.training.step.train_step import TrainState
from jdpo.types import HOST_MEMORY, TokenizedPair
from tests.conftest import write_jsonl

Words = Callable[..., list[str]]
Setups = Callable[..., Setup]

LORA = {"lora.r": 2, "lora.alpha": 3, "lora.target_modules": "[q_proj, down_proj]", "attention": "xla"}
PADDED = {"packing": False, "attention": "auto"}
ONE, EIGHT = (1, MeshConfig(fsdp=1)), (8, MeshConfig(data=2, fsdp=2, expert=2))


@pytest.fixture
def setup_of(run_words: Words, tmp_path: Path) -> Setups:
    """Returns a function (command, mesh, overrides) -> the Setup of a run of adapters."""
    rows = [
        {"prompt": f"river {word}?", "completion": f" {word} paper"} for word in ("stone", "light", "bread", "road")
    ]
    supervised = write_jsonl(tmp_path / "rows.jsonl", rows * 4)

    def made(command: str = "dpo", mesh: tuple[int, MeshConfig] = ONE, **overrides: Any) -> Setup:
        data = {"datasets": supervised} if command == "sft" else {}
        cls: Any = SFTConfig if command == "sft" else DPOConfig
        config = resolve_dtype(load_config(cls, None, run_words(**(LORA | data | overrides))))
        num_devices, axes = mesh
        return dataclasses.replace(build(config, lambda text: None), mesh=make_mesh(axes, jax.devices()[:num_devices]))

    return made


class Step(NamedTuple):
    """The results of one step, on the host.

    Attributes:
      loss, grad_norm: of its report.
      rows: its per-row values, in the order of the step's rows.
      mu: the optimizer's first moments, a tenth of the gradients.
      state: the state after it, still on the devices.
    """

    loss: float
    grad_norm: float
    rows: dict[str, np.ndarray]
    mu: Any
    state: TrainState


def first_step(setup: Setup) -> Step:
    """Takes the first step of adapters with nonzero B; asserts that frozen weights do not change."""
    live = setup.task.uses_reference
    with numerics(setup.config):
        assembly = assemble(setup, reference="live" if live else "none", remat="none")
        params = moved(load_start(setup))
        frozen = load_frozen(setup, None, live=live, moves=False)
        before = jax.tree.map(np.array, fetch(frozen))
        state = TrainState(
            jnp.int32(0), params, assembly.optimizer.init(params), jax.random.key_data(jax.random.key(0))
        )
        state = jax.device_put(state, assembly.state_shardings)
        indices = setup.row_plan.step(0)
        made = make_batches(setup, setup.train_data, [indices], max_tokens_per_device=4096, cache=None).make(indices)
        batch = place(made.batch, micro_batch_sharding(setup.mesh))
        state, report = assembly.compiled.train_step(state, frozen, batch)
        jax.tree.map(np.testing.assert_array_equal, fetch(frozen), before)
    parts = jax.tree.leaves(state.opt_state, is_leaf=lambda part: hasattr(part, "mu"))
    (moments,) = (part for part in parts if hasattr(part, "mu"))
    rows = rows_at(fetch(report.rows), made.rows.at)
    return Step(float(report.loss), float(report.grad_norm), rows, fetch(moments.mu), state)


def moved(adapters: Any) -> Any:
    """Returns adapters with a nonzero B that is exact in every dtype: multiples of 1/64."""

    def of_leaf(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "a":
            return leaf
        values = np.random.default_rng(leaf.size).integers(-8, 9, leaf.shape) / 64
        return jax.device_put(jnp.asarray(values, leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(of_leaf, adapters)


def assert_same(found: Step, expected: Step, *, rtol: float) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=rtol / 10)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=rtol)
    for ours, theirs in zip(jax.tree.leaves(found.mu), jax.tree.leaves(expected.mu), strict=True):
        most = float(np.abs(theirs).max())
        assert most > 0
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=rtol * most)


def test_padded_and_offloaded_and_bfloat16_steps_are_the_plain_one(setup_of: Setups) -> None:
    plain = first_step(setup_of())
    away = first_step(setup_of(**PADDED, offload_optimizer=True))
    assert_same(away, plain, rtol=1e-4)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away.state.opt_state) if leaf.ndim} == {HOST_MEMORY}
    narrow = first_step(setup_of(optimizer="adamw_bf16"))
    assert {leaf.dtype for leaf in jax.tree.leaves((narrow.state.params, narrow.mu))} == {jnp.dtype(jnp.bfloat16)}
    assert_same(narrow, plain, rtol=2e-2)


@pytest.mark.full
def test_supervised_steps_are_the_same_too(setup_of: Setups) -> None:
    plain = first_step(setup_of("sft"))
    assert_same(first_step(setup_of("sft", **PADDED, offload_optimizer=True)), plain, rtol=1e-4)


def test_a_reference_of_another_folder_is_that_model(setup_of: Setups, toy_model: Path, tmp_path: Path) -> None:
    """Covers live and cached references, and a floating-point reference although the policy's base is int8."""
    other = Path(shutil.copytree(toy_model, tmp_path / "other"))
    rng = np.random.default_rng(0)
    tensors = {
        name: values if "norm" in name else values + rng.normal(0, 0.05, values.shape).astype(values.dtype)
        for name, values in load_file(other / "model.safetensors").items()
    }
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    setup = setup_of(reference_model=other, **{"lora.base_dtype": "int8"})
    live = first_step(setup)
    with numerics(setup.config):
        kept = settle_reference(
            setup, asked="auto", needs_reference=True, began_as="cached", stopped=lambda: False, log=lambda text: None
        )
    assert kept.train is not None

    adaptation, base = setup.adaptation, load_base(setup)
    assert adaptation is not None
    assert base is not None
    policy = merge(adaptation.lora, base, moved(load_start(setup)), sites=adaptation.sites, dtype=jnp.float32)
    weights = (policy, load_params(other, setup.model))
    logits_of = jax.jit(make_apply_fn(setup.model))

    def logps(pair: TokenizedPair, side: np.ndarray) -> list[float]:
        """Returns the summed log-probs of a completion under the policy and the reference."""
        tokens = np.concatenate([pair.prompt_ids, side])
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        at, real = np.arange(len(pair.prompt_ids), len(tokens)), np.arange(64)[None] < len(tokens)
        logits = (logits_of(each, padded, real)[0] for each in weights)
        return [float(jax.nn.log_softmax(each)[at - 1, tokens[at]].sum()) for each in logits]

    for number, index in enumerate(map(int, setup.row_plan.step(0)[:3])):
        pair = setup.train_data[index]
        expected = np.array([logps(pair, side) for side in (pair.chosen_ids, pair.rejected_ids)])
        found = [live.rows[f"rewards/{side}"][number] / 0.1 for side in ("chosen", "rejected")]
        np.testing.assert_allclose(found, expected[:, 0] - expected[:, 1], atol=1e-3)
        np.testing.assert_allclose([values.sum() for values in kept.train.row(index, pair)], expected[:, 1], atol=1e-3)
        assert np.abs(expected[:, 0] - expected[:, 1]).min() > 0.1


@pytest.fixture
def mixtral(toy_model: Path, tmp_path: Path) -> Path:
    """A folder with the toy's tokenizer and random weights of a Mixtral."""
    folder = Path(shutil.copytree(toy_model, tmp_path / "mixtral"))
    config = json.loads((folder / "config.json").read_text())
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05}
    names = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | experts | names))
    rng = np.random.default_rng(0)
    tensors = {
        name: np.ones(pieces[0].hf_shape, np.float32)
        if "norm" in name
        else rng.normal(0, 0.1, pieces[0].hf_shape).astype(np.float32)
        for name, pieces in hf_tensors(read_model_config(folder)).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.full
def test_an_expert_mesh_makes_the_step_of_one_device(setup_of: Setups, mixtral: Path) -> None:
    overrides = {"model_name_or_path": mixtral, "lora.target_modules": "all-linear"}
    alone, spread = (first_step(setup_of(mesh=mesh, **overrides)) for mesh in (ONE, EIGHT))
    assert_same(spread, alone, rtol=1e-4)
    gate = spread.state.params["stack"]["layer_0"]["mlp"]["experts"]["gate"]
    shapes = {name: (leaf.shape, leaf.addressable_shards[0].data.shape) for name, leaf in gate.items()}
    assert shapes == {"a": ((2, 4, 64, 2), (2, 2, 32, 2)), "b": ((2, 4, 2, 192), (2, 2, 2, 192))}, "experts are split"
