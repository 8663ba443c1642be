"""The mirror of a run: a copy of what the run writes, from which a start with an empty output_dir continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import jax

from jdpo.checkpoint.mirror.checkpoint_fetch import fetch_newest
from jdpo.checkpoint.mirror.contents import IDENTITY
from jdpo.checkpoint.mirror.leading_upload import Kept, Leader
from jdpo.checkpoint.mirror.object_store import ObjectStore, StoreError
from jdpo.checkpoint.mirror.run_fetch import RunInMirror, with_retries
from jdpo.checkpoint.mirror.share_upload import Follower
from jdpo.checkpoint.mirror.upload_notes import UploadNotes
from jdpo.config import LoggingSettings, OutputSettings
from jdpo.exit_codes import FAILED
from jdpo.processes import PROGRESS, agree_on, any_process, is_first, run_jointly
from jdpo.training.interrupt import StopRequest
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.run_setup import Log

GRACE_SECONDS = 60.0
"""How long a run that a signal has stopped goes on uploading: schedulers kill what has not ended by then."""

NOTE_AFTER_SECONDS = 10.0
"""How long a run that has ended waits for its uploads without saying so."""


class MirrorIncomplete(OSError):
    """A run is finished, but not everything could be copied to its mirror.

    Attributes:
      exit_code: 1, or that of the signal that ended the uploads, after which a launcher starts the command again.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class RunMirror:
    """The mirror of a run that starts; leaving it uploads what is missing. Every process has one."""

    def __init__(self, url: str, directory: RunDirectory, stop: StopRequest, log: Log) -> None:
        """Checks that the mirror can be read and written. Every process must call this.

        Args:
          url: the address of the mirror.
          directory: of the run; its records are written to the mirror.

        Raises:
          ValueError: the package of the store is not installed.
          OSError: the mirror cannot be read or written.
        """
        self._directory, self._stop, self._log = directory, stop, log
        self._leader: Leader | None = None
        self._follower: Follower | None = None
        self._follows = False
        index, count = jax.process_index(), jax.process_count()
        self._notes = UploadNotes(directory.path, index, agree_on(lambda: int(time.time()) % 2**31) or 0)
        self._earlier = directory.record.mirror if is_first() else {}
        self._store = run_jointly(lambda: ObjectStore(url))

        def lead() -> None:
            self._leader = with_retries(lambda: Leader(self._store, directory.path, self._notes, count, log))
            records = self._leader.records
            # Also shows that the mirror can be written, before anything is computed.
            with_retries(lambda: records.upload(IDENTITY))

        run_jointly(lead, on_first=True)
        run_jointly(self._join)
        if self._leader is not None:
            directory.mirror_state = self._state
        else:
            self._follower = Follower(self._store, directory.path, self._notes, index, count)

    def _join(self) -> None:
        if not is_first():  # this host, too, must have the credentials
            with_retries(lambda: self._store.read(IDENTITY[-1]))
            self._notes.join(self._store.address)

    def _state(self) -> Mapping[str, Any]:
        assert self._leader is not None
        earlier = self._earlier.get("failures", 0) if self._earlier.get("address") == self._store.address else 0
        state = {
            "address": self._store.address,
            "step": self._leader.newest,
            "failures": earlier + self._leader.failures,
            "error": self._leader.error,
        }
        return {name: value for name, value in state.items() if value is not None}

    # --- the start

    def fetch_newest(self, newest: int | None, last_step: int, config: LoggingSettings) -> int | None:
        """See the function of the same name; the best checkpoint is fetched as well if the run exports it."""
        best_metric = config.metric_for_best_model if config.load_best_model_at_end else None
        found = run_jointly(lambda: with_retries(lambda: RunInMirror(self._store)))
        return fetch_newest(found, self._directory.path, newest, last_step, best_metric, self._log)

    # --- called by the checkpoints, see `jdpo.checkpoint.manager.Mirror`

    def follow(self, newest: int | None, kept: Kept, delete_old: Callable[[], None]) -> None:
        self._follows = True
        if self._leader is not None:
            self._leader.follow(newest, kept, delete_old)

    def sealed(self) -> None:
        if self._leader is not None:
            self._leader.sealed()

    def held(self) -> Collection[int]:
        return self._leader.held() if self._leader is not None else ()

    # --- the end

    def __enter__(self) -> RunMirror:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Uploads what is missing, and says what is missing after that.

        Raises:
          MirrorIncomplete: the run is finished, but its mirror lacks something.
        """
        # Whatever the phase in which a run has failed or was found finished, uploads may take hours. In these phases
        # the watchdog takes bytes that move for progress.
        if PROGRESS.phase not in ("save", "export"):
            PROGRESS.enter("save")
        # Where one of several processes fails, the others may be gone; and a second Ctrl-C ends a run at once.
        alone = error is not None and (jax.process_count() > 1 or isinstance(error, KeyboardInterrupt))
        signalled = not alone and (self._stop.signalled() if error is None else self._has_signal())
        given_up = self._patience(signalled=signalled, leaves=alone)
        if self._follower is not None:
            self._follower.close(given_up)
        problem = None
        if self._leader is not None:
            try:
                problem = self._end_uploads(given_up, leaves=alone)
            except (OSError, ValueError) as fault:  # of output_dir, and perhaps what ends the run: a disk that is full
                problem = f"the uploads to the mirror {self._store.address} cannot be ended: {fault}"
        if problem is not None and (error is not None or not self._directory.record.finished):
            self._log(f"warning: {problem}")
            problem = None
        if error is None:
            self._raise_jointly(problem)

    def _patience(self, *, signalled: bool, leaves: bool) -> Callable[[], bool]:
        """Returns a function that tells whether to wait no longer for the uploads."""
        began, is_told = time.monotonic(), False

        def given_up() -> bool:
            nonlocal is_told
            waited = time.monotonic() - began
            if waited > NOTE_AFTER_SECONDS and not is_told:
                is_told = True
                self._log(
                    f"waiting for uploads to the mirror {self._store.address}; Ctrl-C leaves them to the next start"
                )
            # A signal while it waits asks to leave at once.
            return leaves or (waited > GRACE_SECONDS if signalled else self._has_signal())

        return given_up

    def _has_signal(self) -> bool:
        return self._stop.signum is not None or PROGRESS.stop_signal is not None

    def _end_uploads(self, given_up: Callable[[], bool], *, leaves: bool) -> str | None:
        """Uploads what is missing; returns what could not be uploaded, in a sentence, or None."""
        leader, directory = self._leader, self._directory
        assert leader is not None
        # A start that was refused, or that ended before it found its checkpoint, has nothing newer than the mirror.
        if not self._follows and not directory.record.finished:
            leader.close(lambda: True)
            return None
        leader.close(given_up)
        missing = leader.missing()
        directory.keep()
        # Also after a checkpoint that could not be uploaded because it is damaged: that is no fault of the store.
        if not leaves and leader.answers:
            try:
                leader.records.upload()  # as they are now: how the run has ended
            except StoreError as error:
                leader.error = str(error)
                missing.append("the latest records of the run")
        if not missing:
            return None
        why = f": {leader.error}" if leader.error is not None else ""
        return (
            f"the mirror {self._store.address} lacks {' and '.join(missing)}{why}. All of it is in {directory.path}; "
            "run the same command again to upload the rest"
        )

    def _raise_jointly(self, problem: str | None) -> None:
        if any_process(problem is not None):
            code = self._stop.exit_code if self._stop.signalled() else FAILED
            raise MirrorIncomplete(f"the run is finished, but {problem or 'its mirror is not complete'}", code)
        if self._leader is not None and self._directory.record.finished:
            self._log(f"the mirror {self._store.address} is complete")


def open_mirror(
    config: OutputSettings, directory: RunDirectory, stop: StopRequest, log: Log
) -> AbstractContextManager[RunMirror | None]:
    """Opens the mirror of a run, if it has one. Every process must call this; see `RunMirror` for the errors."""
    return nullcontext() if config.mirror is None else RunMirror(config.mirror, directory, stop, log)
