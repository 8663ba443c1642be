"""The Jinja environment of chat templates: transformers' settings, with all work and text counted."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from markupsafe import Markup

from jdpo.data.templates.budget import MACRO_STEPS, BoundExceeded, Budget, current
from jdpo.data.templates.filters import bounded_filters

TEMPLATE_DAY = datetime.datetime(2024, 7, 26)
"""The date that a chat template gets as today's, so that the same rows give the same tokens on every day and host.

Llama 3's templates write this date if they are given none.
"""

_LONGEST_FORMAT = 1000


class _Generator(CodeGenerator):
    """Compiles templates to code that counts every loop, macro, list and slice."""

    def write_commons(self) -> None:
        super().write_commons()
        # Local names in the compiled template; they replace Jinja's own str_join and markup_join.
        for name in ("step", "held", "scanned", "str_join", "markup_join"):
            self.writeline(f"{name} = environment.budget.{name}")

    def visit_ContextReference(self, node: jinja2.nodes.ContextReference, frame: Frame) -> None:
        # The parser never creates this node; `_Environment._generate` inserts it where work must be counted.
        self.write("step()")

    def visit_DerivedContextReference(self, node: jinja2.nodes.DerivedContextReference, frame: Frame) -> None:
        self.write(f"step({MACRO_STEPS})")

    def visit_List(self, node: jinja2.nodes.List, frame: Frame) -> None:
        self._held(super().visit_List, node, frame)

    def visit_Tuple(self, node: jinja2.nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._held(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: jinja2.nodes.Dict, frame: Frame) -> None:
        self._held(super().visit_Dict, node, frame)

    def _held(self, visit: Any, node: Any, frame: Frame) -> None:
        # A literal cannot grow with the input.
        if all(isinstance(part, jinja2.nodes.Const) for part in node.iter_child_nodes()):
            visit(node, frame)
            return
        self.write("held(")
        visit(node, frame)
        self.write(")")

    def visit_Operand(self, node: jinja2.nodes.Operand, frame: Frame) -> None:
        if node.op not in ("in", "notin"):
            super().visit_Operand(node, frame)
            return
        self.write(" in scanned(" if node.op == "in" else " not in scanned(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, jinja2.nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("scanned(")
        self.visit(node.node, frame)
        self.write(")[")
        self.visit(node.arg, frame)
        self.write("]")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    # The operators whose result may be much larger than their operands.
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            finalize=_finalize,
        )
        self.filters.update(bounded_filters())
        # `x is in y` is a test, not the operator that the generator counts.
        self.tests["in"] = _is_in
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
        )
        del self.globals["lipsum"]  # random text

    @property
    def budget(self) -> Budget:
        return current.get()

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        return self.budget.concat(pieces)

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **kwargs: Any) -> str:
        nodes = jinja2.nodes
        for loop in source.find_all(nodes.For):
            # Counted at the start of each iteration, so that `continue` cannot skip it.
            loop.body.insert(0, nodes.ExprStmt(nodes.ContextReference(), lineno=loop.lineno))
            if loop.test is not None:
                # A loop may filter out all items without running its body once; the filter counts too.
                loop.test = nodes.And(nodes.ContextReference(), loop.test, lineno=loop.lineno)
        for macro in source.find_all((nodes.Macro, nodes.CallBlock, nodes.Block)):
            count = nodes.ExprStmt(nodes.DerivedContextReference(), lineno=macro.lineno)
            macro.body.insert(0, count)  # type: ignore[attr-defined]
        text: str = super()._generate(source, *args, **kwargs)
        return text

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return self.budget.binary(operator, left, right)

    # The odd names are Jinja's: a template may pass keyword arguments called self, context or obj.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Methods of built-in values, such as "a".join, do their work in one call, which is counted before.
        owner = getattr(__obj, "__self__", None)
        if owner is not None:
            args = tuple(__self.budget.method(owner, getattr(__obj, "__name__", ""), args, kwargs))
        return __self.budget.held(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        text, takes_mapping = value.__self__, value.__name__ == "format_map"

        def formatted(*args: Any, **kwargs: Any) -> str:
            if takes_mapping:
                (kwargs,), args = args, ()
            formatter = _Formatter(self) if not isinstance(text, Markup) else _EscapeFormatter(self, escape=text.escape)
            return type(text)(formatter.vformat(text, args, kwargs))

        return formatted


class _Formatter(SandboxedFormatter):
    """`str.format` with bounds on widths and on the whole text."""

    _size = 0

    def format_field(self, value: Any, format_spec: str) -> str:
        budget = current.get()
        # "{:1000000000}" fills up to a width; any number in the specification may be one.
        for digits in _digits(format_spec):
            budget.wide(budget.number(digits))
        text = super().format_field(budget.held(value), format_spec)
        self._size += len(text)
        budget.text(self._size)
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(current.get().held(value), conversion)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """A `_Formatter` for text that escapes HTML."""


def _digits(text: str) -> list[str]:
    return "".join(letter if letter.isdigit() else " " for letter in text).split()


class _GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks an answer in the template; its content is written unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Scope:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """A replacement for `dict` that gives templates no access to the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(current.get().listed(keys), value)


class _Namespace(Namespace):
    """Jinja's `namespace`, whose attributes may not start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Jinja's repr would show the attributes, which are not counted.
        current.get().step()
        return "<Namespace>"


def _check_attribute(name: Any) -> None:
    # Such attributes would reach the namespace's own fields.
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}: it starts with an underscore")


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> str:
    return current.get().text_of(value)


def _is_in(value: Any, values: Any) -> bool:
    return value in current.get().scanned(values)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > _LONGEST_FORMAT:
        raise BoundExceeded(f"strftime_now gets a format of more than {_LONGEST_FORMAT:,} characters")
    return TEMPLATE_DAY.strftime(format)


@functools.cache
def environment() -> jinja2.Environment:
    """Returns the environment, which is shared, since templates leave no state in it."""
    return _Environment()
