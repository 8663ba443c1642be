"""Checkpoints: every orbax call of jdpo is in this module.

    checkpoints/<step>/state/       params, optimizer state, step and key, written by orbax in the background
    checkpoints/<step>/position/    JSON: where in the data the run stands, and what a resumed run must know
    checkpoints/<step>/manifest.json   sizes and digests of all files, written last

Orbax notices neither flipped bits nor a folder that a crash left half deleted. A step therefore counts only once
its manifest is written, and is restored only when every file agrees with it (`jdpo.checkpoint.steps`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

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
    settle_steps,
)
from jdpo.durable import write_durably
from jdpo.processes import run_jointly


class Restored(NamedTuple):
    """A checkpoint brought back: the step it was taken after, the device state, and the position."""

    step: int
    state: Any
    position: dict[str, Any]


class CheckpointManager:
    """Saves asynchronously, keeps the newest N and the best, restores the newest that is whole."""

    def __init__(
        self,
        folder: Path,
        *,
        max_to_keep: int,
        metric_name: str = "",
        greater_is_better: bool = False,
        verified: int | None = None,
    ) -> None:
        """
        Args:
          folder: holds one folder a step; made if missing.
          max_to_keep: newest complete checkpoints to keep, beside the best.
          metric_name: what `metric` of `save` is, rows included; checkpoints ranked by anything else are not compared.
          greater_is_better: how `metric` ranks checkpoints.
          verified: a step that `settle_steps` found whole: reading a large checkpoint once is enough.
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
          OSError: an earlier save failed, or something in the step's place cannot be moved.
        """
        self.wait()
        run_jointly(lambda: clear_way(self._folder / str(step)), on_first=True)
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
            f"the checkpoint of step {step} could not be written to {self._folder}: {reason(error)}. Make room there "
            "and run the same command again: it goes on from the newest whole checkpoint"
        )

    def _seal(self, step: int, metric: float | None) -> None:
        if jax.process_index() != 0:
            return
        folder = self._folder / str(step)
        try:
            manifest = {"step": step, "metric_name": self._metric_name, "metric": metric, "files": digests_of(folder)}
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
                delete_step(self._folder / str(step))

    # --- finding

    def complete_steps(self) -> list[int]:
        """See the function of the same name in `jdpo.checkpoint.steps`."""
        return complete_steps(self._folder)

    def best_step(self) -> int | None:
        """The complete step with the best metric, the earliest among equals, or None where none has one."""
        manifests = {step: read_manifest(self._folder / str(step)) or {} for step in self.complete_steps()}
        return best_of(manifests, self._metric_name, greater_is_better=self._greater_is_better)

    def newest_whole_step(self) -> int | None:
        """The newest step whose files all agree with its manifest; see `settle_steps`."""
        self._verified = settle_steps(self._folder)
        return self._verified

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
