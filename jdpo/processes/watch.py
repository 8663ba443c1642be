"""Heartbeats between the processes of a run, and the verdict on a process that has stopped sending them, or is stuck.

Each process writes a count to JAX's key-value store every second, from a thread that needs only the interpreter: XLA
compiles and computes without the interpreter's lock, so a busy process keeps sending. Process 0, which hosts the store,
checks the others' counts and publishes a verdict; the others check that the store of process 0 answers. The deadlines
are earlier than JAX's own, after which its client aborts the process.

A heartbeat carries the state of its process. If no process of the run makes progress any more, process 0 publishes a
verdict that names the one for which the others wait; and if a signal asked one to stop, it tells the others.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jdpo.processes.process_progress import State
from jdpo.processes.relay import CoordinatorRelay
from jdpo.processes.stalls import describe_stall, is_stalled

DEFAULT_TIMEOUT = 30.0
"""Seconds without a heartbeat after which a process counts as dead."""
_SUSPECTED_SECONDS = 10.0
"""The deadline once a collective operation has failed somewhere in a way that suggests a lost process."""
_BEAT_SECONDS = 1.0
_TICK_SECONDS = 0.25
LEAVE_SECONDS = 10.0
"""Time for processes that were asked to stop, and have nothing to save, to do so in order."""
_LINGER_SECONDS = 4 * _BEAT_SECONDS
"""Time for which process 0 keeps the store running, so that the others can read its verdict."""

_BEATS, _HOSTS, _VERDICTS = "jdpo/beats/", "jdpo/hosts/", "jdpo/verdicts/"
_FAILED, _LEAVE, _STALLED, _LOST, _STOP = "failed", "leave", "stalled", "lost", "stop"
_LEFT, _SUSPECTS = "left", "suspects"


class Verdict(NamedTuple):
    """The reason why this process cannot continue.

    Attributes:
      lost: True if a process is dead, stopped or stuck; False if it has failed and reported an error.
      process: index of that process.
      text: its host and how it ended, or the error that it reported, or which processes are stuck.
      stuck: the processes that are stuck, all if it is not known which; None if none is.
      leaves: True if all processes were asked to stop and end now, as they have nothing to save.
    """

    lost: bool
    process: int
    text: str
    stuck: frozenset[int] | None = None
    leaves: bool = False


class Silence:
    """Counts the seconds since each process last gave a new sign of life.

    The time during which this process itself did not run (stopped, suspended) does not count.
    """

    def __init__(self, now: float) -> None:
        self._now = now
        self._signs: dict[int, object] = {}
        self._seconds: dict[int, float] = {}

    def update(self, signs: dict[int, object], now: float) -> dict[int, float]:
        """Returns the seconds of silence per process.

        Args:
          signs: the latest sign per process; any change is a sign of life.
          now: a monotonic time in seconds.
        """
        # A longer gap means that this process did not run, and could not have seen signs.
        elapsed, self._now = min(now - self._now, _BEAT_SECONDS), now
        for index, sign in signs.items():
            changed = index not in self._signs or self._signs[index] != sign
            self._seconds[index] = 0.0 if changed else self._seconds[index] + elapsed
        self._signs = dict(signs)
        return {index: self._seconds[index] for index in signs}


class Watch:
    """The heartbeats of this process, and what it knows of the others."""

    def __init__(
        self,
        client: Any,
        *,
        index: int,
        count: int,
        timeout: float,
        host: str,
        relay: CoordinatorRelay | None = None,
        state: Callable[[], State] | None = None,
        on_stop: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
          client: JAX's coordination client.
          index: index of this process.
          count: number of processes of the run.
          timeout: seconds without a heartbeat after which a process counts as dead.
          host: host and pid of this process, for the messages of the others.
          relay: the relay between `client` and process 0, if there is one.
          state: returns the state of this process; without it, no process of the run counts as stuck.
          on_stop: is called with the signal that asked another process to stop.
        """
        self._client, self._index, self._count, self._timeout = client, index, count, timeout
        self._host, self._relay, self._state, self._on_stop = host, relay, state, on_stop
        self._left, self._suspected = threading.Event(), threading.Event()
        self._beats: dict[int, str] = {}
        self._hosts: dict[int, str] = {}
        self._verdicts: dict[str, str] = {}
        self._num_answers = 0
        self._leave_since: float | None = None

    def start(self) -> None:
        """Starts sending heartbeats."""
        threading.Thread(target=self._send, name="heartbeats", daemon=True).start()

    def leave(self) -> None:
        """Tells the others that this process ends normally, so that they do not wait for its heartbeats."""
        self._left.set()
        # On another thread, because the store may never answer.
        threading.Thread(target=self._write_beat, args=(_LEFT,), daemon=True).start()

    def report(self, error: str) -> None:
        """Tells the others that this process has failed."""
        with contextlib.suppress(Exception):  # another process has reported first, or the store is gone
            self._client.key_value_set(_VERDICTS + _FAILED, f"{self._index} {error}")

    def suspect(self) -> float:
        """Shortens the deadlines, because this process has failed in a way that suggests a lost process.

        Returns:
          the seconds within which `wait` returns a verdict if another process is gone.
        """
        self._suspected.set()
        return min(_SUSPECTED_SECONDS, self._timeout) + _LINGER_SECONDS + 4 * _BEAT_SECONDS

    def wait(self) -> Verdict | None:
        """Waits until this process cannot continue and returns the verdict; returns None once the process has left."""
        silence = Silence(time.monotonic())
        while not self._left.wait(_TICK_SECONDS):
            # First, because a published reason says more than silence.
            if found := self._published():
                return found
            if self._relay is not None and self._relay.lost.is_set():
                return Verdict(True, 0, self._where(0) + "has died: its connection is closed")
            if found := self._leave() or self._stall():
                return found
            silent = silence.update(self._signs(), time.monotonic())
            index = max(silent, key=lambda each: silent[each], default=0)
            if silent and silent[index] > self._deadline():
                return self._publish(index, silent[index])
        return None

    def left_within(self, seconds: float) -> bool:
        """Waits until this process leaves or `suspect` is called; returns True if it has left."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._suspected.is_set():
            if self._left.wait(_TICK_SECONDS):
                return True
        return self._left.is_set()

    # --- signs of the other processes

    def _signs(self) -> dict[int, object]:
        if self._index != 0:
            # Process 0 hosts the store, so every answer of the store is a sign of life from it.
            return {0: self._num_answers}
        return dict(self._of_others())

    def _of_others(self) -> dict[int, str | None]:
        """Returns, on process 0, the last heartbeat of each other process that has not left."""
        # None before the first heartbeat, so a process that never sends one is noticed as well.
        beats = {index: self._beats.get(index) for index in range(1, self._count)}
        return {index: beat for index, beat in beats.items() if beat != _LEFT}

    def _deadline(self) -> float:
        # Only process 0 has read `_beats`; it applies the shorter deadline if any process suspects a loss.
        suspected = self._suspected.is_set() or any(beat.endswith(_SUSPECTS) for beat in self._beats.values())
        return min(_SUSPECTED_SECONDS, self._timeout) if suspected else self._timeout

    def _published(self) -> Verdict | None:
        for name in (_FAILED, _LEAVE, _STALLED, _LOST):
            if name in self._verdicts:
                index, _, text = self._verdicts[name].partition(" ")
                if name == _LEAVE:
                    return Verdict(False, int(index), text, leaves=True)
                if name == _STALLED:
                    stuck = frozenset(map(int, index.split(",")))
                    return Verdict(True, min(stuck), text, stuck)
                return Verdict(name == _LOST, int(index), text)
        return None

    def _states(self) -> dict[int, State | None]:
        """Returns, on process 0, the states of all processes that have not left."""
        if self._index != 0 or self._state is None:
            return {}
        return {0: self._state(), **{index: _state_in(beat) for index, beat in self._of_others().items()}}

    def _leave(self) -> Verdict | None:
        """Returns and publishes the verdict that all processes end now, on process 0.

        One that ended by itself could leave another one, which ends in order at that moment, waiting for it in JAX.
        """
        states, now = self._states(), time.monotonic()
        # A process that has left has ended in order, and so will the others.
        if len(states) < self._count or not all(state is not None and state.may_leave for state in states.values()):
            self._leave_since = None
            return None
        self._leave_since = now if self._leave_since is None else self._leave_since
        if now - self._leave_since < LEAVE_SECONDS:
            return None
        self._tell(_LEAVE, "0 was asked to stop")
        return Verdict(False, 0, "was asked to stop", leaves=True)

    def _stall(self) -> Verdict | None:
        """Returns and publishes the verdict that this run is stuck, on process 0, which alone knows all states."""
        states = self._states()
        if not is_stalled(states):
            return None
        known = {index: state for index, state in states.items() if state is not None}
        found, text = describe_stall(known, self._where)
        verdict = Verdict(True, min(found, default=0), text, frozenset(found or known))
        self._tell(_STALLED, f"{','.join(map(str, sorted(found or known)))} {text}")
        return verdict

    def _publish(self, index: int, seconds: float) -> Verdict:
        verdict = Verdict(True, index, f"{self._where(index)}has died or stopped: no heartbeat for {seconds:.0f} s")
        if self._index == 0:
            self._tell(_LOST, f"{index} {verdict.text}")
        return verdict

    def _tell(self, name: str, text: str) -> None:
        """Publishes a verdict on process 0, which hosts the store, so that it answers at once."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(_VERDICTS + name, text)
        # The store ends with this process.
        time.sleep(_LINGER_SECONDS)

    def _where(self, index: int) -> str:
        return f"({self._hosts[index]}) " if index in self._hosts else ""

    # --- heartbeats

    def _send(self) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_HOSTS}{self._index}", self._host, allow_overwrite=True)
        number = 0
        while not self._left.wait(_BEAT_SECONDS):
            number += 1
            words = [str(number)]
            words += [str(self._state())] if self._state is not None else []
            words += [_SUSPECTS] if self._suspected.is_set() else []
            self._write_beat(" ".join(words))
            with contextlib.suppress(Exception):  # `wait` notices the missing answer
                self._read()
                self._num_answers += 1
                self._pass_on_stop()

    def _pass_on_stop(self) -> None:
        """Tells the others, by way of process 0, of a signal that asked one process to stop."""
        if self._state is None:
            return
        if self._index == 0 and _STOP not in self._verdicts:
            states = [self._state(), *map(_state_in, self._of_others().values())]
            signum = next((state.signal for state in states if state is not None and state.signal), None)
            if signum is not None:
                self._client.key_value_set(_VERDICTS + _STOP, str(signum))
        if _STOP in self._verdicts and self._on_stop is not None:
            self._on_stop(int(self._verdicts[_STOP]))

    def _write_beat(self, beat: str) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_BEATS}{self._index}", beat, allow_overwrite=True)

    def _read(self) -> None:
        self._verdicts = self._entries(_VERDICTS)
        if self._index == 0:
            self._beats = {int(index): beat for index, beat in self._entries(_BEATS).items()}
        # Hosts do not change, so they are read until known; the others only ever name process 0.
        if len(self._hosts) < (self._count if self._index == 0 else 1):
            self._hosts = {int(index): host for index, host in self._entries(_HOSTS).items()}

    def _entries(self, folder: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: value for key, value in self._client.key_value_dir_get(folder)}


def _state_in(beat: str | None) -> State | None:
    """Returns the state that a heartbeat carries, if it carries one."""
    words = [] if beat is None else beat.split()
    words = words[1 : 1 + len(State._fields)]
    return State.parse(words) if len(words) == len(State._fields) else None
