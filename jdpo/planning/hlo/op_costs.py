"""The work of an operation: FLOPs of its matrix products, and bytes of the device's memory that it reads and writes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jdpo.planning.hlo.hlo_text import Array, Computation, Module, Op

FREE = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain", "add-dependency"),
        *("partition-id", "replica-id", "opt-barrier", "copy-done", "slice-done", "async-done", "async-update"),
        *("while", "conditional", "call"),
    ]
)
"""Operations that move nothing by themselves; those of loops and calls count where they run."""

_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "ConsumeBuffer")
"""Custom calls that only name memory."""

_SLICES = ("dynamic-slice", "slice", "gather")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_JAX_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s8": "int8", "s4": "int4"}


class Cost(NamedTuple):
    """The work of one execution.

    Attributes:
      flops: by the dtype of the operands, two for each multiplication with its addition.
      num_bytes: read and written in main memory; what is in a TPU's memory next to its units does not count.
    """

    flops: Mapping[str, float]
    num_bytes: float


def cost_of(module: Module, computation: Computation, op: Op) -> Cost:
    """Returns the work of an operation of a computation; nothing for `FREE` ones."""
    if op.opcode in FREE or op.target in _FREE_TARGETS:
        return Cost({}, 0)
    if op.opcode == "fusion":
        callee = module.called(op)[0]
        return Cost(flops_in(module, callee), _fusion_bytes(module, computation, op, callee))
    return Cost(product_flops(computation, op), _plain_bytes(computation, op))


# --- FLOPs


def flops_in(module: Module, computation: Computation) -> Counter[str]:
    """Returns the FLOPs of all matrix products of a fusion, those of fusions within it included."""
    total: Counter[str] = Counter()
    for op in computation.ops:
        if op.opcode == "fusion":
            for callee in module.called(op):
                total.update(flops_in(module, callee))
        else:
            total.update(product_flops(computation, op))
    return total


def product_flops(computation: Computation, op: Op) -> dict[str, float]:
    """Returns the FLOPs of an operation if it is a matrix product."""
    if op.opcode == "dot":
        contracted = op.numbers("lhs_contracting_dims")
    elif op.opcode == "convolution":
        left, right = computation.operands_of(op)
        return {_wider(left.array, right.array): 2.0 * _multiplications(op, left.array, right.array)}
    elif op.target is not None and op.target.startswith("__cublas$"):
        found = re.search(r'"lhs_contracting_dimensions":\s*(\[[^\]]*\])', op.attributes)
        contracted = tuple(map(int, json.loads(found.group(1)))) if found else ()
    else:
        return {}
    left, right = computation.operands_of(op)[:2]
    summed = math.prod(left.array.dims[dim] for dim in contracted)
    return {_wider(left.array, right.array): 2.0 * op.array.size * summed}


def _wider(left: Array, right: Array) -> str:
    """Returns the name of the operands' dtype, of two the one with more bytes."""
    dtype = max(left, right, key=lambda array: array.item_bytes).dtype
    return _JAX_NAMES.get(dtype, dtype)


def _multiplications(op: Op, left: Array, right: Array) -> int:
    """Counts the multiplications of a convolution, which is how TPU programs write a matrix product.

    Places of the window that fall on padding are not counted: a window as large as the padded input is the usual form
    of a product with several output dimensions.
    """
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", op.attributes)
    assert labels, op
    of_left, of_right, of_output = labels.groups()
    window = re.search(r"window={([^}]*)}", op.attributes)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}
    count = op.array.dims[of_output.index("b")] * op.array.dims[of_output.index("f")]
    count *= right.dims[of_right.index("i")]
    for number, digit in enumerate(sorted(character for character in of_output if character.isdigit())):
        count *= _pairs_within(
            left.dims[of_left.index(digit)],
            right.dims[of_right.index(digit)],
            op.array.dims[of_output.index(digit)],
            **{key: _field(fields, key, number) for key in ("stride", "lhs_dilate", "rhs_dilate")},
            padding=int(fields["pad"].split("x")[number].split("_")[0]) if "pad" in fields else 0,
        )
    batch_groups = re.search(r"batch_group_count=(\d+)", op.attributes)
    return count // int(batch_groups.group(1)) if batch_groups else count


def _field(fields: Mapping[str, str], key: str, number: int) -> int:
    return int(fields[key].split("x")[number]) if key in fields else 1


def _pairs_within(
    size: int, window: int, outputs: int, *, stride: int, lhs_dilate: int, rhs_dilate: int, padding: int
) -> int:
    """Counts pairs of an output and a place of the window that read the input, and not padding or dilation."""
    if (size, window, outputs) == (1, 1, 1):
        return 1
    pairs = 0
    for output in range(outputs):
        first = output * stride - padding
        pairs += sum(
            0 <= place <= (size - 1) * lhs_dilate and place % lhs_dilate == 0
            for place in range(first, first + window * rhs_dilate, rhs_dilate)
        )
    return pairs


# --- bytes


def in_memory(array: Array) -> float:
    """Returns the bytes of an array if it is in the device's main memory, else 0."""
    return array.num_bytes if array.space == 0 else 0


def _plain_bytes(computation: Computation, op: Op) -> float:
    """Bytes of an operation that is not a fusion."""
    operands = computation.operands_of(op)
    written = sum(map(in_memory, op.arrays))
    if op.opcode in ("copy-start", "slice-start"):
        # The result holds the destination, the source and a number; a slice reads only what it writes.
        source, moved = operands[0].array, op.arrays[0] if op.opcode == "copy-start" else op.arrays[1]
        return in_memory(moved) + (moved.num_bytes if source.space == 0 else 0)
    if op.opcode in _SLICES:
        read = op.array.num_bytes if operands[0].array.space == 0 else 0
        return written + read + sum(in_memory(index.array) for index in operands[1:])
    if op.opcode in ("dynamic-update-slice", "scatter"):
        return _updated(op, operands)
    return written + sum(in_memory(array) for operand in operands for array in operand.arrays)


def _updated(op: Op, operands: list[Op]) -> float:
    """Bytes of an update in place: the update is read, and written; a scatter adds to what it reads."""
    update = operands[2 if op.opcode == "scatter" else 1].array
    target = operands[0].array
    times = 2 if op.opcode == "scatter" else 1
    return in_memory(update) + (times * update.size * target.item_bytes if target.space == 0 else 0)


def _fusion_bytes(module: Module, computation: Computation, op: Op, callee: Computation) -> float:
    """Bytes of a fusion: the parts of its operands that it reads, and its results."""
    operands = computation.operands_of(op)
    results, written = _results(callee), 0.0
    wanted: dict[str, float] = {}
    for result, array in zip(results, op.arrays, strict=False):
        producer = _behind_bitcasts(callee, result)
        if producer.opcode == "parameter" or producer.opcode in COLLECTIVES:
            continue  # a buffer that is passed through, or that a collective fills
        if producer.opcode in ("dynamic-update-slice", "scatter"):
            update = callee.by_name[producer.operands[2 if producer.opcode == "scatter" else 1]]
            times = 2 if producer.opcode == "scatter" else 1
            written += times * update.array.size * array.item_bytes if array.space == 0 else 0
            wanted |= {name: callee.by_name[name].array.size for name in producer.operands[1:]}
            # In place where the target is an operand; a target that the fusion computes is written whole.
            if _behind_bitcasts(callee, callee.by_name[producer.operands[0]]).opcode != "parameter":
                written += in_memory(array)
                wanted[producer.operands[0]] = producer.array.size
            continue
        written += in_memory(array)
        wanted[result.name] = array.size
    read = 0.0
    for number, elements in _elements_read(module, callee, wanted).items():
        if number < len(operands) and operands[number].array.space == 0:
            read += elements * operands[number].array.item_bytes
    return read + written


def _results(callee: Computation) -> list[Op]:
    root = callee.root
    return callee.operands_of(root) if root.opcode == "tuple" else [root]


def _behind_bitcasts(callee: Computation, op: Op) -> Op:
    while op.opcode == "bitcast":
        op = callee.by_name[op.operands[0]]
    return op


def _elements_read(module: Module, callee: Computation, wanted: Mapping[str, float]) -> dict[int, float]:
    """Returns how many elements of each parameter a fusion reads.

    Args:
      wanted: elements of its operations that are needed.
    """
    need = defaultdict[str, float](float, wanted)
    read: dict[int, float] = {}
    # Users come after what they use, so that all uses of an operation are known when its turn comes.
    for op in reversed(callee.ops):
        elements = need.get(op.name, 0)
        if not elements or not op.arrays:
            continue
        elements = min(elements, op.array.size) if op.opcode != "tuple" else elements
        if op.opcode == "parameter":
            number = int(op.inside)
            read[number] = max(read.get(number, 0), elements)
            continue
        for name, wanted_of, adds in _operand_needs(module, callee, op, elements):
            # Several slices read different parts; other users read the same elements, once.
            need[name] = need[name] + wanted_of if adds else max(need[name], wanted_of)
    return read


def _operand_needs(module: Module, callee: Computation, op: Op, elements: float) -> Iterator[tuple[str, float, bool]]:
    """Yields for each operand its name, the elements that are needed, and whether they add to those of other users."""
    operands = callee.operands_of(op)
    if op.opcode in COLLECTIVES or op.target is not None:
        return
    if op.opcode == "fusion":
        inner = module.called(op)[0]
        wanted = {result.name: min(elements, result.array.size) for result in _results(inner) if result.arrays}
        for number, needed in _elements_read(module, inner, wanted).items():
            if number < len(op.operands):
                yield op.operands[number], needed, False
        return
    share = elements / max(op.array.size, 1)
    for number, operand in enumerate(operands):
        size = sum(array.size for array in operand.arrays)
        if op.opcode in _SLICES and number == 0:
            yield operand.name, min(size, elements), True
        elif op.opcode in ("dot", "convolution", "sort", *_SLICES):
            yield operand.name, size, False
        elif op.opcode in ("reduce", "reduce-window", "concatenate"):
            yield operand.name, size * share, False
        else:
            yield operand.name, min(size, elements), False
