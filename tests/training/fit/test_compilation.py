"""Programs are compiled once for each shape, ahead of the steps, and found again on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jdpo.training.fit.compilation import (
    Programs,
    Stopwatch,
    _drop_oldest,
    compiler_threads,
    persistent_cache,
    shapes_of,
)


class Batch(NamedTuple):
    values: Any
    mask: Any


def batch(size: int, dtype: Any = np.float32) -> Batch:
    return Batch(np.ones(size, dtype), np.ones(size, bool))


@pytest.fixture
def programs() -> Iterator[tuple[Programs, list[tuple[int, ...]]]]:
    lowered: list[tuple[int, ...]] = []

    def lower(abstract: Batch) -> Any:
        assert isinstance(abstract.values, jax.ShapeDtypeStruct)
        lowered.append(abstract.values.shape)
        if abstract.values.shape == (13,):
            raise ValueError("no program for 13")
        return jax.jit(lambda given: jnp.where(given.mask, given.values, 0).sum()).lower(abstract)

    with compiler_threads() as pool:
        yield Programs(lower, pool), lowered


def test_each_shape_is_compiled_once_and_ahead(programs: tuple[Programs, list[tuple[int, ...]]]) -> None:
    made, lowered = programs
    made.prepare([batch(3), batch(5), batch(3)])
    assert [float(made.of(batch(size))(batch(size))) for size in (5, 3, 5)] == [5, 3, 5]
    assert made.ready(batch(3))
    assert sorted(lowered) == [(3,), (5,)]
    assert (len(made), made.num_late) == (2, 0)


def test_a_shape_that_nobody_prepared_is_counted(programs: tuple[Programs, list[tuple[int, ...]]]) -> None:
    made, lowered = programs
    assert not made.ready(batch(4))
    assert float(made.of(batch(4))(batch(4))) == 4
    assert float(made.of(batch(4, np.int32))(batch(4, np.int32))) == 4
    made.of(batch(4))
    assert (made.num_late, lowered) == (2, [(4,), (4,)])


def test_a_program_from_elsewhere_is_used(programs: tuple[Programs, list[tuple[int, ...]]]) -> None:
    made, lowered = programs
    made.keep(batch(2), "the program")
    made.prepare([batch(2)])
    assert made.of(batch(2)) == "the program"
    assert lowered == []


def test_an_error_of_the_compiler_comes_at_the_step_that_needs_it(
    programs: tuple[Programs, list[tuple[int, ...]]],
) -> None:
    made, _ = programs
    made.prepare([batch(13), batch(1)])
    assert float(made.of(batch(1))(batch(1))) == 1
    with pytest.raises(ValueError, match="no program for 13"):
        made.of(batch(13))


def test_an_error_of_the_compiler_is_told_without_waiting_for_its_step(
    programs: tuple[Programs, list[tuple[int, ...]]],
) -> None:
    made, _ = programs
    made.prepare([batch(1)])
    made.wait()
    made.check()
    made.prepare([batch(13)])
    with pytest.raises(ValueError, match="no program for 13"):
        made.wait()
    with pytest.raises(ValueError, match="no program for 13"):
        made.check()


def test_shapes_tell_dtypes_apart() -> None:
    assert shapes_of(batch(3)) != shapes_of(batch(3, np.int32))
    assert shapes_of(batch(3)) == shapes_of(Batch(jnp.ones(3), jnp.ones(3, bool)))


@pytest.fixture
def no_cache() -> Iterator[None]:
    """A jax whose user names no folder for compiled programs, as the test run does."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@pytest.fixture
def cache_events(no_cache: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[int, int]]]:
    """How often a program was found in jax's persistent cache, and how often not."""
    seen: list[str] = []

    def listen(event: str, **_: Any) -> None:
        seen.append(event)

    jax.monitoring.register_event_listener(listen)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield lambda: tuple(seen.count(f"/jax/compilation_cache/cache_{what}") for what in ("hits", "misses"))  # type: ignore
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    jax.monitoring.unregister_event_listener(listen)


def test_programs_are_kept_on_disk(cache_events: Callable[[], tuple[int, int]], tmp_path: Path) -> None:
    def run(folder: Path | None) -> tuple[int, int]:
        hits, misses = cache_events()
        with persistent_cache(folder):
            jax.jit(lambda x: jnp.sin(x) * 3).lower(jax.ShapeDtypeStruct((7,), jnp.float32)).compile()
        return cache_events()[0] - hits, cache_events()[1] - misses

    assert run(tmp_path / "one") == (0, 1)
    assert run(tmp_path / "one") == (1, 0)
    assert run(tmp_path / "two") == (0, 1), "another folder"
    assert run(None) == (0, 0)
    (machine,) = (tmp_path / "one").iterdir()
    assert machine.name.startswith("cpu-")
    assert any(machine.iterdir())
    assert jax.config.jax_compilation_cache_dir is None


def test_the_oldest_programs_go_where_all_take_too_much(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    _drop_oldest(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "new"]
    _drop_oldest(tmp_path / "not there", 250)


def test_the_cache_of_the_user_is_left_alone(no_cache: None, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "users"))
    with persistent_cache(tmp_path / "ours"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "users")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "users")


def test_a_stopwatch_leaves_pauses_out() -> None:
    began, watch = time.perf_counter(), Stopwatch()
    with watch.paused():
        time.sleep(0.2)
    counted = watch.lap()
    assert 0 <= counted <= time.perf_counter() - began - 0.2
    time.sleep(0.05)
    assert watch.lap() >= 0.05
