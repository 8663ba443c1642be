"""Files are replaced as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from jdpo.durable import replacing, write_durably


def test_an_old_file_is_replaced_and_no_other_file_remains(tmp_path: Path) -> None:
    for content in (b"long before", "né", b"now"):
        write_durably(tmp_path / "a", content, writer="-1")
        expected = content if isinstance(content, bytes) else content.encode()
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", expected)]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_durably(tmp_path / "a", "old")
    (tmp_path / "a.tmp").mkdir()  # a folder blocks the place of the new content
    with pytest.raises(OSError, match="directory"):
        write_durably(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_a_block_that_raises_leaves_the_old_file_alone(tmp_path: Path) -> None:
    def write_half() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"new")
            raise ValueError("half way")

    write_durably(tmp_path / "a", "old")
    with pytest.raises(ValueError, match="half way"):
        write_half()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
