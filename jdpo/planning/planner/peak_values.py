"""The temporary values of a compiled program that are in memory at its peak, from the lists that XLA writes.

XLA tells the place of each value in its block of temporary memory, and from when to when it is needed. Values of a loop
have times of their own for each turn, and what the loop carries along is not listed as needed in between. So values of
equal size at one place count as one that is needed from the first to the last.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jdpo.planning.hlo.hlo_text import Array, Computation, Module, Op, parse

_MOMENTS = 64
"""Moments at which the memory is measured to the byte: those with the largest sums of values."""


class Value(NamedTuple):
    """A temporary value in memory at the peak.

    Attributes:
      array: its type; None where the program does not tell it.
      op_name: the place in the Python program that it comes from; may be empty.
      in_loop: True if it belongs to a loop or another computation that the step calls.
    """

    num_bytes: int
    array: Array | None
    op_name: str
    in_loop: bool


class _Held(NamedTuple):
    """Bytes from `offset` on that hold values from `first` to `last`; `names` are (start, operation, index)."""

    offset: int
    num_bytes: int
    first: int
    last: int
    names: tuple[tuple[int, str, str], ...]


def values_at_peak(text: str, live_ranges: str, buffers: str) -> Iterator[Value]:
    """Yields the temporary values in memory at the peak.

    Args:
      text: the optimized program.
      live_ranges, buffers: XLA's lists of when values are needed and where they are.
    """
    held = _held(live_ranges, buffers)
    if not held:
        return
    moment = _peak(held)
    module = parse(text)
    places = {op.name: (computation, op) for computation in module.computations.values() for op in computation.ops}
    for each in held:
        if not each.first <= moment <= each.last:
            continue
        values = [
            (abs(first - moment), _value(module, places.get(name), index, each.num_bytes))
            for first, name, index in each.names
        ]
        # Of what is at one place in the course of a loop, some comes from no place in the Python program that tells.
        yield min(values, key=lambda found: (not _tells(found[1]), found[0]))[1]


def _value(module: Module, place: tuple[Computation, Op] | None, index: str, num_bytes: int) -> Value:
    if place is None:
        return Value(num_bytes, None, "", True)
    computation, op = place
    op_name = computation.op_name(op).replace("\\'", "'")  # of arguments: state.params['kernel']
    return Value(num_bytes, _array(op, index, num_bytes), op_name, computation.name != module.entry)


def _tells(value: Value) -> bool:
    """Returns True if a value comes from the model, or from an argument of the step."""
    return "jvp" in value.op_name or value.op_name.startswith(("state.", "frozen."))


def _held(live_ranges: str, buffers: str) -> list[_Held]:
    needed = {
        (name, index): (int(first), int(last))
        for name, index, first, last in re.findall(r"^ +(\S+?)\{([\d,]*)\}:(\d+)-(\d+)$", live_ranges, re.MULTILINE)
    }
    places: defaultdict[tuple[int, int], list[tuple[int, int, str, str]]] = defaultdict(list)
    value = r"value: <\d+ (\S+?)(?:\{([\d,]*)\})? @\d+> \(size=(\d+),offset=(\d+)\)"
    for name, index, size, offset in re.findall(value, _temporary(buffers)):
        if (name, index) in needed:
            places[int(offset), int(size)].append((*needed[name, index], name, index))
    return [
        _Held(
            offset,
            size,
            min(first for first, *_ in found),
            max(last for _, last, *_ in found),
            tuple((first, name, index) for first, _, name, index in found),
        )
        for (offset, size), found in places.items()
    ]


def _temporary(buffers: str) -> str:
    """Returns the part of XLA's list of buffers on the largest block of temporary values in the main memory."""
    blocks = re.split(r"^(?=allocation \d+:)", buffers, flags=re.MULTILINE)
    sizes = {}
    for number, block in enumerate(blocks):
        head = block.partition("\n")[0]
        size = re.search(r"size (\d+)", head)
        # A TPU's other memories have a color.
        if "preallocated-temp" in head and "color" not in head and size:
            sizes[number] = int(size.group(1))
    return blocks[max(sizes, key=lambda number: sizes[number])] if sizes else ""


def _peak(held: Sequence[_Held]) -> int:
    """Returns the moment at which the values cover the most bytes."""
    first, last, size = (
        np.array(column) for column in zip(*((each.first, each.last, each.num_bytes) for each in held), strict=True)
    )
    moments = np.unique(first)  # memory only grows where a value begins
    sums = np.array([size[(first <= moment) & (moment <= last)].sum() for moment in moments])
    likely = moments[np.argsort(-sums, kind="stable")[:_MOMENTS]]
    return int(max(likely, key=lambda moment: _covered([e for e in held if e.first <= moment <= e.last])))


def _covered(held: Sequence[_Held]) -> int:
    total, end = 0, 0
    for each in sorted(held, key=lambda each: each.offset):
        total += max(each.offset + each.num_bytes - max(each.offset, end), 0)
        end = max(end, each.offset + each.num_bytes)
    return total


def _array(op: Op, index: str, num_bytes: int) -> Array | None:
    """Returns the array of a value: the part of a tuple that `index` names, or has as many bytes."""
    if not index:
        return op.arrays[0] if len(op.arrays) == 1 else None
    if "," not in index and int(index) < len(op.arrays):
        return op.arrays[int(index)]
    return next((array for array in op.arrays if array.num_bytes == num_bytes), None)
