"""Data files for scripts/fuzz_readers.py: random rows of known schemas with hostile values, written and damaged."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from jdpo.data.sources import READERS

KINDS = (*READERS, ".stream.arrow")
"""Endings of the files that are made."""

# --- what files hold

WORDS = ("river", "Paris", "a", "the capital is", "Human:", "\n\nHuman: hi\n\nAssistant: yo", "<|im_end|>", "</s>", "")
HOSTILE = (
    "\ud800",
    "\0",
    "\u202e",
    "\ufeff",
    "\r",
    "\n",
    "\u2028",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "\x1b[31m",
    "🤷🏽‍♀️",
    "e\u0301" * 40,
    "NaN",
    '"',
    "'",
    ",",
    "\\",
    "x" * 5000,
    " " * 300,
)
BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x1f\x8b",
    b"\xed\xa0\x80",
    b'"',
    b"\n",
    b"\r",
    b",",
    b"\t",
    b"[" * 2000,
    b"{" * 5,
    b"}",
    b"]",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"\\ud800",
    b"\\u0000",
    b"null",
    b"PAR1",
    b"ARROW1\0\0",
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"version https://git-lfs",
)
COLUMNS = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "tools"),
    ("chosen", "rejected"),
    ("messages",),
    ("messages", "tools"),
    ("conversations", "chosen", "rejected"),
    ("prompt", "completion"),
    ("history", "human_ref_A", "human_ref_B", "labels"),
    ("prompt", "answers"),
    ("question", "answers"),
    ("question", "response_j", "response_k"),
    ("system", "question", "chosen", "rejected"),
    ("instruction", "input", "chosen", "rejected"),
    ("context", "completions"),
    ("messages", "chosen", "rejected"),
    ("history", "conversation", "chosen", "rejected", "tools"),
    ("prompt", "response_a", "response_b", "winner", "model_a", "model_b"),
    ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
    ("context", "response1", "response2", "overall_preference"),
    ("conversation_a", "conversation_b", "winner_model_a", "winner_model_b", "winner_tie"),
)

VOTES = ("winner", "better_response_id", "safer_response_id", "overall_preference")
VOTES += ("winner_model_a", "winner_model_b", "winner_tie")
CONVERSATIONS = ("messages", "conversations", "conversation", "context", "history", "conversation_a", "conversation_b")


def text(rng: random.Random) -> str:
    """Draws words, some of them hostile."""
    return " ".join(rng.choice(HOSTILE if rng.random() < 0.1 else WORDS) for _ in range(rng.randrange(6)))


def message(rng: random.Random, role: str | None = None) -> Any:
    """Draws a turn of a conversation, or sometimes something else."""
    if rng.random() < 0.05:
        return value(rng)
    role = role or rng.choice(("user", "assistant", "system", "tool", "gpt", "human", "USER", "narrator", ""))
    keys = ("from", "value") if rng.random() < 0.2 else ("role", "content")
    turn: dict[str, Any] = {keys[0]: role, keys[1]: text(rng) if rng.random() < 0.9 else value(rng)}
    if rng.random() < 0.1:
        turn["tool_calls"] = value(rng) if rng.random() < 0.5 else [call(rng) for _ in range(rng.randrange(3))]
    return turn


def call(rng: random.Random) -> dict[str, Any]:
    """Draws a call of a function, with arguments of any kind."""
    arguments = {text(rng): value(rng) for _ in range(rng.randrange(4))}
    function = {"name": text(rng), "arguments": rng.choice((arguments, json.dumps(arguments), value(rng)))}
    return rng.choice((function, {"type": "function", "function": function, "id": None}))


def conversation(rng: random.Random) -> list[Any]:
    """Draws turns that usually alternate."""
    turns = [message(rng, ("user", "assistant")[index % 2]) for index in range(rng.randrange(5))]
    return [message(rng) if rng.random() < 0.05 else turn for turn in turns]


def value(rng: random.Random, depth: int = 3) -> Any:
    """Draws any JSON value."""
    choice = rng.randrange(9 if depth else 7)
    if choice == 7:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if choice == 8:
        return {text(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    numbers = (0, 1, -1, 2**63, 10**300, 0.5, 1e308, -0.0)
    return (None, True, rng.choice(numbers), rng.random(), text(rng), text(rng), rng.choice(HOSTILE))[choice]


def cell(name: str, rng: random.Random) -> Any:
    """Draws a value that a column of such a name may hold, and now and then any value."""
    kind = rng.random()
    if kind < 0.1:
        return value(rng)
    if name in VOTES:
        return rng.choice((0, 1, 2, -1, "0", "a", "model_b", "tie", "tie (bothbad)", None, True, text(rng)))
    if name in CONVERSATIONS or (name != "labels" and kind < 0.5):
        turns = conversation(rng)
        return turns if rng.random() < 0.9 else {"role": turns, "content": [text(rng) for _ in turns]}
    if name in ("answers", "completions"):
        keys = ("answer", "text", "completion", "rank", "pm_score", "model", "selected", "content")
        return [{key: value(rng, 1) for key in rng.sample(keys, 3)} for _ in range(rng.randrange(4))]
    if name in ("labels", "score_chosen", "score_rejected"):
        return rng.choice((0, 1, 1.5, -3, None, True, "1"))
    if name in ("chosen", "rejected") and kind < 0.6:
        return message(rng, "assistant")
    if name == "tools":
        return rng.choice((None, [], [{"type": "function", "function": {"name": text(rng)}}], text(rng)))
    return text(rng)


def make_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Draws a few rows of one schema."""
    columns = rng.choice(COLUMNS)
    rows = [{name: cell(name, rng) for name in columns} for _ in range(rng.randrange(1, 6))]
    for row in rows:
        if rng.random() < 0.1:
            row.pop(rng.choice(columns))
        if rng.random() < 0.1:
            row[text(rng)] = value(rng)
    return rows


# --- files of every kind


def make_file(kind: str, rng: random.Random) -> bytes:
    """Writes a valid or nearly valid file of a kind."""
    if kind.endswith(".gz"):
        return gzip.compress(make_file(kind.removesuffix(".gz"), rng), rng.choice((0, 6)))
    if kind in (".parquet", ".arrow", ".stream.arrow"):
        return table_file(kind, rng)
    rows = make_rows(rng)
    if kind == ".json":
        content = json.dumps(rows, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
        content = content if rng.random() < 0.8 else "\n".join(map(json.dumps, rows))
    elif kind in (".csv", ".tsv"):
        stream = io.StringIO()
        writer = csv.writer(
            stream, delimiter="," if kind == ".csv" else "\t", lineterminator=rng.choice(("\n", "\r\n"))
        )
        writer.writerow(list(rows[0]))
        writer.writerows([json.dumps(v) if isinstance(v, list | dict) else v for v in row.values()] for row in rows)
        content = stream.getvalue()
    else:
        content = "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows)
    return content.encode("utf-8", "surrogatepass" if rng.random() < 0.3 else "replace")


def table_file(kind: str, rng: random.Random) -> bytes:
    """Writes a Parquet or Arrow file of the rows, or of columns of rare types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.Table.from_pylist(make_rows(rng)) if rng.random() < 0.6 else rare_table(rng)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):  # values without a common type
        table = rare_table(rng)
    stream = io.BytesIO()
    if kind == ".parquet":
        try:
            pq.write_table(
                table,
                stream,
                compression=rng.choice(("none", "snappy", "gzip", "zstd")),
                row_group_size=rng.choice((1, 100)),
                use_dictionary=rng.random() < 0.5,
                data_page_version=rng.choice(("1.0", "2.0")),
            )
        except (pa.ArrowException, UnicodeError):
            stream = io.BytesIO()
            pq.write_table(pa.table({"prompt": ["a", None]}), stream)
        return stream.getvalue()
    options = pa.ipc.IpcWriteOptions(compression=rng.choice((None, "lz4", "zstd")))
    opener = pa.ipc.new_stream if kind == ".stream.arrow" else pa.ipc.new_file
    with opener(stream, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rng.choice((1, 100)))
    return stream.getvalue()


def rare_table(rng: random.Random) -> Any:
    """Draws columns of types that JSON lacks, under names that schemas know."""
    import pyarrow as pa

    makers: Sequence[tuple[Any, Callable[[], Any]]] = (
        (pa.large_string(), lambda: rng.choice(WORDS)),
        (pa.string_view(), lambda: rng.choice(WORDS)),
        (pa.dictionary(pa.int8(), pa.string()), lambda: rng.choice(WORDS)),
        (pa.binary(), lambda: rng.choice(BYTES)),
        (pa.binary(3), lambda: rng.randbytes(3)),
        (pa.decimal128(20, 3), lambda: decimal.Decimal(rng.randrange(10**9)) / 1000),
        (pa.float16(), lambda: rng.choice((0.5, float("nan"), float("inf")))),
        (pa.float64(), lambda: rng.choice((0.5, float("nan"), float("-inf")))),
        (pa.int64(), lambda: rng.randrange(-(2**63), 2**63)),
        (pa.timestamp("us"), lambda: rng.choice((0, 2**62, -(2**62)))),
        (pa.timestamp("ns", rng.choice(("UTC", "Mars/Phobos", "+07:30"))), lambda: rng.randrange(2**62)),
        (pa.date64(), lambda: datetime.date(2000, 1, rng.randrange(1, 28))),
        (pa.time32("s"), lambda: rng.randrange(86400)),
        (pa.list_(pa.string()), lambda: [rng.choice(WORDS)]),
        (pa.map_(pa.string(), pa.string()), lambda: [("role", "user"), ("content", rng.choice(WORDS))]),
        (
            pa.list_(pa.struct({"role": pa.string(), "content": pa.large_string()})),
            lambda: [{"role": rng.choice(("user", "assistant")), "content": rng.choice(WORDS)}],
        ),
        (pa.struct({"role": pa.binary(), "content": pa.string()}), lambda: {"role": b"user", "content": "a"}),
    )
    size, columns = rng.randrange(1, 5), {}
    for name in rng.choice(COLUMNS):
        kind, make = rng.choice(makers)
        columns[name] = pa.array([None if rng.random() < 0.1 else make() for _ in range(size)], kind)
    return pa.table(columns)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Changes, removes, inserts or doubles some bytes of a file."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        # Half of the time near the end, where table formats have their footers.
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:
            at = max(0, len(data) - at % 64) if rng.random() < 0.7 else at % 64
        end = min(len(data), at + rng.choice((1, 2, 8, 200)))
        match rng.randrange(7):
            case 0:
                for place in range(at, end):
                    data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = rng.choice(BYTES)
            case 4:
                data[at:end] = rng.choice(BYTES)
            case 5:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.choice((4, 50, 1000))]
            case 6:
                data[at:end] = rng.randbytes(end - at)
    return bytes(data)


def make_case(rng: random.Random) -> tuple[str, bytes]:
    """Draws the ending and the content of a file."""
    kind = rng.choice(KINDS)
    content = make_file(kind, rng)
    if rng.random() < 0.65:
        if kind.endswith(".gz") and rng.random() < 0.7:  # a whole gzip file of damaged text
            return kind, gzip.compress(damaged(gzip.decompress(content), rng))
        content = damaged(content, rng)
    return kind, content
