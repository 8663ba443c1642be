"""Where a run's model and adapter are found, with weights and without; fsspec's memory file system is the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jdpo.config import DPOConfig
from jdpo.training.sources import find_sources

URL = "memory://bucket/adapter"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """An adapter on a store, its base beside it, and an empty cache here."""
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


def test_a_model_with_the_config_of_an_adapter_beside_it_is_a_model(store: MemoryFileSystem) -> None:
    store.pipe("/bucket/adapter/model.safetensors", b"weights")
    sources = find_sources(config_of(URL), weights=False)
    assert (sources.name, sources.adapter_folder) == (URL, None)
