"""Model folders on stores: fsspec's memory file system represents them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jdpo.models.weights.hub_models import resolve_folder

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 10, "tokenizer.json": b"[]"}
URL = "memory://bucket/a/model"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """A store with one model, and an empty local cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = MemoryFileSystem()
    system.store.clear()
    for name, content in {**FILES, "optimizer.pt": b"x", "code.py": b"x", "deep/config.json": b"x"}.items():
        system.pipe(f"/bucket/a/model/{name}", content)
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def found(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", "jdpo_download.json")
    }


def test_a_folder_is_downloaded_once_and_again_when_it_changes(store: MemoryFileSystem, tmp_path: Path) -> None:
    folder = resolve_folder(URL)
    assert found(folder) == FILES
    assert tmp_path / "cache" in folder.parents
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name in FILES}
    assert resolve_folder(f"{URL}/") == folder
    assert {name: (folder / name).stat().st_mtime_ns for name in FILES} == times
    (folder / "model.safetensors").write_bytes(b"cut short")
    assert resolve_folder(URL) == folder
    assert found(folder) == FILES


def test_a_model_that_changes_gets_a_folder_of_its_own(store: MemoryFileSystem) -> None:
    """Matters since a trainer may still be reading the older version."""
    folder = resolve_folder(URL)
    store.pipe("/bucket/a/model/config.json", b'{"a": 1}')
    store.rm("/bucket/a/model/tokenizer.json")
    newer = resolve_folder(URL)
    assert newer != folder
    assert found(newer) == {"config.json": b'{"a": 1}', "model.safetensors": FILES["model.safetensors"]}
    assert (newer / "model.safetensors").samefile(folder / "model.safetensors")  # a second call does not download again
    assert found(folder) == FILES


def test_weights_in_the_cache_stay_when_only_the_other_files_are_needed(store: MemoryFileSystem) -> None:
    folder = resolve_folder(URL)
    inode = (folder / "model.safetensors").stat().st_ino
    assert resolve_folder(URL, weights=False) == folder
    assert (folder / "model.safetensors").stat().st_ino == inode
    assert found(folder) == FILES


def test_an_interrupted_download_continues_where_it_was(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    broken = ["tokenizer.json"]
    own = MemoryFileSystem.open

    def opening(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        name = path.rpartition("/")[2]
        opened.append(name)
        if name in broken:
            raise ConnectionResetError("the line broke")
        return own(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "open", opening)
    with pytest.raises(ValueError, match=r"downloading tokenizer\.json failed: ConnectionResetError"):
        resolve_folder(URL)
    assert sorted(opened) == sorted(FILES)
    opened.clear()
    broken.clear()
    assert found(resolve_folder(URL)) == FILES
    assert opened == ["tokenizer.json"]


def test_faults_name_the_address(store: MemoryFileSystem) -> None:
    with pytest.raises(ValueError, match=r"^model memory://bucket/nowhere: no such folder on the store$"):
        resolve_folder("memory://bucket/nowhere")
    with pytest.raises(ValueError, match=r"revision 'main' applies to hub repositories only"):
        resolve_folder(URL, "main")
    with pytest.raises(ValueError, match=r"^model nosuch://bucket/model: cannot read the store: "):
        resolve_folder("nosuch://bucket/model")
    store.rm("/bucket/a/model/model.safetensors")
    with pytest.raises(ValueError, match=r"has no \*.safetensors weights"):
        resolve_folder(URL)


def test_a_file_that_is_not_what_the_store_says_is_refused(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lets the store give MD5 hashes, as Google's does."""
    own, told = MemoryFileSystem.ls, {"wrong": True}

    def ls(self: Any, path: str, detail: bool = True, **options: Any) -> Any:
        entries = own(self, path, detail, **options)
        for entry in entries:
            if entry["type"] == "file":
                content = b"other" if told["wrong"] else self.cat(entry["name"])
                entry["md5Hash"] = base64.b64encode(hashlib.md5(content).digest()).decode()
        return entries

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    with pytest.raises(ValueError, match=r"downloading \S+ failed: its md5 differs"):
        resolve_folder(URL)
    told["wrong"] = False
    assert found(resolve_folder(URL)) == FILES
