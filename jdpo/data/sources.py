"""Where rows come from: JSON, JSONL and Parquet files, folders of them, and hub names.

Files are streamed (a `.json` array excepted, which is read whole). `split` selects rows as in `datasets`: `train`,
`train[:90%]`, `train[100:200]`, `train[-50:]`; percentages round to the nearest row, so `[:90%]` and `[90%:]`
partition. A file is one split, `train`. In a folder, files named after a split (`test.jsonl`,
`train-00000-of-00002.parquet`) are that split; a folder without such names is one split, `train`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from jdpo.config import DatasetConfig

Row = tuple[dict[str, Any], str]
"""A raw row and its origin, for messages."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT = re.compile(r"(?P<name>\w[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "eval", "test")


class Source(Protocol):
    """An opened data set.

    Attributes:
      left_out: names of data files of a folder that belong to no split.
    """

    left_out: tuple[str, ...]

    def rows(self) -> Iterator[Row]:
        """Yields raw rows with their origins."""

    def digest(self) -> str:
        """A digest of the content that `rows` yields, origins included."""


def read_rows(dataset: DatasetConfig) -> Iterator[Row]:
    """Yields (raw row, origin); origins look like `pairs.jsonl:17`, `pairs.json[3]`, `org/name:train[5]`.

    Raises:
      ValueError: nothing is there, or a file is empty or broken; it names the file and line.
    """
    return open_source(dataset).rows()


def open_source(dataset: DatasetConfig) -> Source:
    """Finds what `dataset.path` names: a file, a folder, or a data set on the hub.

    Raises:
      ValueError: nothing is there, the split is not one, the hub cannot be reached, or a hub option is set for files.
    """
    path = Path(dataset.path).expanduser()
    if path.exists():
        _refuse_hub_options(dataset)
    if path.is_dir():
        split = _parse_split(dataset.split)
        return FileSource(*_files_of_split(path, split.name), split)
    if path.exists():
        split = _parse_split(dataset.split)
        if split.name != "train":
            raise ValueError(f"{path}: a file has one split, 'train', but split is {dataset.split!r}")
        if _reader(path) is None:
            raise ValueError(f"{path}: cannot read this kind of file; known endings are {', '.join(READERS)}")
        return FileSource((File(path, path.name),), (), split)
    if _reader(path) is not None or not _HUB_NAME.fullmatch(dataset.path):
        raise ValueError(f"{dataset.path}: no such file or folder (a hub name would look like org/name)")
    return HubSource(dataset)


def _refuse_hub_options(dataset: DatasetConfig) -> None:
    for option in ("name", "revision"):
        value = getattr(dataset, option)
        if value is not None:
            raise ValueError(
                f"{dataset.path}: {option} is {value!r}, but it is for data sets on the hub only, and this is a local "
                f"{'folder' if Path(dataset.path).expanduser().is_dir() else 'file'}; leave {option} out"
            )


class File(NamedTuple):
    path: Path
    label: str  # its name in origins


class Slice(NamedTuple):
    """A split: bounds as written, None where left out; `50%` stays text until the number of rows is known."""

    text: str
    name: str
    start: str | None
    stop: str | None

    def needs_count(self) -> bool:
        return any(bound is not None and not bound.isdigit() for bound in (self.start, self.stop))

    def bounds(self, num_rows: int) -> tuple[int, int]:
        return slice(_bound(self.start, num_rows), _bound(self.stop, num_rows)).indices(num_rows)[:2]


def _bound(text: str | None, num_rows: int) -> int | None:
    if text is None:
        return None
    if not text.endswith("%"):
        return int(text)
    percent = int(text[:-1])
    if abs(percent) > 100:
        raise ValueError(f"a split bound of {text} is more than all rows")
    return round(percent * num_rows / 100) + (num_rows if percent < 0 else 0)


def _parse_split(text: str) -> Slice:
    match = _SPLIT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f"cannot read split {text!r}: expected one like train, train[:90%] or train[100:200]")
    return Slice(text, match["name"], match["start"], match["stop"])


def _files_of_split(folder: Path, split: str) -> tuple[tuple[File, ...], tuple[str, ...]]:
    """The files of a split, and the names of those that belong to none."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and _reader(path) is not None)
    if not paths:
        raise ValueError(f"{folder}: no data files in this folder; known endings are {', '.join(READERS)}")
    named = {path: next(filter(None, (_is_split(path, name) for name in _SPLIT_NAMES)), None) for path in paths}
    if any(named.values()):
        paths = [path for path in paths if _is_split(path, split)]
    elif split != "train":
        paths = []
    if not paths:
        known = sorted({name for name in named.values() if name}) or ["train"]
        raise ValueError(f"{folder}: no split {split!r} in this folder; it has {', '.join(known)}")
    left_out = tuple(path.name for path, name in named.items() if name is None and path not in paths)
    return tuple(File(path, f"{folder.name}/{path.name}") for path in paths), left_out


def _is_split(path: Path, split: str) -> str | None:
    return split if re.match(rf"{re.escape(split)}(?=[-_.])", path.name) else None


class FileSource:
    """Rows of files, one after the other."""

    def __init__(self, files: Sequence[File], left_out: Sequence[str], split: Slice) -> None:
        self.files = tuple(files)
        self.left_out = tuple(left_out)
        self.split = split

    def rows(self) -> Iterator[Row]:
        start, stop = self._bounds()
        found = False
        for row in itertools.islice(self._all_rows(), start, stop):
            found = True
            yield row
        if not found:
            raise ValueError(f"{self._name()}: split {self.split.text} selects no rows")

    def digest(self) -> str:
        digest = hashlib.sha256(repr(self.split).encode())
        for file in self.files:
            with open(file.path, "rb") as stream:
                digest.update(file.label.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def _bounds(self) -> tuple[int, int | None]:
        if self.split.needs_count():
            return self.split.bounds(sum(1 for _ in self._all_rows()))
        return int(self.split.start or 0), None if self.split.stop is None else int(self.split.stop)

    def _all_rows(self) -> Iterator[Row]:
        for file in self.files:
            reader = _reader(file.path)
            assert reader is not None
            empty = True
            for row in reader(file):
                empty = False
                yield row
            if empty:
                raise ValueError(f"{file.path}: the file is empty: it holds no rows")

    def _name(self) -> str:
        return str(self.files[0].path if len(self.files) == 1 else self.files[0].path.parent)


class HubSource:
    """A data set on the Hugging Face hub, downloaded and memory-mapped by `datasets`."""

    def __init__(self, config: DatasetConfig) -> None:
        import datasets

        self.left_out: tuple[str, ...] = ()
        self.label = f"{config.path}:{config.split}"
        try:
            self.data = datasets.load_dataset(config.path, config.name, split=config.split, revision=config.revision)
        except Exception as error:  # the hub client raises errors of five libraries
            raise ValueError(
                f"cannot load {self.label} from the hub ({type(error).__name__}: {error}). There is no local file "
                f"or folder {config.path!r} either: without a network, give the path of a local one"
            ) from error

    def rows(self) -> Iterator[Row]:
        for index, raw in enumerate(self.data):
            yield raw, f"{self.label}[{index}]"

    def digest(self) -> str:
        return hashlib.sha256(f"{self.label} {self.data._fingerprint}".encode()).hexdigest()


def _read_json(file: File) -> Iterator[Row]:
    with _opened(file.path) as stream:
        data = stream.read()
    text = _decoded(data, str(file.path))
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file.path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno}); a .json file is one "
            "array of objects, and one object a line goes into a .jsonl file"
        ) from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file.path}: {_unreadable(error)}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file.path}: expected an array of objects, found {_kind(rows)}")
    for index, row in enumerate(rows):
        yield _object(row, f"{file.path}[{index}]"), f"{file.label}[{index}]"


def _read_json_lines(file: File) -> Iterator[Row]:
    with _opened(file.path) as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file.path}:{number}"
            text = _decoded(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: broken JSON: {error.msg} (column {error.colno})") from None
            except (RecursionError, ValueError) as error:
                raise ValueError(f"{where}: {_unreadable(error)}") from None
            yield _object(row, where), f"{file.label}:{number}"


def _unreadable(error: Exception) -> str:
    """Why valid JSON cannot be read: nested too deeply, or a number of thousands of digits."""
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
    return f"JSON that Python cannot read: {reason}"


def _read_parquet(file: File) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.path) as parquet:
            for batch in parquet.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{file.label}:{number}"
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file.path}: not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[File], Iterator[Row]]] = {
    ".json": _read_json,
    ".json.gz": _read_json,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".parquet": _read_parquet,
}
"""What a file name may end in, and who reads it."""


def _reader(path: Path) -> Callable[[File], Iterator[Row]] | None:
    return next((reader for ending, reader in READERS.items() if path.name.lower().endswith(ending)), None)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, through gzip where its name says so; errors of reading name the file."""
    compressed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as stream:
            yield cast(BinaryIO, stream)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: the gzip file is cut short or damaged: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file: {error.strerror or error}") from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text (byte 0x{data[error.start]:02x} at position {error.start}); save it as UTF-8"
        ) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with the row's columns, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
