"""Reading a metrics.jsonl, damaged or not, and continuing it in a resumed run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jdpo.reports.metrics_file import cut_metrics, read_metrics, scan_metrics

LINES = [json.dumps({"step": step, "loss": 1 / step}).encode() + b"\n" for step in range(1, 6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES))
    return path


def kept_next_to(path: Path) -> Path:
    (kept,) = path.parent.glob("metrics.damaged-*.jsonl")
    return kept


def test_cutting_keeps_the_lines_up_to_the_checkpoint(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')  # a crash cut the last line
    assert cut_metrics(path, 3) is None
    assert path.read_bytes() == b"".join(LINES[:3])
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_run_without_a_checkpoint_evaluates_its_start_again(path: Path) -> None:
    path.write_bytes(b'{"step": 0, "eval_loss": 1.0}\n' + path.read_bytes())
    assert cut_metrics(path, None) is None
    assert path.read_bytes() == b""


@pytest.mark.parametrize("tail", [b"", b"{", b'{"step', b'{"step": 6', b'{"step": 6, "loss": "'])
def test_a_last_line_that_a_crash_cut_off_is_no_damage(tail: bytes, path: Path) -> None:
    path.write_bytes(path.read_bytes() + tail)
    assert scan_metrics(path).damage == []
    assert cut_metrics(path, 5) is None
    assert path.read_bytes() == b"".join(LINES)


def test_a_whole_last_line_counts_without_its_newline(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    assert cut_metrics(path, 5) is None
    assert path.read_bytes() == b"".join(LINES)


NO_NUMBER = "has a value that is not a number under 'loss'"
DAMAGE = {
    "a page of zeros": (bytes(4096), "is not JSON"),
    "a text": (b"hello", "is not JSON"),
    "bytes": (b"\xff\x00garbage", "is not JSON"),
    "half a line": (LINES[0][:14], "is not JSON"),
    "two lines in one": (LINES[0][:14] + LINES[1][:-1], "is not JSON"),
    "a list": (b"[1]", "is not a JSON object"),
    "a number": (b"7", "is not a JSON object"),
    "a null": (b"null", "is not a JSON object"),
    "deep nesting": (b"[" * 200_000, "is not JSON"),
    "no step": (b'{"loss": 1.0}', "has no step"),
    "a step in words": (b'{"step": "3"}', "has no step"),
    "half a step": (b'{"step": 3.5}', "has no step"),
    "true as step": (b'{"step": true}', "has no step"),
    "a negative step": (b'{"step": -1}', "has no step"),
    "a text as value": (b'{"step": 3, "loss": "low"}', NO_NUMBER),
    "a list as value": (b'{"step": 3, "loss": [1]}', NO_NUMBER),
    "null as value": (b'{"step": 3, "loss": null}', NO_NUMBER),
    "a number beyond floats": (b'{"step": 3, "loss": 1' + b"0" * 400 + b"}", NO_NUMBER),
    "a number beyond int": (b'{"step": 3, "loss": 1' + b"0" * 5000 + b"}", "is not JSON"),
}


@pytest.mark.parametrize("place", ["before", "after", "at the end without a newline"])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_left_out_and_kept_next_to_the_new_file(what: str, place: str, path: Path) -> None:
    text, fault = DAMAGE[what]
    if place == "before":
        number, content = 3, b"".join([*LINES[:2], text, b"\n", *LINES[2:]])
    elif place == "after":
        number, content = 5, b"".join([*LINES[:4], text, b"\n", *LINES[4:]])
    else:
        number, content = 6, b"".join([*LINES, text])
    path.write_bytes(content)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
    note = cut_metrics(path, 4)
    torn = place.startswith("at the end") and text.startswith(b'{"step": ')
    if torn:  # a file as a crash leaves it
        assert note is None
    else:
        kept = kept_next_to(path)
        assert note is not None
        assert f"{path} is damaged (line {number} {fault})" in note
        assert kept.name in note
        assert kept.read_bytes() == content
    assert path.read_bytes() == b"".join(LINES[:4])


def test_zeros_over_the_end_of_lines(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[30:60] = bytes(30)  # overwrites lines 2 and 3 and the newline between them
    path.write_bytes(content)
    note = cut_metrics(path, 5)
    assert note is not None
    assert path.read_bytes() == b"".join([LINES[0], *LINES[3:]])


@pytest.mark.parametrize("what", ["folder", "fifo", "broken link"])
def test_an_entry_that_is_not_a_file_is_moved(what: str, path: Path) -> None:
    path.unlink()
    if what == "folder":
        path.mkdir()
        (path / "inner").write_text("mine")
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path.parent / "nowhere")
    assert read_metrics(path) == []
    note = cut_metrics(path, 4)
    assert note is not None
    assert f"{path} cannot be read (it is not a file)" in note
    (kept,) = path.parent.iterdir()
    assert kept.name in note
    assert what != "folder" or (kept / "inner").read_text() == "mine"


def test_a_missing_file_is_reported_where_there_should_be_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    assert cut_metrics(path, None) is None
    assert "the metrics up to step 4 are lost" in str(cut_metrics(path, 4))


def test_two_damaged_files_are_both_kept(path: Path) -> None:
    for _ in range(2):
        path.write_bytes(b"hello\n")
        assert cut_metrics(path, 4) is not None
    assert len(list(path.parent.glob("metrics.damaged-*.jsonl"))) == 2
