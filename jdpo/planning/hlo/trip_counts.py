"""Finds how often the loops of a program run."""

from __future__ import annotations

import re
from typing import NamedTuple

from jdpo.planning.hlo.hlo_text import Computation, Module, Op

_THROUGH = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "broadcast", "opt-barrier")
"""Operations that return the number that they are given."""


class Scope(NamedTuple):
    """A computation, and where it is called: a fusion's parameters are the operands of the fusion.

    Attributes:
      caller: the scope of the operation that calls it; None where its parameters are not known.
      call: that operation.
    """

    computation: Computation
    caller: Scope | None = None
    call: Op | None = None


def trip_count(module: Module, computation: Computation, loop: Op) -> int | None:
    """Returns how often a loop runs at most, or None if the text does not tell.

    A loop whose number of turns is only known when it runs, such as one over the chunks of the head that hold tokens,
    counts with the upper bound that the program sets.

    Args:
      computation: that has the loop.
    """
    known = re.search(r'"known_trip_count":\s*{"n":\s*"(\d+)"}', loop.attributes)
    if known:
        return int(known.group(1))
    condition, body = (module.computations[loop.attribute(key) or ""] for key in ("condition", "body"))
    test = _comparison(module, Scope(condition))
    start = computation.by_name[loop.operands[0]]
    if test is None or start.opcode != "tuple":
        return None
    counter, limit = test
    state = [computation.by_name[name] for name in start.operands]
    first = upper_bound(module, Scope(computation), state[counter])
    last = limit if isinstance(limit, int) else upper_bound(module, Scope(computation), state[limit.element])
    step = _step(module, body, counter)
    if first is None or last is None or not step:
        return None
    return max(0, -(-(last - first) // step))


class _Carried(NamedTuple):
    """An element of the state of a loop."""

    element: int


def _comparison(module: Module, scope: Scope) -> tuple[int, int | _Carried] | None:
    """Returns the counter that `counter < limit` tests, and the limit: a number or an element of the loop's state."""
    scope, root = _inner(module, scope, scope.computation.root)
    if root.opcode != "compare" or root.attribute("direction") != "LT":
        return None
    counter, limit = (scope.computation.by_name[name] for name in root.operands)
    carried, bound = _carried(scope, counter), _carried(scope, limit)
    number = upper_bound(module, scope, limit) if bound is None else bound
    return None if carried is None or number is None else (carried.element, number)


def _inner(module: Module, scope: Scope, op: Op) -> tuple[Scope, Op]:
    """Returns the operation that computes the result of a fusion, and its scope; any other operation as it is."""
    while op.opcode in ("fusion", "call"):
        scope = Scope(module.called(op)[0], scope, op)
        op = scope.computation.root
    return scope, op


def _outer(scope: Scope, op: Op) -> tuple[Scope, Op]:
    """Returns the operand that a parameter of a fusion stands for; any other operation as it is."""
    while op.opcode == "parameter" and scope.caller is not None and scope.call is not None:
        op = scope.caller.computation.by_name[scope.call.operands[int(op.inside)]]
        scope = scope.caller
    return scope, op


def _carried(scope: Scope, op: Op) -> _Carried | None:
    """Returns the element of the loop's state that an operation in its condition or body is."""
    scope, op = _outer(scope, op)
    while op.opcode in _THROUGH and op.operands:
        scope, op = _outer(scope, scope.computation.by_name[op.operands[0]])
    if op.opcode != "get-tuple-element":
        return None
    source = scope.computation.by_name[op.operands[0]]
    index = op.attribute("index")
    return _Carried(int(index)) if source.opcode == "parameter" and index is not None else None


def _step(module: Module, body: Computation, counter: int) -> int | None:
    """Returns what a turn of the loop adds to the counter."""
    if body.root.opcode != "tuple":
        return None
    return _offset(module, Scope(body), body.by_name[body.root.operands[counter]], counter)


def _offset(module: Module, scope: Scope, op: Op, counter: int) -> int | None:
    """Returns d where an operation is the counter plus d, else None."""
    scope, op = _outer(scope, op)
    if _carried(scope, op) == _Carried(counter):
        return 0
    if op.opcode in ("fusion", "call"):
        return _offset(module, *_inner(module, scope, op), counter)
    operands = scope.computation.operands_of(op)
    if op.opcode in _THROUGH and operands:
        return _offset(module, scope, operands[0], counter)
    if op.opcode == "add":
        for one, other in (operands, operands[::-1]):
            before, added = _offset(module, scope, one, counter), upper_bound(module, scope, other)
            if before is not None and added is not None:
                return before + added
    return None


def upper_bound(module: Module, scope: Scope, op: Op) -> int | None:
    """Returns the most that an integer can be, or None if the program does not tell."""
    scope, op = _outer(scope, op)
    if op.opcode == "constant":
        number = re.fullmatch(r"{?\s*(-?\d+)\s*}?", op.inside)
        return int(number.group(1)) if number else None
    if op.opcode in ("fusion", "call") and len(op.arrays) == 1:
        return upper_bound(module, *_inner(module, scope, op))
    operands = scope.computation.operands_of(op)
    if op.opcode in _THROUGH and operands:
        return upper_bound(module, scope, operands[0])
    if op.opcode in ("minimum", "maximum", "clamp", "add"):
        bounds = [upper_bound(module, scope, operand) for operand in operands]
        known = [bound for bound in bounds if bound is not None]
        if op.opcode == "minimum":
            return min(known, default=None)
        if op.opcode == "clamp":  # (least, number, most)
            return bounds[2]
        if len(known) == len(bounds):
            return max(known) if op.opcode == "maximum" else sum(known)
    return None
