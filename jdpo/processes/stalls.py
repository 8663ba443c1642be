"""Finds out which process of a run is stuck, and describes it in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jdpo.processes.process_progress import State

_STOPPED_EARLIER = 3.0
"""Seconds by which a stuck process has stopped before those that wait for it: they get only a little further."""


def is_stalled(states: Mapping[int, State | None]) -> bool:
    """Returns True if no process of a run has time left.

    While one of them makes progress, or may still take its time, the others may be waiting for it, as they do while the
    first process writes the model.

    Args:
      states: index of a process -> its state; None if it is not known.
    """
    return bool(states) and all(state is not None and state.left < 0 for state in states.values())


def stuck_processes(states: Mapping[int, State]) -> list[int]:
    """Returns the processes for which the others wait; none if they all stopped at the same point.

    >>> waiting = State("step", 13, 0, -1.0, 301.0, 0)
    >>> stuck_processes({0: waiting, 1: State("evaluation", 12, 1, -1.0, 302.0, 0), 2: waiting})
    [1]
    """
    first = min((state.step, state.point) for state in states.values())
    behind = [index for index, state in states.items() if (state.step, state.point) == first]
    if len(behind) < len(states):
        return behind
    idle = [state.idle for state in states.values()]
    if max(idle) - min(idle) < _STOPPED_EARLIER:
        return []
    middle = (max(idle) + min(idle)) / 2
    return [index for index, state in states.items() if state.idle > middle]


def describe_stall(states: Mapping[int, State], where: Callable[[int], str]) -> tuple[list[int], str]:
    """Returns the stuck processes and a text that names them, and what the others wait in.

    Args:
      where: index of a process -> its host and pid in brackets and a space, or "".
    """
    stuck = stuck_processes(states)
    named = stuck or sorted(states)
    first = states[named[0]]
    if not stuck:
        return [], f"all processes of this run are stuck: {point_of(first)} for {first.idle:.0f} s"
    text = f"{_named(stuck)} of this run {where(stuck[0]) if len(stuck) == 1 else ''}"
    text += f"{'is' if len(stuck) == 1 else 'are'} stuck: {point_of(first)} for {first.idle:.0f} s"
    others = [index for index in sorted(states) if index not in stuck]
    waits = "waits" if len(others) == 1 else "wait"
    return stuck, f"{text}; {_named(others)} {waits} for it, {point_of(states[others[0]])}"


def point_of(state: State) -> str:
    """Returns where a process is.

    >>> point_of(State("evaluation", 12, 1, -1.0, 3.0, 0)), point_of(State("compile", 0, 1, -1.0, 3.0, 0))
    ('in phase evaluation of step 12', 'in phase compile before the first step')
    """
    return f"in phase {state.phase} {f'of step {state.step}' if state.step else 'before the first step'}"


def _named(indices: Sequence[int]) -> str:
    """Returns the names of some processes, of which there may be hundreds."""
    if len(indices) == 1:
        return f"process {indices[0]}"
    shown = [str(index) for index in indices[:4]]
    if len(indices) > len(shown):
        return f"processes {', '.join(shown)} and {len(indices) - len(shown)} more"
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"
