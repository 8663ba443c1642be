"""Plans of targets: the choice of mesh and step, the cache of plans, and what installed compilers say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jdpo.config import CONFIGS, MeshConfig, TrainConfig, load_config
from jdpo.devices import Target, compiling_for
from jdpo.planning.compile_only import missing_package
from jdpo.planning.hlo.collectives import Collective
from jdpo.planning.links import Place, split_wire_bytes
from jdpo.planning.machines import machine_of
from jdpo.planning.plan_target import plan_target, step_limit
from jdpo.planning.planner.plan_cache import plan_key
from jdpo.planning.planner.planned_run import planned_run
from jdpo.planning.planner.step_search import search_step
from jdpo.planning.target_plan import TargetPlan
from tests.planning.test_memory_kinds import tiny_config

SHAPES = Path(__file__).resolve().parents[2] / "benchmarks" / "shapes"
LENGTHS = [(16, 24, 24)]


def quiet(line: str) -> None:
    """Takes lines on progress."""


def refuse(line: str) -> None:
    raise AssertionError(f"a kept plan needs no work, but: {line}")


def plan(config: TrainConfig, name: str, folder: Path, log: Any = quiet) -> TargetPlan:
    return plan_target(config, machine_of(name), LENGTHS, cache_dir=folder, log=log)


# --- the choice


@pytest.mark.parametrize(
    ("words", "mesh"),
    [
        ((), MeshConfig()),
        # Four pairs cannot be split over eight devices, over four with two each they can.
        (("global_batch_size=4",), MeshConfig(tensor=2)),
        (("global_batch_size=4", "mesh.tensor=2"), MeshConfig(tensor=2)),
        (("mesh.data=2",), MeshConfig(data=2)),
    ],
)
def test_the_mesh_is_that_of_a_run_unless_it_cannot_split_the_batch(
    tmp_path: Path, words: tuple[str, ...], mesh: MeshConfig
) -> None:
    assert planned_run(tiny_config(tmp_path, *words), jax.devices(), LENGTHS).config.mesh == mesh


def test_a_batch_that_no_mesh_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="global_batch_size 3"):
        planned_run(tiny_config(tmp_path, "global_batch_size=3"), jax.devices(), LENGTHS)
    with pytest.raises(ValueError, match="packing"):
        planned_run(tiny_config(tmp_path, "packing=false"), jax.devices(), LENGTHS)


def test_the_reference_is_where_a_first_run_has_it(tmp_path: Path) -> None:
    def mode(*words: str) -> str:
        return planned_run(tiny_config(tmp_path, *words), jax.devices(), LENGTHS).mode

    assert mode("reference=auto") == "live"
    assert mode("reference=auto", "num_train_epochs=2") == "cached"
    assert mode("reference=auto", "sync_ref_model=true", "num_train_epochs=2") == "live"
    assert mode("reference=auto", "loss_type=simpo", "beta=2") == "none"


def test_the_search_takes_the_fastest_step_that_fits_and_ends_with_the_smallest(tmp_path: Path) -> None:
    run = planned_run(tiny_config(tmp_path, "global_batch_size=64"), jax.devices(), LENGTHS)
    with compiling_for(Target("cpu")):
        roomy = search_step(run, limit=1e9, compiles=False, log=quiet)
        assert (roomy.fits, roomy.chosen.remat, roomy.chosen.planned.batch.tokens.shape[0]) == (True, "attention", 1)
        tight = search_step(run, limit=roomy.chosen.needed * 0.7, compiles=False, log=quiet)
        assert tight.fits
        assert tight.chosen.needed < roomy.chosen.needed
        none = search_step(run, limit=1, compiles=False, log=quiet)
        assert (none.fits, none.chosen.remat, none.chosen.budget) == (False, "full", 64)
        # What the config gives stays, whether it fits or not.
        given = planned_run(tiny_config(tmp_path, "max_tokens_per_device=128", "remat=dots"), jax.devices(), LENGTHS)
        kept = search_step(given, limit=1, compiles=False, log=quiet)
    assert (kept.fits, kept.chosen.remat, kept.chosen.budget) == (False, "dots", 128)


def test_padding_is_that_of_real_lengths_and_the_longest_row_is_laid_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = [(4, int(a), int(b)) for a, b in rng.integers(1, 20, (2000, 2))]
    lengths[1500] = (10, 54, 54)
    run = planned_run(tiny_config(tmp_path), jax.devices(), lengths)
    assert len(run.steps) == 64
    assert run.rows.sizes().longest.max() == 64
    sizes = run.sizes(128)
    assert 1 < sizes.slots / sizes.tokens < 3
    even = planned_run(tiny_config(tmp_path), jax.devices(), LENGTHS).sizes(128)
    assert (even.tokens, even.slots) == (16 * 64, 16 * 64)


# --- what is sent


def test_bytes_within_and_between_slices_add_up() -> None:
    places = [Place(number // 4, (number % 4,)) for number in range(8)]
    everyone = Collective("all-reduce", "f32", 800.0, np.arange(8)[None], "", 0, 0)
    inside, across = split_wire_bytes(everyone, places)
    # Reduced within four first; then each has a fourth, of which it sends half to the other slice, twice.
    assert (inside, across) == (1200, 200)
    assert inside + across == everyone.wire_bytes
    assert split_wire_bytes(everyone._replace(groups=np.arange(8).reshape(2, 4)), places) == (1200, 0)
    pairs = everyone._replace(kind="collective-permute", groups=np.array([[0, 1], [3, 4]]))
    assert split_wire_bytes(pairs, places) == (400, 400)


# --- plans and their cache


def test_a_plan_is_kept_until_something_that_decides_it_changes(tmp_path: Path) -> None:
    config, machine = tiny_config(tmp_path, "compute_dtype=auto"), machine_of("h100x8")
    made = plan(config, "h100x8", tmp_path)
    assert (made.fits, made.from_cache) == (True, False)
    assert made.how == ("compiled" if missing_package(machine) is None else "estimated")
    assert made.peak_bytes == sum(dataclasses.astuple(made.memory)) <= made.limit_bytes < made.hbm_bytes
    assert made.step_seconds is not None
    assert made.mfu is not None
    assert 0 < made.step_seconds[0] < made.step_seconds[1]
    assert (made.mesh["fsdp"], made.tokens_per_step, made.micro_batches) == (8, 16 * 64, 1)
    assert plan(config, "h100x8", tmp_path, refuse) == dataclasses.replace(made, from_cache=True)
    assert TargetPlan.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    # Where the run writes and how often it logs decides nothing.
    same = plan_key(load_like(config, output_dir="y", logging_steps=3), machine, LENGTHS)
    assert same == plan_key(config, machine, LENGTHS)
    others = [
        plan_key(load_like(config, global_batch_size=32), machine, LENGTHS),
        plan_key(config, machine_of("h200"), LENGTHS),
        plan_key(config, machine, [(16, 24, 23)]),
    ]
    shape = tmp_path / "config.json"
    shape.write_text(shape.read_text().replace("1e-06", "1e-05"))
    others.append(plan_key(config, machine, LENGTHS))
    assert len({same, *others}) == 5


def load_like(config: TrainConfig, **keys: Any) -> TrainConfig:
    return dataclasses.replace(config, **keys)


@pytest.mark.parametrize("damage", ["", "{", '{"plan": {}, "digest": "0"}', "changed"])
def test_a_damaged_plan_is_made_again(tmp_path: Path, damage: str) -> None:
    config = tiny_config(tmp_path, "compute_dtype=auto")
    made = plan(config, "h200", tmp_path)
    (file,) = (tmp_path / "plans").iterdir()
    whole = file.read_text()
    file.write_text(damage if damage != "changed" else whole.replace('"fits": true', '"fits": false'))
    again = plan(config, "h200", tmp_path)
    assert again == made
    assert file.read_text() == whole


def test_what_does_not_fit_is_a_plan_with_advice(tmp_path: Path) -> None:
    keys = [f"model_name_or_path={SHAPES / 'Llama-3.1-70B'}", "datasets=x", "output_dir=x", "reference=cached"]
    config = load_config(CONFIGS["dpo"], None, keys)
    if missing_package(machine_of("h200")) is None:
        pytest.skip("jax[cuda13] is installed, which would compile the step")
    made = plan(config, "h200", tmp_path)
    assert not made.fits
    assert made.missing_bytes == pytest.approx(made.peak_bytes - made.limit_bytes, abs=2)
    assert (made.step_seconds, made.mfu, made.wire_inside_bytes) == (None, None, None)
    assert any("adamw_bf16" in line and "does not fit either" in line for line in made.suggestions)
    assert any("at least 7 such devices" in line for line in made.suggestions)


def test_a_model_without_a_shape_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        plan(config, "h200", tmp_path)


# --- compiled


def compiled(name: str, shape: str, folder: Path, *words: str) -> tuple[TargetPlan, list[str]]:
    machine = machine_of(name)
    if missing := missing_package(machine):
        pytest.skip(f"{missing} is not installed; benchmarks/README.md makes an environment that has it")
    lines: list[str] = []
    keys = [f"model_name_or_path={SHAPES / shape}", "datasets=x", "output_dir=x", "reference=cached", *words]
    config = load_config(CONFIGS["dpo"], None, keys)
    made = plan_target(config, machine, [(256, 384, 384)], cache_dir=folder, log=lines.append)
    return made, lines


@pytest.mark.full
@pytest.mark.parametrize("name", ["v5e-4", "h100x2"])
def test_a_small_model_is_compiled_and_fits(tmp_path: Path, name: str) -> None:
    made, lines = compiled(name, "SmolLM2-135M", tmp_path, "global_batch_size=32", "remat=full")
    assert (made.fits, made.how, made.error) == (True, "compiled", None)
    assert 1 <= made.num_compilations <= 3
    assert sum("compiled in" in line for line in lines) == made.num_compilations
    assert made.peak_bytes <= step_limit(machine_of(name))
    # float32 weights and two moments, divided over the devices.
    share = 4 * 134_515_008 / made.num_devices
    assert made.memory.weights >= share
    assert made.memory.moments == pytest.approx(2 * share, rel=0.02)
    assert min(made.memory.activations, made.memory.other) > 0
    assert made.wire_inside_bytes
    assert made.wire_across_bytes == 0
    again, lines = compiled(name, "SmolLM2-135M", tmp_path, "global_batch_size=32", "remat=full")
    assert (again.from_cache, lines) == (True, [])


@pytest.mark.full
def test_the_compiler_of_tpus_itself_says_what_does_not_fit(tmp_path: Path) -> None:
    made, _ = compiled("v5e-4", "Llama-3.1-8B", tmp_path, "global_batch_size=32")
    assert not made.fits
    assert made.error is not None
    assert "RESOURCE_EXHAUSTED" in made.error
    assert made.peak_bytes > made.hbm_bytes
    assert 1 <= made.num_compilations <= 3
    # 8.03 B parameters in float32 with two moments, over four devices.
    assert made.memory.moments == pytest.approx(2 * 8.03e9, rel=0.01)
    assert any("adamw_bf16" in line for line in made.suggestions)
