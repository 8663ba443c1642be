"""Adapters of kernels: which kernels, how they are initialized, what they add; and kernels in int8."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.generation.engine import Engine
from jdpo.generation.values import Sampling
from jdpo.models.lora.adapters import (
    Lora,
    abstract_adapters,
    adapter_axes,
    init_adapters,
    num_active_params,
    num_adapter_params,
    weights_of,
)
from jdpo.models.lora.base_weights import Base, as_float, quantize
from jdpo.models.lora.merge import _merged, merge
from jdpo.models.lora.sites import KERNEL, get_at, last_name, tree_of
from jdpo.models.lora.targets import choose_sites, find_sites, require_loadable
from jdpo.models.model_config import MoEConfig
from jdpo.models.transformer import Transformer, Weights, init_params, make_apply_fn
from tests.conftest import small_llama

# Layers of two kinds and one more: a stack of repeats, and a rest that is not scanned.
MODEL = Transformer(small_llama(num_layers=3, windows=(None, 5, None)))
SITES = find_sites(MODEL)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))
MASK = np.ones(TOKENS.shape, bool)


def lora_on(targets: Any, **fields: Any) -> Lora:
    return Lora(**{"r": 3, "alpha": 6.0, "use_rslora": False, **fields}, sites=choose_sites(SITES, targets))


def moved(adapters: Any) -> Any:
    """Returns adapters whose B is not zero, so that they change the output."""
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(7), leaf.shape), adapters)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(init_params(MODEL, jax.random.key(0)), {})


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        (["v_proj", "mlp.up_proj"], ["v_proj", "up_proj"]),
        (r"model\.layers\.\d+\.self_attn\..*", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_targets_mean_what_they_mean_to_peft(targets: Any, names: list[str]) -> None:
    chosen = choose_sites(SITES, targets)
    assert list(dict.fromkeys(map(last_name, chosen))) == names
    modules = {module.name for site in chosen for module in site.modules}
    assert len(modules) == 3 * len(names), "in every layer"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "qproj"], "no module is called 'qproj'; the modules that can be adapted are q_proj, k_proj"),
        (["lm_head"], "no module is called 'lm_head'.*Embedding, head and norms remain frozen"),
        ("q_proj", "no module matches 'q_proj'"),
        (["layers.0.self_attn.q_proj"], "q_proj is adapted in some layers but not in model.layers.2.self_attn.q_proj"),
        ("(", "not a regular expression"),
    ],
)
def test_targets_that_cannot_be_are_refused(targets: Any, message: str) -> None:
    # Layers 0 and 2 are of one kind, but 2 is on its own: with a third repeat they would be one array.
    model = Transformer(small_llama(num_layers=4, windows=(None, 5, None, 5)))
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        choose_sites(find_sites(model), targets)


def test_experts_are_adapted_whole_or_not_at_all_and_routers_never() -> None:
    config = small_llama(family="qwen3_moe", num_layers=2)
    experts = MoEConfig(num_experts=4, experts_per_token=2, aux_loss_coef=0.0, d_ff=112, normalize=True)
    kinds = tuple(dataclasses.replace(kind, mlp="experts") for kind in config.layers)
    sites = find_sites(Transformer(dataclasses.replace(config, layers=kinds, moe=experts)))
    assert [last_name(site) for site in sites][4:] == ["gate_proj", "up_proj", "down_proj"], "no router"
    assert (sites[-1].lead, sites[-1].inputs, sites[-1].outputs) == ((2, 4), (112,), (64,))
    with pytest.raises(ValueError, match="target_modules selects up_proj of the experts"):
        choose_sites(sites, ["up_proj"])
    lora = Lora(r=2, alpha=2.0, use_rslora=False, sites=choose_sites(sites, ["gate_proj", "up_proj", "down_proj"]))
    assert num_adapter_params(lora) == 2 * 4 * 3 * 2 * (64 + 112)
    assert num_active_params(lora, experts_per_token=2) == num_adapter_params(lora) // 2


def test_dense_maps_next_to_experts_are_adapted_only_if_the_merged_model_is_exported() -> None:
    config = small_llama(family="qwen3_moe", num_layers=3)
    experts = MoEConfig(num_experts=4, experts_per_token=2, aux_loss_coef=0.0, d_ff=112, normalize=True)
    kinds = tuple(
        dataclasses.replace(kind, mlp="dense" if place == 1 else "experts") for place, kind in enumerate(config.layers)
    )
    sites = find_sites(Transformer(dataclasses.replace(config, layers=kinds, moe=experts)))
    with pytest.raises(ValueError, match=r"would not load the adapters of model\.layers\.1\.mlp\.gate_proj") as caught:
        require_loadable(sites, choose_sites(sites, "all-linear"))
    advised = str(caught.value).rpartition("target_modules ")[2].strip("'")
    chosen = choose_sites(sites, advised)
    require_loadable(sites, chosen)
    names = {module.name for site in chosen for module in site.modules}
    dense = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert names == {module.name for site in sites for module in site.modules} - dense


def test_the_axis_of_a_single_head_is_not_taken_for_input_or_output() -> None:
    one = small_llama(num_heads=1, num_kv_heads=1, head_dim=16)
    shapes = [(last_name(site), site.inputs, site.outputs, site.fan_in_first) for site in find_sites(Transformer(one))]
    assert shapes[:4] == [
        ("q_proj", (64,), (1, 16), False),
        ("k_proj", (64,), (1, 16), False),
        ("v_proj", (64,), (1, 16), False),
        ("o_proj", (1, 16), (64,), False),
    ]
    plain = {"family": "gpt2", "gated_mlp": False, "norm": "layer", "learned_positions": True}
    sites = find_sites(Transformer(dataclasses.replace(one, **plain)))
    assert [(last_name(site), site.inputs, site.outputs) for site in sites[2:4]] == [
        ("c_attn", (64,), (1, 16)),
        ("c_proj", (1, 16), (64,)),
    ]
    assert all(site.fan_in_first for site in sites)


def test_fresh_adapters_change_nothing_and_are_sharded_as_the_params(base: Base) -> None:
    lora = lora_on("all-linear")
    adapters = init_adapters(lora, jax.random.key(1), jnp.float32)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_adapters(lora, jnp.float32))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), adapters) == described
    assert num_adapter_params(lora) == sum(leaf.size for leaf in jax.tree.leaves(adapters))
    query = adapters["stack"]["layer_1"]["attention"]["query"]
    assert query["a"].shape == (1, 64, 3)
    assert 0.9 / 8 < np.abs(query["a"]).max() <= 1 / 8, "uniform within 1 / sqrt(64)"
    assert adapter_axes(lora)["rest"]["layer_0"]["mlp"]["down"] == {"a": ("mlp", None), "b": (None, "embed")}
    # The start of an adapter does not depend on the other targets.
    alone = init_adapters(lora_on(["q_proj"]), jax.random.key(1), jnp.float32)
    np.testing.assert_array_equal(alone["stack"]["layer_1"]["attention"]["query"]["a"], query["a"])
    apply = jax.jit(make_apply_fn(MODEL))
    expected = apply(base.params, TOKENS, MASK)
    np.testing.assert_array_equal(apply(weights_of(lora, base, adapters), TOKENS, MASK), expected)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_unmerged_equals_merged_in_training_and_decoding(base: Base, use_rslora: bool) -> None:
    lora = lora_on("all-linear", use_rslora=use_rslora)
    assert lora.scale == pytest.approx(6 / (3**0.5 if use_rslora else 3))
    adapters = moved(init_adapters(lora, jax.random.key(1), jnp.float32))
    merged = merge(lora, base, adapters, sites=SITES, dtype=jnp.float32)
    weights, apply = weights_of(lora, base, adapters), jax.jit(make_apply_fn(MODEL))
    found, expected = (np.asarray(apply(params, TOKENS, MASK)) for params in (weights, merged))
    assert np.abs(expected - apply(base.params, TOKENS, MASK)).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5)
    greedy = Sampling(temperature=0, max_new_tokens=6)
    unmerged, separate = (Engine(MODEL, params, end_token_ids=[], sampling=greedy) for params in (weights, merged))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert [answer.tokens for answer in unmerged.run(prompts)] == [answer.tokens for answer in separate.run(prompts)]


def in_int8(base: Base) -> Base:
    kernels, scales = {}, {}
    for site in SITES:
        path = (*site.path, KERNEL)
        kernels[path], scales[path] = quantize(get_at(base.params, path), site)

    def of_leaf(path: Any, leaf: Any) -> Any:
        return kernels.get(tuple(key.key for key in path), leaf)

    return Base(jax.tree_util.tree_map_with_path(of_leaf, base.params), tree_of(scales))


def test_int8_is_off_by_half_a_unit_at_most(base: Base) -> None:
    site = next(site for site in SITES if last_name(site) == "o_proj" and site.lead)
    kernel = get_at(base.params, (*site.path, KERNEL)).at[..., 5].set(0)
    values, unit = quantize(kernel, site)
    assert (values.dtype, unit.shape) == (jnp.int8, (*site.lead, *site.outputs))
    back = np.asarray(values, np.float32) * unit[:, None, None]
    assert (np.abs(back - kernel) <= 0.5001 * np.asarray(unit)[:, None, None]).all()
    assert np.abs(np.asarray(values, np.int32)).max((1, 2)).tolist() == [[127] * 5 + [0] + [127] * 58]
    np.testing.assert_array_equal(back[..., 5], 0)


def test_quantizing_a_stack_makes_no_second_copy_of_it(base: Base) -> None:
    site = next(site for site in SITES if last_name(site) == "down_proj" and site.lead)
    kernel = get_at(base.params, (*site.path, KERNEL))
    large = jax.ShapeDtypeStruct((8, *kernel.shape[1:]), jnp.float32)  # as it is read, for any compute dtype
    sizes = jax.jit(quantize, static_argnums=1).lower(large, site).compile().memory_analysis()
    num_bytes = 4 * large.size
    assert sizes.argument_size_in_bytes == num_bytes
    assert sizes.output_size_in_bytes < 0.3 * num_bytes
    assert sizes.temp_size_in_bytes < 0.1 * num_bytes


def test_adapters_in_bfloat16_count_in_training_as_in_their_merge(base: Base) -> None:
    """Uses a scale that bfloat16 would round once more."""
    lora = lora_on(["o_proj"], alpha=4.0)
    adapters = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), moved(init_adapters(lora, jax.random.key(0), jnp.float32))
    )
    apply = jax.jit(make_apply_fn(MODEL))
    merged = merge(lora, base, adapters, sites=SITES, dtype=jnp.float32)
    expected, plain = apply(merged, TOKENS, MASK), apply(base.params, TOKENS, MASK)
    found = apply(weights_of(lora, base, adapters), TOKENS, MASK)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected - plain).max())


def test_int8_logits_are_those_of_its_numbers_and_near_the_base(base: Base) -> None:
    quantized = in_int8(base)
    paths = {(*site.path, KERNEL): site for site in SITES}
    numbers = {
        path: as_float(*(get_at(tree, path) for tree in quantized), site, jnp.float32) for path, site in paths.items()
    }
    plain = jax.tree_util.tree_map_with_path(
        lambda path, leaf: numbers.get(tuple(key.key for key in path), leaf), base.params
    )
    apply = jax.jit(make_apply_fn(MODEL))
    found = np.asarray(apply(Weights(*quantized, {}), TOKENS, MASK))
    np.testing.assert_allclose(found, apply(plain, TOKENS, MASK), atol=2e-5)
    # A weight is off by up to half its unit s, about uniformly: a logit with the gradient g moves by about
    # sqrt(sum g^2 s^2 / 12). Five times that is the bound.
    picked = (np.array([0, 0, 1, 1]), np.array([3, 8, 5, 8]), np.array([1, 30, 7, 63]))

    def logits(kernels: dict[Any, jax.Array]) -> jax.Array:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: kernels.get(tuple(key.key for key in path), leaf), base.params
        )
        return make_apply_fn(MODEL)(params, TOKENS, MASK)[picked]

    kernels = {path: get_at(base.params, path) for path in numbers}
    slopes = jax.jit(jax.jacrev(logits))(kernels)
    variance = np.zeros(4)
    for site in SITES:
        unit = get_at(quantized.scales, (*site.path, KERNEL)).reshape(
            (*site.lead, *(1 for _ in site.inputs), *site.outputs)
        )
        variance += np.square(slopes[*site.path, KERNEL] * unit).reshape(4, -1).sum(1) / 12
    apart = np.abs(found - apply(base.params, TOKENS, MASK))[picked]
    assert (apart < 5 * np.sqrt(variance)).all(), (apart, np.sqrt(variance))
    assert apart.max() > 0.1 * np.sqrt(variance.max()), "int8 rounds"


def test_a_merge_that_gives_up_the_base_reuses_its_memory(base: Base) -> None:
    lora = lora_on("all-linear")
    adapters = moved(init_adapters(lora, jax.random.key(1), jnp.float32))
    expected = merge(lora, base, adapters, sites=SITES, dtype=jnp.float32)
    for own in (jax.tree.map(jnp.copy, base), jax.tree.map(jnp.copy, in_int8(base))):
        kept = jax.tree.map(jnp.copy, own)
        kernel = get_at(own.params, (*SITES[0].path, KERNEL))
        place = kernel.unsafe_buffer_pointer()
        merged = merge(lora, own, adapters, sites=SITES, dtype=jnp.float32, gives_up=True)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(own.params))
        found = get_at(merged, (*SITES[0].path, KERNEL))
        if not own.scales:
            assert found.unsafe_buffer_pointer() == place, "in the memory of the base"
            jax.tree.map(np.testing.assert_array_equal, merged, expected)
        plain = merge(lora, kept, adapters, sites=SITES, dtype=jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, merged, plain)


def test_a_stack_is_merged_layer_by_layer() -> None:
    model = Transformer(small_llama(num_layers=16))
    site = next(site for site in find_sites(model) if last_name(site) == "up_proj")
    kernel = jax.ShapeDtypeStruct((*site.lead, *site.inputs, *site.outputs), jnp.float32)
    pair = tuple(jax.ShapeDtypeStruct((16, *shape), jnp.float32) for shape in ((64, 2), (2, *site.outputs)))
    program = jax.jit(partial(_merged, site=site, scale=1.0, dtype=jnp.dtype(jnp.float32)), donate_argnums=0)
    # In bfloat16 XLA's CPU backend copies the stack to change a layer of it; no other backend has to.
    memory = program.lower(kernel, None, pair).compile().memory_analysis()
    assert memory.alias_size_in_bytes == kernel.size * 4
    assert memory.temp_size_in_bytes < kernel.size * 4 / 4, "far from a copy of all layers"
