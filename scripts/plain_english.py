"""Counts words that the project's style replaces by plainer ones, and names each place.

    python scripts/plain_english.py            # counts by word and by folder
    python scripts/plain_english.py --list     # every hit: file, line, word, what to write instead
    python scripts/plain_english.py jdpo/data  # these files and folders alone

Read are docstrings, comments, string literals and names in Python files, and the text of Markdown, YAML, TOML and
shell files. Lines that contain `plain: as it is` are skipped: there the word is data, such as a value in a file.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("jdpo", "docs", "scripts", "configs", "examples", "benchmarks", "tests", "README.md", "CONTRIBUTING.md")
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".sh", ".jinja")
NOT_OURS = ("tests/golden", "tests/data/templates", "benchmarks/results")

_UNIT = (
    "step|device|row|token|weight|epoch|second|line|pair|side|layer|parameter|sequence|command|position|host|process"
)
_COUNTED = (
    "pairs?|tokens?|rows?|slots?|bytes|GiB|FLOPs|examples?|steps|once|twice|times|one|two|few|object|file|program|entry"
)

WORDS: dict[str, str] = {
    r"behind": "after",
    r"beside": "next to",
    r"data sets?|data_sets?": "dataset",
    rf"(?:{_COUNTED}) an? (?:{_UNIT})": "per",
    r"stands?": "is",
    r"lies?|lay": "is",
    r"but for": "except",
    r"anew": "again",
    r"no numbers?|none numbers?": "NaN or Inf",
    r"goes on|go on|going on|gone on|went on": "continue",
    r"said": "logged, written",
    r"say|_say|self\.say": "log",
    r"held against": "compared with",
    r"(?:tells?|told|telling) \w* ?apart|told apart": "distinguish",
    r"in the place of": "instead of",
    r"rooms?": "package",
    r"circumstances|one_by_one|num_met_params": "a telling name",
    r"taken for": "mistaken for",
}
"""Pattern -> what to write instead. Words are the style's glossary; patterns match whole words."""

FRAGMENT = re.compile(r"(?:What|Whether|Of|The same|How|Where|Which|Who|Whose)\b")
"""Beginnings that a docstring does not have: it starts with a verb or names the thing."""

_PATTERNS = [(re.compile(rf"(?<![\w-])(?:{word})(?![\w-])", re.IGNORECASE), better) for word, better in WORDS.items()]
AS_IT_IS = "plain: as it is"


class Hit(NamedTuple):
    """A word of the list.

    Attributes:
      path: file, relative to the project.
      line: 1 is the first.
      word: as it is written there.
      better: what the glossary puts in its place.
    """

    path: str
    line: int
    word: str
    better: str


def hits_of(path: Path) -> Iterator[Hit]:
    """Yields the hits of one file."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    for number, line in enumerate(text.splitlines(), 1):
        if AS_IT_IS in line:
            continue
        for pattern, better in _PATTERNS:
            yield from (Hit(name, number, match[0], better) for match in pattern.finditer(line))
    if path.suffix == ".py":
        yield from _fragments(name, ast.parse(text))


def _fragments(name: str, tree: ast.AST) -> Iterator[Hit]:
    """Yields docstrings that begin as a fragment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and (match := FRAGMENT.match(doc)):
                yield Hit(name, node.body[0].lineno, f"docstring: {match[0]}", "start with a verb or a noun")


def files_below(places: list[str]) -> Iterator[Path]:
    """Yields the project's own text files of the named files and folders, this one left out."""
    for place in places:
        found = [ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).rglob("*"))
        for path in found:
            ours = not any(path.relative_to(ROOT).as_posix().startswith(other) for other in NOT_OURS)
            if path.suffix in SUFFIXES and path.is_file() and ours and path != Path(__file__).resolve():
                yield path


def main() -> None:
    """Prints the hits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", help=f"files and folders; default: {' '.join(FOLDERS)}")
    parser.add_argument("--list", action="store_true", help="name every hit")
    arguments = parser.parse_args()
    hits = [hit for path in files_below(arguments.places or list(FOLDERS)) for hit in hits_of(path)]
    if arguments.list:
        print("\n".join(f"{hit.path}:{hit.line}: {hit.word} -> {hit.better}" for hit in hits))
    for title, keys in (
        ("word", [hit.word.lower() for hit in hits]),
        ("folder", ["/".join(hit.path.split("/")[:2]) for hit in hits]),
    ):
        print(f"\n{title}")
        for key, count in Counter(keys).most_common(30):
            print(f"{count:6} {key}")
    print(f"\n{len(hits)} hits")


if __name__ == "__main__":
    main()
