"""Queries of addresses may be keys: a run reads with them, and leaves no file that holds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jdpo.cli.main import main
from tests.web_server import serving_web

Words = Callable[..., list[str]]
Capture = pytest.CaptureFixture[str]

SECRETS = ("s3cr3t-one", "s3cr3t-two")


@pytest.fixture
def server(toy_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that has the toy model as a zip file and the pairs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "web"
    folder.mkdir()
    shutil.make_archive(str(folder / "model"), "zip", toy_model)
    for name in ("one.jsonl", "two.jsonl"):
        shutil.copy(pairs_file, folder / name)
    with serving_web(folder, [f"token={secret}" for secret in SECRETS]) as address:
        yield address


def words_of(run_words: Words, server: str, secret: str, **overrides: object) -> list[str]:
    data = [f"{server}/{name}.jsonl?token={secret}" for name in ("one", "two")]
    values = {
        "model_name_or_path": f"zip://::{server}/model.zip?token={secret}",
        "datasets": json.dumps(data),
        "max_steps": 6,
        "num_train_epochs": 2,
        "lora.r": 2,
        "lora.target_modules": "[q_proj]",
        "report_to": "tensorboard",
    }
    return ["dpo", *run_words(**(values | overrides))]


def files_with_secrets(folder: Path) -> list[str]:
    """Returns the files that hold a secret in their content or name."""
    found = []
    for path in sorted(folder.rglob("*")):
        held = path.read_bytes() if path.is_file() else b""
        found += [str(path) for secret in SECRETS if secret.encode() in held or secret in path.name]
    return found


def test_no_file_holds_the_query_of_an_address_and_another_query_resumes(
    run_words: Words, server: str, tmp_path: Path, capsys: Capture
) -> None:
    run, (one, two) = tmp_path / "run", SECRETS
    assert main(words_of(run_words, server, one)) == 0
    output = "".join(capsys.readouterr())
    assert "reference: cached" in output, "or the key of a cache would not be looked at"
    assert files_with_secrets(tmp_path) == []
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"zip://::{server}/model.zip"
    inputs = json.loads((run / "run.json").read_text())["inputs"]
    assert f"the model zip://::{server}/model.zip" in inputs
    assert {"rewards/margins/one", "rewards/margins/two"} <= json.loads(
        (run / "metrics.jsonl").read_text().splitlines()[-1]
    ).keys()
    # As if it had been stopped before its export, and the addresses had been signed again since.
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"finished": False}))
    assert main(words_of(run_words, server, two)) == 0
    again = "".join(capsys.readouterr())
    assert "resuming from the checkpoint of step 6" in again
    assert json.loads((run / "run.json").read_text())["inputs"] == inputs
    assert files_with_secrets(tmp_path) == []
    assert len(list((tmp_path / "home" / "jdpo" / "models").iterdir())) == 1, "one model, whatever it is signed with"
    # Errors do not contain them either.
    assert main(words_of(run_words, server, one, seed=5)) == 2
    assert main(words_of(run_words, server, f"{one}-wrong", output_dir=tmp_path / "wrong")) == 2
    assert main(words_of(run_words, server, one, reference_model="x", loss_type="simpo")) == 2
    for text in (output, again, "".join(capsys.readouterr())):
        assert "s3cr3t" not in text
