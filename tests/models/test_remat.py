"""Rematerialization: equal gradients, less memory, and no attention kernel run twice."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.data.batching.packing import pack_step
from jdpo.data.batching.packing_plan import item_sizes, plan_run
from jdpo.models.lora.adapters import Lora, abstract_adapters, weights_of
from jdpo.models.lora.base_weights import BaseDtype, abstract_base
from jdpo.models.lora.targets import find_sites
from jdpo.models.model_config import ModelConfig
from jdpo.models.packed_attention import packed_sequences
from jdpo.models.remat import REMAT_ORDER, REMAT_POLICIES
from jdpo.models.transformer import Params, Transformer, Weights, abstract_params, init_params, variables
from jdpo.training.fit.estimates import kept_bytes
from jdpo.types import PackedBatch, TokenizedPair
from tests.conftest import small_llama

VOCAB = 64
CONFIG = small_llama(vocab_size=VOCAB, num_layers=4)
KERNEL_CONFIG = small_llama(vocab_size=VOCAB, head_dim=64)


def packed_batch(num_pairs: int, lengths: tuple[int, int, int]) -> PackedBatch:
    """Returns one micro-batch of one row."""
    rng = np.random.default_rng(0)
    pairs = [
        TokenizedPair(*(rng.integers(0, VOCAB, size).astype(np.int32) for size in lengths), origin="")
        for _ in range(num_pairs)
    ]
    everything = np.arange(num_pairs)
    plan = plan_run(item_sizes(pairs), [everything], num_shards=1, max_tokens_per_device=4096)
    return jax.tree.map(lambda array: array[0], pack_step(pairs, everything, plan.step(everything)))


def loss(model: Transformer, batch: PackedBatch, params: Params | Weights) -> Any:
    sequences = packed_sequences(batch.gather, batch.lengths, batch.scatter, batch.readers)
    hidden, head = model.apply(
        variables(params), batch.tokens, batch.positions, sequences, method="packed_hidden_and_head"
    )
    used = (batch.readers < batch.gather[0].size).any(-2)
    wanted = (hidden @ head)[..., 0] * used
    return (wanted**2).astype(jnp.float32 if wanted.dtype == jnp.bfloat16 else wanted.dtype).sum()


class Run(NamedTuple):
    results: Any
    temporary: int


def compiled(config: ModelConfig, remat: str, batch: PackedBatch) -> Any:
    """Compiles value and gradients in float64."""
    model = Transformer(config, remat=remat, compute_dtype=jnp.float64, param_dtype=jnp.float64, attention="blockwise")
    return jax.jit(jax.value_and_grad(partial(loss, model, batch))).lower(abstract_params(model)).compile()


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """Value and gradients in float64 and temporary memory of each policy, for 2k tokens in 4 layers."""
    batch, found = packed_batch(4, (150, 180, 180)), {}
    assert batch.tokens.size == 2048
    with jax.enable_x64(True):
        params = init_params(Transformer(CONFIG, param_dtype=jnp.float64), jax.random.key(0))
        for remat in ("none", *REMAT_POLICIES):
            program = compiled(CONFIG, remat, batch)
            found[remat] = Run(program(params), program.memory_analysis().temp_size_in_bytes)
    return found


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_gradients_are_those_of_keeping_everything(runs: dict[str, Run], remat: str) -> None:
    value, gradients = runs["none"].results
    assert float(runs[remat].results[0]) == pytest.approx(float(value), rel=1e-12)
    for expected, found in zip(jax.tree.leaves(gradients), jax.tree.leaves(runs[remat].results[1]), strict=True):
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())


def test_memory_falls_along_the_order(runs: dict[str, Run]) -> None:
    assert set(REMAT_ORDER) == {"none", *REMAT_POLICIES} - {"offload"}
    taken = [runs[remat].temporary for remat in REMAT_ORDER]
    # Each policy saves more than noise: at least one layer input of all tokens, in float64.
    layer_input = 8 * 2048 * CONFIG.d_model
    assert all(more - less > layer_input for more, less in pairwise(taken)), taken
    assert taken[0] > 2.5 * taken[-1]


@pytest.mark.full
def test_bytes_per_token_match_the_formulas(runs: dict[str, Run]) -> None:
    """Checks docs/memory.md by the memory of two more layers; whatever does not grow with the layers cancels."""
    batch = packed_batch(4, (150, 180, 180))
    places = batch.gather.size / batch.tokens.size
    assert places == 1.5
    expected = {
        remat: kept_bytes(CONFIG, remat, itemsize=8, places=places) / CONFIG.num_layers for remat in REMAT_ORDER
    }
    two_layers = small_llama(vocab_size=VOCAB)
    with jax.enable_x64(True):
        fewer = {name: compiled(two_layers, name, batch).memory_analysis().temp_size_in_bytes for name in expected}
    found = {name: (runs[name].temporary - fewer[name]) / 2 / batch.tokens.size for name in expected}
    assert found == pytest.approx(expected, rel=5e-3)


def kept_per_layer(loss_of: Callable[..., Any], *arguments: Any) -> Counter[tuple[tuple[int, ...], str]]:
    """Returns the shapes and dtypes of what the layers keep of each token for the gradient of the first argument."""
    num_layers, num_tokens = CONFIG.num_layers, 2048
    # The function that pulls cotangents back is a tree of everything that the forward pass has kept.
    pull_back = jax.eval_shape(lambda *args: jax.vjp(partial(loss_of, rest=args[1:]), args[0])[1], *arguments)
    kept = (leaf for leaf in jax.tree.leaves(pull_back) if leaf.shape[:3] == (num_layers, 1, num_tokens))
    return Counter((leaf.shape[3:], leaf.dtype.name) for leaf in kept)


@pytest.mark.parametrize("int8", [False, True])
def test_dots_keeps_one_array_per_adapted_projection_and_x_a(int8: bool) -> None:
    batch, model = packed_batch(4, (150, 180, 180)), Transformer(CONFIG, remat="dots", compute_dtype=jnp.bfloat16)
    sites = find_sites(model)
    lora = Lora(r=3, alpha=8, use_rslora=False, sites=sites)

    def adapted(adapters: Any, rest: Any) -> Any:
        return loss(model, batch, weights_of(lora, rest[0], adapters))

    all_weights = kept_per_layer(lambda params, rest: loss(model, batch, params), abstract_params(model))
    base = abstract_base(model, sites, BaseDtype(jnp.bfloat16, int8))
    assert sum(all_weights.values()) == 7  # the input, query, key, value, attention's projection, gate and up
    assert kept_per_layer(adapted, abstract_adapters(lora, jnp.float32), base) == all_weights + Counter(
        {((lora.r,), "bfloat16"): len(sites)}
    )


def lowered(attention: str, remat: str, platform: str) -> str:
    """Lowers value and gradient of two scanned layers in bfloat16, also for a platform that is not present."""
    model = Transformer(KERNEL_CONFIG, compute_dtype=jnp.bfloat16, remat=remat, attention=attention)
    batch = packed_batch(1, (60, 100, 90))
    step = jax.jit(jax.value_and_grad(partial(loss, model, batch)))
    return step.trace(abstract_params(model)).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def count_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], int]:
    """Returns a function (attention, remat) -> number of attention kernel calls, forward and backward, per layer."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

    def count(attention: str, remat: str) -> int:
        platform, kernel = {"cudnn": ("cuda", "__cudnn$fmha"), "splash": ("tpu", "tpu_custom_call")}[attention]
        return lowered(attention, remat, platform).count(f"stablehlo.custom_call @{kernel}")

    return count


@pytest.mark.parametrize(("attention", "backward"), [("cudnn", 1), ("splash", 2)])
def test_kernels_whose_outputs_are_kept_do_not_run_again(
    count_kernels: Callable[[str, str], int], attention: str, backward: int
) -> None:
    assert count_kernels(attention, "none") == 1 + backward
    assert count_kernels(attention, "dots") == 1 + backward
    assert count_kernels(attention, "attention") == 1 + backward
    assert count_kernels(attention, "full") == 2 + backward


def test_offload_moves_layer_inputs_to_the_host_and_back() -> None:
    places = [line for line in lowered("splash", "offload", "tpu").splitlines() if "annotate_device_placement" in line]
    assert sum("pinned_host" in line for line in places) == 1, places
    assert len(places) == 2


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
def test_offload_takes_the_host_memory_of_all_layer_inputs() -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    one = jax.sharding.SingleDeviceSharding(devices[0])
    batch, sizes = packed_batch(1, (60, 100, 90)), {}
    for remat in ("full", "offload"):
        model = Transformer(KERNEL_CONFIG, compute_dtype=jnp.bfloat16, remat=remat, attention="xla")
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), abstract_params(model)
        )
        program = jax.jit(jax.value_and_grad(partial(loss, model, batch))).lower(params).compile()
        sizes[remat] = program.memory_analysis().host_temp_size_in_bytes
    layer_inputs = KERNEL_CONFIG.num_layers * batch.tokens.size * KERNEL_CONFIG.d_model * 2
    assert sizes["full"] == 0
    assert sizes["offload"] >= layer_inputs


@pytest.mark.parametrize("remat", ["some", "auto"])
def test_unknown_names_are_refused(remat: str) -> None:
    with pytest.raises(ValueError, match=f"expected one of none, dots, attention, full, offload, found '{remat}'"):
        abstract_params(Transformer(CONFIG, remat=remat))
