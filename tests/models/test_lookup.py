"""The token table: its gradient where one token occurs thousands of times, and lookups over a mesh."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdpo.config import MeshConfig
from jdpo.models.lookup import lookup
from jdpo.models.transformer import Transformer, init_params, logical_axes, make_apply_fn
from jdpo.sharding.axes import AXES, BATCH_AXES
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.on_mesh import OnMesh
from jdpo.sharding.rules import param_shardings, partition_spec
from tests.conftest import small_llama

NAMES = ("vocab", "embed")

TOKENS = np.where(np.arange(4096).reshape(64, 64) % 2, 0, np.arange(4096).reshape(64, 64) % 31 + 1)


def gradient(dtype: str, take: Any) -> np.ndarray:
    cotangent = jnp.asarray(np.random.default_rng(0).normal(0.5, 1, (64, 64, 8)), jnp.bfloat16)
    _, pull_back = jax.vjp(lambda table: take(table, TOKENS).astype(jnp.bfloat16), jnp.ones((32, 8), dtype))
    (found,) = jax.jit(pull_back)(cotangent)
    assert found.dtype == dtype
    return np.asarray(found, np.float64)


def test_a_narrow_table_gets_the_sum_of_a_wide_one() -> None:
    def own(table: Any, tokens: Any) -> Any:
        return lookup(table, tokens, NAMES, table.dtype)

    exact = gradient("float32", own)
    np.testing.assert_array_equal(exact, gradient("float32", lambda table, tokens: table[tokens]))
    np.testing.assert_allclose(gradient("bfloat16", own), exact, rtol=2**-8, atol=1e-3)
    lost = gradient("bfloat16", lambda table, tokens: table[tokens])
    assert np.abs(lost[0] / exact[0] - 1).min() > 0.05, "what plain indexing loses of the token in every other place"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_those_of_the_table(dtype: str) -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), dtype)
    found = lookup(table, TOKENS, NAMES, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(table, np.float32)[TOKENS])


def over_mesh(
    sizes: tuple[int, int, int, int], table: Any, tokens: Any, cotangent: Any, dtype: str
) -> tuple[Any, Any, str]:
    """Returns the rows, the table's gradient, and the compiled program, on data x fsdp x expert x tensor."""
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    split = NamedSharding(mesh, partition_spec(NAMES, table.shape, mesh))
    by_sequence = NamedSharding(mesh, PartitionSpec(BATCH_AXES if tokens.shape[0] % 8 == 0 else None))

    def run(table: Any, tokens: Any, cotangent: Any) -> Any:
        rows, pull_back = jax.vjp(lambda table: lookup(table, tokens, NAMES, dtype), table)
        return rows, pull_back(cotangent)[0]

    inputs, outputs = (split, by_sequence, by_sequence), (by_sequence, split)
    compiled = OnMesh(mesh, jax.jit(run, in_shardings=inputs, out_shardings=outputs)).lower(table, tokens, cotangent)
    compiled = compiled.compile()
    found = compiled(*(jax.device_put(*pair) for pair in zip((table, tokens, cotangent), inputs, strict=True)))
    return *(np.asarray(array, np.float32) for array in found), compiled.as_text()


def inputs(width: int, table_dtype: str, dtype: str, rows: int = 8, length: int = 8) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 96, (rows, length)) // 3, jnp.int32)  # several devices look up the same ids
    table, cotangent = rng.normal(size=(96, width)), rng.normal(0.5, 1, (rows, length, width))
    return jnp.asarray(table, table_dtype), tokens, jnp.asarray(cotangent, dtype)


def collectives(program: str, kinds: str = "all-gather|all-reduce|reduce-scatter") -> list[tuple[int, ...]]:
    """Returns the shapes that collectives of these kinds give."""
    found = re.findall(rf"= (.*?) (?:{kinds})\(", program)
    shapes = [shape for result in found for shape in re.findall(r"\w\[([\d,]*)\]", result)]
    return [tuple(int(size) for size in shape.split(",") if size) for shape in shapes]


@pytest.mark.parametrize(
    ("sizes", "width", "table_dtype", "dtype"),
    [
        ((1, 8, 1, 1), 16, "float32", "bfloat16"),
        ((1, 2, 4, 1), 16, "bfloat16", "bfloat16"),
        ((2, 2, 1, 2), 16, "bfloat16", "float32"),
        ((1, 2, 2, 2), 6, "float32", "float32"),  # 6 is split over fsdp alone
    ],
)
def test_tokens_move_and_the_table_does_not(
    sizes: tuple[int, int, int, int], width: int, table_dtype: str, dtype: str
) -> None:
    table, tokens, cotangent = inputs(width, table_dtype, dtype)
    rows, gradient, program = over_mesh(sizes, table, tokens, cotangent, dtype)
    # Selecting rows rounds nothing, and the exchange must not either.
    np.testing.assert_array_equal(rows, np.asarray(table.astype(dtype), np.float32)[tokens])
    exact = np.zeros(table.shape)
    np.add.at(exact, np.asarray(tokens), np.asarray(cotangent, np.float64))
    tolerance = {"rtol": 2**-8, "atol": 1e-5} if table_dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(gradient, exact, **tolerance)
    assert "all-to-all" in program
    largest = max(math.prod(shape) for shape in collectives(program))
    assert largest <= table.size // 2, "whole rows for own tokens, and sums of own columns over other axes"


@pytest.mark.parametrize(
    ("width", "rows", "length"),
    [
        (12, 8, 4),  # 8 devices do not divide the columns
        (16, 12, 4),  # nor these rows
        (16, 8, 256),  # a device has more tokens than the table has rows
    ],
)
def test_a_table_that_is_whole_or_small_is_gathered(width: int, rows: int, length: int) -> None:
    table, tokens, cotangent = inputs(width, "float32", "float32", rows, length)
    found, gradient, program = over_mesh((1, 8, 1, 1), table, tokens, cotangent, "float32")
    assert "all-to-all" not in program
    np.testing.assert_array_equal(found, np.asarray(table)[tokens])
    exact = np.zeros(table.shape)
    np.add.at(exact, np.asarray(tokens), np.asarray(cotangent, np.float64))
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_a_model_are_those_of_one_device(tied: bool) -> None:
    sizes = {"vocab_size": 96, "d_model": 16, "head_dim": 4, "d_ff": 32, "num_layers": 1, "max_positions": 96}
    config = small_llama(**sizes, tie_embeddings=tied, learned_positions=tied)
    model = Transformer(config)
    params = init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 96, (8, 6))

    def grads(params: Any, tokens: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.square(make_apply_fn(model)(params, tokens, jnp.ones_like(tokens, bool))).mean()

        return jax.grad(loss)(params)

    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    shardings = param_shardings(logical_axes(model), params, mesh)
    by_sequence = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    sharded = OnMesh(mesh, jax.jit(grads, in_shardings=(shardings, by_sequence), out_shardings=shardings))
    place = jax.device_put
    program = sharded.lower(params, tokens).compile()
    found = program(place(params, shardings), place(tokens, by_sequence))
    jax.tree.map(
        lambda one, many: np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-7),
        jax.jit(grads)(params, tokens),
        found,
    )
    of_lookup = "\n".join(line for line in program.as_text().splitlines() if "embed/shard_map" in line)
    assert "all-to-all" in of_lookup
    assert max(math.prod(shape) for shape in collectives(of_lookup)) <= 96 * 16 // 4, "the sum of own columns over data"
