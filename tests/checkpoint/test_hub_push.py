"""Pushing a folder, against a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from jdpo.checkpoint.hub_push import check_push, push_folder
from jdpo.checkpoint.output_folders import MARKER
from tests.hub_server import TOKEN, Hub, serving_hub
from tests.integration.cluster import free_port

# huggingface_hub passes files to httpx in a way that httpx has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def test_a_folder_goes_to_a_private_repository_in_one_commit(hub: Hub, folder: Path) -> None:
    check_push("me/aligned")
    assert push_folder(folder, "aligned", public=False, message="step 3") == f"{hub.endpoint}/me/aligned"
    repository = hub.repositories["me/aligned"]
    assert repository.private
    assert repository.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert repository.commits == ["step 3"]
    (folder / "config.json").write_text('{"a": 1}')
    push_folder(folder, "me/aligned", public=False, message="again")
    assert repository.files["config.json"] == b'{"a": 1}'


def test_public_only_when_asked(hub: Hub, folder: Path) -> None:
    push_folder(folder, "me/open", public=True, message="first")
    assert not hub.repositories["me/open"].private
    with pytest.raises(ValueError, match="push_to_hub me/open: that repository is public"):
        push_folder(folder, "me/open", public=False, message="second")
    assert hub.repositories["me/open"].commits == ["first"]


def test_refusals_come_early_and_never_hold_the_token(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not a valid name for the hub"):
        check_push("my model!")
    hub.readonly = True
    with pytest.raises(ValueError, match=r"the hub refused: the token has no write access") as error:
        push_folder(folder, "me/aligned", public=False, message="")
    assert TOKEN not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match=r"the hub refused: the token is not valid") as error:
        check_push("me/aligned")
    assert "hf_other" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="there is no token; log in with `hf auth login`"):
        check_push("me/aligned")


def test_weights_of_an_older_push_do_not_stay(hub: Hub, folder: Path) -> None:
    push_folder(folder, "me/aligned", public=False, message="one file")
    files = hub.repositories["me/aligned"].files
    older = ("model[1].safetensors", "adapter_config.json", "adapter_model.bin", "pytorch_model.bin.index.json")
    others = dict.fromkeys(("notes.md", "onnx/model.safetensors", "vocab.json"), b"")
    files.update(dict.fromkeys(older, b"") | others)
    (folder / "model.safetensors").unlink()
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", MARKER):
        (folder / name).write_bytes(b"{}")
    push_folder(folder, "me/aligned", public=False, message="shards")
    assert hub.repositories["me/aligned"].commits == ["one file", "shards"]
    pushed = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARKER}
    assert files == pushed | others


def test_an_older_tokenizer_does_not_stay_under_a_new_one(hub: Hub, folder: Path) -> None:
    push_folder(folder, "me/aligned", public=False, message="weights alone")
    files = hub.repositories["me/aligned"].files
    others = dict.fromkeys(("tokenizer_notes.md", "tools/vocab.json", "vocab.py"), b"")
    files.update(dict.fromkeys(("chat_template.jinja", "special_tokens_map.json", "vocab.json"), b"") | others)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_bytes(b"{}")
    push_folder(folder, "me/aligned", public=False, message="with a tokenizer")
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()} | others


def test_a_hub_that_does_not_answer(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="me/aligned: the hub cannot be reached: ConnectError"):
        check_push("me/aligned")
    with pytest.raises(ValueError, match="cannot be reached: ConnectError") as error:
        push_folder(folder, "me/aligned", public=False, message="")
    assert f"The complete model is in {folder};" in str(error.value)


def test_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match=r"push_to_hub me/aligned: the hub cannot be reached: "):
        check_push("me/aligned")
