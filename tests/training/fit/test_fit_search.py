"""The policy and the tokens at once: the fastest by estimate of those that fit, in at most two compilations."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdpo.training.fit.estimates import StepEstimate
from jdpo.training.fit.fit_search import AIM, MOST_TRIALS, Measured, choose_fit, search_fit
from jdpo.training.fit.memory_fit import Fit

KEPT = {"dots": 1000, "attention": 200, "full": 100}
ESTIMATE = StepEstimate(
    fixed_bytes=10**6,
    bytes_per_token=KEPT,
    seconds_per_token={"dots": 3.0, "attention": 3.8, "full": 4.0},
    seconds_per_micro_batch=900.0,
)


class Machine:
    """Compiles steps whose memory is linear in the tokens, with other factors than in the estimates."""

    def __init__(self, *, fixed: float = 1.0, growth: float = 1.0, most_compiled: float = math.inf) -> None:
        self.fixed, self.growth, self.most_compiled = fixed, growth, most_compiled
        self.tried: list[tuple[str, int]] = []

    def true(self, remat: str, tokens: int) -> float:
        return self.fixed * ESTIMATE.fixed_bytes + self.growth * tokens * KEPT[remat]

    def __call__(self, remat: str, tokens: int) -> Measured:
        self.tried.append((remat, tokens))
        needed = self.true(remat, tokens)
        return Measured(needed if needed <= self.most_compiled else math.inf, tokens)


def search(machine: Machine, limit: float, most: int = 32768) -> Fit:
    return search_fit(machine, ESTIMATE, policies=tuple(KEPT), most_tokens=most, limit=limit)


def test_where_everything_fits_the_fastest_policy_is_compiled_once() -> None:
    machine = Machine()
    assert search(machine, limit=1e9) == Fit("dots", 32768, 10**6 + 32768 * 1000)
    assert machine.tried == [("dots", 32768)]


def test_many_tokens_under_a_slower_policy_beat_few_under_a_faster_one() -> None:
    """Checks the choice on both sides of the limit where the cost per micro-batch makes both equally fast."""
    few = 960  # tokens under dots: 3 + 900 / 960 seconds per token; under attention, with five times the tokens, 3.99
    limit = (10**6 + few * 1000) / AIM + 1
    assert search(Machine(), limit) == Fit("dots", few, 10**6 + few * 1000)
    less = (10**6 + 640 * 1000) / AIM + 1
    assert search(Machine(), less).remat == "attention", "3 + 900 / 640 is more than 3.8 + 900 / 3200"
    # Without a cost per micro-batch, fewer tokens take no longer.
    free = dataclasses.replace(ESTIMATE, seconds_per_micro_batch=0.0)
    assert search_fit(Machine(), free, policies=tuple(KEPT), most_tokens=32768, limit=less).remat == "dots"


def test_a_policy_that_does_not_fit_with_all_tokens_is_tried_with_fewer() -> None:
    machine = Machine(growth=1.1)
    limit = ESTIMATE.num_bytes("dots", 32768) / AIM + 1
    found = search(machine, limit)
    assert machine.tried[0] == ("dots", 32768)
    assert found.remat == "dots"
    assert 0.9 * 32768 * AIM / 1.1 < found.max_tokens_per_device < 32768
    assert len(machine.tried) == 2


def test_tokens_on_the_wire_count_until_the_products_take_longer() -> None:
    wired = dataclasses.replace(ESTIMATE, seconds_per_micro_batch=0.0, wire_seconds=3.0 * 4096)
    assert wired.seconds("dots", 4096) == wired.seconds("dots", 8192) == 3.0
    assert wired.seconds("dots", 2048) == 6.0


@given(
    fixed=st.floats(0.8, 1.25),
    growth=st.floats(0.7, 1.4),
    limit=st.floats(2e6, 1e8),
    most=st.integers(1, 512).map(lambda n: 64 * n),
    refuses=st.booleans(),
)
def test_estimates_that_are_a_quarter_off_take_two_compilations(
    fixed: float, growth: float, limit: float, most: int, refuses: bool
) -> None:
    machine = Machine(fixed=fixed, growth=growth, most_compiled=limit * 1.2 if refuses else math.inf)
    found = search(machine, limit, most)
    assert len(machine.tried) <= MOST_TRIALS
    assert len(set(machine.tried)) == len(machine.tried)
    assert ESTIMATE.num_bytes(*machine.tried[0]) <= limit, "nothing is compiled that by the formulas does not fit"
    assert machine.true(found.remat, found.max_tokens_per_device) <= limit
    assert found.bytes_needed == int(machine.true(found.remat, found.max_tokens_per_device))


@given(
    fixed=st.floats(0.01, 30),
    growth=st.floats(0.01, 30),
    limit=st.floats(1e4, 1e8),
    most=st.integers(1, 512).map(lambda n: 64 * n),
)
def test_whatever_the_estimates_say_a_step_that_fits_is_found(
    fixed: float, growth: float, limit: float, most: int
) -> None:
    machine = Machine(fixed=fixed, growth=growth)
    found = search(machine, limit, most)
    if machine.true("full", 64) <= limit:
        assert machine.true(found.remat, found.max_tokens_per_device) <= limit
    else:
        assert (found.remat, found.max_tokens_per_device) == ("full", 64)
    assert found.max_tokens_per_device <= most
    halvings = 1 + max(math.log2(max(most, 64) / 64), 0)
    assert len(machine.tried) <= MOST_TRIALS + math.ceil(halvings)


def test_if_nothing_fits_the_device_reports_it() -> None:
    assert search(Machine(most_compiled=10), limit=10) == Fit("full", 64, None)


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


def choose(steps: dict[tuple[str, int], Any], *, limit: float, fixed_tokens: bool = False) -> tuple[Fit, Any]:
    estimate = StepEstimate(
        fixed_bytes=0.0,
        bytes_per_token={"dots": 4.0, "full": 3.0},
        seconds_per_token={"dots": 1.0, "full": 2.0},
    )
    return choose_fit(
        lambda remat, tokens: ((tokens,), steps[remat, tokens]),  # type: ignore[arg-type, return-value]
        estimate,
        tokens_at_once=lambda batch: batch[0],  # type: ignore[index, return-value]
        policies=("dots", "full"),
        most_tokens=128,
        limit=limit,
        fixed_tokens=fixed_tokens,
    )


def test_each_program_is_compiled_once_and_those_of_the_chosen_policy_come_back() -> None:
    steps = {("dots", 128): Lowered(math.inf), ("full", 128): Lowered(700), ("full", 64): Lowered(400)}
    steps |= {("dots", 64): Lowered(math.inf)}
    fit, programs = choose(steps, limit=530)
    assert fit == Fit("full", 64, 400)
    assert programs == {(size,): steps["full", size] for size in (64, 128)}
    assert all(step.num_compiled <= 1 for step in steps.values())
    fit, _ = choose(steps, limit=530, fixed_tokens=True)
    assert fit == Fit("full", 128, 700), "the tokens are given, whether they fit or not"


def test_another_error_of_the_compiler_ends_the_search() -> None:
    class Broken(Lowered):
        def compile(self) -> Lowered:
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        choose({("dots", 128): Broken(1)}, limit=1000)
