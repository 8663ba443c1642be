"""Fitting memory: the settings that fit are found in few trials."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.devices import Target, compiling_for
from jdpo.training.fit.memory_fit import (
    ENOUGH_TOKENS,
    MOST_TRIALS,
    Fit,
    choose_fit,
    exhaustion_explained,
    peak_memory,
    program_bytes,
    search_fit,
)

POLICIES = ("none", "dots", "full")


class Memory:
    """A step whose memory is linear in the tokens; each policy's line is below that of the one before."""

    def __init__(self, fixed: int, per_token: int, most_compiled: float = math.inf) -> None:
        self.fixed, self.per_token, self.most_compiled = fixed, per_token, most_compiled
        self.trials: Counter[str] = Counter()

    def true(self, policy: str, tokens: int) -> float:
        return self.fixed + tokens * self.per_token / 4 ** POLICIES.index(policy)

    def __call__(self, policy: str, tokens: int) -> float:
        self.trials[policy] += 1
        needed = self.true(policy, tokens)
        return needed if needed <= self.most_compiled else math.inf


@given(
    fixed=st.integers(0, 10**6),
    per_token=st.integers(1, 1000),
    limit=st.integers(10**4, 10**8),
    most=st.integers(1, 1024).map(lambda n: 64 * n),
    refuses=st.booleans(),
)
def test_the_first_policy_that_fits_with_enough_tokens(
    fixed: int, per_token: int, limit: int, most: int, refuses: bool
) -> None:
    memory = Memory(fixed, per_token, most_compiled=limit * 1.5 if refuses else math.inf)
    found = search_fit(memory, policies=POLICIES, most_tokens=most, limit=limit)
    enough = min(ENOUGH_TOKENS, most)
    able = [policy for policy in POLICIES if memory.true(policy, enough) <= limit]
    assert found.remat == (able[0] if able else POLICIES[-1])
    assert all(trials <= MOST_TRIALS + 2 for policy, trials in memory.trials.items() if policy in able)
    if able:
        assert memory.true(found.remat, found.max_tokens_per_device) <= limit
        assert enough <= found.max_tokens_per_device <= most
        assert found.bytes_needed == int(memory.true(found.remat, found.max_tokens_per_device))
        if memory.true(found.remat, most) <= limit:
            assert found.max_tokens_per_device == most
        elif not refuses:  # a line is found at once; budgets are multiples of 64 tokens
            assert memory.true(found.remat, found.max_tokens_per_device + 128) > limit
    elif memory.true("full", 64) <= limit:
        assert memory.true("full", found.max_tokens_per_device) <= limit


def test_if_nothing_fits_the_device_reports_it() -> None:
    memory = Memory(fixed=100, per_token=1, most_compiled=10)
    assert search_fit(memory, policies=("full",), most_tokens=8192, limit=10) == Fit("full", 64, None)


class Lowered:
    """A lowered step that needs `num_bytes`, or that no device can compile."""

    def __init__(self, num_bytes: float) -> None:
        self.num_bytes, self.num_compiled = num_bytes, 0

    def compile(self) -> Lowered:
        self.num_compiled += 1
        if math.isinf(self.num_bytes):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return self

    def memory_analysis(self) -> SimpleNamespace:
        return SimpleNamespace(
            argument_size_in_bytes=self.num_bytes,
            output_size_in_bytes=0,
            alias_size_in_bytes=0,
            temp_size_in_bytes=0,
            generated_code_size_in_bytes=0,
        )


def test_each_program_is_compiled_once_and_those_of_the_chosen_policy_come_back() -> None:
    steps = {("none", 128): Lowered(math.inf), ("none", 64): Lowered(900), ("full", 128): Lowered(700)}
    steps |= {("full", 64): Lowered(400)}
    asked: list[tuple[str, int]] = []

    def lower(remat: str, tokens: int) -> dict[tuple[int], Lowered]:
        asked.append((remat, tokens))
        return {
            (size,): steps[remat, size] for size in (64, 128) if size <= tokens
        }  # the larger programs also serve smaller batches

    fit, programs = choose_fit(lower, policies=("none", "full"), most_tokens=128, limit=500)
    assert fit == Fit("full", 64, 400)
    assert programs == {(64,): steps["full", 64], (128,): steps["full", 128]}
    assert asked == [("none", 128), ("full", 128), ("full", 64)]
    assert all(step.num_compiled == 1 for step in steps.values())
    fit, _ = choose_fit(lower, policies=("none", "full"), most_tokens=128, limit=500, fixed_tokens=True)
    assert fit == Fit("full", 128, 700), "the tokens are given, whether they fit or not"


def test_another_error_of_the_compiler_ends_the_search() -> None:
    class Broken(Lowered):
        def compile(self) -> Lowered:
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        choose_fit(lambda *_: {(): Broken(1)}, policies=("none",), most_tokens=64, limit=1)


def test_a_device_without_enough_memory_is_an_error_with_advice() -> None:
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.\nPages of it\nfollow.")
    with (
        pytest.raises(
            ValueError, match=r"at most 4,096 tokens at once under remat dots \(RES.*3 bytes\.\)\. Set max_t"
        ),
        exhaustion_explained(Fit("dots", 4096)),
    ):
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), exhaustion_explained(Fit("dots", 4096)):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_bytes_of_a_program_count_a_donated_argument_once() -> None:
    array = jax.ShapeDtypeStruct((1024,), jnp.float32)

    def add(x: jax.Array) -> jax.Array:
        return x + 1

    kept, donated = (jax.jit(add, donate_argnums=at).lower(array).compile() for at in ((), 0))
    assert program_bytes(kept) - program_bytes(donated) == 4096
    assert program_bytes(donated) >= 4096


def deep_gradient(width: int, rows: int, sharding: Any = None) -> Any:
    """Compiles the gradient of three layers, whose activations are its temporaries."""

    def loss(weight: jax.Array, rows: jax.Array) -> jax.Array:
        for _ in range(3):
            rows = jnp.tanh(rows @ weight)
        return (rows**2).sum()

    shapes = [jax.ShapeDtypeStruct((size, width), jnp.float32, sharding=sharding) for size in (width, rows)]
    return (
        jax.jit(lambda weight, rows: weight - jax.grad(loss)(weight, rows), donate_argnums=0).lower(*shapes).compile()
    )


def test_on_tpu_the_peak_counts_and_elsewhere_the_sum_of_the_parts() -> None:
    program = deep_gradient(128, 1024)
    stats = program.memory_analysis()
    parts = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert stats.temp_size_in_bytes >= 2 * 4 * 128 * 1024
    # On CPU the peak is that of arguments and results alone.
    assert stats.peak_memory_in_bytes < parts + stats.temp_size_in_bytes / 2
    assert program_bytes(program) >= parts + stats.temp_size_in_bytes
    with compiling_for(Target("gpu", "9.0")):
        assert program_bytes(program) >= parts + stats.temp_size_in_bytes
    with compiling_for(Target("tpu")):
        assert program_bytes(program) == stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
def test_the_peak_of_a_tpu_program_holds_its_arguments_and_activations() -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    program = deep_gradient(1024, 8192, jax.sharding.SingleDeviceSharding(devices[0]))
    stats, activations = program.memory_analysis(), 3 * 4 * 1024 * 8192
    with compiling_for(Target("tpu")):
        needed = program_bytes(program)
    assert stats.argument_size_in_bytes + activations / 2 <= needed
    assert needed <= stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory()
    held = bytearray(2**27)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory() >= before
    assert peak_memory() >= 2**27
