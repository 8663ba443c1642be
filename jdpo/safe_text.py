r"""Escaping of foreign text, so that it is safe to show in a terminal, on an HTML page and in Markdown.

Names of files, tensors and datasets, messages of chat templates, and other text that comes with a model or a dataset
may contain escape codes of terminals, line feeds that fake a separate line, direction overrides that show a name
backwards, or markup. Such characters are escaped (`\x1b`, `\n`, `\u202e`). Letters of all scripts, emoji and the
characters that join them stay as they are.
"""

from __future__ import annotations

import html as _html
import re
import unicodedata

_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

# Format characters that scripts need: joiners and direction marks, and visible signs that Unicode counts as format
# characters (Arabic, Syriac and Kaithi number signs, Egyptian joiners). None of them hides or reverses other text.
_OF_SCRIPTS = re.compile(
    "[\u200c-\u200f\u061c\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd\U00013430-\U0001343f]"
)
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # control, format, half a surrogate pair, line, paragraph
# The flag of a region, such as Scotland, is a black flag followed by invisible tags; elsewhere tags only hide text.
_PIECES = re.compile("\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,6}\U000e007f|[^ -~]")

# These characters have a meaning in Markdown, or start HTML. Other punctuation, and `_` within a word, has none.
_MARKUP = re.compile(r"[\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_])")
_BLOCK_START = re.compile(r"(\s*)([-+=]|\d+(?=[.)]))")


def terminal(text: object) -> str:
    r"""Returns text as one line for a terminal, a log, or a part of a larger message.

    >>> print(terminal("a\x1b[31mb\nc\u202ed"), terminal("naïve 東京 👩\u200d🚀"))
    a\x1b[31mb\nc\u202ed naïve 東京 👩‍🚀
    """
    return _written_out(str(text), "")


def terminal_lines(text: object) -> str:
    r"""Returns text of several lines for a terminal: escaped as by `terminal`, except line feeds and tabs.

    >>> terminal_lines("first\n\tsecond\r\x07")
    'first\n\tsecond\\r\\x07'
    """
    return _written_out(str(text), "\n\t")


def html(text: object) -> str:
    r"""Returns text as the content of an HTML element or of a quoted attribute; line feeds and tabs stay.

    >>> html('<b title="x">\x1b')
    '&lt;b title=&quot;x&quot;&gt;\\x1b'
    """
    return _html.escape(terminal_lines(text), quote=True)


def markdown(text: object) -> str:
    r"""Returns text as one line of Markdown that shows it literally, also in viewers that allow HTML.

    >>> markdown("hh_rlhf *best* <script>`x`|\n")
    'hh_rlhf \\*best\\* &lt;script&gt;\\`x\\`\\|\\\\n'
    """
    escaped = _MARKUP.sub(lambda sign: f"\\{sign[0]}", terminal(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # At the start of a line these characters would begin a list, a rule or a heading.
    start = _BLOCK_START.match(escaped)
    if start is None:
        return escaped
    lead, sign = start.groups()
    return f"{lead}{sign}\\{escaped[start.end() :]}" if sign[0].isdigit() else f"{lead}\\{escaped[len(lead) :]}"


def markdown_code(text: object) -> str:
    """Returns text as a code span of Markdown, or as `markdown` does if a code span would not be safe.

    >>> markdown_code("org/model_1"), markdown_code("a`b<c")
    ('`org/model_1`', 'a\\\\`b&lt;c')
    """
    # No escape works inside a code span, so a backtick, or what some viewers read as HTML there, rules it out.
    line = terminal(text)
    return markdown(text) if re.search("[`<>&]", line) or not line.strip() else f"`{line}`"


def is_unseen(character: str) -> bool:
    """Returns whether a character is invisible, or changes how other characters are shown."""
    return unicodedata.category(character) in _UNSEEN and _OF_SCRIPTS.match(character) is None


def _written_out(text: str, kept: str) -> str:
    # Most texts: no invisible character is printable to Python.
    if text.isprintable():
        return text

    def seen(match: re.Match[str]) -> str:
        piece = match[0]
        if len(piece) > 1 or piece in kept or not is_unseen(piece):
            return piece
        return _SHORT.get(piece) or escaped(piece)

    return _PIECES.sub(seen, text)


def escaped(character: str) -> str:
    r"""Returns the escape of a character, which is valid in Python strings and in quoted YAML scalars.

    >>> print(escaped("\x1b"), escaped("\u202e"), escaped("\U000e0041"))
    \x1b \u202e \U000e0041
    """
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
