"""Parses the text of an optimized program (HLO): its computations, with their operations as they are scheduled."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
"""Bits of element types whose name does not end in their number of bits, or is misleading."""


_MOST_NAMELESS = 5
"""Operations without a name, one after the other, that are searched for the name of what they belong to."""


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and place of an array.

    Attributes:
      dtype: as HLO names it, such as "bf16".
      dims: its sizes on one device.
      space: 0 for the device's main memory; 1 for the memory next to a TPU's units, 5 for the host's.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def item_bytes(self) -> float:
        """Bytes of an element; int4 takes half of one."""
        if self.dtype in _ITEM_BITS:
            return _ITEM_BITS[self.dtype] / 8
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        return int(digits.group(1)) / 8 if digits else 0

    @property
    def num_bytes(self) -> float:
        """Bytes of the array, without the padding of tiled layouts."""
        return self.size * self.item_bytes


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
      arrays: its result; several for a tuple, whose nesting is dropped.
      operands: names of operations of the same computation.
      inside: the text within the parentheses of the operands.
      attributes: the text after them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    is_root: bool

    @property
    def array(self) -> Array:
        """The result of an operation that returns one array."""
        return self.arrays[0]

    def attribute(self, key: str) -> str | None:
        """Returns the value of an attribute that is a name or a word."""
        found = re.search(rf"\b{key}=%?([^\s,{{}}]+)", self.attributes)
        return found.group(1) if found else None

    def numbers(self, key: str) -> tuple[int, ...]:
        """Returns the value of an attribute that is a list of numbers; empty where there is none."""
        found = re.search(rf"\b{key}={{([\d,\s]*)}}", self.attributes)
        return tuple(int(number) for number in found.group(1).split(",") if number.strip()) if found else ()

    @property
    def op_name(self) -> str:
        """The place in the Python program that the operation comes from, as JAX names it; may be empty."""
        found = re.search(r'metadata={op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found.group(1).replace("\\'", "'") if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that the operation runs, for each of its elements or as a whole."""
        single = re.findall(
            r"\b(?:calls|body|condition|to_apply|called_computation|true_computation|false_computation)=%([^\s,{}]+)",
            self.attributes,
        )
        several = re.findall(r"\b(?:branch_computations|called_computations)={([^}]*)}", self.attributes)
        return (*single, *(name.strip().lstrip("%") for names in several for name in names.split(",")))

    @property
    def target(self) -> str | None:
        """The name of the kernel of a custom call."""
        found = re.search(r'custom_call_target="([^"]+)"', self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Operations in the order in which they run."""

    name: str
    ops: tuple[Op, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Op]:
        """The operations by their names."""
        return {op.name: op for op in self.ops}

    @functools.cached_property
    def position(self) -> Mapping[str, int]:
        """The place of each operation in the schedule."""
        return {op.name: index for index, op in enumerate(self.ops)}

    @property
    def root(self) -> Op:
        """The operation whose result is that of the computation."""
        return next((op for op in self.ops if op.is_root), self.ops[-1])

    @functools.cached_property
    def parameters(self) -> Mapping[int, Op]:
        """The parameters by their numbers."""
        return {int(op.inside): op for op in self.ops if op.opcode == "parameter"}

    def op_name(self, op: Op) -> str:
        """Returns the `op_name` of an operation; where it has none, that of what it reads, as of a copy."""
        for _ in range(_MOST_NAMELESS):
            if op.op_name or not op.operands or op.operands[0] not in self.by_name:
                break
            op = self.by_name[op.operands[0]]
        return op.op_name

    def operands_of(self, op: Op) -> list[Op]:
        """Returns the operations that an operation reads."""
        return [self.by_name[name] for name in op.operands if name in self.by_name]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      entry: name of the computation that runs first.
    """

    computations: Mapping[str, Computation]
    entry: str

    def called(self, op: Op) -> list[Computation]:
        """Returns the computations that an operation runs."""
        return [self.computations[name] for name in op.called if name in self.computations]


def parse(text: str) -> Module:
    """Parses a program.

    Raises:
      ValueError: the text has no entry computation.

    >>> module = parse('''
    ... ENTRY %main (x: f32[2,3]) -> f32[2,3] {
    ...   %x = f32[2,3]{1,0} parameter(0)
    ...   ROOT %y = f32[2,3]{1,0:S(1)} add(%x, %x), metadata={op_name="jit(f)/add"}
    ... }
    ... ''')
    >>> root = module.computations["main"].root
    >>> root.opcode, root.array, root.operands, root.op_name
    ('add', Array(dtype='f32', dims=(2, 3), space=1), ('x', 'x'), 'jit(f)/add')
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", list[str]()
    for line in text.splitlines():
        # The body of a computation is indented, except for the further lines of an attribute that has several.
        if not name:
            header = re.match(r"(ENTRY )?%?([^\s(]+) \(.*-> .*{$", line)
            if header:
                name, lines = header.group(2), []
                entry = name if header.group(1) else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            computations[name] = Computation(name, tuple(map(_parse_op, lines)))
            name = ""
        elif re.match(r"\s+(ROOT )?%\S+ = ", line):
            lines.append(line)
        elif lines:
            lines[-1] += " " + line
    if not entry:
        raise ValueError("this is not the text of an optimized program: it has no ENTRY computation")
    return Module(computations, entry)


def _parse_op(line: str) -> Op:
    head = re.match(r"\s+(ROOT )?%(\S+) = ", line)
    assert head, line
    rest = line[head.end() :]
    # A tuple's type is in parentheses; others have none outside of braces.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    arrays, rest = tuple(_arrays(rest[:end])), rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = () if rest[:opening] == "constant" else tuple(re.findall(r"%([^\s,(){}]+)", inside))
    return Op(head.group(2), rest[:opening], arrays, operands, inside, rest[closing + 1 :], bool(head.group(1)))


def _closing(text: str, opening: int) -> int:
    """Returns the place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in re.finditer(r"[()]", text[opening:]):
        depth += 1 if place.group() == "(" else -1
        if depth == 0:
            return opening + place.start()
    raise ValueError(f"no closing parenthesis in the program's text: {text[:200]}")


def _arrays(text: str) -> Iterator[Array]:
    """Yields the arrays of a type."""
    for found in re.finditer(r"([a-z]\w*)\[([\d,<=\s]*)\](?:{([^}]*)})?", text):
        dtype, dims, layout = found.groups()
        space = re.search(r"S\((\d+)\)", layout or "")
        sizes = tuple(int(size.lstrip("<= ")) for size in dims.split(",") if size.strip())
        yield Array(dtype, sizes, int(space.group(1)) if space else 0)
