"""Splits: slices in the notation of `datasets`, and the files of a folder that belong to each split.

A file belongs to the split that its name starts with (`test.jsonl`, `train-00000-of-00002.parquet`), or that one of its
folders is named after. A folder without such names is one split, `train`. If several names start with the same split,
each name without its part number is a split: `train_sft.jsonl` next to `train_prefs.jsonl` are the splits `train_sft`
and `train_prefs`, and asking for `train` is an error, since it could mean either.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jdpo.data.sources.readers import ending_of
from jdpo.safe_text import terminal

SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "eval", "test")

_SPLIT = re.compile(
    r"(?P<name>\w[\w.-]*)(?:\[(?P<start>-?[0-9]{1,18}%?)?:(?P<stop>-?[0-9]{1,18}%?)?\])?",
)
# Part numbers: -00000-of-00002 (with a hash from `datasets`), .part-3, _7.
_PART = re.compile(r"[-_.](?:[0-9]+-of-[0-9]+(?:-[0-9a-f]+)?|(?:part[-_.]?)?[0-9]+)$", re.IGNORECASE)


class Slice(NamedTuple):
    """A split with its bounds as text (None if left out), since `50%` needs the number of rows."""

    text: str
    name: str
    start: str | None
    stop: str | None

    def needs_count(self) -> bool:
        """Returns whether the bounds depend on the number of rows."""
        return any(bound is not None and not bound.isdigit() for bound in (self.start, self.stop))

    def bounds(self, num_rows: int) -> tuple[int, int]:
        """Returns the first row and the row after the last, given the number of rows."""
        return slice(_bound(self.start, num_rows), _bound(self.stop, num_rows)).indices(num_rows)[:2]

    def plain_bounds(self) -> tuple[int, int | None]:
        """Returns the bounds of a split that does not need the number of rows; None: to the end."""
        # islice refuses larger numbers.
        return int(self.start or 0), None if self.stop is None else min(int(self.stop), sys.maxsize)


def _bound(text: str | None, num_rows: int) -> int | None:
    if text is None:
        return None
    if not text.endswith("%"):
        return int(text)
    percent = int(text[:-1])
    # Rounded to the nearest row, so that [:90%] and [90%:] never share a row or leave one out.
    return round(percent * num_rows / 100) + (num_rows if percent < 0 else 0)


def parse_split(text: str) -> Slice:
    """Reads a split such as `train[:90%]`.

    Raises:
      ValueError: the text is no split, or a percentage exceeds 100.
    """
    match = _SPLIT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f"cannot read split {text!r}: expected one like train, train[:90%] or train[100:200]")
    split = Slice(text, match["name"], match["start"], match["stop"])
    for bound in (split.start, split.stop):
        if bound is not None and bound.endswith("%") and abs(int(bound[:-1])) > 100:
            raise ValueError(f"cannot read split {text!r}: {bound} is more than 100 %")
    return split


def choose_files(names: Sequence[str], split: str, folder: str) -> tuple[list[str], list[str]]:
    """Returns the files of a split, and the files that belong to no split.

    Args:
      names: paths of the data files, relative to the folder.
      split: the name of the split.
      folder: the folder's name in messages.

    Raises:
      ValueError: the folder has no such split, several splits that the name could mean, or the same rows twice.
    """
    of = {name: _split_of(name, split) for name in names}
    known = {name for name in of if _known(of[name])}
    # An exact name (`train`) wins over names that only start with it (`train_sft`).
    alike = {name for name in of if _begins(of[name], split)}
    chosen = [name for name in names if of[name] == split] or [name for name in names if name in alike]
    # Taking all of them would mix, for example, supervised and preference rows.
    if len(meant := sorted({of[name] for name in chosen})) > 1:
        raise ValueError(
            f"{folder}: split {split!r} could be {' or '.join(map(terminal, meant))} in this folder; set split to one "
            "of them, or list the folder once per split"
        )
    # No file is named after a split, so the folder is one split with all files.
    if not chosen and split == "train" and not known:
        chosen = list(names)
    if not chosen:
        found = sorted({of[name] for name in known}) or ["train"]
        raise ValueError(f"{folder}: no split {split!r} in this folder; it has {', '.join(map(terminal, found))}")
    # The hub stores many datasets as both JSONL and Parquet; reading both would use every row twice.
    _refuse_copies(chosen, folder)
    return chosen, [name for name in names if name not in chosen and (name not in known or name in alike)]


def _split_of(name: str, split: str) -> str:
    """Returns the split that a file's folders or name indicate; for other names, the name without ending and part.

    >>> [_split_of(n, "train") for n in ("train-00000-of-00002.parquet", "data/train_sft.jsonl.gz", "train/a.csv")]
    ['train', 'train_sft', 'train']
    """
    *folders, base = name.split("/")
    for folder in folders:
        if folder == split or folder in SPLIT_NAMES:
            return folder
    return _PART.sub("", _without_ending(base))


def _without_ending(name: str) -> str:
    return name.removesuffix(name[len(name) - len(ending_of(name) or "") :])


def _begins(name: str, split: str) -> bool:
    # Only a separator or the end may follow: `training` does not belong to the split `train`.
    return re.match(rf"{re.escape(split)}(?![^-_.])", name) is not None


def _known(name: str) -> bool:
    return any(_begins(name, split) for split in SPLIT_NAMES)


def _refuse_copies(names: Sequence[str], folder: str) -> None:
    first: dict[str, str] = {}
    for name in names:
        if (other := first.setdefault(_without_ending(name), name)) != name:
            raise ValueError(
                f"{folder}: {terminal(other)} and {terminal(name)} look like the same rows in two formats; remove one "
                "of them, or give the path of one file"
            )
