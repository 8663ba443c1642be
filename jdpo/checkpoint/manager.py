"""Saves and restores checkpoints. Every orbax call of jdpo is in this module.

    checkpoints/<step>/state/       params, optimizer state, step and key, written by orbax in the background
    checkpoints/<step>/position/    JSON: the position in the data, and what a resumed run must know
    checkpoints/<step>/manifest.json   sizes and digests of all files, written last

Orbax detects neither flipped bits nor a folder that was half deleted in a crash. A step therefore counts only once its
manifest is written, and is restored only if every file agrees with it (`jdpo.checkpoint.steps`).
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import orbax.checkpoint as ocp

from jdpo.checkpoint.orbax_noise import quieten, reason
from jdpo.checkpoint.steps import (
    MANIFEST,
    best_of,
    clear_way,
    complete_steps,
    delete_step,
    digests_of,
    fault_of,
    read_manifest,
)
from jdpo.durable import write_durably
from jdpo.processes import run_jointly


class Restored(NamedTuple):
    """A restored checkpoint: its step, the device state, and the position in the data."""

    step: int
    state: Any
    position: dict[str, Any]


class Mirror(Protocol):
    """Copies complete checkpoints to another place, on a thread of its own."""

    def follow(
        self,
        newest: int | None,
        kept: Callable[[Mapping[int, Mapping[str, Any]]], Collection[int]],
        delete_old: Callable[[], None],
    ) -> None:
        """Begins.

        Args:
          newest: the newest complete step.
          kept: the manifests of some steps -> those of them that are kept.
          delete_old: deletes the steps that are not kept; to be called when a step is held no longer.
        """

    def sealed(self) -> None:
        """Takes note that there is a new complete step; returns at once."""

    def held(self) -> Collection[int]:
        """Returns the steps that are being copied, which must not be deleted yet."""


class CheckpointManager:
    """Saves checkpoints asynchronously, keeps the newest N and the best, and restores the newest complete one."""

    def __init__(
        self,
        folder: Path,
        *,
        max_to_keep: int,
        metric_name: str = "",
        greater_is_better: bool = False,
        verified: int | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """
        Args:
          folder: has one folder per step; created if missing.
          max_to_keep: number of newest complete checkpoints to keep, in addition to the best.
          metric_name: name of the `metric` of `save`, evaluation rows included; other metrics are not compared with it.
          greater_is_better: True if a greater `metric` is better.
          verified: a step that `settle_steps` found complete, which is then not read a second time.
          mirror: gets a copy of every complete checkpoint.
        """
        quieten()
        self._folder = folder.absolute()
        self._max_to_keep = max_to_keep
        self._metric_name = metric_name
        self._greater_is_better = greater_is_better
        self._pending: tuple[int, float | None] | None = None
        self._sealing: Future[None] | None = None
        self._failed = False
        self._verified = verified
        self._mirror = mirror
        self._deleting = threading.Lock()
        # One thread, so that manifests are written, and old steps deleted, in the order of the saves.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-manifest")
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._orbax = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                # Old steps are deleted here, once the manifest is written: orbax would delete the last complete
                # checkpoint before the new one has its manifest.
                max_to_keep=None,
                enable_async_checkpointing=True,
                # Orbax writes a step under another name first; a kill leaves such folders.
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "position"),
        )
        if mirror is not None:
            mirror.follow(verified, self._kept, self._delete_old)

    # --- saving

    def save(self, step: int, state: Any, position: dict[str, Any], *, metric: float | None = None) -> None:
        """Starts a save; returns as soon as the device state is copied.

        Args:
          step: number of updates so far.
          state: a pytree of device arrays.
          position: JSON values.
          metric: ranks this checkpoint; with None it is never the best.

        Raises:
          OSError: an earlier save failed, or something with the step's name is in the way and cannot be moved.
        """
        # Only one save is under way at a time: `_pending` and `_sealing` hold one each.
        self.wait()
        run_jointly(lambda: clear_way(self._folder / str(step)), on_first=True)
        # Orbax remembers the steps it has seen, and would refuse to save one again that was deleted here.
        self._orbax.reload()
        self._orbax.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)),
            # The caller decides when to save, not orbax's own interval.
            force=True,
        )
        self._pending = (step, metric)

    def rate(self, step: int, metric: float | None) -> None:
        """Sets the metric of a complete step that was saved without one."""
        if jax.process_index() == 0 and (manifest := read_manifest(self._folder / str(step))) is not None:
            rated = {**manifest, "metric_name": self._metric_name, "metric": metric}
            write_durably(self._folder / str(step) / MANIFEST, json.dumps(rated, indent=1))
            if self._mirror is not None:
                self._mirror.sealed()

    def poll(self) -> None:
        """Seals a save that has finished in the background, if there is one. Cheap; call it every step.

        Raises:
          OSError: a save failed.
        """
        self._written(self._orbax.check_for_errors)
        if self._sealing is not None and self._sealing.done():
            sealing, self._sealing = self._sealing, None
            sealing.result()
        # Digests of a large checkpoint take long, so another thread computes them while training continues.
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
        """Finishes the current save and frees the threads."""
        try:
            if not self._failed:
                self.wait()
        finally:
            self._pool.shutdown()
            # Orbax would raise again an error that was already raised here.
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._orbax.close()

    def _written(self, ask: Callable[[], object]) -> None:
        """Asks orbax about its save and turns an error of any kind into one that says what to do."""
        try:
            ask()
        except Exception as error:
            self._failed = True
            raise self._failure(self._pending[0] if self._pending else "unknown", error) from error

    def _failure(self, step: int | str, error: Exception) -> OSError:
        return OSError(
            f"the checkpoint of step {step} could not be written to {self._folder}: {reason(error)}. Free some space "
            "and run the same command again: it continues from the newest complete checkpoint"
        )

    def _seal(self, step: int, metric: float | None) -> None:
        # The folder is on a file system that all processes share, so one manifest covers the files of all of them.
        if jax.process_index() != 0:
            return
        folder = self._folder / str(step)
        try:
            manifest = {"step": step, "metric_name": self._metric_name, "metric": metric, "files": digests_of(folder)}
            write_durably(folder / MANIFEST, json.dumps(manifest, indent=1))
            # Only now is the new step complete, so an older one may be deleted.
            self._delete_old()
        except OSError as error:
            raise self._failure(step, error) from error
        if self._mirror is not None:
            self._mirror.sealed()

    def _delete_old(self) -> None:
        with self._deleting:  # the thread of the mirror does so, too
            steps = self.complete_steps()
            keep = self._kept({step: read_manifest(self._folder / str(step)) or {} for step in steps})
            for step in steps:
                if step not in keep and (self._mirror is None or step not in self._mirror.held()):
                    delete_step(self._folder / str(step))

    def _kept(self, manifests: Mapping[int, Mapping[str, Any]]) -> Collection[int]:
        """Returns the steps that are kept among those with these manifests: the newest ones and the best one."""
        best = best_of(manifests, self._metric_name, greater_is_better=self._greater_is_better)
        return {*sorted(manifests)[-self._max_to_keep :], *([] if best is None else [best])}

    # --- finding

    def complete_steps(self) -> list[int]:
        """See the function of the same name in `jdpo.checkpoint.steps`."""
        return complete_steps(self._folder)

    def best_step(self) -> int | None:
        """Returns the complete step with the best metric, the earliest among equals, or None if none has a metric."""
        manifests = {step: read_manifest(self._folder / str(step)) or {} for step in self.complete_steps()}
        return best_of(manifests, self._metric_name, greater_is_better=self._greater_is_better)

    # --- restoring

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Restores a step, with the shardings of `abstract_state`.

        Args:
          step: a step from `settle_steps` or `best_step`.
          abstract_state: a tree of jax.ShapeDtypeStruct with shardings.

        Raises:
          ValueError: a file of the step is not the one that was written.
        """
        if step != self._verified:
            # By one process, as the others read the same files, and may see them later.
            run_jointly(lambda: self._refuse_damaged(step), on_first=True)
        # Steps may have been deleted or renamed since orbax listed them.
        self._orbax.reload()
        items = self._orbax.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore()),
        )
        return Restored(step, items["state"], items["position"])

    def _refuse_damaged(self, step: int) -> None:
        if (fault := fault_of(self._folder / str(step))) is not None:
            raise ValueError(
                f"checkpoint {self._folder / str(step)} is damaged: {fault}; restore the file or, if this is the best "
                "checkpoint, set load_best_model_at_end to false to export the last step"
            )


def read_position(folder: Path) -> dict[str, Any]:
    """Returns the position in the data from the folder of a step."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        position: dict[str, Any] = checkpointer.restore(folder / "position", args=ocp.args.JsonRestore())
    return position


def restore_params(folder: Path, abstract_params: Any) -> Any:
    """Restores only the weights from the folder of a step.

    Args:
      abstract_params: a tree of jax.ShapeDtypeStruct with shardings.
    """
    item = {"params": abstract_params}
    # Partial: the optimizer's state stays on the disk.
    args = ocp.args.PyTreeRestore(
        item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", args=args)["params"]
