"""Checkpoints: which ones count, which ones are kept, and what happens to incomplete ones."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
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

from jdpo.checkpoint.manager import CheckpointManager
from jdpo.checkpoint.steps import MANIFEST, damaged_folders, settle_steps
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
    # The next step is given the old state's memory while the save continues in the background.
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
    assert settle_steps(manager._folder) is None
    assert manager.complete_steps() == []


def spoil(folder: Path, how: str) -> str:
    """Damages a step; returns the key phrase of its error."""
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    name = str(victim.relative_to(folder))
    manifest = folder / MANIFEST
    if how == "bit":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        return f"{name} has changed since it was written"
    if how == "short":
        victim.write_bytes(victim.read_bytes()[:-1])
        return f"{name} has changed since it was written"
    if how == "missing":
        victim.unlink()
        return f"{name} is missing"
    if how == "fifo":
        victim.unlink()
        os.mkfifo(victim)
        return f"{name} is missing"
    if how == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif how == "a manifest of zeros":
        manifest.write_bytes(bytes(100))
    elif how == "a manifest of something else":
        manifest.write_text('["files"]')
    elif how == "a manifest of wrong types":
        manifest.write_text('{"step": "2", "files": []}')
    else:
        assert how == "a folder as manifest"
        manifest.unlink()
        manifest.mkdir()
    return f"{MANIFEST} cannot be read"


DAMAGE = [
    "bit",
    "short",
    "missing",
    "fifo",
    "half a manifest",
    "a manifest of zeros",
    "a manifest of something else",
    "a manifest of wrong types",
    "a folder as manifest",
]


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "jdpo.checkpoint.steps"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_step_is_named_and_set_aside_and_may_be_saved_again(
    how: str, manager: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    save(manager, 1, 2)
    fault = spoil(manager._folder / "2", how)
    damaged = files_of(manager._folder / "2")
    manager = reopened(manager, max_to_keep=1)
    assert settle_steps(manager._folder) == 1
    (place,) = damaged_folders(manager._folder)
    assert re.fullmatch(r"damaged-2-\d{8}T\d{6}Z", place.name)
    (warning,) = logged(caplog)
    assert f"2 is damaged ({fault})" in warning
    assert f"was renamed to {place.name}" in warning
    assert not (manager._folder / "2").exists()
    np.testing.assert_array_equal(manager.restore(1, abstract(state_at(0))).state["params"], state_at(1)["params"])
    save(manager, 2, 3)
    assert manager.complete_steps() == [3], "what was set aside does not count among those to keep"
    np.testing.assert_array_equal(manager.restore(3, abstract(state_at(0))).state["params"], state_at(3)["params"])
    assert files_of(place) == damaged
    manager.close()
    caplog.clear()
    manager = reopened(manager)
    assert settle_steps(manager._folder) == 3
    (warning,) = logged(caplog)
    assert re.search(rf"{place} \([\d.,]+ (MiB|bytes)\) was set aside as damaged and is not used", warning)
    manager.close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["without manifest", "empty", "begun", "with a hidden file"])
def test_a_save_that_was_cut_off_is_removed_and_counted_and_may_be_saved_again(
    how: str, manager: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    save(manager, 1, 2)
    for name in ("2", "7"):
        folder = manager._folder / name
        if how == "without manifest":
            shutil.copytree(manager._folder / "1", folder, dirs_exist_ok=True)
            (folder / MANIFEST).unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        if how == "begun":
            (folder / (MANIFEST + ".tmp")).write_text("{")
        if how == "with a hidden file":
            (folder / ".DS_Store").write_text("x")
    manager = reopened(manager)
    assert settle_steps(manager._folder) == 1
    assert logged(caplog) == [f"deleted 2 interrupted saves from {manager._folder}"]
    assert sorted(path.name for path in manager._folder.iterdir()) == ["1"]
    save(manager, 2)
    np.testing.assert_array_equal(manager.restore(2, abstract(state_at(0))).state["params"], state_at(2)["params"])
    manager.close()


STRAY = (".DS_Store", ".nfs00000000deadbeef00000001", ".array.swp", ".manifest.json.Xy12", "notes.txt")


def test_files_that_the_manifest_does_not_list_change_nothing(
    manager: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    save(manager, 1, 2)
    step = manager._folder / "2"
    for folder in [manager._folder, step, *(path for path in step.rglob("*") if path.is_dir())]:
        for name in STRAY:
            (folder / name).write_text("x")
        (folder / ".stray").mkdir()
        (folder / ".stray" / "inner").write_text("x")
    manager = reopened(manager)
    assert settle_steps(manager._folder) == 2
    assert logged(caplog) == []
    np.testing.assert_array_equal(manager.restore(2, abstract(state_at(0))).state["params"], state_at(2)["params"])
    save(manager, 3, 4)
    assert manager.complete_steps() == [3, 4], "an old step goes with what was put into it"
    assert not step.exists()
    manager.close()


def test_hidden_files_of_others_do_not_enter_the_manifest(manager: CheckpointManager) -> None:
    manager.save(1, state_at(1), {})
    manager._orbax.wait_until_finished()
    passing = manager._folder / "1" / "state" / ".nfs0001"
    passing.write_text("x")
    manager.wait()
    passing.unlink()
    assert settle_steps(reopened(manager)._folder) == 1


def put(folder: Path, name: str, what: str) -> None:
    place = folder / name
    if what == "file":
        place.write_text("mine")
    elif what == "link":
        place.symlink_to(folder / "nowhere")
    elif what == "folder":
        place.mkdir()
        (place / "photo.jpg").write_text("mine")
    else:
        shutil.copytree(folder / "2", place)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("notes", "file"),
        ("latest", "link"),
        ("2.bak", "copy"),
        ("002", "copy"),
        ("\u0663", "copy"),
        ("tmp", "folder"),
        ("3", "file"),
        ("3", "link"),
        ("3", "folder"),
    ],
)
def test_entries_that_are_not_checkpoints_are_kept_and_ignored(
    name: str, what: str, manager: CheckpointManager
) -> None:
    save(manager, 1, 2)
    put(manager._folder, name, what)
    manager = reopened(manager)
    assert settle_steps(manager._folder) == 2
    assert os.path.lexists(manager._folder / name)
    save(manager, 3)
    assert manager.complete_steps() == [2, 3]
    assert settle_steps(reopened(manager)._folder) == 3
    kept = [path.name for path in manager._folder.iterdir() if path.name not in ("2", "3")]
    assert len(kept) == 1
    assert kept[0] == name or re.fullmatch(r"damaged-3-.*", kept[0]), "moved where a step needs its name"


def test_a_checkpoint_on_another_disk_is_used_and_only_its_link_is_deleted(
    manager: CheckpointManager, tmp_path: Path
) -> None:
    save(manager, 1)
    (manager._folder / "1").rename(tmp_path / "elsewhere")
    (manager._folder / "1").symlink_to(tmp_path / "elsewhere")
    manager = reopened(manager)
    assert settle_steps(manager._folder) == 1
    np.testing.assert_array_equal(manager.restore(1, abstract(state_at(0))).state["params"], state_at(1)["params"])
    save(manager, 2, 3)
    assert manager.complete_steps() == [2, 3]
    assert not os.path.lexists(manager._folder / "1")
    assert (tmp_path / "elsewhere" / MANIFEST).is_file()
    manager.close()


@pytest.mark.parametrize("how", ["copied", "renamed", "linked"])
def test_a_step_under_another_name_is_refused_and_left_as_it_is(how: str, manager: CheckpointManager) -> None:
    save(manager, 1, 2)
    real, other = manager._folder / "2", manager._folder / "1000"
    if how == "copied":
        shutil.copytree(real, other)
    elif how == "renamed":
        real.rename(other)
    else:
        other.symlink_to(real)
    manager = reopened(manager)
    before = sorted(path.name for path in manager._folder.iterdir())
    with pytest.raises(ValueError, match="checkpoints/1000 has the manifest of step 2"):
        settle_steps(manager._folder)
    assert sorted(path.name for path in manager._folder.iterdir()) == before
    assert 1000 not in manager.complete_steps()
    manager.close()


def test_a_step_beyond_the_runs_last_is_refused(manager: CheckpointManager) -> None:
    save(manager, 1, 8)
    with pytest.raises(ValueError, match="checkpoints/8 is a checkpoint of step 8"):
        settle_steps(manager._folder, last_step=5)
    assert settle_steps(manager._folder, last_step=8) == 8


def test_a_step_that_the_disk_does_not_let_go_does_not_end_the_run(
    manager: CheckpointManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(folder: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))  # as NFS answers for an open file

    monkeypatch.setattr(shutil, "rmtree", busy)
    save(manager, 1, 2, 3)
    assert manager.complete_steps() == [2, 3]
    assert "1 could not be deleted completely" in logged(caplog)[-1]
    monkeypatch.undo()
    assert settle_steps(reopened(manager)._folder) == 3
    assert not (manager._folder / "1").exists()


def test_where_no_step_is_whole_the_first_may_be_saved_again(manager: CheckpointManager) -> None:
    save(manager, 1)
    (manager._folder / "1" / MANIFEST).unlink()
    manager = reopened(manager)
    assert settle_steps(manager._folder) is None
    save(manager, 1)
    assert settle_steps(manager._folder) == 1
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


def test_one_interrupted_save_is_reported_as_one(manager: CheckpointManager, caplog: pytest.LogCaptureFixture) -> None:
    (manager._folder / "3").mkdir(parents=True)
    assert settle_steps(reopened(manager)._folder) is None
    (message,) = logged(caplog)
    assert message.startswith("deleted 1 interrupted save from")


def test_what_an_unfinished_save_left_is_cleared_away(manager: CheckpointManager) -> None:
    save(manager, 1)
    torso = manager._folder / "2.orbax-checkpoint-tmp-1"
    torso.mkdir()
    (torso / "array").write_text("x")
    manager = reopened(manager)
    assert settle_steps(manager._folder) == 1
    save(manager, 2)
    assert not torso.exists()
    assert settle_steps(manager._folder) == 2
    manager.close()


@contextlib.contextmanager
def disk_that_takes(num_bytes: int) -> Iterator[None]:
    """Makes every write beyond so many bytes of a file fail, for root as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FAILURE = r"the checkpoint of step 2 could not be written to .*checkpoints: .*File too large.*Free some space and run"


# After a failed save the destructors of orbax' event loops raise warnings.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_the_disk_refuses_is_an_error_and_the_previous_step_remains(
    manager: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    save(manager, 1)
    # A later message must not hide this one, as a search for files that were never written would.
    with disk_that_takes(10), pytest.raises(OSError, match=FAILURE) as raised:
        save(manager, 2)
    assert "\n" not in str(raised.value)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == [], (
        "what is raised is not logged too"
    )
    # Threads of the failed save may still write here; a restarted process, which this test imitates, has none.
    time.sleep(1)
    manager = reopened(manager)
    gc.collect()
    assert settle_steps(manager._folder) == 1
    save(manager, 2)
    assert settle_steps(manager._folder) == 2
    manager.close()


def test_a_manifest_that_the_disk_refuses_is_an_error(manager: CheckpointManager) -> None:
    save(manager, 1)
    manager.save(2, state_at(2), {})
    manager._orbax.wait_until_finished()
    with disk_that_takes(10), pytest.raises(OSError, match=FAILURE):
        manager.wait()
    assert manager.complete_steps() == [1]
