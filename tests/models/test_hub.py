"""Model names; the machine of the tests has no network (HF_HUB_OFFLINE=1)."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

from jdpo.models.hub import resolve_folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_an_existing_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "owner" / "model" / "model.safetensors").touch()
    assert resolve_folder(str(tmp_path / "owner" / "model")) == tmp_path / "owner" / "model"
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("owner/model") == Path("owner/model")


def test_a_folder_of_pickles_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(ValueError, match=r"found: only pytorch_model-00001-of-00002[.]bin") as error:
        resolve_folder(str(tmp_path))
    assert "save_pretrained" in str(error.value)


def test_an_empty_folder_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found: none"):
        resolve_folder(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        resolve_folder(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["./model", "/no/model", "~/no/model", "runs/sft/model", "model/"])
def test_what_looks_like_a_path_is_never_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=r"model folder .* does not exist"):
        resolve_folder(name)


def test_a_hub_name_without_network_says_so() -> None:
    with pytest.raises(ValueError, match=r"model 'owner/model' at revision 'main': .*the hub cannot be reached"):
        resolve_folder("owner/model", "main")


def test_a_name_that_the_hub_cannot_have() -> None:
    with pytest.raises(ValueError, match="not a valid hub id"):
        resolve_folder("my model!")


def test_a_cached_snapshot_is_used_without_network(tmp_path: Path) -> None:
    repo = tmp_path / "cache" / "models--owner--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert resolve_folder("owner/model") == snapshot
