"""The chunked head against the plain one in float64: values, gradients, what the compiled program holds and sends."""

from __future__ import annotations

import re
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jdpo.losses import token_logps
from jdpo.losses.linear import linear_token_logps
from jdpo.losses.linear_chunks import HeadSettings, row_token_logps

WIDTH, VOCAB = 16, 37
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float64": 1e-12}
SOFT = {"logit_softcap": 3.0, "logit_scale": 0.7}


def plain(hidden: Any, head: Any, targets: Any, *, logit_softcap: Any = None, logit_scale: Any = None) -> tuple:
    """(logps, log_sum_sq) from all logits at once."""
    logits = hidden @ head
    if logit_scale is not None:
        logits *= logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    log_sum_sq = jax.nn.logsumexp(2 * logits, -1) - 2 * jax.nn.logsumexp(logits, -1)
    return token_logps(logits, targets), log_sum_sq


def inputs(shape: tuple[int, ...], seed: int = 0, *, width: int = WIDTH, vocab: int = VOCAB) -> tuple[np.ndarray, ...]:
    """Hidden states, head, targets, and two random cotangents; float32."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(0, 1, (*shape, width)), rng.normal(0, 0.5, (width, vocab))
    floats = (array.astype(np.float32) for array in (hidden, head, *rng.normal(0, 1, (2, *shape))))
    hidden, head, *cotangents = floats
    return hidden, head, rng.integers(0, vocab, shape).astype(np.int32), *cotangents


def weighted(function: Any, **options: Any) -> Any:
    """The first results of `function`, one for each cotangent given, and the gradients under these."""

    def total(hidden: Any, head: Any, targets: Any, *cotangents: Any) -> Any:
        results = function(hidden, head, targets, **options)
        results = (results if isinstance(results, tuple) else (results,))[: len(cotangents)]
        pairs = zip(results, cotangents, strict=True)
        return sum((result * cotangent).sum() for result, cotangent in pairs), results

    def run(*arrays: Any) -> Any:
        (_, results), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays)
        return results, gradients

    return run


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Norm of the difference over the norm of what was expected, for every array."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


ROWS_CASE = ((3, 10), {"chunk_size": 4, "return_log_sum_sq": True, **SOFT})  # 3 chunks of 4, two slots are padding
FLAT_CASE = ((44,), {"chunk_size": 20, "return_log_sum_sq": True})


@pytest.mark.parametrize(
    ("dtype", "shape", "options"),
    [
        *((dtype, *case) for dtype in TOLERANCE for case in (ROWS_CASE, FLAT_CASE)),
        ("float32", (2, 7), {"chunk_size": 3}),
        ("float32", (3, 9), {"logit_scale": 0.3, "return_log_sum_sq": True}),
        ("float32", (24,), {"chunk_size": 100, "logit_softcap": 2.0}),
        ("bfloat16", (45,), {}),
    ],
)
def test_values_and_gradients_are_those_of_the_plain_head(dtype: str, shape: tuple, options: dict) -> None:
    *arrays, targets, g_logps, g_sum_sq = inputs(shape, seed=sum(shape))
    cotangents = (g_logps, g_sum_sq)[: 1 + options.get("return_log_sum_sq", False)]
    model = {key: value for key, value in options.items() if key.startswith("logit")}
    with jax.enable_x64(True):
        arrays = [jnp.asarray(array, dtype) for array in arrays]
        found = jax.jit(weighted(linear_token_logps, **options))(*arrays, targets, *cotangents)
        # The operands as they are after rounding to dtype: what is measured is the arithmetic.
        wide = [array.astype(jnp.float64) for array in arrays]
        results, gradients = jax.jit(weighted(plain, **model))(*wide, targets, *cotangents)
    assert [result.dtype for result in found[0]] == [jnp.promote_types(dtype, jnp.float32)] * len(cotangents)
    assert [gradient.dtype for gradient in found[1]] == [dtype, dtype]
    assert_close(found, (results, gradients), TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6)])
@pytest.mark.parametrize("chunk", [4, 9])
@pytest.mark.parametrize("option", ["by_token", "by_index", "keeps_logits"])
def test_options_of_the_arithmetic_change_no_results(option: str, chunk: int, dtype: str, tolerance: float) -> None:
    hidden, head, targets, *cotangents = inputs((2, 9), seed=11)

    hidden[1, 5] = np.nan  # after the 4 positions of its row that count

    def found(chunk: int, **options: bool) -> Any:
        settings = HeadSettings(SOFT["logit_softcap"], SOFT["logit_scale"], True, **options)
        function = partial(row_token_logps, settings, lengths_r=jnp.array([9, 4]), chunk=chunk)
        return jax.jit(weighted(function))(*arrays, targets, *cotangents)

    with jax.enable_x64(True):
        arrays = [jnp.asarray(array, dtype) for array in (hidden, head)]
        assert_close(found(chunk, **{option: True}), found(4), tolerance)


@pytest.mark.smoke
def test_half_of_a_by_hand() -> None:
    # Two words, logits (0, ln 3): p = (1/4, 3/4), sum of squares 10/16.
    hidden, head = jnp.ones((1, 2, 1)), jnp.log(jnp.array([[1.0, 3.0]]))
    logps, log_sum_sq = linear_token_logps(hidden, head, jnp.array([[0, 1]]), return_log_sum_sq=True)
    np.testing.assert_allclose(logps, np.log([[0.25, 0.75]]), rtol=1e-6)
    np.testing.assert_allclose(log_sum_sq, np.log([[0.625, 0.625]]), rtol=1e-6)


def test_the_same_under_remat_and_inside_a_scan() -> None:
    hidden, head, targets, *cotangents = inputs((2, 6), seed=3)
    function = weighted(linear_token_logps, chunk_size=2, return_log_sum_sq=True)
    expected = jax.jit(function)(hidden, head, targets, *cotangents)

    def remat(*arrays: Any) -> Any:
        return jax.checkpoint(lambda *args: linear_token_logps(*args, chunk_size=2, return_log_sum_sq=True))(*arrays)

    assert_close(jax.jit(weighted(remat))(hidden, head, targets, *cotangents), expected, 1e-6)

    @jax.jit
    def scanned() -> Any:
        return jax.lax.scan(lambda carry, _: (carry, function(hidden, head, targets, *cotangents)), None, length=2)[1]

    assert_close(jax.tree.map(lambda leaf: leaf[1], scanned()), expected, 1e-6)


def test_nan_stays_in_its_slot_and_huge_logits_stay_finite() -> None:
    hidden, head, targets, *cotangents = inputs((2, 6), seed=4)
    clean = linear_token_logps(hidden, head, targets, chunk_size=4)
    dirty = hidden.copy()
    dirty[0, 2] = np.nan
    for shape in ((2, 6), (12,)):
        found = linear_token_logps(dirty.reshape(*shape, WIDTH), head, targets.reshape(shape), chunk_size=4)
        expected = np.where(np.isnan(dirty[..., 0]), np.nan, clean)
        np.testing.assert_allclose(found.reshape(2, 6), expected, rtol=1e-6)
    results = weighted(linear_token_logps, return_log_sum_sq=True)(1e4 * hidden, head, targets, *cotangents)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_targets_of_a_narrow_integer_type_name_one_word_each() -> None:
    hidden, head, targets, *_ = inputs((1, 8), vocab=300)
    targets = (targets % 100).astype(np.int8)
    np.testing.assert_allclose(
        linear_token_logps(hidden, head, targets), token_logps(hidden @ head, targets.astype(int)), rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_no_tokens_give_no_results_and_a_gradient_of_zero(shape: tuple[int, ...]) -> None:
    hidden, head, targets, *cotangents = inputs(shape)
    (logps,), (_, d_head) = weighted(linear_token_logps)(hidden, head, targets, cotangents[0])
    assert logps.shape == shape
    assert not d_head.any()


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 4), (5, 7), (2, 3)), {}, r"found hidden \(2, 3, 4\) and head \(5, 7\)"),
        (((2, 2, 3, 4), (4, 7), (2, 2, 3)), {}, r"expected hidden \[r, k, d\] or \[n, d\]"),
        (((2, 3, 4), (4, 7), (6,)), {}, r"expected targets of shape \(2, 3\)"),
        (((3, 4), (4, 7), (3,)), {"chunk_size": 0}, "at least 1 .*found 0"),
        (((3, 4), (4, 7), (3,)), {"logit_softcap": 0.0}, r"above 0 .*found 0\.0"),
    ],
)
def test_errors_name_what_was_found(shapes: tuple, options: dict, message: str) -> None:
    hidden, head, targets = shapes
    with pytest.raises(ValueError, match=message):
        linear_token_logps(jnp.zeros(hidden), jnp.zeros(head), jnp.zeros(targets, int), **options)


# Rows of which the first positions count.

LENGTHS = np.array([7, 0, 3], np.int32)  # of 13 positions, in chunks of 4: two chunks run, one of them in part


def past_end(lengths: np.ndarray, positions: int) -> np.ndarray:
    return np.arange(positions) >= lengths[:, None]


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        *((LENGTHS, dtype) for dtype in TOLERANCE),
        (np.array([1, 12, 99], np.int8), "float64"),
        pytest.param(np.array([13, 13, 13]), "float64", marks=pytest.mark.full),
    ],
)
def test_tokens_after_the_lengths_are_ignored(dtype: str, lengths: np.ndarray) -> None:
    options = {"chunk_size": 4, "return_log_sum_sq": True, **SOFT}
    hidden, head, targets, *cotangents = inputs((3, 13), seed=5)
    gone = past_end(lengths, 13)
    with jax.enable_x64(True):
        hidden, head = (jnp.asarray(array, dtype) for array in (hidden, head))
        wide = (array.astype(jnp.float64) for array in (hidden, head))
        clean = [np.where(gone, 0, cotangent) for cotangent in cotangents]
        results, gradients = jax.jit(weighted(plain, **SOFT))(*wide, targets, *clean)
        hidden = jnp.where(gone[..., None], jnp.nan, hidden)
        targets, cotangents = np.where(gone, 10**6, targets), [np.where(gone, np.nan, x) for x in cotangents]

        def counted(*arrays: Any) -> Any:
            # With a cotangent of NaN after the end, because the test is of the vector-Jacobian product, not of a sum.
            results, pull_back = jax.vjp(
                lambda h, w: linear_token_logps(h, w, targets, lengths=lengths, **options), *arrays
            )
            return results, pull_back(tuple(jnp.asarray(x, r.dtype) for x, r in zip(cotangents, results, strict=True)))

        found = jax.jit(counted)(hidden, head)
    assert_close(found, ([np.where(gone, 0, x) for x in results], gradients), TOLERANCE[dtype])
    assert not np.asarray(found[1][0], np.float64)[gone].any()


@pytest.mark.parametrize(("lengths", "num_run"), [([0, 0, 0], 0), ([7, 0, 3], 2), ([4, 1, 0], 1), ([5, 13, 0], 4)])
def test_chunks_after_the_longest_row_are_not_run(lengths: list[int], num_run: int) -> None:
    """With a head of NaN, everything that a chunk touches is NaN."""
    hidden, head, targets, cotangent, _ = inputs((3, 13))
    run = weighted(partial(linear_token_logps, lengths=jnp.array(lengths)), chunk_size=4)
    (logps,), (d_hidden, d_head) = jax.jit(run)(hidden, np.full_like(head, np.nan), targets, cotangent)
    np.testing.assert_array_equal(np.isnan(logps), ~past_end(np.array(lengths), 13))
    assert np.isnan(d_hidden[:, : 4 * num_run]).all()
    assert not d_hidden[:, 4 * num_run :].any()
    assert num_run or not d_head.any()


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((6,), np.array([3]), r"expected hidden \[r, k, d\] and lengths \[r\], found hidden \(6, 16\)"),
        ((2, 3), np.array([3]), r"and lengths \(1,\)"),
        ((2, 3), np.array([3.0, 1.0]), "expected an integer dtype, found float32"),
    ],
)
def test_lengths_that_fit_no_rows_are_an_error(shape: tuple[int, ...], lengths: np.ndarray, message: str) -> None:
    hidden, head, targets, *_ = inputs(shape)
    with pytest.raises(ValueError, match=message):
        linear_token_logps(hidden, head, targets, lengths=lengths)


def test_targets_that_are_no_integers_are_an_error() -> None:
    with pytest.raises(ValueError, match="integer dtype, found float32"):
        linear_token_logps(jnp.zeros((3, 4)), jnp.zeros((4, 7)), jnp.zeros(3))


# What the compiled program holds and sends. d < tokens and d * v < tokens * v, so that sizes distinguish arrays.

ROWS, POSITIONS, D, V = 8, 24, 32, 512
TOKENS = ROWS * POSITIONS


def compiled(function: Any, *arrays: Any) -> Any:
    """Returns the shardings of value and gradients; each gradient is sharded like its array."""
    out = (None, tuple(array.sharding for array in arrays[:2]))
    return jax.jit(weighted(function), out_shardings=out).lower(*arrays).compile()


def sizes(text: str) -> list[int]:
    """Elements of every array named in an HLO text."""
    return [prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)]


def collectives(text: str) -> list[tuple[str, str, list[int]]]:
    """(computation, operation, elements of its results) of every collective of an HLO text."""
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").split()[0]
        match = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)", line)
        if match:
            found.append((computation, match[2], sizes(match[1])))
    return found


def placed(arrays: tuple[np.ndarray, ...], mesh: jax.sharding.Mesh, rows: P, head: P) -> list[jax.Array]:
    """Hidden states, head, targets and one cotangent on a mesh."""
    return [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(arrays, (rows, head, rows, rows), strict=False)
    ]


@pytest.mark.parametrize("shape", [(ROWS, POSITIONS), (TOKENS,)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_no_array_holds_the_logits_of_all_tokens(shape: tuple[int, ...], chunk_size: int | None) -> None:
    arrays = [jnp.asarray(array) for array in inputs(shape, width=D, vocab=V)[:4]]
    whole = compiled(plain, *arrays)
    assert max(sizes(whole.as_text())) >= TOKENS * V  # the parser sees them where they are
    chunked = compiled(lambda *args: linear_token_logps(*args, chunk_size=chunk_size), *arrays)
    assert max(sizes(chunked.as_text())) < TOKENS * V
    if chunk_size == 4:
        assert max(sizes(chunked.as_text())) <= max(ROWS * chunk_size * V, D * V)


@pytest.mark.parametrize(
    ("shape", "chunk_size"), [((16, 13), 4), ((208,), 64), pytest.param((88,), 32, marks=pytest.mark.full)]
)
def test_sharded_rows_or_tokens_send_no_hidden_state(shape: tuple[int, ...], chunk_size: int) -> None:
    arrays = inputs(shape, width=D, vocab=V)[:4]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    on_mesh = placed(arrays, mesh, P("data"), P())
    program = compiled(lambda *args: linear_token_logps(*args, chunk_size=chunk_size), *on_mesh)
    moved = {operation for _, operation, _ in collectives(program.as_text())}
    assert moved == {"all-reduce"}  # of the head's gradient
    assert_close(program(*on_mesh), jax.jit(weighted(plain))(*arrays), 2e-6)


MESHES = {
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "automatic": (AxisType.Auto, AxisType.Auto),
    "shard_map": (AxisType.Auto, AxisType.Auto),
}


@pytest.mark.parametrize("shape", [(ROWS, POSITIONS), pytest.param((TOKENS,), marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", MESHES)
def test_a_head_sharded_by_vocabulary_and_width(shape: tuple[int, ...], kind: str) -> None:
    def function(*args: Any) -> Any:
        return linear_token_logps(*args, chunk_size=6 if len(shape) == 2 else 12, logit_softcap=8.0)

    arrays = inputs(shape, width=D, vocab=V)[:4]
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=MESHES[kind])
    on_mesh = placed(arrays, mesh, P("fsdp"), P("fsdp", "tensor"))
    if kind == "shard_map":  # by hand over the rows, the vocabulary left to the compiler
        specs = (P("fsdp"), P(), P("fsdp"))
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("fsdp"), axis_names={"fsdp"})
    program = compiled(function, *on_mesh)
    assert_close(program(*on_mesh), jax.jit(weighted(plain, logit_softcap=8.0))(*arrays), 2e-6)
    found = collectives(program.as_text())
    gathered = [size for _, operation, results in found if operation == "all-gather" for size in results]
    assert all(size == D * V // 2 for size in gathered)  # the head, never a hidden state
    if kind != "automatic":
        # The head is gathered before the loops, and its gradient is summed once, after them.
        loops = set(re.findall(r"body=(%[\w.\-]+)", program.as_text()))
        assert loops
        of_head = [name for name, _, results in found if any(size >= D * V // 8 for size in results)]
        assert of_head
        assert not loops & set(of_head)
        reduced = [results for _, operation, results in found if "reduce" in operation]
        assert sum(D * V // 2 in results or D * V // 8 in results for results in reduced) == 1


@pytest.mark.parametrize("kind", MESHES)
def test_each_shard_goes_by_its_own_lengths(kind: str) -> None:
    """Skipping more here than there, no device waits for another but where the vocabulary is split."""
    lengths = np.array([0, 0, 24, 3, 9, 13, 1, 0], np.int32)
    gone = past_end(lengths, POSITIONS)
    hidden, head, targets, cotangent, _ = inputs((ROWS, POSITIONS), width=D, vocab=V)
    cotangent = np.where(gone, 0, cotangent)
    (logps,), gradients = jax.jit(weighted(plain))(hidden, head, targets, cotangent)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=MESHES[kind])
    by_row = NamedSharding(mesh, P("fsdp"))
    on_mesh = placed(
        (np.where(gone[..., None], 9.0, hidden), head, targets, cotangent), mesh, P("fsdp"), P(None, "tensor")
    )

    def chunked(*args: Any) -> Any:
        return linear_token_logps(*args[:3], lengths=args[3], chunk_size=4)

    function = chunked
    if kind == "shard_map":
        specs = (P("fsdp"), P(), P("fsdp"), P("fsdp"))
        function = jax.shard_map(chunked, mesh=mesh, in_specs=specs, out_specs=P("fsdp"), axis_names={"fsdp"})
    counts = jax.device_put(lengths, by_row)
    program = compiled(lambda *args: function(*args, counts), *on_mesh)
    assert_close(program(*on_mesh), ((np.where(gone, 0, logps),), gradients), 2e-6)
    if kind != "automatic":
        loops = set(re.findall(r"body=(%[\w.\-]+)", program.as_text()))
        sent = [results for name, _, results in collectives(program.as_text()) if name in loops]
        assert sent  # of sums over the vocabulary, one number a token of the chunk
        assert max(size for results in sent for size in results) <= ROWS // 4 * 4 * D
