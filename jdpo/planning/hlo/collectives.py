"""Finds the collectives of a program: what they carry, between which devices, and what runs at the same time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jdpo.planning.hlo.hlo_text import Computation, Module, Op
from jdpo.planning.hlo.op_costs import COLLECTIVES
from jdpo.planning.hlo.slice_transfers import slice_transfers


class Collective(NamedTuple):
    """A collective as a computation runs it once.

    Attributes:
      kind: of COLLECTIVES.
      dtype: of its elements, as HLO names it.
      num_bytes: of the whole array on one device: the result of an all-gather, the operand of all others.
      groups: the devices that take part together; int [groups, devices].
      op_name: where it comes from.
      start, done: places in the schedule; equal where nothing can run meanwhile.
    """

    kind: str
    dtype: str
    num_bytes: float
    groups: np.ndarray
    op_name: str
    start: int
    done: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends, by the best known algorithms (rings): a share (g - 1) / g of the array."""
        if self.kind == "collective-permute":
            return self.num_bytes
        size = self.groups.shape[1]
        times = 2 if self.kind == "all-reduce" else 1  # reduced in parts, then gathered
        return times * self.num_bytes * (size - 1) / size


def collectives_of(module: Module, computation: Computation, num_devices: int) -> list[Collective]:
    """Returns the collectives of a computation; those of loops and calls within it are theirs.

    On a TPU an asynchronous collective is a fusion that starts it, fusions that compute next to it and carry it along,
    and one that ends it; all name the same channel. Collectives of its SparseCores are calls: one that starts the
    cores, one that gives them the operands, and one that waits for the result. Those between slices are sends.
    """
    found: list[Collective] = []
    carried, started = _carried_channels(module, computation), _started_channels(module)
    for place, op in enumerate(computation.ops):
        kind = _kind(op.opcode)
        if op.opcode == "fusion":
            found += _of_fusion(module, computation, op, place, carried, started, num_devices)
        elif op.opcode == "async-start":
            if (within := collective_within(module, op)) is not None:
                begun = _begun_at(computation, op, place)
                done = _done_of(computation, computation.ops[begun], begun)
                # What a SparseCore computes gets its operands after it was started.
                by = (computation, op) if begun == place else within
                found.append(_collective(*by, within[1], begun, done, num_devices))
        elif kind and not op.opcode.endswith("-done"):
            done = _done_of(computation, op, place) if op.opcode.endswith("-start") else place
            found.append(_collective(computation, op, op, place, done, num_devices))
    found += (
        Collective(each.kind, each.array.dtype, each.array.num_bytes, each.groups, "", each.start, each.done)
        for each in slice_transfers(computation, num_devices)
    )
    # Over an axis of one device nothing is sent.
    return [each for each in found if each.groups.shape[1] > 1]


def is_collective(op: Op) -> bool:
    """Returns True for a collective, its start and its done."""
    return _kind(op.opcode) is not None


def collective_within(module: Module, op: Op) -> tuple[Computation, Op] | None:
    """Returns the first collective of what an operation calls, at any depth, and its computation; None without one."""
    for callee in module.called(op):
        for inner in callee.ops:
            if is_collective(inner):
                return callee, inner
            if (deeper := collective_within(module, inner)) is not None:
                return deeper
    return None


def has_collective(computation: Computation) -> bool:
    """Returns True for a fusion that is, starts or ends a collective."""
    return any(map(is_collective, computation.ops))


def _kind(opcode: str) -> str | None:
    base = opcode.removesuffix("-start").removesuffix("-done")
    return base if base in COLLECTIVES else None


def _begun_at(computation: Computation, op: Op, place: int) -> int:
    """Returns the place where an asynchronous call has its operands: its own, or that of a later update."""
    later = enumerate(computation.ops[place + 1 :], place + 1)
    return next((at for at, user in later if user.opcode == "async-update" and op.name in user.operands), place)


def _done_of(computation: Computation, op: Op, place: int) -> int:
    """Returns the place of the operation that waits for one that was started."""
    waiting = [
        later
        for later, user in enumerate(computation.ops[place + 1 :], place + 1)
        if op.name in user.operands and user.opcode.endswith("-done")
    ]
    return waiting[0] if waiting else place


def _carried_channels(module: Module, computation: Computation) -> dict[str, tuple[int, int]]:
    """Returns the places where the asynchronous collectives of a TPU program start and end, by channel."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for place, op in enumerate(computation.ops):
        if op.opcode != "fusion":
            continue
        callee = module.called(op)[0]
        targets = {inner.target for inner in callee.ops if inner.target}
        for name, places in (("AsyncCollectiveStart", starts), ("AsyncCollectiveDone", ends)):
            if name in targets:
                places |= {channel: place for inner in callee.ops if (channel := _channel(inner)) is not None}
    return {channel: (place, ends.get(channel, place)) for channel, place in starts.items()}


def _started_channels(module: Module) -> set[str | None]:
    """Returns the channels of all asynchronous collectives of a TPU program.

    One may be started before a loop, be carried along by the computations of every turn, and be ended after it.
    """
    return {
        _channel(inner)
        for computation in module.computations.values()
        if any(inner.target == "AsyncCollectiveStart" for inner in computation.ops)
        for inner in computation.ops
        if _channel(inner) is not None
    }


def _channel(op: Op) -> str | None:
    return op.attribute("channel_id") if _kind(op.opcode) else None


def _of_fusion(
    module: Module,
    computation: Computation,
    op: Op,
    place: int,
    carried: dict[str, tuple[int, int]],
    started: set[str | None],
    num_devices: int,
) -> Iterator[Collective]:
    callee = module.called(op)[0]
    for inner in callee.ops:
        channel = _channel(inner)
        if not _kind(inner.opcode):
            continue
        if channel in carried:
            start, done = carried[channel]
            if place == start:
                yield _collective(callee, inner, inner, start, done, num_devices)
        elif channel not in started or channel is None:
            found = _collective(callee, inner, inner, place, place, num_devices)
            # An all-reduce of which each device keeps its own part.
            scattered = found.kind == "all-reduce" and any(user.opcode == "dynamic-slice" for user in callee.ops)
            yield found._replace(kind="reduce-scatter") if scattered else found


def _collective(computation: Computation, op: Op, inner: Op, start: int, done: int, num_devices: int) -> Collective:
    """Makes a collective from the operation that has its operands and the one that has its groups."""
    kind = _kind(inner.opcode)
    assert kind is not None, inner
    if kind == "all-gather":
        # A start returns its operands and its results.
        arrays = op.arrays[len(op.arrays) // 2 :] if len(op.arrays) > 1 and op.opcode.endswith("-start") else op.arrays
        arrays = tuple(array for array in arrays if array.dtype != "u32" or len(op.arrays) == 1)
    else:
        arrays = tuple(array for operand in computation.operands_of(op) for array in operand.arrays)
    assert arrays, op
    return Collective(
        kind,
        arrays[0].dtype,
        sum(array.num_bytes for array in arrays),
        groups_of(inner.attributes, num_devices),
        inner.op_name or computation.op_name(op),
        start,
        done,
    )


def groups_of(attributes: str, num_devices: int) -> np.ndarray:
    """Returns the groups of devices of a collective, int [groups, devices]; pairs for a permutation.

    >>> groups_of("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", 4).tolist()
    [[0, 2], [1, 3]]
    >>> groups_of("replica_groups=mesh['data'=2,'fsdp'=2] {'fsdp'}, dimensions={0}", 4).tolist()
    [[0, 1], [2, 3]]
    >>> groups_of("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}, dimensions={0}", 4).tolist()
    [[0, 1], [2, 3]]
    """
    if pairs := re.search(r"source_target_pairs={({[\d,{}\s]*})}", attributes):
        return _rows(pairs.group(1))
    everything = np.arange(num_devices)[None]
    if listed := re.search(r"replica_groups={({[\d,{}\s]*})}", attributes):
        return _rows(listed.group(1))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape = _numbers(iota.group(1))
        return _iota(iota.group(2), iota.group(3)).reshape(shape[0], -1)
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*){([^}]*)}", attributes):
        order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", mesh.group(2))
        numbers = _iota(*order.groups()) if order else None
        return _mesh_groups(mesh.group(1), mesh.group(3), numbers)
    return everything


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",")) if text else ()


def _rows(text: str) -> np.ndarray:
    return np.array([_numbers(row.replace(" ", "")) for row in re.findall(r"{([\d,\s]+)}", text)])


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Returns the numbers of devices as `[2,4]T(1,0)` lists them: of a shape, with its axes in another order."""
    sizes = _numbers(shape)
    numbers = np.arange(np.prod(sizes)).reshape(sizes)
    return numbers.transpose(_numbers(order)) if order else numbers


def _mesh_groups(axes: str, along: str, numbers: np.ndarray | None) -> np.ndarray:
    """Returns the groups of devices that differ along some axes of a mesh and no others.

    Args:
      numbers: of the devices, in the order of the mesh; None: 0, 1, 2, ...

    An axis may be used in part: `'x':(2)4` is the part of 4 of the axis x after a part of 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    numbers = np.arange(np.prod(list(sizes.values()))) if numbers is None else numbers
    shape: list[int] = []
    inside: list[bool] = []
    parts = dict(re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", along))
    for name, size in sizes.items():
        if name not in parts:
            shape, inside = [*shape, size], [*inside, False]
        elif not parts[name]:
            shape, inside = [*shape, size], [*inside, True]
        else:
            before, within = (int(number) for number in re.findall(r"\d+", parts[name]))
            shape += [before, within, size // (before * within)]
            inside += [False, True, False]
    order = [axis for axis, used in enumerate(inside) if not used] + [axis for axis, used in enumerate(inside) if used]
    group_size = int(np.prod([size for size, used in zip(shape, inside, strict=True) if used]))
    return numbers.reshape(shape).transpose(order).reshape(-1, group_size)
