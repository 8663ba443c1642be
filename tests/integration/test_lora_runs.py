"""Runs that train adapters: their checkpoints, how they resume, where they start, and what they export."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import jdpo
from jdpo.cli.main import main
from jdpo.config import DPOConfig, load_config
from jdpo.models.transformer import Weights
from jdpo.training.run import train
from jdpo.training.setup.folder_digests import folder_digest
from tests.run_stops import EachStep, SignalAt

Words = Callable[..., list[str]]
Start = Callable[..., subprocess.Popen[str]]
SameRun = Callable[[Path, Path], None]
Capture = pytest.CaptureFixture[str]

LORA = {"lora.r": 2, "lora.alpha": 4, "learning_rate": 1e-2}
TIE = "start: policy equals reference"


@pytest.fixture(scope="module")
def lora_run(cut_words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of an uninterrupted run of 12 steps."""
    output_dir = tmp_path_factory.mktemp("lora") / "run"
    assert main(cut_words(output_dir, **LORA)) == 0
    return output_dir


def saved_shapes(run: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the shapes of all arrays of the last checkpoint."""
    path = (run / "checkpoints" / "12" / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
    import jax

    return [(jax.tree_util.keystr(p), tuple(leaf.shape)) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def test_a_checkpoint_holds_adapters_and_no_base(lora_run: Path, toy_model: Path) -> None:
    adapters = load_file(lora_run / "model" / "adapter_model.safetensors")
    num_trained = sum(values.size for values in adapters.values())
    shapes = saved_shapes(lora_run)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes}
    assert sum(sizes.values()) <= 3 * num_trained + 8, "adapters, two moments of each, and scalars"
    base = load_file(toy_model / "model.safetensors")
    num_bytes = sum(file.stat().st_size for file in (lora_run / "checkpoints" / "12" / "state").rglob("*"))
    assert num_bytes < sum(values.nbytes for values in base.values())
    position = json.loads(next((lora_run / "checkpoints" / "12" / "position").rglob("metadata")).read_text())
    assert position["base"]["model"] == str(toy_model)
    assert len(position["base"]["digest"]) == 64


def test_adapters_can_be_asked_without_a_merge(lora_run: Path, toy_model: Path, tmp_path: Path) -> None:
    assert main(["export", str(lora_run), str(tmp_path / "merged"), "--merge", "--dtype", "float32"]) == 0
    question = [{"role": "user", "content": "slow river"}]
    merged, base = (jdpo.load(path).logps(question, "green paper").logps for path in (tmp_path / "merged", toy_model))
    assert np.abs(np.subtract(merged, base)).max() > 1e-2
    digests = set()
    for path in (lora_run, lora_run / "checkpoints" / "12", lora_run / "checkpoints" / "10"):
        model = jdpo.load(path)
        assert isinstance(model.params, Weights)
        distance = np.abs(np.subtract(model.logps(question, "green paper").logps, merged)).max()
        assert distance > 1e-3 if path.name == "10" else distance < 2e-5
        digests.add(model.digest)
    assert len(digests) == 3


def test_a_stopped_run_resumes_to_the_same_end(
    cut_words: Words, lora_run: Path, same_run: SameRun, tmp_path: Path
) -> None:
    words = cut_words(tmp_path / "cut", **LORA)

    assert train(load_config(DPOConfig, None, words[1:]), callbacks=[SignalAt(7)]).step == 7
    assert main(words) == 0
    same_run(tmp_path / "cut", lora_run)


@pytest.mark.full
def test_a_killed_run_resumes_to_the_same_end(
    cut_words: Words, lora_run: Path, same_run: SameRun, jdpo_process: Start, tmp_path: Path
) -> None:
    words = cut_words(tmp_path / "cut", **LORA)
    process = jdpo_process(words, "SIGKILL", "jdpo.training.step_reports:StepReports.read", "before", 7)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    assert main(words) == 0
    same_run(tmp_path / "cut", lora_run)


def test_another_base_is_refused_by_name(
    cut_words: Words, toy_model: Path, lora_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = Path(shutil.copytree(toy_model, tmp_path / "base"))
    words = cut_words(tmp_path / "run", model_name_or_path=base, max_steps=2, **LORA)
    assert main(words) == 0
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.nan  # refused when it is read
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "run" / "run.json").write_text(
        json.dumps(json.loads((tmp_path / "run" / "run.json").read_text()) | {"finished": False, "inputs": {}})
    )
    capsys.readouterr()
    assert main(words) == 2, "even where run.json no longer knows the model: the checkpoint does"
    error = capsys.readouterr().err
    assert f"adapters on {base}" in error
    assert "adapters fit only the base that they were trained on" in error


def test_an_adapter_export_does_not_read_a_base_deleted_or_changed_during_training(
    cut_words: Words, toy_model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(toy_model, tmp_path / "base"))
    words = cut_words(tmp_path / "run", model_name_or_path=base, max_steps=2, **LORA)[1:]
    config = load_config(DPOConfig, None, words)
    digest = folder_digest(base)
    train(config, callbacks=[EachStep(lambda run: shutil.rmtree(base, ignore_errors=True))])
    position = json.loads(next((tmp_path / "run" / "checkpoints" / "2" / "position").rglob("metadata")).read_text())
    assert position["base"]["digest"] == digest
    # Equal in name, size and time, so this process uses the digest that it knows; reading the file would fail.
    shutil.copytree(toy_model, base)
    file = base / "model.safetensors"
    status, weights = file.stat(), load_file(file)
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, file, metadata={"format": "pt"})
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    def again(*more: str, **options: Any) -> None:
        state = json.loads((tmp_path / "run" / "run.json").read_text())
        (tmp_path / "run" / "run.json").write_text(json.dumps(state | {"finished": False}))
        shutil.rmtree(tmp_path / "run" / "model")
        train(load_config(DPOConfig, None, [*words, *more]), **options)

    before = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    again()
    after = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {name: values.tobytes() for name, values in after.items()} == {
        name: values.tobytes() for name, values in before.items()
    }
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* holds NaN"):
        again("lora.merge=true")
    (tmp_path / "run" / "model").mkdir()
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* holds NaN"):
        again(callbacks=[EachStep(lambda run: None)])


@pytest.fixture(scope="module")
def sft_adapter(cut_words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter from supervised training, far from the base."""
    folder = tmp_path_factory.mktemp("sft")
    words = ["sft", *cut_words(folder / "run", max_steps=4, **(LORA | {"learning_rate": 3e-2}))[1:]]
    rows = [{"prompt": "river green?", "completion": f" paper {word}"} for word in ("stone", "light", "bread", "road")]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 5), encoding="utf-8")
    words = [word for word in words if not word.startswith(("datasets=", "eval_"))] + [f"datasets={data}"]
    assert main(words) == 0
    return folder / "run" / "model"


def last_loss(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float([line for line in lines if "loss" in line][-1]["loss"])


def test_an_sft_adapter_is_where_dpo_starts_and_its_reference(
    cut_words: Words, sft_adapter: Path, toy_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1}
    capsys.readouterr()
    assert main(cut_words(tmp_path / "live", model_name_or_path=sft_adapter, reference="live", **settings)) == 0
    output = "".join(capsys.readouterr())
    assert f"{TIE} (largest difference 0.0e+00" in output
    assert "loss 0.6931 (0.6931 expected)" in output
    # Start from the same adapter by lora.adapter, with a cached reference.
    by_name = {"lora.adapter": sft_adapter, "lora.r": 2}
    assert main(cut_words(tmp_path / "auto", max_length=64, **by_name, **settings)) == 0
    output = "".join(capsys.readouterr())
    assert "reference: cached" in output
    assert TIE in output
    assert last_loss(tmp_path / "auto") == pytest.approx(last_loss(tmp_path / "live"), rel=1e-4)
    assert main(cut_words(tmp_path / "no", **(by_name | {"lora.r": 3}), **settings)) == 2
    assert "r 3 asked for, 2 there" in capsys.readouterr().err


def test_merged_weights_are_base_plus_adapter(
    cut_words: Words, lora_run: Path, toy_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    assert main(cut_words(run, **LORA, **{"lora.merge": "true"})) == 0
    assert "exporting the model of step 12" in "".join(capsys.readouterr()), "a finished run exports again"
    merged, base = (load_file(folder / "model.safetensors") for folder in (run / "model", toy_model))
    adapter = load_file(lora_run / "model" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    num_adapted = 0
    for name, values in merged.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = base[name].astype(np.float32)
        if f"{prefix}A.weight" in adapter:
            num_adapted += 1
            expected = expected + 4 / 2 * adapter[f"{prefix}B.weight"] @ adapter[f"{prefix}A.weight"]
            assert np.abs(expected - base[name]).max() > 1e-3
        np.testing.assert_allclose(values, expected.astype(values.dtype), atol=1e-6, err_msg=name)
    assert num_adapted == 14
    assert not (run / "model" / "adapter_config.json").exists()


def test_an_adapter_export_refuses_options_of_a_merged_one(lora_run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"

    def refusal(*words: str) -> str:
        capsys.readouterr()
        assert main(["export", str(lora_run), str(out), *words]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "no effect of --dtype: adapters alone" in refusal("--dtype", "bfloat16")
    assert "no effect of --max_shard_size" in refusal("--max_shard_size", "1MB", "--no-merge")
    both = ("--dtype", "float32", "--max_shard_size", "1MB")
    assert "no effect of --dtype and --max_shard_size" in (message := refusal(*both))
    assert "leave it out, or give --merge" in message
    assert main(["export", str(lora_run), str(out), *both, "--merge"]) == 0
    assert {values.dtype for values in load_file(out / "model.safetensors").values()} == {np.dtype(np.float32)}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loads_a_runs_adapter_onto_its_base(lora_run: Path) -> None:
    import jax
    import torch
    from peft import AutoPeftModelForCausalLM

    from jdpo.models.families import read_model_config
    from jdpo.models.lora.adapter_config import base_of
    from jdpo.models.lora.adapters import abstract_adapters, weights_of
    from jdpo.models.lora.base_weights import Base
    from jdpo.models.lora.peft_folder import load_adapters, read_adapter
    from jdpo.models.lora.targets import find_sites
    from jdpo.models.transformer import Transformer, make_apply_fn
    from jdpo.models.weights.loading import load_params

    tokens = np.random.default_rng(0).integers(0, 50, (2, 9))
    peft_model = AutoPeftModelForCausalLM.from_pretrained(str(lora_run / "model")).eval()
    with torch.no_grad():
        expected = peft_model(torch.tensor(tokens)).logits.numpy()
    folder = Path(base_of(lora_run / "model")[0])
    model = Transformer(read_model_config(folder))
    adapter = read_adapter(lora_run / "model", find_sites(model))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one, abstract_adapters(adapter.lora, np.float32))
    adapters = load_adapters(adapter, shardings, np.dtype(np.float32))
    weights = weights_of(adapter.lora, Base(load_params(folder, model), {}), adapters)
    found = jax.jit(make_apply_fn(model))(weights, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(found, expected, atol=1e-4)
