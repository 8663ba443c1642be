"""Estimates how long a compiled step takes at least on its machine, and the bound on its MFU.

The model is a roofline, and nothing in it is fitted to a measurement:

    time of an operation      max(FLOPs / peak, bytes / bandwidth of the main memory)
    attention kernels         FLOPs / peak, by the formulas of `jdpo.models.attention.work`
    asynchronous copies       use the main memory while operations between start and done leave it idle; the rest is
                              added
    collectives               nothing where matrix products run between start and done, else bytes / speed of the links
    bound on MFU              logical FLOPs / (devices x peak x time)

Operations run one after the other, as the compilers schedule them. FLOPs are those of matrix products, with the trip
counts of loops; an operation's bytes are the parts of its operands that it reads and its results, each once; peaks,
bandwidths and links are those of `jdpo.chips`, by data sheets; collectives carry what rings carry. Left out are the
time of vector units and of starting kernels, copies to and from the host's memory, and that collectives share links: a
device takes longer. `busy_links` is the time of all collectives on the links; where it is longer than the rest, not all
are hidden.

Sources: Williams, Waterman and Patterson, "Roofline" (CACM 2009); Austin et al., "How to Scale Your Model" (2025),
whose cost of collectives on tori is used here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jdpo.planning.attention_kernels import AttentionWork
from jdpo.planning.hlo.collectives import (
    Collective,
    collective_within,
    collectives_of,
    has_collective,
    is_collective,
)
from jdpo.planning.hlo.hlo_text import Computation, Module, Op
from jdpo.planning.hlo.op_costs import Cost, cost_of
from jdpo.planning.hlo.trip_counts import trip_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """The time of a computation and its parts.

    Attributes:
      matrix: operations that the peak FLOP/s bound.
      memory: operations that the main memory bounds.
      copies: what asynchronous copies add.
      collectives: those without compute between start and done.
      busy_links: all collectives, hidden ones included; not part of the sum.
      busy_memory: all bytes over the bandwidth; not part of the sum.
      flops: True if there are matrix products.
    """

    matrix: float = 0
    memory: float = 0
    copies: float = 0
    collectives: float = 0
    busy_links: float = 0
    busy_memory: float = 0
    flops: bool = False

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.matrix + self.memory + self.copies + self.collectives

    def plus(self, other: Seconds, times: int = 1) -> Seconds:
        """Adds another computation that runs this many times."""
        values = {
            field.name: getattr(self, field.name) + times * getattr(other, field.name)
            for field in dataclasses.fields(self)
            if field.name != "flops"
        }
        return Seconds(**values, flops=self.flops or (other.flops and times > 0))


class Speeds(NamedTuple):
    """What a device does per second.

    Attributes:
      peaks: FLOP/s by dtype.
      memory: bytes of the main memory.
    """

    peaks: Mapping[str, float]
    memory: float

    def peak(self, dtype: str) -> float:
        """Returns the FLOP/s for operands of a dtype; that of the narrowest known one where there is no figure."""
        return self.peaks.get(dtype) or self.peaks["bfloat16"]


class Executed(NamedTuple):
    """An operation of a program that runs by itself, and the cost of one run.

    Attributes:
      op_name: the place in the Python program that it comes from.
      times: how often a step runs it.
      cost: FLOPs and bytes.
      seconds: where nothing else uses the device.
    """

    op: Op
    op_name: str
    times: int
    cost: Cost
    seconds: float


class Communication(NamedTuple):
    """A collective of a program.

    Attributes:
      times: how often a step runs it.
      hidden: True if matrix products run between its start and its done.
      seconds: of one run, on links that carry nothing else.
    """

    collective: Collective
    times: int
    hidden: bool
    seconds: float


class Roofline:
    """Estimated times of a program.

    Attributes:
      loops_counted_once: names of loops whose number of turns the program does not tell.
    """

    def __init__(
        self,
        module: Module,
        *,
        speeds: Speeds,
        num_devices: int,
        link_seconds: Callable[[Collective], float],
        attention: AttentionWork | None = None,
    ) -> None:
        """
        Args:
          link_seconds: returns the time of a collective on links that carry nothing else.
          attention: the work of attention kernels; None where the program has none.
        """
        self.module, self._speeds, self._num_devices = module, speeds, num_devices
        self._link_seconds, self._attention = link_seconds, attention
        self.loops_counted_once: list[str] = []
        self._seconds: dict[str, Seconds] = {}
        self._found: dict[str, list[Communication]] = {}

    def seconds(self) -> Seconds:
        """Returns the time of a whole step."""
        return self._of(self.module.computations[self.module.entry])

    def executed(self) -> Iterator[Executed]:
        """Yields every operation that runs by itself: those of loops with the number of their turns."""
        for computation, times in self._visited():
            for op in computation.ops:
                cost = self._cost(computation, op)
                yield Executed(op, computation.op_name(op), times, cost, self._alone(op, cost).total)

    def communications(self) -> Iterator[Communication]:
        """Yields every collective."""
        for computation, times in self._visited():
            for found in self._communications(computation):
                yield found._replace(times=times)

    # --- the parts

    def _visited(self) -> Iterator[tuple[Computation, int]]:
        """Yields the computations that run by themselves, and how often."""
        waiting = [(self.module.computations[self.module.entry], 1)]
        while waiting:
            computation, times = waiting.pop()
            yield computation, times
            for op in computation.ops:
                waiting += [(inner, times * turns) for inner, turns in self._inner(computation, op)]

    def _inner(self, computation: Computation, op: Op) -> list[tuple[Computation, int]]:
        """Returns the computations that an operation runs by themselves, and how often; not those of fusions."""
        if op.opcode == "while":
            turns = trip_count(self.module, computation, op)
            if turns is None and op.name not in self.loops_counted_once:
                self.loops_counted_once.append(op.name)
            body = self.module.computations[op.attribute("body") or ""]
            return [(body, 1 if turns is None else turns)]
        if op.opcode in ("call", "async-start"):
            return [] if collective_within(self.module, op) else [(inner, 1) for inner in self.module.called(op)]
        if op.opcode == "conditional":  # one of them runs; the longest is a bound
            return [(max(self.module.called(op), key=lambda inner: self._of(inner).total), 1)]
        return []

    def _of(self, computation: Computation) -> Seconds:
        if computation.name not in self._seconds:
            self._seconds[computation.name] = self._sum(computation)
        return self._seconds[computation.name]

    def _sum(self, computation: Computation) -> Seconds:
        timeline: list[Seconds] = []
        for op in computation.ops:
            here = self._alone(op, self._cost(computation, op))
            for inner, turns in self._inner(computation, op):
                here = here.plus(self._of(inner), turns)
            timeline.append(here)
        total = Seconds()
        for here in timeline:
            total = total.plus(here)
        copies = self._copies(computation, timeline)
        total = total.plus(copies)
        self._found[computation.name] = found = self._hidden_or_not(computation, timeline)
        return total.plus(
            Seconds(
                collectives=sum(each.seconds for each in found if not each.hidden),
                busy_links=sum(each.seconds for each in found),
            )
        )

    def _cost(self, computation: Computation, op: Op) -> Cost:
        if is_collective(op) or op.opcode == "async-start":
            return Cost({}, 0)  # their time is that of the links
        cost = cost_of(self.module, computation, op)
        if op.opcode == "fusion" and not cost.flops and has_collective(self.module.called(op)[0]):
            return Cost({}, 0)
        attention = self._attention
        flops = None if attention is None else attention.flops(op)
        return cost if attention is None or flops is None else Cost({attention.dtype: flops}, cost.num_bytes)

    def _alone(self, op: Op, cost: Cost) -> Seconds:
        """The time of an operation without what runs within it; 0 for asynchronous copies."""
        memory = cost.num_bytes / self._speeds.memory
        if _is_copy_start(op):
            return Seconds()
        matrix = sum(flops / self._speeds.peak(dtype) for dtype, flops in cost.flops.items())
        if op.opcode == "custom-call" and matrix:  # a kernel of attention, at the peak
            return Seconds(matrix=matrix, busy_memory=min(memory, matrix), flops=True)
        bound = {"matrix": matrix} if matrix >= memory else {"memory": memory}
        return Seconds(**bound, busy_memory=memory, flops=matrix > 0)

    def _copies(self, computation: Computation, timeline: Sequence[Seconds]) -> Seconds:
        """What asynchronous copies take in addition to the operations that run meanwhile."""
        idle = [here.total - here.busy_memory for here in timeline]
        added = busy = 0.0
        for place, op in enumerate(computation.ops):
            if not _is_copy_start(op):
                continue
            done = next(
                (
                    later
                    for later in range(place + 1, len(computation.ops))
                    if op.name in computation.ops[later].operands and computation.ops[later].opcode.endswith("-done")
                ),
                place,
            )
            left = self._cost(computation, op).num_bytes / self._speeds.memory
            busy += left
            for meanwhile in range(place + 1, done):
                used = min(left, max(idle[meanwhile], 0))
                idle[meanwhile] -= used
                left -= used
            added += left
        return Seconds(copies=added, busy_memory=busy)

    def _communications(self, computation: Computation) -> list[Communication]:
        self._of(computation)
        return self._found[computation.name]

    def _hidden_or_not(self, computation: Computation, timeline: Sequence[Seconds]) -> list[Communication]:
        return [
            Communication(
                found,
                1,
                any(here.flops for here in timeline[found.start + 1 : found.done]),
                self._link_seconds(found),
            )
            for found in collectives_of(self.module, computation, self._num_devices)
        ]


def _is_copy_start(op: Op) -> bool:
    return op.opcode in ("copy-start", "slice-start")
