"""Finding a run's model and adapter, with and without weights, on fsspec's memory file system as a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jdpo.config import DPOConfig
from jdpo.training.setup.model_sources import find_sources
from tests.web_server import serving_web

URL = "memory://bucket/adapter"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """An adapter on a store, its base next to it, and an empty local cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = MemoryFileSystem()
    system.store.clear()
    config = {"base_model_name_or_path": "memory://bucket/base"}
    system.pipe("/bucket/adapter/adapter_config.json", json.dumps(config).encode())
    system.pipe("/bucket/adapter/adapter_model.safetensors", b"weights")
    system.pipe("/bucket/base/config.json", b"{}")
    system.pipe("/bucket/base/model.safetensors", b"weights")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def config_of(name: str) -> DPOConfig:
    return DPOConfig(model_name_or_path=name, output_dir="o", datasets=("d",))  # type: ignore[arg-type]


def test_an_adapter_comes_with_its_weights_where_those_of_the_base_are_not_asked_for(store: MemoryFileSystem) -> None:
    sources = find_sources(config_of(URL), weights=False)
    assert sources.adapter_folder is not None
    assert (sources.adapter_folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert (sources.model_folder / "config.json").is_file()
    assert not list(sources.model_folder.glob("*.safetensors"))
    assert sources.tokenizer_folder == sources.model_folder, "the adapter has none"


def test_the_base_that_an_adapter_names_may_hold_no_password_and_is_written_without_its_query(
    store: MemoryFileSystem, tmp_path: Path
) -> None:
    def naming(base: str) -> DPOConfig:
        config = json.dumps({"base_model_name_or_path": base})
        store.pipe("/bucket/adapter/adapter_config.json", config.encode())
        return config_of(URL)

    with pytest.raises(ValueError, match=r"base_model_name_or_path in .*: an address may not hold a pass") as caught:
        find_sources(naming("memory://me:hunter2@bucket/base"))
    assert "hunter2" not in str(caught.value)
    shutil.make_archive(str(tmp_path / "base"), "zip", find_sources(naming("memory://bucket/base")).model_folder)
    (tmp_path / "config.json").write_text("{}")
    with serving_web(tmp_path) as address:
        sources = find_sources(naming(f"zip://::{address}/base.zip?token=hunter2"))
        assert sources.name == f"zip://::{address}/base.zip"
        assert (sources.model_folder / "model.safetensors").read_bytes() == b"weights"
        with pytest.raises(ValueError, match=rf"model {address}/: this store lists files without their siz") as caught:
            find_sources(config_of(f"{address}/?token=hunter2"))
        assert "hunter2" not in str(caught.value)


def test_an_adapter_on_an_adapter_is_refused(store: MemoryFileSystem) -> None:
    store.pipe("/bucket/base/adapter_config.json", b"{}")
    store.mv("/bucket/base/model.safetensors", "/bucket/base/adapter_model.safetensors")
    with pytest.raises(ValueError, match="its base memory://bucket/base is an adapter as well"):
        find_sources(config_of(URL))


def test_a_model_with_the_config_of_an_adapter_next_to_it_is_a_model(store: MemoryFileSystem) -> None:
    store.pipe("/bucket/adapter/model.safetensors", b"weights")
    sources = find_sources(config_of(URL), weights=False)
    assert (sources.name, sources.adapter_folder) == (URL, None)
