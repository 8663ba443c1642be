"""Programs are compiled once for each shape, ahead of the steps."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.devices import Target, compiling_for
from jdpo.training.fit.compilation import Programs, compiler_threads, shapes_of


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


def test_a_program_that_waits_for_others_is_compiled_where_it_is_needed() -> None:
    made_by: dict[int, str] = {}
    go = threading.Event()

    def lower(abstract: Batch) -> Any:
        size = abstract.values.shape[0]
        made_by[size] = threading.current_thread().name
        if size == 13:
            raise ValueError("no program for 13")
        return jax.jit(lambda given: given.values.sum()).lower(abstract)

    with compiler_threads() as pool:
        busy = [pool.submit(go.wait) for _ in range(8)]
        made = Programs(lower, pool)
        made.prepare([batch(3), batch(5), batch(13)])
        assert float(made.of(batch(5))(batch(5))) == 5
        held_out = Programs(lower, pool)
        held_out.prepare([batch(7)])
        held_out.wait()
        # Its error comes again, as it does from a thread.
        for read in (lambda: made.of(batch(13)), made.check):
            with pytest.raises(ValueError, match="no program for 13"):
                read()
        go.set()
        assert float(made.of(batch(3))(batch(3))) == 3
        assert (len(made), made.num_late) == (3, 0)
        assert all(one.result() for one in busy)
    assert made_by[5] == made_by[7] == threading.main_thread().name


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux has a thread a priority of its own")
def test_on_cpu_steps_come_before_programs_that_nobody_waits_for() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    priorities: dict[int, int] = {}

    def lower(abstract: Batch) -> Any:
        priorities[abstract.values.shape[0]] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return jax.jit(lambda given: given.values.sum()).lower(abstract)

    with compiler_threads() as pool:
        made = Programs(lower, pool)
        made.prepare([batch(2), batch(4), batch(6)])
        pool.submit(int).result()  # after all of them, as there is one thread
    assert priorities == {2: before, 4: 19, 6: 19}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.parametrize(("platform", "at_once"), [("cpu", 1), ("tpu", 2)])
def test_tpu_programs_are_compiled_at_the_same_time(
    platform: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    first, second = threading.Event(), threading.Event()
    with compiling_for(Target(platform)), compiler_threads() as pool:
        meets = pool.submit(lambda: first.set() or second.wait(0.2 if at_once == 1 else 20))  # type: ignore[func-returns-value]
        pool.submit(second.set)
        assert first.wait(20)
        assert meets.result() == (at_once > 1)


def test_existing_programs_are_used() -> None:
    with compiler_threads() as pool:
        made = Programs(lambda _: pytest.fail("nothing is lowered"), pool, {shapes_of(batch(2)): "the program"})
        made.prepare([batch(2)])
        assert made.of(batch(2)) == "the program"


def test_an_error_of_the_compiler_comes_at_the_step_that_needs_it(
    programs: tuple[Programs, list[tuple[int, ...]]],
) -> None:
    made, _ = programs
    made.prepare([batch(13), batch(1)])
    assert float(made.of(batch(1))(batch(1))) == 1
    with pytest.raises(ValueError, match="no program for 13"):
        made.of(batch(13))


def test_an_error_of_the_compiler_is_reported_before_its_step(
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


def test_shapes_of_different_dtypes_differ() -> None:
    assert shapes_of(batch(3)) != shapes_of(batch(3, np.int32))
    assert shapes_of(batch(3)) == shapes_of(Batch(jnp.ones(3), jnp.ones(3, bool)))
