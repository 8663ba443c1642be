"""scripts/same_programs.py: a digest depends on the computation, not on names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

PATH = Path(__file__).parents[1] / "scripts" / "same_programs.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("same_programs", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shipped_configs_of_training_are_compared_and_the_loop_is_none(script: Any) -> None:
    names = {path.name for path in script.training_configs()}
    assert {"dpo.yaml", "sft.yaml"} < names
    assert "iterate.yaml" not in names


def program(function: Callable[[Any], Any]) -> str:
    return jax.jit(function).lower(jnp.ones((4, 4))).as_text()


@jax.jit
def double(x: Any) -> Any:
    return x * 2


@jax.jit
def twice(x: Any) -> Any:
    return x * 2


def test_names_of_functions_and_results_make_no_difference(script: Any) -> None:
    def step(x: Any) -> Any:
        return {"loss": double(x).sum(), "sorted": jnp.sort(x)}

    def train(y: Any) -> Any:
        return {"loss_sum": twice(y).sum(), "ordered": jnp.sort(y)}

    assert program(step) != program(train)
    assert script.normalised(program(step)) == script.normalised(program(train))


def test_what_is_computed_makes_a_difference(script: Any) -> None:
    assert script.normalised(program(lambda x: x * 2)) != script.normalised(program(lambda x: x * 3))


def test_which_function_is_called_makes_a_difference(script: Any) -> None:
    module = "func.func private @a() { } func.func private @b() { } func.func public @main() { call @%s() }"
    assert script.normalised(module % "a") != script.normalised(module % "b")
    assert script.normalised("custom_call @Sharding(%0)") == "custom_call @Sharding(%0)"


def test_differences_name_their_place(script: Any) -> None:
    before = {"metrics": [{"loss": 0.5}, {"loss": 0.25}], "config": {"beta": 0.1}}
    after = {"metrics": [{"loss": 0.5}, {"loss": 0.125, "kl": 1.0}], "config": {}}
    assert list(script.differences(before, before)) == []
    assert list(script.differences(before, after)) == [
        "metrics.1.loss: 0.25 before, 0.125 now",
        "metrics.1.kl: missing before, 1.0 now",
        "config.beta: 0.1 before, missing now",
    ]


@pytest.mark.full
def test_a_run_repeats_itself_and_a_changed_beta_shows(script: Any, tmp_path: Path) -> None:
    def recorded(name: str, **settings: Any) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        script.write_inputs(folder)
        return script.record_run(folder, "padded", script.RUNS["padded"] | settings)

    first = recorded("first")
    assert first["programs"]
    assert len(first["metrics"]) > 3
    assert recorded("second") == first
    changed = recorded("changed", beta=0.2)
    assert changed["programs"].keys() != first["programs"].keys()
    assert changed["metrics"] != first["metrics"]
