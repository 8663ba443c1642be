"""Locks and digests of files, and JSON objects in files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from pathlib import Path

import pytest

from jdpo.file_digests import cached_file_digest, file_digest
from jdpo.file_locks import is_locked, lock_file
from jdpo.json_files import read_json, write_json


def test_a_digest_is_the_sha256_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"rows" * 100_000)
    expected = hashlib.sha256(b"rows" * 100_000).hexdigest()
    assert file_digest(path) == cached_file_digest(path) == expected


def test_a_cached_digest_follows_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    before = cached_file_digest(path)
    path.write_text("newer")
    assert cached_file_digest(path) == file_digest(path) != before
    path.write_text("other")
    os.utime(path, ns=(1, 1))
    assert cached_file_digest(path) == file_digest(path)


def test_a_lock_is_held_until_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("the owner")
    lock = lock_file(path)
    assert lock is not None
    assert lock_file(path) is None
    assert path.read_text() == "the owner", "who waits can read who has the lock"
    lock.close()
    again = lock_file(path, wait=True)
    assert again is not None
    again.close()


def test_who_looks_at_a_lock_does_not_take_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not is_locked(path)
    lock = lock_file(path)
    assert lock is not None
    assert is_locked(path)
    lock.close()
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another process that looks
        assert not is_locked(path)
        assert lock_file(path) is None
        looked = threading.Timer(0.2, lambda: fcntl.flock(other, fcntl.LOCK_UN))
        looked.start()
        lock = lock_file(path, patience=60)
        looked.join()
        assert lock is not None
        lock.close()


@pytest.mark.parametrize(
    ("text", "phrase"), [("{", "not valid JSON"), ("[1]", "found list"), ("[" * 99_999, "not valid")]
)
def test_a_file_without_a_json_object_is_named(tmp_path: Path, text: str, phrase: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: .*{phrase}"):
        read_json(path)


def test_a_json_object_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "né", "sizes": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"name": "né", "sizes": [1, 2]}
