"""Strided views and the casts of weights through them, against numpy and einops."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from jdpo.models.weights.casting import BFLOAT16, all_finite, copy_cast
from jdpo.models.weights.strided_views import StridedView, common_ranges, view_of

SIZES = {"h": 3, "g": 2, "k": 4, "d": 6, "f": 5, "e": 2, "m": 2, "u": 3}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("d -> d", lambda t: t),
        ("(h k) d -> d h k", lambda t: rearrange(t, "(h k) d -> d h k", k=4)),
        ("d (h k) -> h k d", lambda t: rearrange(t, "d (h k) -> h k d", k=4)),
        ("[h k](g k)[g k] d -> d g k", lambda t: rearrange(t[12:20], "(g k) d -> d g k", k=4)),
        ("e d [f]f -> e d f", lambda t: t[:, :, 5:]),
        ("(h 2/3 k) d -> d h k", lambda t: rearrange(t, "(h c k) d -> c d h k", c=3, k=4)[2]),
        # For each g: k, k, m x u and m x u rows.
        ("(g [k](k)[m u][m u]) d -> d g k", lambda t: rearrange(t, "(g r) d -> d g r", g=2)[:, :, 4:8]),
        (
            "(g [k][k][m u](m u)) d -> d g m u",
            lambda t: rearrange(rearrange(t, "(g r) d -> d g r", g=2)[:, :, 14:], "d g (m u) -> d g m u", m=2),
        ),
        ("d 0/1 k -> k d", lambda t: t[:, 0].T),
    ],
)
def test_a_pattern_gives_the_view_of_einops(pattern: str, expected: object) -> None:
    shape, view = view_of(pattern, SIZES)
    tensor = np.arange(math.prod(shape)).reshape(shape)
    part = expected(tensor)  # type: ignore[operator]
    assert view.shape == part.shape
    np.testing.assert_array_equal(view.array(tensor.reshape(-1)), part)


@given(data=st.data())
def test_chunks_cover_a_view_once(data: st.DataObject) -> None:
    pattern = data.draw(st.sampled_from(["(h k) d -> d h k", "d [g k](h k) -> d h k", "(h 1/3 k) d -> d h k"]))
    shape, view = view_of(pattern, SIZES)
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in view.shape]
    part = view.cut([(low, high) for low, high in bounds])
    if not part.size:
        return
    most = data.draw(st.integers(1, 40))
    run = np.arange(math.prod(shape))
    found = np.full(part.shape, -1)
    for inside, chunk in part.chunks(most):
        assert chunk.span <= most or chunk.size == 1
        assert chunk.is_dense or not part.is_dense
        place = tuple(slice(*axis) for axis in inside)
        assert (found[place] == -1).all()
        found[place] = chunk.array(run[chunk.start : chunk.start + chunk.span], chunk.start)
    np.testing.assert_array_equal(found, part.array(run))


def test_a_long_gap_is_not_read() -> None:
    view = StridedView(0, (2, 3), (10**6, 1))
    assert [chunk.span for _, chunk in view.chunks(2 * 10**6)] == [3, 3]


@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_casts_are_those_of_ml_dtypes(source: type, target: type) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((64, 33)) * 2.0 ** rng.integers(-9, 9, (64, 33))).astype(source)
    for given_values in (values, np.swapaxes(values, 0, 1), values[:0], values[:, :1]):
        found = np.full(given_values.shape, 7, target)
        copy_cast(given_values, found)
        np.testing.assert_array_equal(found, given_values.astype(target))


def test_every_bfloat16_and_every_tie() -> None:
    exact = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)
    exact = exact[np.isfinite(exact.astype(np.float32))]
    wide = np.zeros(exact.size, np.float32)
    copy_cast(exact, wide)
    np.testing.assert_array_equal(wide, exact.astype(np.float32))
    ties = (wide.view(np.uint32) | 0x8000).view(np.float32)
    for values in (ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e38))):
        narrow = np.zeros(values.size, BFLOAT16)
        copy_cast(values, narrow)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(narrow, values.astype(BFLOAT16))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_finite(dtype: type) -> None:
    values = np.array([[0.0, -1.5, float(ml_dtypes.finfo(dtype).max)]], dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        values[0, 1] = bad
        assert not all_finite(values)
        assert not all_finite(values.T)


@pytest.mark.parametrize(
    ("in_common", "patterns"),  # the size of the smallest ranges: a row, an expert, a head, a pair
    [
        (10, ("e d (f 0/2) -> e d f", "e d (f 1/2) -> e d f")),
        (60, ("e f[f] d -> e d f", "e [f]f d -> e d f")),
        (72, ("(h 0/3 k) d -> d h k", "(h 1/3 k) d -> d h k", "(h 2/3 k) d -> d h k")),
        (20, ("d (h k)[g k] -> d h k", "d [h k](g k) -> d g k")),
        (2, ("(f 0/2) -> f", "(f 1/2) -> f")),
    ],
)
@pytest.mark.parametrize("most", [1, 7, 12, 25, 1000])
def test_ranges_of_interleaved_views_fill_the_run_in_order(
    in_common: int, patterns: tuple[str, ...], most: int
) -> None:
    (shape, *_), views = zip(*(view_of(pattern, SIZES) for pattern in patterns), strict=True)
    size, end = math.prod(shape), 0
    parts = [view.array(np.arange(size)) for view in views]
    for start, length, found in common_ranges(views, size, most):
        assert start == end
        end, run = start + length, np.full(length, -1)
        for (bounds, view), part in zip(found, parts, strict=True):
            place = tuple(slice(*axis) for axis in bounds)
            view._replace(start=view.start - start).array(run)[...] = part[place]
        np.testing.assert_array_equal(run, np.arange(start, end))
        assert length <= max(most, in_common)
    assert end == size
