"""The thread of the first process that keeps the mirror of a run up to date: it decides what is uploaded, and when."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jdpo.checkpoint.mirror.contents import (
    CHECKPOINTS,
    EXPORT,
    export_files,
    manifest_in,
    manifest_of,
    step_folder,
    steps_in,
)
from jdpo.checkpoint.mirror.daemon_threads import in_daemon_threads
from jdpo.checkpoint.mirror.object_store import ObjectStore, StoreError
from jdpo.checkpoint.mirror.record_upload import RecordUpload
from jdpo.checkpoint.mirror.share_upload import (
    AT_ONCE,
    LAST_ATTEMPTS,
    POLL_SECONDS,
    Backoff,
    CannotUpload,
    upload_share,
)
from jdpo.checkpoint.mirror.upload_notes import Digest, Task, UploadNotes
from jdpo.checkpoint.steps import complete_steps, read_manifest
from jdpo.file_digests import file_digest
from jdpo.words import listed

Kept = Callable[[Mapping[int, Mapping[str, Any]]], Collection[int]]
"""The manifests of some steps -> the steps that are kept, as among the checkpoints on the disk."""


class Leader:
    """Uploads complete checkpoints, the newest first, and the exported model once the run ends.

    A failure never ends the run: it is counted, logged once, and the upload is tried again.

    Attributes:
      failures: attempts that failed in this start.
      error: why the last one failed; None if the last attempt succeeded.
    """

    def __init__(
        self, store: ObjectStore, run: Path, notes: UploadNotes, count: int, log: Callable[[str], None]
    ) -> None:
        """Finds out what the mirror holds.

        Args:
          count: processes of the run.

        Raises:
          StoreError: the mirror cannot be read.
        """
        self._store, self._run, self._notes, self._count, self._log = store, run, notes, count, log
        self.records = RecordUpload(store, run)
        names = store.sizes()
        notes.begin(store.address, names)
        notes.join(store.address)
        manifests = {step: self._whole(step, names) for step in steps_in(names, with_manifest=True)}
        self._steps = {step: manifest for step, manifest in manifests.items() if manifest is not None}
        # Damaged ones; those that are later than what the run continues from stay until it has come as far again.
        self._later = manifests.keys() - self._steps.keys()
        # Left by uploads or deletions that were interrupted.
        self._partial = set(steps_in(names, with_manifest=False)) - manifests.keys()
        self._export: dict[str, Digest] | None = None  # once the run has ended: the files of the exported model
        self._exported = False
        self._skipped: dict[str, str] = {}  # folders that can never be uploaded, and why
        self._again: set[str] = set()
        self._kept: Kept | None = None
        self._delete_old: Callable[[], None] = lambda: None
        self._held: int | None = None
        self._number = 0
        self.failures, self.error = 0, None  # type: int, str | None
        self._backoff = Backoff()
        self._ending, self._abandoned = False, False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def _whole(self, step: int, names: Mapping[str, int]) -> dict[str, Any] | None:
        """Returns the manifest of a step in the mirror if all its files are there, by their sizes."""
        folder = step_folder(step)
        manifest = manifest_in(self._store.read(manifest_of(folder)))
        if manifest is None:
            return None
        sizes = {f"{folder}/{name}": found[0] for name, found in manifest["files"].items()}
        return manifest if sizes.items() <= names.items() else None

    # --- called by the run

    def follow(self, newest: int | None, kept: Kept, delete_old: Callable[[], None]) -> None:
        """Uploads the checkpoints of the run from now on.

        Args:
          newest: step that the run continues from. Later steps in the mirror were not used, as they are damaged.
          kept: tells which steps are kept.
          delete_old: deletes old steps on the disk.
        """
        self._later |= {step for step in self._steps if newest is None or step > newest}
        self._steps = {step: manifest for step, manifest in self._steps.items() if step not in self._later}
        self._kept, self._delete_old = kept, delete_old
        self._thread.start()

    def sealed(self) -> None:
        """Looks for new checkpoints."""
        self._wake.set()

    def held(self) -> Collection[int]:
        """Returns the step that is being uploaded, which must not be deleted until then."""
        return () if self._held is None else (self._held,)

    @property
    def answers(self) -> bool:
        """True unless the store, or the disk, refused the last attempt."""
        return self._backoff.failures == 0

    @property
    def newest(self) -> int | None:
        """The newest step in the mirror."""
        return max(self._steps, default=None)

    def close(self, given_up: Callable[[], bool]) -> None:
        """Uploads what is missing, the exported model included, and ends the thread.

        Args:
          given_up: returns True to wait no longer.
        """
        self._ending = True
        self._backoff.clear()
        if self._thread.ident is None:  # of a run that was finished before, or failed before it trained
            self._thread.start()
        self._wake.set()
        while self._thread.is_alive() and not given_up():
            self._thread.join(POLL_SECONDS)
        self._abandoned = True
        self._wake.set()
        self._held = None
        self._delete_old()  # on the disk, what was held when the last checkpoint was saved
        self._notes.publish(Task(self._number + 1, over=True))

    def missing(self) -> list[str]:
        """Returns what the mirror lacks, in words. To be called after `close`."""
        self.error = self.error or next(iter(self._skipped.values()), None)
        steps = [str(step) for step in complete_steps(self._run / CHECKPOINTS) if not self._has(step)]
        found = [f"the checkpoint{'s' * (len(steps) > 1)} of step {listed(steps, 3)}"] if steps else []
        return found + (["the exported model"] if not self._exported and export_files(self._run) else [])

    # --- on the thread

    def _work(self) -> None:
        while not self._abandoned:
            # Before looking for what is missing: a checkpoint may be saved, and the run end, while this thread looks.
            folder, ending = None, self._ending
            try:
                if (folder := self._next()) is not None:
                    self._upload(folder)
                else:
                    self._tidy()
            except CannotUpload as error:
                if folder != EXPORT and read_manifest(self._run / str(folder)) is None:
                    continue  # as an old step, it has been deleted on the disk meanwhile
                self._skipped[str(folder)] = f"{folder}: {error}"
                self._note(f"{folder}: {error}")
            except Exception as error:  # of the store or of the disk; whatever it is, the thread must live
                self._backoff.failures += 1
                self._note(str(error) or type(error).__name__)
                if self._ending and self._backoff.failures >= LAST_ATTEMPTS:
                    return
                self._pause(self._backoff.seconds())
            else:
                self._backoff.clear()
                if folder is None and ending:
                    return
                if folder is None:
                    self._pause(None)
            finally:
                self._held = None

    def _pause(self, seconds: float | None) -> None:
        self._wake.wait(seconds)
        self._wake.clear()

    def _note(self, problem: str) -> None:
        if self.failures == 0:
            self._log(f"warning: the mirror is not up to date: {problem}. The run goes on, and tries again")
        self.failures += 1
        self.error = problem

    def _next(self) -> str | None:
        """Returns the folder to upload next, or None if the mirror holds all."""
        # Nothing on the disk is known to be whole before the run has looked for its newest checkpoint.
        for step in reversed(complete_steps(self._run / CHECKPOINTS)):
            if step_folder(step) not in self._skipped and not self._has(step):
                self._held = step
                return step_folder(step)
        if self._ending and not self._exported and EXPORT not in self._skipped:
            if self._export is None:
                sizes = export_files(self._run)
                self._export = {name: [size, file_digest(self._run / EXPORT / name)] for name, size in sizes.items()}
            found = manifest_in(self._store.read(manifest_of(EXPORT))) if self._export else None
            self._exported = found is not None and found["files"] == self._export
            if self._export and not self._exported:
                return EXPORT
        return None

    def _has(self, step: int) -> bool:
        manifest = read_manifest(self._run / step_folder(step))
        # The whole of it: the metric of a step may become known in a later start.
        return manifest is None or self._steps.get(step) == manifest

    def _upload(self, folder: str) -> None:
        """Uploads a folder: its files, then the records of the run, and its manifest last."""
        if folder == EXPORT:
            manifest: dict[str, Any] | None = {"files": self._export}
        else:
            manifest = read_manifest(self._run / folder)
        if manifest is None:
            raise CannotUpload("it is gone")
        if folder != EXPORT and self._steps.get(_step_of(folder), {}).get("files") == manifest["files"]:
            self._store.write(manifest_of(folder), json.dumps(manifest, indent=1).encode())
            self._steps[_step_of(folder)] = manifest
            return
        self._clear(folder, manifest["files"])
        if folder != EXPORT:
            self._partial.add(_step_of(folder))  # until its manifest is there
        self._number += 1
        task = Task(self._number, folder, manifest["files"], again=folder in self._again)
        self._notes.publish(task)
        self._notes.start(task)
        upload_share(self._store, self._run, self._notes, task, 0, self._count, lambda: self._abandoned)
        self._notes.finish()
        self._await_others(task)
        self._verify(task)
        # Before the manifest: the metrics up to a step are in the mirror when the step is.
        self.records.upload()
        self._store.write(manifest_of(folder), json.dumps(manifest, indent=1).encode())
        if self.error is not None:
            self._log(f"the mirror holds {folder} now")
        self.error = None
        if folder == EXPORT:
            self._exported = True
            return
        self._steps[_step_of(folder)] = manifest
        self._partial.discard(_step_of(folder))
        self._later.discard(_step_of(folder))
        self._held = None
        self._delete_old()  # on the disk, where the step was held
        self._tidy()

    def _clear(self, folder: str, files: Mapping[str, Digest]) -> None:
        """Deletes objects that an earlier upload to the same folder left; the manifest first."""
        names = self._store.sizes(folder)
        if folder == EXPORT:
            self._store.delete(manifest_of(folder))
        elif manifest_of(folder) in names:
            self._steps.pop(_step_of(folder), None)
            self._store.delete(manifest_of(folder))
        self._delete([name for name in names if name.removeprefix(f"{folder}/") not in files])

    def _await_others(self, task: Task) -> None:
        while True:
            found = self._notes.progress(task, self._count)
            for index, progress in enumerate(found):
                if progress.given_up is not None:
                    raise CannotUpload(f"process {index}: {progress.given_up}")
            if all(progress.over for progress in found):
                return
            problems = [f"process {index}: {each.problem}" for index, each in enumerate(found) if each.problem]
            newest = max(complete_steps(self._run / CHECKPOINTS), default=0)
            # A newer checkpoint is worth more than one whose upload fails.
            if problems and (self._abandoned or newest > (self._held or newest)):
                raise StoreError(problems[0])
            if problems and self.error != problems[0]:
                self._note(problems[0])
            if self._abandoned:
                raise StoreError("the upload was given up")
            threading.Event().wait(POLL_SECONDS)

    def _verify(self, task: Task) -> None:
        """Compares what the store has with what was uploaded."""
        names = self._store.sizes(task.folder)
        for name, (size, _) in task.files.items():
            found = names.get(f"{task.folder}/{name}")
            if found != size:
                self._again.add(task.folder)
                place = f"{self._store.address}/{task.folder}/{name}"
                raise StoreError(f"{place}: expected {size} bytes, found {found or 0}")
        self._again.discard(task.folder)

    def _tidy(self) -> None:
        """Deletes old steps in the mirror, as they are deleted on the disk, and what interrupted uploads left."""
        if self._kept is not None:
            kept = self._kept(self._steps)
            self._partial |= {step for step in self._steps if step not in kept}
            self._partial |= {step for step in self._later if step < max(self._steps, default=0)}
        # What is on the disk is in the mirror, too, or will be.
        for step in sorted(self._partial - set(complete_steps(self._run / CHECKPOINTS))):
            folder = step_folder(step)
            self._steps.pop(step, None)
            self._store.delete(manifest_of(folder))
            self._delete(self._store.sizes(folder))
            self._partial.discard(step)
            self._later.discard(step)

    def _delete(self, names: Collection[str]) -> None:
        for error in in_daemon_threads(self._store.delete, names, AT_ONCE, lambda: self._abandoned):
            raise error


def _step_of(folder: str) -> int:
    return int(folder.rpartition("/")[2])
