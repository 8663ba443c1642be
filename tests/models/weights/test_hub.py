"""Model names; the machine of the tests has no network (HF_HUB_OFFLINE=1)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

import jdpo
from jdpo.models.weights.hub_models import resolve_folder


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
def test_a_path_is_never_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=r"model folder .* does not exist"):
        resolve_folder(name)


def test_a_hub_name_without_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        resolve_folder("owner/model", "main")


def test_an_invalid_hub_name() -> None:
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


@contextlib.contextmanager
def serving(files: list[str]) -> Iterator[str]:
    """A hub with one repository; every file contains its own name."""

    numbered = list(enumerate(files))

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": name, "oid": f"{i:040}", "size": len(name)} for i, name in numbered]
                body = json.dumps(tree).encode()
            elif self.path.startswith("/api/"):
                siblings = [{"rfilename": name} for name in files]
                body = json.dumps({"id": "owner/model", "sha": "1" * 40, "siblings": siblings}).encode()
            else:
                body = self.path.rpartition("/")[2].encode()
            self.send_response(200)
            headers = {"Content-Length": len(body), "X-Repo-Commit": "1" * 40, "ETag": f'"{abs(hash(self.path)):x}"'}
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test's output free of requests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_which_files_are_downloaded(tmp_path: Path) -> None:
    wanted = ["config.json", "model-00001-of-00001.safetensors", "tokenizer.json", "chat_template.jinja"]
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "pytorch_model.bin", "code.py"]
    others += ["original/model.safetensors"]
    program = "from jdpo.models.weights.hub_models import resolve_folder; print(resolve_folder('owner/model'))"
    with serving(wanted + others) as endpoint:
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(jdpo.__file__).parents[1]),
        }
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    folder = Path(run.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == sorted(wanted)


def test_a_pickled_adapter_has_its_own_advice(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors.*save_file\(torch\.load") as error:
        resolve_folder(str(tmp_path))
    assert "AutoModelForCausalLM" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pipe_instead_of_a_model_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    os.mkfifo(tmp_path / "notes")  # jdpo reads no such file
    assert resolve_folder(str(tmp_path)) == tmp_path
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: expected a file of the model, found a pipe or a device"):
        resolve_folder(str(tmp_path))
    with pytest.raises(ValueError, match="found a pipe or a device"):
        resolve_folder(str(tmp_path), weights=False)


def test_a_pipe_among_further_chat_templates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "additional_chat_templates").mkdir()
    os.mkfifo(tmp_path / "additional_chat_templates" / "rag.jinja")
    with pytest.raises(ValueError, match=r"rag\.jinja: expected a file of the model"):
        resolve_folder(str(tmp_path))


def test_a_link_to_a_device_is_refused_and_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "model.safetensors").symlink_to("blob")
    assert resolve_folder(str(tmp_path)) == tmp_path
    (tmp_path / "vocab.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"vocab\.json: expected a file of the model"):
        resolve_folder(str(tmp_path))
