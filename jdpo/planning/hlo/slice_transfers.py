"""Transfers between TPU slices: a program has a send and a recv for each, which libtpu's MegaScale runtime carries out.

The program is that of one slice, whose devices have the numbers 0 to n - 1 in it; groups of collectives name those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jdpo.planning.hlo.hlo_text import Array, Computation, Op

_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
"""MegaScale's names of collectives -> those of HLO."""


class SliceTransfer(NamedTuple):
    """A transfer between slices, as a computation runs it once.

    Attributes:
      kind: as HLO names the collective.
      array: what a device sends, or for an all-gather what it receives.
      groups: the devices that take part together, those with one place in their slices; int [groups, slices].
      start, done: places in the schedule.
    """

    kind: str
    array: Array
    groups: np.ndarray
    start: int
    done: int


def slice_transfers(computation: Computation, num_devices: int) -> Iterator[SliceTransfer]:
    """Yields the transfers between slices of a computation.

    Args:
      num_devices: of all slices.
    """
    received = {name: op for op in computation.ops if op.opcode == "recv" and (name := _rendezvous(op)) is not None}
    for place, op in enumerate(computation.ops):
        name = _rendezvous(op) if op.opcode == "send" else None
        if name is None:
            continue
        recv = received.get(name, op)
        transfer = _attribute(op, "_xla_megascale_transfer_type") or "ONE_TO_ONE"
        array = recv.array if transfer == "ALL_GATHER" else op.array
        done = next(
            (
                at
                for at, later in enumerate(computation.ops)
                if later.opcode == "recv-done" and recv.name in later.operands
            ),
            place,
        )
        last = re.search(r"x{0:(\d+)}", _attribute(op, "_xla_megascale_target") or "")
        per_slice = int(last.group(1)) + 1 if last else 1
        groups = np.arange(num_devices).reshape(-1, per_slice).T
        yield SliceTransfer(_KINDS.get(transfer, "all-to-all"), array, groups, place, done)


def _rendezvous(op: Op) -> str | None:
    """Returns the name of a transfer, which its send and its recv have in common; None for other transfers."""
    return _attribute(op, "_xla_host_transfer_rendezvous") if "_xla_megascale" in op.attributes else None


def _attribute(op: Op, name: str) -> str | None:
    found = re.search(rf'{name}="([^"]*)"', op.attributes)
    return found.group(1) if found else None
