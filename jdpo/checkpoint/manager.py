"""Checkpoints: every orbax call of jdpo stands here.

    checkpoints/<step>/state/       params, optimizer state, step and key, written by orbax in the background
    checkpoints/<step>/position/    JSON: where in the data the run stands, and what a resumed run must know
    checkpoints/<step>/manifest.json   sizes and digests of all files, written last

Orbax notices neither flipped bits nor a folder that a crash left half deleted. A step therefore counts only once
its manifest stands, and is restored only when every file agrees with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jdpo.durable import TEMPORARY, write_durably

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint brought back: the step it was taken after, the device state, and the position."""

    step: int
    state: Any
    position: dict[str, Any]


class CheckpointManager:
    """Saves asynchronously, keeps the newest N and the best, restores the newest that is whole."""

    def __init__(
        self, folder: Path, *, max_to_keep: int, metric_name: str = "", greater_is_better: bool = False
    ) -> None:
        """
        Args:
          folder: holds one folder a step; made if missing.
          max_to_keep: newest complete checkpoints to keep, beside the best.
          metric_name: what `metric` of `save` is, rows included; checkpoints ranked by anything else are not compared.
          greater_is_better: how `metric` ranks checkpoints.
        """
        self._folder = folder.absolute()
        self._max_to_keep = max_to_keep
        self._metric_name = metric_name
        self._greater_is_better = greater_is_better
        self._pending: tuple[int, float | None] | None = None
        self._sealing: Future[None] | None = None
        self._failed = False
        self._verified: int | None = None  # reading a large checkpoint once is enough
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-manifest")
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._orbax = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                # Which steps stay is decided here, after the manifest: orbax would delete the last whole
                # checkpoint before the new one has its manifest.
                max_to_keep=None,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "position"),
        )

    # --- saving

    def save(self, step: int, state: Any, position: dict[str, Any], *, metric: float | None = None) -> None:
        """Starts a save; returns as soon as the device state is copied.

        Args:
          step: updates made.
          state: a pytree of device arrays.
          position: JSON values.
          metric: ranks this checkpoint against others; None never is the best.

        Raises:
          OSError: an earlier save failed.
        """
        self.wait()
        # Orbax remembers the steps it once saw, and refuses to save one again that was deleted here since.
        self._orbax.reload()
        self._orbax.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)),
            force=True,
        )
        self._pending = (step, metric)

    def poll(self) -> None:
        """Seals a save that has finished in the background, if there is one. Cheap; call it every step.

        Raises:
          OSError: a save failed.
        """
        self._written(self._orbax.check_for_errors)
        if self._sealing is not None and self._sealing.done():
            sealing, self._sealing = self._sealing, None
            sealing.result()
        if self._pending is not None and not self._orbax.is_saving_in_progress():
            step, metric = self._pending
            self._pending = None
            self._sealing = self._pool.submit(self._seal, step, metric)

    def wait(self) -> None:
        """Blocks until every started save is complete, manifest included.

        Raises:
          OSError: a save failed.
        """
        self._written(self._orbax.wait_until_finished)
        self.poll()
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def close(self) -> None:
        """Finishes what is under way and frees the threads."""
        try:
            if not self._failed:
                self.wait()
        finally:
            self._pool.shutdown()
            # Orbax raises an error that was already raised here again and again.
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._orbax.close()

    def _written(self, ask: Callable[[], object]) -> None:
        """Asks orbax about its save; what it failed with, of whatever kind, is made one error that says what to do."""
        try:
            ask()
        except Exception as error:
            self._failed = True
            raise self._failure(self._pending[0] if self._pending else "unknown", error) from error

    def _failure(self, step: int | str, error: Exception) -> OSError:
        return OSError(
            f"the checkpoint of step {step} could not be written to {self._folder}: {error}. Make room there and run "
            "the same command again: it goes on from the newest whole checkpoint"
        )

    def _seal(self, step: int, metric: float | None) -> None:
        if jax.process_index() != 0:
            return
        folder = self._folder / str(step)
        try:
            manifest = {"step": step, "metric_name": self._metric_name, "metric": metric, "files": _digests(folder)}
            write_durably(folder / MANIFEST, json.dumps(manifest, indent=1))
            self._delete_old()
        except OSError as error:
            raise self._failure(step, error) from error

    def _delete_old(self) -> None:
        steps = self.complete_steps()
        keep = set(steps[-self._max_to_keep :])
        best = self.best_step()
        for step in steps:
            if step not in keep and step != best:
                _delete(self._folder / str(step))

    # --- finding

    def complete_steps(self) -> list[int]:
        """See the function of the same name."""
        return complete_steps(self._folder)

    def best_step(self) -> int | None:
        """The complete step with the best metric, the earliest among equals, or None where none has one."""
        manifests = {step: self._manifest(step) for step in self.complete_steps()}
        ranked = {
            step: manifest["metric"]
            for step, manifest in manifests.items()
            if manifest["metric"] is not None
            and math.isfinite(manifest["metric"])
            and manifest["metric_name"] == self._metric_name
        }
        if not ranked:
            return None
        best = max(ranked.values()) if self._greater_is_better else min(ranked.values())
        return next(step for step, metric in ranked.items() if metric == best)

    def newest_whole_step(self) -> int | None:
        """The newest step whose files all agree with its manifest; later ones are warned of and deleted."""
        for step in reversed(self._all_steps()):
            fault = fault_of(self._folder / str(step))
            if fault is None:
                self._verified = step
                return step
            log.warning("checkpoint %s is not whole (%s): it is deleted", self._folder / str(step), fault)
            if jax.process_index() == 0:
                _delete(self._folder / str(step))
        return None

    def _all_steps(self) -> list[int]:
        return _steps_in(self._folder)

    def _manifest(self, step: int) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self._folder / str(step) / MANIFEST).read_text())
        return manifest

    # --- restoring

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Brings a step back, each leaf under the sharding that `abstract_state` gives it.

        Args:
          step: a step from `newest_whole_step` or `best_step`.
          abstract_state: tree of jax.ShapeDtypeStruct with shardings.

        Raises:
          ValueError: a file of the step is not what was written.
        """
        if step != self._verified and (fault := fault_of(self._folder / str(step))) is not None:
            raise ValueError(
                f"checkpoint {self._folder / str(step)} is damaged: {fault}; bring the file back, or, if this is the "
                "best checkpoint, set load_best_model_at_end to false to export the last step"
            )
        self._orbax.reload()
        items = self._orbax.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore()),
        )
        return Restored(step, items["state"], items["position"])


def complete_steps(folder: Path) -> list[int]:
    """Steps in a folder of checkpoints that have a manifest, oldest first; whether files agree is seen at restore."""
    return [step for step in _steps_in(folder) if (folder / str(step) / MANIFEST).exists()]


def fault_of(folder: Path) -> str | None:
    """What is wrong with the folder of a step, held against its manifest, all files read; None: nothing."""
    if not (folder / MANIFEST).exists():
        return "its save was cut off"
    try:
        expected = json.loads((folder / MANIFEST).read_text())["files"]
    except (ValueError, KeyError):
        return f"{MANIFEST} cannot be read"
    found = _digests(folder)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            return f"{name} is {'missing' if name not in found else 'not what was written'}"
    return None


def read_position(folder: Path) -> dict[str, Any]:
    """The position of the folder of a step."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        position: dict[str, Any] = checkpointer.restore(folder / "position", args=ocp.args.JsonRestore())
    return position


def restore_params(folder: Path, abstract_params: Any) -> Any:
    """The weights alone of the folder of a step; what else it holds is not read.

    Args:
      abstract_params: tree of jax.ShapeDtypeStruct with shardings.
    """
    item = {"params": abstract_params}
    args = ocp.args.PyTreeRestore(
        item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", args=args)["params"]


def _steps_in(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir())


def _digests(folder: Path) -> dict[str, list[Any]]:
    """{relative path: [bytes, sha256]} of every file but the manifest."""
    digests: dict[str, list[Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, MANIFEST + TEMPORARY):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[str(path.relative_to(folder))] = [path.stat().st_size, digest]
    return digests


def _delete(folder: Path) -> None:
    """Deletes a step; its manifest first, so that a half-deleted step never counts."""
    import shutil

    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
