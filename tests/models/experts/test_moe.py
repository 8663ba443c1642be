"""Experts against a plain loop over tokens, on one device and over meshes.

Axes: n sequences, t positions, k experts of a token, e experts, d model, f width, r rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdpo.config import MeshConfig
from jdpo.losses.router import load_balancing_loss, of_real_rows
from jdpo.models.experts.grouped_matmul import Grouping, choose_grouping, grouped_matmul
from jdpo.models.experts.routes import add_bias, make_routes, most_rows, to_rows, to_tokens
from jdpo.models.experts.routing import ROUTER, MoE
from jdpo.models.layers import ADAPTERS, SCALES
from jdpo.models.model_config import ClampedGate, MoEConfig
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import LOGICAL_RULES, param_shardings
from jdpo.types import RouterStats

N, T, D, F, E, K = 8, 5, 8, 6, 8, 3
CONFIG = MoEConfig(num_experts=E, experts_per_token=K, d_ff=F, normalize=True, aux_loss_coef=0.1)
# As gpt-oss; most outputs of gate and up are beyond the limit.
BIASED = {"bias": True, "clamped_gate": ClampedGate(1.7, 2.0)}

Params = dict[str, Any]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def layer(**changes: Any) -> MoE:
    config = MoEConfig(**{**vars(CONFIG), **changes})
    return MoE(config, D, "silu", jnp.float64, jnp.float64)


def make_params(seed: int = 0, *, bias: bool = False) -> Params:
    rng = np.random.default_rng(seed)
    maps = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    params = {
        "router": {"kernel": rng.normal(size=(D, E))},
        "experts": {name: {"kernel": rng.normal(size=shape)} for name, shape in maps.items()},
    }
    for held in (params["router"], *params["experts"].values()) if bias else ():
        held["bias"] = rng.normal(size=held["kernel"].shape[:-2] + held["kernel"].shape[-1:])
    return params


def make_inputs(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns activations [n, t, d] and weights of tokens [n, t], some of them 0 and some 2."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, T, D)), rng.integers(0, 3, (N, T)).astype(np.float64)


def plain(params: Params, x: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Returns for one token the layer's output, the router's probabilities and the chosen experts."""
    logits = x @ params["router"]["kernel"] + params["router"].get("bias", 0)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    chosen = np.argsort(-probabilities, kind="stable")[:K]
    weights = probabilities[chosen] / (probabilities[chosen].sum() if normalize else 1)
    out = np.zeros(D)
    for expert, weight in zip(chosen, weights, strict=True):
        gate, up, down = (params["experts"][name]["kernel"][expert] for name in ("gate", "up", "down"))
        if "bias" in params["router"]:
            of_gate, of_up, of_down = (params["experts"][name]["bias"][expert] for name in ("gate", "up", "down"))
            g, u = np.minimum(x @ gate + of_gate, 2.0), np.clip(x @ up + of_up, -2.0, 2.0)
            out += weight * ((g / (1 + np.exp(-1.7 * g)) * (u + 1)) @ down + of_down)
        else:
            out += weight * ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
    return out, probabilities, chosen.tolist()


def test_a_shared_expert_is_added_whatever_the_routing() -> None:
    params, (x, token_weights) = make_params(), make_inputs()
    rng = np.random.default_rng(7)
    shapes = {"gate": (D, 4), "up": (D, 4), "down": (4, D), "score": (D, 1)}
    own = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    shared = {name: {"kernel": kernel} for name, kernel in own.items()}
    found = jax.jit(lambda: layer(shared_d_ff=4).apply({"params": params | {"shared": shared}}, x, token_weights))()
    alone = jax.jit(lambda: layer().apply({"params": params}, x, token_weights))()
    gate = x @ own["gate"]
    expected = (gate / (1 + np.exp(-gate)) * (x @ own["up"])) @ own["down"] / (1 + np.exp(-(x @ own["score"])))
    np.testing.assert_allclose(found - alone, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"normalize": False}, BIASED], ids=["plain", "not normalized", "biased"])
def test_outputs_and_statistics_are_those_of_a_plain_loop(changes: dict[str, Any]) -> None:
    params, (x, token_weights) = make_params(bias=changes == BIASED), make_inputs()
    normalize = changes.get("normalize", True)
    out, left = jax.jit(lambda *args: layer(**changes).apply({"params": params}, *args, mutable=[ROUTER]))(
        x, token_weights
    )
    expected = np.zeros((N, T, D))
    assignments, probabilities = np.zeros((N, E)), np.zeros((N, E))
    for n, t in np.argwhere(token_weights > 0):
        expected[n, t], of_token, chosen = plain(params, x[n, t], normalize)
        assignments[n, chosen] += token_weights[n, t]
        probabilities[n] += token_weights[n, t] * of_token
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(left[ROUTER]["assignments"], assignments)
    np.testing.assert_allclose(left[ROUTER]["probabilities"], probabilities, rtol=1e-12)
    np.testing.assert_array_equal(left[ROUTER]["tokens"], token_weights.sum(1))


def scalar(params: Params, x: Any, token_weights: Any, module: MoE) -> Any:
    """Returns a scalar that depends on all outputs and statistics."""
    out, left = module.apply({"params": params}, x, token_weights, mutable=[ROUTER])
    counts = left[ROUTER]
    balance = (counts["assignments"].sum(0) * counts["probabilities"].sum(0)).sum()
    return (jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out).sum() + 0.01 * balance


@pytest.mark.parametrize("changes", [pytest.param({}, marks=pytest.mark.full), BIASED], ids=["plain", "biased"])
def test_gradients_are_central_differences(changes: dict[str, Any]) -> None:
    bias = changes == BIASED
    params, (x, token_weights) = make_params(bias=bias), make_inputs()
    value = jax.jit(lambda params, x: scalar(params, x, token_weights, layer(**changes)))
    of_params, of_x = jax.jit(jax.grad(value, (0, 1)))(params, x)
    direction, along_x = make_params(5, bias=bias), make_inputs(6)[0]
    along = sum(
        jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), (of_params, of_x), (direction, along_x)))
    )
    up, down = (
        float(value(jax.tree.map(lambda p, d, s=sign: p + s * 1e-6 * d, params, direction), x + sign * 1e-6 * along_x))
        for sign in (1, -1)
    )
    assert along == pytest.approx((up - down) / 2e-6, rel=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
        pytest.param({"data": 1, "fsdp": 4, "tensor": 2}, marks=pytest.mark.full),
        pytest.param({"data": 1, "fsdp": 1, "expert": 8}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_meshes_change_nothing(sizes: dict[str, int]) -> None:
    params, (x, token_weights) = make_params(bias=True), make_inputs()
    module, mesh = layer(**BIASED), make_mesh(MeshConfig(**sizes))
    expected = jax.jit(jax.value_and_grad(lambda *args: scalar(*args, token_weights, module), (0, 1)))(params, x)
    found = on_mesh(module, mesh, params, x, token_weights)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, expected)


def on_mesh(module: MoE, mesh: Any, params: Params, x: Any, token_weights: Any) -> Any:
    """Returns value and gradients compiled for a mesh, with arguments sharded as in training."""
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), x, token_weights))["params"]
    names = jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    shardings = (
        param_shardings(names, params, mesh),
        NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"))),
    )
    function = jax.value_and_grad(lambda *args: scalar(*args, token_weights, module), (0, 1))
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
        return jax.jit(function, in_shardings=shardings, out_shardings=(None, shardings)).lower(params, x).compile()


@pytest.mark.parametrize(
    "sizes", [None, pytest.param({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.full)], ids=str
)
def test_scales_and_adapters_of_kernels_are_those_of_merged_kernels(sizes: dict[str, int] | None) -> None:
    rng, (x, token_weights) = np.random.default_rng(7), make_inputs()
    params, merged = make_params(), make_params()
    scales: Params = {"experts": {}}
    adapters: Params = {"experts": {}}
    for name, held in merged["experts"].items():
        inputs, outputs = held["kernel"].shape[1:]
        held["kernel"] = rng.integers(-127, 128, (E, inputs, outputs)).astype(np.float64)
        params["experts"][name] = {"kernel": held["kernel"].astype(np.int8)}
        unit, a, b = (rng.normal(size=size) for size in ((E, outputs), (E, inputs, 2), (E, 2, outputs)))
        scales["experts"][name] = {"kernel": unit / 100}
        adapters["experts"][name] = {"a": a, "b": b}
        held["kernel"] = held["kernel"] * unit[:, None] / 100 + a @ b
    expected = jax.jit(layer().apply)({"params": merged}, x, token_weights)
    variables = {"params": params, SCALES: scales, ADAPTERS: adapters}
    mesh = make_mesh(MeshConfig(**sizes)) if sizes else make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
        found = jax.jit(layer().apply)(variables, x, token_weights)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.full
def test_sequences_that_a_mesh_does_not_divide_are_whole_on_each_device() -> None:
    params, (x, token_weights) = make_params(), make_inputs()
    apply = jax.jit(lambda *args: layer().apply({"params": params}, *args))
    expected = apply(x[:7], token_weights[:7])
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
        found = jax.jit(lambda *args: layer().apply({"params": params}, *args))(x[:7], token_weights[:7])
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_no_device_ever_holds_the_experts_of_others() -> None:
    """Checks that on data=2 x expert=4 no array holds more than two experts: none is gathered along expert."""
    params, (x, token_weights) = make_params(), make_inputs()
    program = on_mesh(layer(), make_mesh(MeshConfig(data=2, fsdp=1, expert=4)), params, x, token_weights)
    text = program.as_text()
    assert f"f64[{E // 4},{D},{F}]" in text
    assert f"f64[{E},{D},{F}]" not in text
    assert f"f64[{E},{F},{D}]" not in text
    alone = jax.jit(jax.grad(lambda params: scalar(params, x, token_weights, layer()))).lower(params).compile()
    assert f"f64[{E},{D},{F}]" in alone.as_text()


def test_everything_may_go_to_one_expert() -> None:
    """Sends all tokens to the same experts of one device, as a collapsed router does; nothing is dropped."""
    params, (x, token_weights) = make_params(), make_inputs()
    params["router"]["kernel"] = np.zeros((D, E))  # ties: the first experts win
    expected = jax.jit(jax.value_and_grad(lambda *args: scalar(*args, token_weights, layer()), (0, 1)))(params, x)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=4))
    found = on_mesh(layer(), mesh, params, x, token_weights)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, expected)
    assert float(plain(params, x[0, 0], True)[0] @ np.ones(D)) != 0


def test_padding_may_hold_anything() -> None:
    params, (x, token_weights) = make_params(), make_inputs()
    spoilt = np.where(token_weights[..., None] > 0, x, np.nan)

    def weights_grad(x: Any) -> Any:
        return jax.grad(lambda experts: scalar({**params, "experts": experts}, x, token_weights, layer()))(
            params["experts"]
        )

    jax.tree.map(np.testing.assert_array_equal, jax.jit(weights_grad)(spoilt), jax.jit(weights_grad)(x))


@pytest.mark.parametrize("block", [1, 4])
def test_rows_are_sorted_by_expert_and_come_back(block: int) -> None:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(6)[:3] for _ in range(20)])
    experts[3] = 99
    routes = jax.jit(make_routes, static_argnums=(1, 2))(experts, 4, block)  # experts 4 and 5 are on another device
    rows = most_rows(20, 3, 4, block)
    assert routes.assignment.shape == (rows,)
    np.testing.assert_array_equal(routes.sizes, [-(-(experts == e).sum() // block) * block for e in range(4)])
    used = np.flatnonzero(np.asarray(routes.assignment) < 60)
    assert len(used) == (experts < 4).sum()
    for row in used:
        assert experts.reshape(-1)[routes.assignment[row]] == routes.expert[row]
        assert np.asarray(routes.place).reshape(-1)[routes.assignment[row]] == row
    assert (np.diff(np.asarray(routes.expert)) >= 0).all()
    x, weights = rng.normal(size=(20, 5)), rng.normal(size=(20, 3))
    expected = x * np.where(experts < 4, weights, 0).sum(1, keepdims=True)
    back = to_tokens(to_rows(jnp.asarray(x), routes), jnp.asarray(weights), routes)
    np.testing.assert_allclose(back, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grouping", [Grouping("blocks", 4), Grouping("ragged", 4)], ids=str)
def test_grouped_products_and_their_gradients(grouping: Grouping) -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([4, 0, 12, 4], np.int32)
    x, kernel, cotangent = (rng.normal(size=shape) for shape in ((28, 3), (4, 3, 5), (28, 5)))
    x[20:] = cotangent[20:] = 0  # after the last group
    expert = np.repeat(np.arange(4), sizes)
    out, pull = jax.vjp(lambda *args: grouped_matmul(grouping, *args, sizes), jnp.asarray(x), jnp.asarray(kernel))
    of_x, of_kernel = pull(jnp.asarray(cotangent))
    np.testing.assert_allclose(out[:20], np.einsum("rd,rdf->rf", x[:20], kernel[expert]), rtol=1e-12)
    np.testing.assert_allclose(of_x[:20], np.einsum("rf,rdf->rd", cotangent[:20], kernel[expert]), rtol=1e-12)
    expected = [x[:20][expert == e].T @ cotangent[:20][expert == e] for e in range(4)]
    np.testing.assert_allclose(of_kernel, expected, rtol=1e-12, atol=1e-14)


def test_the_gradient_of_a_bias_reads_no_row_after_those_in_use() -> None:
    """Kernels may leave anything there, such as NaN."""
    routes = make_routes(jnp.array([[0, 1], [1, 3], [3, 3]]), 3, block=2)  # 3 means none
    in_use = np.arange(len(routes.expert)) < routes.sizes.sum()
    assert not in_use.all()
    rows = jnp.zeros((len(routes.expert), 4))
    _, pull = jax.vjp(lambda bias: add_bias(rows, bias, routes), jnp.zeros((3, 4)))
    (of_bias,) = pull(jnp.where(in_use[:, None], jnp.ones_like(rows), jnp.nan))
    np.testing.assert_array_equal(of_bias, np.repeat(np.asarray(routes.sizes)[:, None], 4, 1))


@pytest.mark.parametrize(
    ("platform", "blocks"),
    [("cpu", [16, 16, 512]), ("tpu", [128, 128, 512]), ("gpu", [128, 128, 512])],
)
def test_groupings_follow_the_platform_and_the_load(platform: str, blocks: list[int]) -> None:
    backend = "ragged" if platform == "tpu" else "blocks"
    found = [choose_grouping(rows, 8, platform) for rows in (8, 1000, 100_000)]
    assert found == [Grouping(backend, block) for block in blocks]


def test_only_real_rows_count() -> None:
    stats = RouterStats(
        jnp.array([[2.0, 0.0], [jnp.nan, 1.0]]), jnp.array([[1.5, 0.5], [7.0, 7.0]]), jnp.array([2.0, 9])
    )
    real = of_real_rows(stats, jnp.array([True, False]))
    assert float(load_balancing_loss(real)) == 2 * (1 * 0.75 + 0 * 0.25)
    even = RouterStats(jnp.full((3, 4), 6.0), jnp.full((3, 4), 3.0), jnp.full(3, 12.0))  # two of four experts per token
    assert float(load_balancing_loss(even)) == 2.0
