"""Which checkpoints count, which are kept, and what happens to those that are not whole."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdpo.checkpoint.manager import MANIFEST, CheckpointManager
from jdpo.config import MeshConfig
from jdpo.sharding.mesh import make_mesh


def state_at(step: int, axis: str | None = "fsdp") -> dict[str, Any]:
    sharding = NamedSharding(make_mesh(MeshConfig(fsdp=8)), PartitionSpec(axis))
    return {
        "params": jax.device_put(jnp.arange(64, dtype=jnp.float32) * step, sharding),
        "moment": jax.device_put(jnp.full(16, step, jnp.bfloat16), sharding),
        "count": jnp.int32(step),
    }


def abstract(state: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[CheckpointManager]:
    manager = CheckpointManager(tmp_path / "checkpoints", max_to_keep=2)
    yield manager
    manager.close()


def reopened(manager: CheckpointManager, **settings: Any) -> CheckpointManager:
    manager.close()
    return CheckpointManager(manager._folder, **({"max_to_keep": 2} | settings))


def save(manager: CheckpointManager, *steps: int, metrics: dict[int, float] | None = None) -> None:
    for step in steps:
        manager.save(step, state_at(step), {"tokens": step * 10}, metric=(metrics or {}).get(step))
    manager.wait()


def test_what_was_saved_comes_back_bitwise(manager: CheckpointManager) -> None:
    save(manager, 3)
    restored = manager.restore(3, abstract(state_at(0)))
    assert (restored.step, restored.position) == (3, {"tokens": 30})
    for found, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_at(3)), strict=True):
        assert found.dtype == expected.dtype
        assert found.sharding == expected.sharding
        np.testing.assert_array_equal(found, expected)


def test_another_sharding_is_taken_on_restore(manager: CheckpointManager) -> None:
    save(manager, 3)
    whole = state_at(3, None)
    restored = manager.restore(3, abstract(whole))
    assert restored.state["params"].sharding == whole["params"].sharding
    np.testing.assert_array_equal(restored.state["params"], whole["params"])


def test_what_is_saved_is_the_state_at_the_call(manager: CheckpointManager) -> None:
    # The next step is given the old state's memory while the save goes on in the background.
    state = {"params": jnp.arange(1 << 20, dtype=jnp.float32)}
    shape = abstract(state)
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    manager.save(1, state, {})
    for _ in range(3):
        state = add(state)
    manager.wait()
    np.testing.assert_array_equal(manager.restore(1, shape).state["params"], np.arange(1 << 20, dtype=np.float32))


def test_the_manifest_names_every_file_and_comes_last(manager: CheckpointManager) -> None:
    save(manager, 1)
    folder = manager._folder / "1"
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == set(files) - {MANIFEST}
    assert manifest["step"] == 1
    assert all(path.stat().st_mtime_ns <= files[MANIFEST].stat().st_mtime_ns for path in files.values())


def test_poll_seals_without_waiting(manager: CheckpointManager) -> None:
    manager.save(1, state_at(1), {})
    for _ in range(10_000):
        manager.poll()
        if manager.complete_steps() == [1]:
            break
        manager._orbax.wait_until_finished()
    assert manager.complete_steps() == [1]


def test_the_newest_and_the_best_are_kept(manager: CheckpointManager) -> None:
    save(manager, 1, 2, 3, 4, 5, metrics={1: 0.7, 2: 0.3, 3: 0.3, 5: 0.9})
    assert manager.best_step() == 2, "the earliest among equals"
    assert manager.complete_steps() == [2, 4, 5]


def test_a_metric_may_be_better_where_it_is_greater(manager: CheckpointManager) -> None:
    manager = reopened(manager, max_to_keep=1, greater_is_better=True)
    save(manager, 1, 2, 3, metrics={1: 0.7, 2: 0.3, 3: 0.3})
    assert manager.complete_steps() == [1, 3]
    manager.close()


def test_checkpoints_ranked_by_another_metric_are_not_compared(tmp_path: Path) -> None:
    for name, steps in (("eval_loss on a", {1: 0.1}), ("eval_loss on b", {2: 0.7, 3: 0.8})):
        again = CheckpointManager(tmp_path / "checkpoints", max_to_keep=3, metric_name=name)
        save(again, *steps, metrics=steps)
        again.close()
    assert again.best_step() == 2


def test_without_metrics_none_is_best(manager: CheckpointManager) -> None:
    save(manager, 1, 2, 3)
    assert manager.best_step() is None
    assert manager.complete_steps() == [2, 3]


def test_nothing_saved_is_nothing_found(manager: CheckpointManager) -> None:
    assert manager.newest_whole_step() is None
    assert manager.complete_steps() == []


def spoil(folder: Path, how: str) -> str:
    """Damages a step; returns what the warning says of it."""
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    name = str(victim.relative_to(folder))
    if how == "bit":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        return f"{name} is not what was written"
    if how == "short":
        victim.write_bytes(victim.read_bytes()[:-1])
        return f"{name} is not what was written"
    if how == "missing":
        victim.unlink()
        return f"{name} is missing"
    if how == "extra":
        (folder / "state" / "stray").write_text("x")
        return "state/stray is not what was written"
    if how == "no manifest":
        (folder / MANIFEST).unlink()
        return "its save was cut off"
    if how == "half a manifest":
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])
        return f"{MANIFEST} cannot be read"
    assert how == "empty folder"
    shutil.rmtree(folder)
    folder.mkdir()
    return "its save was cut off"


FAULTS = ["bit", "short", "missing", "extra", "no manifest", "half a manifest", "empty folder"]


@pytest.mark.parametrize("how", FAULTS)
def test_a_step_that_is_not_whole_is_named_deleted_and_may_be_saved_again(
    how: str, manager: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    save(manager, 1, 2)
    fault = spoil(manager._folder / "2", how)
    manager = reopened(manager)
    assert manager.newest_whole_step() == 1
    warnings = [record.getMessage() for record in caplog.records if record.name == "jdpo.checkpoint.manager"]
    assert warnings == [f"checkpoint {manager._folder / '2'} is not whole ({fault}): it is deleted"]
    assert not (manager._folder / "2").exists()
    np.testing.assert_array_equal(manager.restore(1, abstract(state_at(0))).state["params"], state_at(1)["params"])
    save(manager, 2)
    np.testing.assert_array_equal(manager.restore(2, abstract(state_at(0))).state["params"], state_at(2)["params"])
    manager.close()


def test_where_no_step_is_whole_the_first_may_be_saved_again(manager: CheckpointManager) -> None:
    save(manager, 1)
    spoil(manager._folder / "1", "no manifest")
    manager = reopened(manager)
    assert manager.newest_whole_step() is None
    save(manager, 1)
    assert manager.newest_whole_step() == 1
    manager.close()


def test_retention_never_deletes_the_last_whole_step_before_the_next_one_has_its_manifest(
    manager: CheckpointManager,
) -> None:
    manager = reopened(manager, max_to_keep=1)
    save(manager, 1)
    manager.save(2, state_at(2), {})
    manager._orbax.wait_until_finished()
    assert (manager._folder / "2" / "state").is_dir(), "orbax is done"
    assert manager.complete_steps() == [1]
    manager.wait()
    assert manager.complete_steps() == [2]
    manager.close()


def test_what_an_unfinished_save_left_is_cleared_away(manager: CheckpointManager) -> None:
    save(manager, 1)
    torso = manager._folder / "2.orbax-checkpoint-tmp-1"
    torso.mkdir()
    (torso / "array").write_text("x")
    manager = reopened(manager)
    assert manager.newest_whole_step() == 1
    save(manager, 2)
    assert not torso.exists()
    assert manager.newest_whole_step() == 2
    manager.close()


@contextlib.contextmanager
def disk_that_takes(num_bytes: int) -> Iterator[None]:
    """Every write past so many bytes of a file fails, for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FAILURE = r"the checkpoint of step 2 could not be written to .*checkpoints: .*File too large.*Make room there and run"


# A failed save leaves orbax' event loops in a state of which their destructors complain.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_the_disk_refuses_is_an_error_and_the_step_before_stands(manager: CheckpointManager) -> None:
    save(manager, 1)
    # A later message must not hide this one, as a search for files that were never written would.
    with disk_that_takes(10), pytest.raises(OSError, match=FAILURE):
        save(manager, 2)
    # Threads of the failed save may still write in this process; a restarted one, which this stands for, has none.
    time.sleep(1)
    manager = reopened(manager)
    gc.collect()
    assert manager.newest_whole_step() == 1
    save(manager, 2)
    assert manager.newest_whole_step() == 2
    manager.close()


def test_a_manifest_that_the_disk_refuses_is_an_error(manager: CheckpointManager) -> None:
    save(manager, 1)
    manager.save(2, state_at(2), {})
    manager._orbax.wait_until_finished()
    with disk_that_takes(10), pytest.raises(OSError, match=FAILURE):
        manager.wait()
    assert manager.complete_steps() == [1]
