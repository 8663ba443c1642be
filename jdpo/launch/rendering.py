"""Renders the templates of launchers, with every value quoted for the language that it is put into."""

from __future__ import annotations

import functools
import shlex
import textwrap
from typing import TYPE_CHECKING, Any

import yaml

from jdpo.exit_codes import LOST, RESTART_CODES
from jdpo.launch.request import LaunchRequest
from jdpo.safe_text import terminal

if TYPE_CHECKING:
    import jinja2

WAIT_SECONDS = 600
"""Between the end of a first process and the kill of those that still run: they end together, unless one is stuck."""


def render(template: str, request: LaunchRequest, options: Any, **values: Any) -> str:
    """Returns a template of this package with its values, next to the exit codes that a launcher decides by.

    Templates quote by filter: `sh` for a word of a shell, `words` for a command line, `yaml` for a scalar, `block` for
    a text of several lines in YAML, and `comment` for the text of a comment (YAML and shell).

    Args:
      template: its file name in `jdpo/launch/templates`.
      options: of the launcher.

    Raises:
      jinja2.UndefinedError: the template names a value that is not given.
    """
    known = {"request": request, "machine": request.machine, "options": options}
    return _environment().get_template(template).render(**known, **values).rstrip() + "\n"


def yaml_scalar(value: object) -> str:
    r"""Returns text as a quoted scalar, a number or a truth value as it is.

    Text is always quoted: readers of YAML differ in what they take for a number, a date or a truth value.

    >>> print(yaml_scalar("1e3"), yaml_scalar('a "b"\n$c'), yaml_scalar(3), yaml_scalar(True))
    "1e3" "a \"b\"\n$c" 3 true
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    return str(yaml.safe_dump(str(value), default_style='"', allow_unicode=True, width=float("inf"))).rstrip("\n")


def yaml_block(text: str, indent: int) -> str:
    r"""Returns text as the value of a key: a literal block where that keeps every character, else a quoted scalar.

    Args:
      indent: spaces before each line of the block.

    >>> print("key: " + yaml_block("beta: 0.1\n", 2))
    key: |
      beta: 0.1
    """
    body = textwrap.indent(text.rstrip("\n"), " " * indent, lambda line: bool(line.strip("\n")))
    block = f"|\n{body}"
    try:
        kept = yaml.safe_load(f"key: {block}\n")["key"] == text
    except yaml.YAMLError:  # such as control characters
        kept = False
    return block if kept else yaml_scalar(text)


def comment_lines(text: object, indent: int) -> str:
    """Returns text for a place after `# `: wrapped, with a mark of its own for each further line.

    Args:
      indent: spaces before each mark.
    """
    # One line of escaped text: a line feed in a name would end the comment.
    lines = textwrap.wrap(terminal(text), 118 - indent, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}# ".join(lines)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jdpo.launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Nothing here is HTML; every value passes through one of the filters below.
        autoescape=False,
    )
    environment.globals |= {"restart_codes": RESTART_CODES, "lost": LOST, "wait_seconds": WAIT_SECONDS}
    environment.filters |= {
        "sh": lambda value: shlex.quote(str(value)),
        "words": shlex.join,
        "yaml": yaml_scalar,
        "block": yaml_block,
        "comment": comment_lines,
    }
    return environment
