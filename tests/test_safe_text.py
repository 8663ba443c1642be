"""Foreign text in a terminal, on a page and in Markdown."""

from __future__ import annotations

import html as html_of_python

import pytest

from jdpo import safe_text

SCOTLAND = "\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in "gbsct") + "\U000e007f"
READABLE = [
    "rows/train-00001.jsonl",
    "données – été",
    "Ελληνικά Русский עברית العربية हिन्दी ไทย ភាសាខ្មែរ 日本語 한국어",
    "می‌خواهم क्‍ष",  # joiners within words of Persian and Hindi
    "שלום\u200f!",
    "\u0600\u0661\u06dd",  # Arabic number sign, end of ayah
    "👩‍👩‍👧‍👦 👩🏽‍🚀 ❤️‍🔥 🇮🇪 1️⃣",
    SCOTLAND,
    "\ue0b0 \U0001fae9",  # a private-use character of terminal fonts, an emoji newer than some Unicode tables
    "C:\\rows\\new",
]
HIDDEN = {
    "\x1b[31mred\x1b]0;title\x07": r"\x1b[31mred\x1b]0;title\x07",
    "a\nfake: ok\r\tb": r"a\nfake: ok\r\tb",
    "\x00\x08\x7f\x85\x9b": r"\x00\x08\x7f\x85\x9b",
    "x\u202egpj.exe\u2066\u2069": r"x\u202egpj.exe\u2066\u2069",
    "zero\u200bwidth\ufeff\u2060\u00ad": r"zero\u200bwidth\ufeff\u2060\xad",
    "line\u2028paragraph\u2029": r"line\u2028paragraph\u2029",
    "\udc80": r"\udc80",  # a byte of a file's name that is not UTF-8
    "tags\U000e0041\U000e007f": r"tags\U000e0041\U000e007f",
    "\U0001f3f4\U000e0041": "\U0001f3f4"
    + r"\U000e0041",  # tag characters of a flag are lower-case letters and an end tag
}


@pytest.mark.parametrize("text", READABLE)
def test_every_script_and_emoji_stay_as_they_are(text: str) -> None:
    assert safe_text.terminal(text) == safe_text.terminal_lines(text) == text
    assert html_of_python.unescape(safe_text.html(text)) == text


@pytest.mark.parametrize(("text", "shown"), HIDDEN.items())
def test_invisible_and_control_characters_are_escaped(text: str, shown: str) -> None:
    assert safe_text.terminal(text) == shown
    shown.encode("utf-8")
    assert safe_text.terminal_lines(text) == shown.replace(r"\n", "\n").replace(r"\t", "\t")
    assert all(one in "\n\t" or not safe_text.is_unseen(one) or one in SCOTLAND for one in safe_text.html(text))


def test_html_has_no_markup_left() -> None:
    assert safe_text.html("<img src='x' alt=\"y\">&") == "&lt;img src=&#x27;x&#x27; alt=&quot;y&quot;&gt;&amp;"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hh_rlhf-v1.5.jsonl (train)", "hh_rlhf-v1.5.jsonl (train)"),
        ("_a_ *b* ~~c~~", r"\_a\_ \*b\* \~\~c\~\~"),
        ("[x](javascript:y) ![z](w)", r"\[x\](javascript:y) !\[z\](w)"),
        ("<script>a && b</script>", "&lt;script&gt;a &amp;&amp; b&lt;/script&gt;"),
        ("a|b\\`", r"a\|b\\\`"),
        ("# head", r"\# head"),
        ("- item", r"\- item"),
        ("  1. item", r"  1\. item"),
        ("===", r"\==="),
        ("a\n# b", r"a\\n\# b"),
    ],
)
def test_markdown_shows_text_letter_for_letter(text: str, shown: str) -> None:
    assert safe_text.markdown(text) == shown


def test_a_code_span_ends_where_it_should() -> None:
    assert safe_text.markdown_code("runs/sft_1") == "`runs/sft_1`"
    assert safe_text.markdown_code("a` <b>`") == r"a\` &lt;b&gt;\`"
    assert safe_text.markdown_code("x\x1b") == r"`x\x1b`"
