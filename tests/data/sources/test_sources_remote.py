"""Rows on remote stores: fsspec's own memory file system and a web server on this machine serve as stores."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import http.server
import json
import random
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from jdpo.config import DatasetConfig
from jdpo.data.sources import open_source, read_rows
from jdpo.data.sources.remote import content_hash

ROWS = [{"prompt": f"question {i}", "completion": "wörd"} for i in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """The memory store, empty."""
    system = MemoryFileSystem()
    system.store.clear()
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def put(name: str, rows: list[dict[str, Any]] = ROWS) -> str:
    """Writes rows to the memory store in the format of the name's ending."""
    url, table = f"memory://bucket/{name}", pa.Table.from_pylist(rows)
    with fsspec.open(url, "wb") as stream:
        if name.endswith(".parquet"):
            pq.write_table(table, stream)
        elif name.endswith(".arrow"):
            with pa.ipc.new_file(stream, table.schema) as writer:
                writer.write_table(table)
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            stream.write(gzip.compress(text) if name.endswith(".gz") else text)
    return url


def read(url: str, split: str = "train") -> list[tuple[dict[str, Any], str]]:
    return list(read_rows(DatasetConfig(path=url, split=split)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_remote_file_is_read_as_a_local_one(memory: MemoryFileSystem, name: str) -> None:
    url = put(f"deep/{name}")
    rows = read(url)
    assert [raw for raw, _ in rows] == ROWS
    assert rows[2][1] == f"{name}:3"
    assert [raw for raw, _ in read(url, "train[-30%:]")] == ROWS[7:]


def test_a_remote_folder_has_splits(memory: MemoryFileSystem) -> None:
    put("set/train-00000-of-00001.parquet", ROWS[:6])
    put("set/test.jsonl", ROWS[6:])
    put("set/extra.jsonl")
    put("set/README.md")
    source = open_source(DatasetConfig(path="memory://bucket/set/", split="test"))
    assert next(source.rows()) == (ROWS[6], "set/test.jsonl:1")
    assert source.left_out == ("extra.jsonl",)
    assert list(source.file_digests()) == ["memory://bucket/set/test.jsonl"]
    assert [raw for raw, _ in read("memory://bucket/set")] == ROWS[:6]
    with pytest.raises(ValueError, match=r"^memory://bucket/set: no split 'dev' in this folder"):
        read("memory://bucket/set", "dev")
    put("deep/data/train/a.jsonl")
    assert read("memory://bucket/deep")[0] == (ROWS[0], "deep/data/train/a.jsonl:1")


def test_a_saved_dataset_is_read_from_a_store(memory: MemoryFileSystem, tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    memory.put(str(tmp_path / "saved"), "/bucket/saved", recursive=True)
    assert read("memory://bucket/saved")[0] == (ROWS[0], "saved/train/data-00000-of-00001.arrow:1")


def test_faults_name_the_file_by_its_address(memory: MemoryFileSystem) -> None:
    with pytest.raises(ValueError, match=r"^memory://bucket/no\.jsonl: no such file or folder$"):
        read("memory://bucket/no.jsonl")
    with fsspec.open("memory://bucket/a.jsonl", "wb") as stream:
        stream.write(b'{"a": 1}\n{"a": }\n')
    with pytest.raises(ValueError, match=r"^memory://bucket/a\.jsonl:2: broken JSON: Expecting value"):
        read("memory://bucket/a.jsonl")
    with fsspec.open("memory://bucket/a.parquet", "wb") as stream:
        stream.write(b"PAR1 no")
    with pytest.raises(ValueError, match=r"^memory://bucket/a\.parquet: not a readable Parquet file"):
        read("memory://bucket/a.parquet")
    with fsspec.open("memory://bucket/a.txt", "wb") as stream:
        stream.write(b"text")
    with pytest.raises(ValueError, match=r"^memory://bucket/a\.txt: cannot read this kind of file"):
        read("memory://bucket/a.txt")
    with pytest.raises(ValueError, match=r"revision is 'main', but .*hub only"):
        open_source(DatasetConfig(path=put("b.jsonl"), revision="main"))


def test_a_file_address_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    here = open_source(DatasetConfig(path=str(tmp_path / "a.jsonl")))
    assert read(f"file://{tmp_path}/a.jsonl") == list(here.rows())
    assert open_source(DatasetConfig(path=f"file://{tmp_path}/a.jsonl")).file_digests() == here.file_digests()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/no\.jsonl: no such file"):
        read(f"file://{tmp_path}/no.jsonl")


def test_a_member_of_an_archive_is_read_through_a_chain(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("sets/a.jsonl", LINES)
    assert read(f"zip://sets/a.jsonl::file://{tmp_path}/a.zip")[0] == (ROWS[0], "a.jsonl:1")


def test_the_digest_follows_the_content(memory: MemoryFileSystem, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    remote, local = (open_source(DatasetConfig(path=p)) for p in (put("a.jsonl"), str(tmp_path / "a.jsonl")))
    assert (
        list(remote.file_digests().values())
        == list(local.file_digests().values())
        == [hashlib.sha256(LINES).hexdigest()]
    )
    assert remote.digest() == local.digest()
    put("a.jsonl", ROWS[1:])
    assert open_source(DatasetConfig(path="memory://bucket/a.jsonl")).digest() != remote.digest()


class Hashing(MemoryFileSystem):
    """A store that provides MD5 hashes, as Google's does, and counts how often it is read."""

    protocol = "hashing"
    opened: ClassVar[list[str]] = []

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        about = super().info(path, **kwargs)
        if about["type"] == "file":
            content = self.store[self._strip_protocol(path)].getvalue()
            about["md5Hash"] = base64.b64encode(hashlib.md5(content).digest()).decode()
        return about

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("hashing://", "memory://"))

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self.opened.append(path)
        return super()._open(path, *args, **kwargs)


class Failing(MemoryFileSystem):
    """A store whose connection breaks while a file is read, or before."""

    protocol = "failing"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("failing://", "memory://"))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        if "refused" in path:
            raise PermissionError("403: the token has expired\nsee the manual")
        return super().info(path, **kwargs)

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        content = super()._open(path, *args, **kwargs).getvalue()

        class Breaking(MemoryFile):
            def read(self, size: int = -1) -> bytes:
                if self.tell() >= 2 * 2**20:
                    raise ConnectionError("the peer went away")
                return bytes(super().read(size))

        return Breaking(data=content)


@pytest.fixture(autouse=True)
def known_stores() -> None:
    for store in (Hashing, Failing):
        fsspec.register_implementation(store.protocol, store, clobber=True)
    Hashing.opened.clear()


def test_the_hash_of_a_store_saves_reading_the_file(memory: MemoryFileSystem) -> None:
    put("a.jsonl")
    source = open_source(DatasetConfig(path="hashing://bucket/a.jsonl"))
    assert source.file_digests() == {"hashing://bucket/a.jsonl": f"md5:{hashlib.md5(LINES).hexdigest()}"}
    first = source.digest()
    assert Hashing.opened == []
    put("a.jsonl", ROWS[1:])
    assert open_source(DatasetConfig(path="hashing://bucket/a.jsonl")).digest() != first


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"lfs": {"sha256": "ab" * 32}, "blob_id": "c0ffee"}, "ab" * 32),
        ({"lfs": None, "blob_id": "c0ffee"}, "git:c0ffee"),
        ({"md5Hash": base64.b64encode(bytes(16)).decode()}, "md5:" + "00" * 16),
        ({"ETag": '"' + "0a" * 16 + '"'}, "md5:" + "0a" * 16),
        ({"ETag": '"' + "0a" * 16 + '-3"'}, None),
        ({"ETag": 'W/"66a"'}, None),
        ({"size": 3, "mtime": 0}, None),
    ],
)
def test_only_hashes_of_content_are_used_as_digests(info: dict[str, Any], expected: str | None) -> None:
    assert content_hash(info) == expected


def test_a_connection_that_breaks_is_named_with_the_file(memory: MemoryFileSystem) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        rows = [{"text": random.Random(i).randbytes(900).hex()} for i in range(6000)]
        url = put(name, rows).replace("memory", "failing")
        message = rf"^{url}: cannot read from the store \(ConnectionError: the peer went away\); check .* start again$"
        with pytest.raises(ValueError, match=message):
            read(url)
        if name != "a.parquet" and not name.endswith(".gz"):
            with pytest.raises(ValueError, match=message):
                open_source(DatasetConfig(path=url)).digest()
    with pytest.raises(ValueError, match=r"refused\.jsonl: cannot read .*\(PermissionError: 403"):
        read("failing://bucket/refused.jsonl")


@pytest.mark.parametrize(
    ("protocol", "module", "package"), [("gs", "gcsfs", "gcsfs"), ("s3", "s3fs", "s3fs"), ("abfs", "adlfs", "adlfs")]
)
def test_a_package_that_a_store_needs_is_named(
    protocol: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # imitates an environment without the package
    message = rf"^{protocol}://bucket/a\.jsonl: reading {protocol}:// needs a package .*: pip install {package}$"
    with pytest.raises(ValueError, match=message):
        read(f"{protocol}://bucket/a.jsonl")


def test_a_store_that_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match=r"^nostore://a\.jsonl: cannot open the store: .*nostore"):
        read("nostore://a.jsonl")


def test_the_hub_out_of_reach_is_named() -> None:
    with pytest.raises(ValueError, match=r"^hf://datasets/org/name/a\.jsonl: cannot (read from|open) the store"):
        read("hf://datasets/org/name/a.jsonl")


class Web(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder; names with "closed" are forbidden."""

    def send_head(self) -> Any:
        return self.send_error(403) if "closed" in self.path else super().send_head()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that shows tmp_path."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Web, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_web_addresses_are_read(web: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "set" / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert read(f"{web}/set/a.jsonl")[2] == (ROWS[2], "a.jsonl:3")
    assert read(f"{web}/set/b.jsonl.gz?download=true#x")[2] == (ROWS[2], "b.jsonl.gz:3")
    assert [origin for _, origin in read(f"{web}/set/")][::10] == ["set/a.jsonl:1", "set/b.jsonl.gz:1"]
    with pytest.raises(ValueError, match=rf"^{web}/no\.jsonl: no such file or folder$"):
        read(f"{web}/no.jsonl?token=secret")
    with pytest.raises(ValueError, match=rf"^{web}/closed\.jsonl: cannot read from the store .*403") as caught:
        read(f"{web}/closed.jsonl?token=secret")
    assert "secret" not in str(caught.value)


def test_a_server_that_does_not_answer_is_not_reported_as_a_missing_file() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/a.jsonl"
    with pytest.raises(ValueError, match=rf"^{address}: cannot read from the store \(ClientConnect"):
        read(address)
