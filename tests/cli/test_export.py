"""`jdpo export` on the checkpoints of real runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import jdpo
from jdpo.checkpoint.output_folders import MARKER
from jdpo.cli.main import main
from tests.conftest import chat_pairs, write_jsonl
from tests.hub_server import TOKEN, Hub, serving_hub

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("exported")
    values = {
        "model_name_or_path": toy_model,
        "datasets": write_jsonl(folder / "pairs.jsonl", chat_pairs(20)),
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "max_length": 64,
        "global_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "remat": "none",
        "reference": "live",
        "save_steps": 3,
        "logging_steps": 1,
        "mesh.data": 8,
        "mesh.fsdp": 1,
    }
    assert main(["dpo", *(f"{key}={value}" for key, value in values.items())]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refusal(words: list[str], capsys: Capture) -> str:
    capsys.readouterr()
    assert main(["export", *words]) == 2
    return capsys.readouterr().err


def test_the_newest_step_gives_the_model_of_the_run(run: Path, tmp_path: Path, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert f"exporting step 6 of {run} to {out}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    names = sorted(path.name for path in (run / "model").iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (run / "model" / name).read_bytes(), name


def test_an_earlier_step_by_its_folder_or_by_number(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run / "checkpoints" / "3"), str(tmp_path / "by_folder")]) == 0
    words = [str(run), str(tmp_path / "by_number"), "--step", "3", "--dtype", "float16", "--max_shard_size", "50KB"]
    assert main(["export", *words]) == 0
    one = load_file(tmp_path / "by_folder" / "model.safetensors")
    index = json.loads((tmp_path / "by_number" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    last = load_file(run / "model" / "model.safetensors")
    assert one.keys() == index["weight_map"].keys() == last.keys()
    for name, file_name in index["weight_map"].items():
        np.testing.assert_array_equal(
            load_file(tmp_path / "by_number" / file_name)[name], one[name].astype(np.float16), err_msg=name
        )
    assert any((one[name] != last[name]).any() for name in one)
    card = (tmp_path / "by_folder" / "README.md").read_text()
    assert "| step | 3 |" in card
    assert "The run did not record" not in card


def test_runs_and_checkpoints_can_be_asked(run: Path, tmp_path: Path) -> None:
    def weights(path: Path) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(jdpo.load(path, dtype="float32").params)]

    assert main(["export", str(run / "checkpoints" / "3"), str(tmp_path / "third")]) == 0
    third, exported = weights(tmp_path / "third"), weights(run / "model")
    jax.tree.map(np.testing.assert_array_equal, weights(run / "checkpoints" / "3"), third)
    # The model of a finished run, but the newest checkpoint of one in progress.
    assert jdpo.load(run).digest == jdpo.load(run / "model").digest
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"finished": False}))
    assert jdpo.load(run).name == f"{run} (step 6)"
    jax.tree.map(np.testing.assert_array_equal, weights(run), exported)
    assert any((one != other).any() for one, other in zip(exported, third, strict=True))
    half = jax.tree.leaves(jdpo.load(run, dtype="bfloat16").params)
    for one, other in zip(half, exported, strict=True):
        np.testing.assert_array_equal(one, other.astype(jnp.bfloat16), strict=True)
    with pytest.raises(ValueError, match="is a checkpoint of a run, whose config names"):
        jdpo.load(run, revision="main")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="holds no whole checkpoint yet"):
        jdpo.load(run)


@pytest.mark.parametrize("attention", ["splash", "cudnn"])
def test_a_run_whose_attention_kernel_needs_another_device(run: Path, tmp_path: Path, attention: str) -> None:
    saved = yaml.safe_load((run / "resolved_config.yaml").read_text())
    saved |= {"attention": attention, "attention_block_q": 128 if attention == "splash" else None}
    (run / "resolved_config.yaml").write_text(yaml.safe_dump(saved))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert f"attention: {attention}" in (tmp_path / "out" / "README.md").read_text()


def test_wrong_options_are_errors_like_all_others(capsys: Capture) -> None:
    shown = refusal(["run", "out", "--steps\x1b[31m", "3"], capsys)
    assert shown == "jdpo: error: unrecognized arguments: --steps\\x1b[31m 3; did you mean '--step'?\n"


def test_a_folder_that_is_not_a_checkpoint_is_refused(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert "is not a checkpoint: expected the output_dir of a run" in refusal([str(tmp_path), str(out)], capsys)
    assert "no whole checkpoint of step 4; it has 3, 6" in refusal([str(run), str(out), "--step", "4"], capsys)
    step = str(run / "checkpoints" / "3")
    assert "is step 3; leave --step out" in refusal([step, str(out), "--step", "6"], capsys)
    assert "OUT is an address (gs://..)" in refusal([step, "gs://b/m"], capsys)
    for flag in ("--merge", "--no-merge"):
        assert f"{flag}: " in (shown := refusal([step, str(out), flag], capsys))
        assert "holds all weights, not adapters" in shown
    assert "belongs to its run; choose another place" in refusal([step, str(run / "checkpoints" / "x")], capsys)
    base = Path(yaml.safe_load((run / "resolved_config.yaml").read_text())["model_name_or_path"])
    assert f"is inside {base}, which is an input of this export" in refusal([step, str(base / "x")], capsys)
    assert (base / "config.json").is_file()
    assert "--public makes the repository of --push_to_hub" in refusal([step, str(out), "--public"], capsys)
    out.mkdir()
    (out / "thesis.tex").touch()
    assert "is not an export of jdpo (it has no .jdpo_export)" in refusal([step, str(out)], capsys)
    array = max((run / "checkpoints" / "3" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    assert f"{array.name} has changed since it was written" in refusal([step, str(tmp_path / "other")], capsys)
    assert not (tmp_path / "other").exists()


def test_relative_paths_of_a_config_start_where_the_run_was_started(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    saved, state = run / "resolved_config.yaml", json.loads((run / "run.json").read_text())
    config = yaml.safe_load(saved.read_text())
    model = Path(config["model_name_or_path"])
    there = tmp_path / "there"
    shutil.copytree(model, there / "own")
    digest = state["inputs"].pop(f"the model {model}")
    state |= {"started_in": str(there), "inputs": {**state["inputs"], "the model own": digest}}
    saved.write_text(yaml.safe_dump({**config, "model_name_or_path": "own"}))
    (run / "run.json").write_text(json.dumps(state))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(run), "out"]) == 0
    assert Path.cwd() == tmp_path / "here"
    assert (tmp_path / "here" / "out" / "model.safetensors").is_file()
    # Another model of the same name must not be taken as the base of these weights.
    other = json.loads((there / "own" / "config.json").read_text()) | {"rope_theta": 77.0}
    (there / "own" / "config.json").write_text(json.dumps(other))
    assert f"the model own in own is not the one that {run} started from" in refusal([str(run), "out"], capsys)
    shutil.rmtree(there)
    assert "'own': no such local folder" in refusal([str(run), "out"], capsys)


def test_damaged_state_and_files_in_the_way_are_named(run: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    assert "file, which is a file" in refusal([str(run), str(tmp_path / "file" / "x")], capsys)
    whole = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**whole, "command": "ppo"}))
    assert "was not written by a run of jdpo (sft, dpo)" in refusal([str(run), str(tmp_path / "out")], capsys)
    (run / "run.json").write_text("{")
    assert f"{run / 'run.json'}: not valid JSON" in refusal([str(run), str(tmp_path / "out")], capsys)


def run_jdpo(words: list[str], hub: Hub, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process that knows this hub and its token."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(jdpo.__file__).parents[1]),
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-m", "jdpo.cli.main", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.ci
def test_pushes_are_private_and_the_token_stays_where_it_is(run: Path, tmp_path: Path) -> None:
    saved = (run / "resolved_config.yaml").read_text()
    with serving_hub() as hub:
        words = [str(run), str(tmp_path / "out"), "--push_to_hub", "me/aligned"]
        exported = run_jdpo(["export", *words], hub, tmp_path)
        assert exported.returncode == 0, exported.stderr
        assert f"pushed to {hub.endpoint}/me/aligned" in exported.stdout
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != MARKER}
        assert hub.repositories["me/aligned"].files == files
        assert hub.repositories["me/aligned"].private
        assert hub.repositories["me/aligned"].commits == ["Step 6 of a jdpo run"]
        # Starting the finished run again with push keys exports and pushes it.
        config = tmp_path / "again.yaml"
        config.write_text(saved)
        words = [str(config), f"output_dir={run}", "push_to_hub=me/run", "mesh.data=1"]
        trained = run_jdpo(["dpo", *words], hub, tmp_path)
        assert trained.returncode == 0, trained.stderr
        assert f"pushed to {hub.endpoint}/me/run" in " ".join(trained.stderr.split())
        assert hub.repositories["me/run"].files["model.safetensors"] == files["model.safetensors"]
        hub.readonly = True
        refused = run_jdpo(["export", str(run), str(tmp_path / "no"), "--push_to_hub", "a b"], hub, tmp_path)
        assert refused.returncode == 2
        assert not (tmp_path / "no").exists()
    shown = exported.stdout + exported.stderr + trained.stdout + trained.stderr + refused.stderr
    assert TOKEN not in shown
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_push_keys_that_would_not_be_read(run_words: Callable[..., list[str]], capsys: Capture) -> None:
    assert main(["dpo", *run_words(push_public=True)]) == 2
    assert "push_public makes the repository of push_to_hub public" in capsys.readouterr().err
    assert main(["dpo", *run_words(push_to_hub="me/model", export_at_end=False)]) == 2
    assert "push_to_hub needs the export" in capsys.readouterr().err
