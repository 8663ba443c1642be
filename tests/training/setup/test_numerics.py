"""Compiled programs are kept on disk and found again, and the oldest are dropped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jdpo.training.setup.numerics import drop_oldest, persistent_cache


@pytest.fixture
def no_cache() -> Iterator[None]:
    """Unsets the folder for compiled programs that the test run sets."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@pytest.fixture
def cache_events(no_cache: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[int, int]]]:
    """Returns the hits and misses of jax's persistent cache."""
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


def test_programs_that_compile_in_less_than_a_second_are_kept(no_cache: None, tmp_path: Path) -> None:
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    try:
        with persistent_cache(tmp_path):
            assert jax.config.jax_persistent_cache_min_compile_time_secs <= 0.2
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_the_oldest_programs_go_where_all_take_too_much(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    drop_oldest(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "new"]
    drop_oldest(tmp_path / "not there", 250)


def test_the_cache_of_the_user_is_left_alone(no_cache: None, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "users"))
    with persistent_cache(tmp_path / "ours"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "users")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "users")
