"""Edits of one function, each a fault that its tests should find.

Every operator takes a node of the syntax tree and yields the nodes that may replace it:

    arithmetic       + and -, * and /, // and *, % and *, & and | are swapped
    comparison       < and <=, > and >=, == and !=, is and is not, in and not in are swapped
    boolean          and and or are swapped
    condition        the condition of an if, a conditional expression or a comprehension is negated
    constant         an integer grows or shrinks by 1, a float grows by 1, True and False are swapped
    negation         a minus (not that of a constant), a not or a ~ is dropped
    term             an operand of +, - or * is dropped, and a condition of and or or
    stop_gradient    a stop_gradient is dropped
    extremes         min and max, minimum and maximum, argmin and argmax, any and all are swapped
    sides            chosen and rejected are swapped
    branches         the two values of a where are swapped
    bound            a bound of a slice moves by 1

What is raised, asserted, logged or annotated stays as it is, and so do docstrings and the conditions of loops.
"""

from __future__ import annotations

import ast
import copy
import difflib
import random
import textwrap
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

Operator = Callable[[ast.AST], Iterator[ast.AST]]

_ARITHMETIC: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_EXTREMES = {
    name: other
    for pair in (("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("any", "all"))
    for name, other in (pair, pair[::-1])
}
_SIDES = {
    name: other for pair in (("chosen", "rejected"), ("CHOSEN", "REJECTED")) for name, other in (pair, pair[::-1])
}


class Mutant(NamedTuple):
    """One edit of one function.

    Attributes:
      function: the qualified name within its module.
      operator: one of OPERATORS.
      source: the whole module with the edit.
      before, after: the lines of the function that the edit changes.
    """

    function: str
    operator: str
    source: str
    before: str
    after: str


def _arithmetic(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp | ast.AugAssign) and (other := _ARITHMETIC.get(type(node.op))):
        yield _with(node, op=other())


def _comparison(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            if other := _COMPARISONS.get(type(op)):
                yield _with(node, ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])


def _boolean(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())


def _condition(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If | ast.IfExp) and not _is_inverted_elsewhere(node.test):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.comprehension):
        for index, test in enumerate(node.ifs):
            if not _is_inverted_elsewhere(test):
                negated = ast.UnaryOp(ast.Not(), test)
                yield _with(node, ifs=[*node.ifs[:index], negated, *node.ifs[index + 1 :]])


def _is_inverted_elsewhere(test: ast.expr) -> bool:
    """Tells whether another operator yields the negation of a condition too, such as `is not` for `is`."""
    if isinstance(test, ast.Compare):
        return len(test.ops) == 1 and not isinstance(test.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
    return isinstance(test, ast.UnaryOp)


def _constant(node: ast.AST) -> Iterator[ast.AST]:
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node.value, float):
        yield ast.Constant(node.value + 1)


def _negation(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node.operand


def _term(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
        yield node.left
        if not isinstance(node.op, ast.Sub):
            yield node.right
    if isinstance(node, ast.BoolOp):
        for index in range(len(node.values)):
            rest = node.values[:index] + node.values[index + 1 :]
            yield rest[0] if len(rest) == 1 else _with(node, values=rest)


def _stop_gradient(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Call) and _identifier(node.func) == "stop_gradient":
        yield node.args[0]


def _extremes(node: ast.AST) -> Iterator[ast.AST]:
    if (other := _EXTREMES.get(_identifier(node))) is not None:
        yield _renamed(node, other)


def _sides(node: ast.AST) -> Iterator[ast.AST]:
    name = _identifier(node)
    for word, other in _SIDES.items():
        if word in name:
            yield _renamed(node, name.replace(word, other))


def _branches(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Call) and _identifier(node.func) == "where" and len(node.args) == 3:
        condition, first, second = node.args
        yield _with(node, args=[condition, second, first])


def _bound(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Slice):
        for field in ("lower", "upper"):
            bound = getattr(node, field)
            if bound is not None and not isinstance(bound, ast.Constant | ast.UnaryOp):  # -1 is for `constant`
                yield _with(node, **{field: ast.BinOp(bound, ast.Add(), ast.Constant(1))})
        if node.lower is None and node.upper is not None:
            yield _with(node, lower=ast.Constant(1))


OPERATORS: dict[str, Operator] = {
    "arithmetic": _arithmetic,
    "comparison": _comparison,
    "boolean": _boolean,
    "condition": _condition,
    "constant": _constant,
    "negation": _negation,
    "term": _term,
    "stop_gradient": _stop_gradient,
    "extremes": _extremes,
    "sides": _sides,
    "branches": _branches,
    "bound": _bound,
}


def mutants_of(source: str, function: str) -> list[Mutant]:
    """Lists all edits of a function, in the order of its nodes and of the operators.

    Args:
      source: of the module.
      function: its qualified name, such as "pack" or "RowPlan.step".

    Raises:
      ValueError: the module has no such function.
    """
    tree = ast.parse(source)
    found = _find(tree, function)
    known = {_identifier(node) for node in ast.walk(tree)}
    original = ast.unparse(found)
    mutants = []
    for node in _nodes(found):
        for operator, replacements in OPERATORS.items():
            for replacement in replacements(node):
                if operator == "sides" and _identifier(replacement) not in known:
                    continue  # the other side has no such name
                _Replace(node, replacement).visit(found)
                edited = ast.unparse(found)
                before, after = _changed_lines(original, edited)
                mutants.append(Mutant(function, operator, _with_function(source, found, edited), before, after))
                _Replace(replacement, node).visit(found)
    assert ast.unparse(found) == original, function
    return mutants


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Draws at most `count` of the edits of one function, by as many operators as there are.

    Edits of other functions do not change which are drawn.
    """
    if not mutants:
        return []
    rng = random.Random(f"{seed} {mutants[0].function}")
    of_operator = [[one for one in mutants if one.operator == name] for name in OPERATORS]
    for group in of_operator:
        rng.shuffle(group)
    rng.shuffle(of_operator)
    rounds = zip_longest(*of_operator)  # the first of each operator, then the second of each
    return [one for drawn in rounds for one in drawn if one is not None][:count]


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self._new if node is self._old else self.generic_visit(node)


def _find(tree: ast.Module, name: str) -> ast.AST:
    place: Any = tree
    for part in name.split("."):
        inner = (node for node in place.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part)
        place = next(inner, None)
        if place is None:
            raise ValueError(f"found no function {name}")
    return place


def _with_function(source: str, function: Any, text: str) -> str:
    """Returns the source of a module with a function replaced by a text."""
    lines = source.splitlines()
    first = min(node.lineno for node in (function, *function.decorator_list))
    indented = textwrap.indent(text, " " * function.col_offset)
    return "\n".join([*lines[: first - 1], indented, *lines[function.end_lineno :]]) + "\n"


def _nodes(node: Any) -> Iterator[ast.AST]:
    """Yields all nodes of a function that may be edited, parents first."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_kept(child):
                continue
            yield child
            yield from _nodes(child)


def _is_kept(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        logs = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("log.")
        return logs or isinstance(node.value, ast.Constant)
    if isinstance(node, ast.keyword):
        return node.arg == "strict"  # of zip: an assertion
    return isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr)


def _identifier(node: ast.AST) -> str:
    """Returns the name that a node reads; empty for other nodes."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else ""


def _renamed(node: ast.AST, name: str) -> ast.AST:
    return _with(node, **{"id" if isinstance(node, ast.Name) else "attr": name})


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    """Copies a node, not its children, with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _changed_lines(before: str, after: str) -> tuple[str, str]:
    lines = [*difflib.ndiff(before.splitlines(), after.splitlines())]
    removed, added = ("\n".join(line[2:].strip() for line in lines if line.startswith(sign)) for sign in ("- ", "+ "))
    return removed, added
