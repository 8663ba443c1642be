"""`jdpo plan`: the whole command on a toy, by formula, and its command line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.cli.commands.clusters.plan import parser
from jdpo.cli.main import main
from jdpo.cli.parsing import parse
from jdpo.config import CONFIGS, load_config

by_formula = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="here, plans for GPUs are compiled"
)


@pytest.fixture
def shape(toy_model: Path, tmp_path: Path) -> Path:
    """A folder with the config.json of the toy model, and nothing else."""
    folder = tmp_path / "shape"
    folder.mkdir()
    shutil.copy(toy_model / "config.json", folder)
    return folder


@pytest.fixture
def words(shape: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Returns the words of a plan; keyword arguments are keys of the config."""

    def of(*options: str, **keys: Any) -> list[str]:
        usual = {"model_name_or_path": shape, "cache_dir": tmp_path / "cache", "global_batch_size": 8, "max_length": 64}
        return ["plan", *options, *(f"{key}={value}" for key, value in (usual | keys).items())]

    return of


GPUS = ("--on", "h100x8", "h200", "--lengths", "16,20,24")


@by_formula
def test_a_plan_needs_config_json_alone(
    words: Callable[..., list[str]], shape: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("currency: EUR\nper_chip_hour: {h100: 4}\n")
    assert main(words(*GPUS, "--num_rows", "80", f"--prices={prices}", "--json")) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    eight, one = document["targets"]
    assert "h100x8: 1 of 2, without a compiler" in captured.err
    assert [each["fits"] for each in (eight, one)] == [True, True]
    assert eight["how"] == "estimated"
    assert (eight["devices"], eight["hosts"], document["run"]["steps"]) == (8, 1, 10)
    assert document["rows"]["rows_per_epoch"] == 80
    assert 0 < eight["peak_bytes"] < eight["hbm_bytes"]
    assert 0 < eight["step_seconds_low"] <= eight["step_seconds_high"]
    assert 0 < eight["cost_low"] <= eight["cost_high"]
    assert one["cost_low"] is None
    # What is to be pasted is a config.
    (tmp_path / "pasted.yaml").write_text(eight["settings_yaml"])
    keys = [f"model_name_or_path={shape}", "datasets=x", "output_dir=x"]
    pasted: Any = load_config(CONFIGS["dpo"], tmp_path / "pasted.yaml", keys)
    assert pasted.mesh.data * pasted.mesh.fsdp == 8
    assert [path.name for path in shape.iterdir()] == ["config.json"]


@by_formula
def test_lengths_come_from_the_rows_and_later_from_the_cache(
    run_words: Callable[..., list[str]], toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(toy_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    keys = ["plan", "--on=h100", *run_words(model_name_or_path=folder, **{"mesh.data": 1})]
    assert main([*keys, "--no_tokenize"]) == 2
    message = capsys.readouterr().err
    assert "not in the cache" in message
    assert "--lengths 512,300,300" in message
    assert main(keys) == 0
    assert "20 rows, tokenized in" in capsys.readouterr().out
    assert main([*keys, "--no_tokenize", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "cache" in document["rows"]["source"]
    assert document["run"] == document["run"] | {"steps": 3, "steps_from": "1 epoch of 20 pairs"}
    assert not (tmp_path / "run").exists()


@by_formula
def test_one_targets_failure_is_its_own(words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    # Eight GPUs cannot split a batch of four pairs on an axis that is given.
    asked = words(*GPUS, global_batch_size=4, **{"mesh.fsdp": 8})
    assert main([*asked]) == 1
    out = capsys.readouterr().out
    assert out.count("not planned") == 2
    assert main(words(*GPUS, global_batch_size=4, **{"mesh.tensor": 1, "mesh.data": 1})) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "such as --on v5e-16"),
        (("--on", "v5litepod-16", "a100x8", "--lengths=1,2,3"), "did you mean v5e-16?"),
        (("--on", "v5litepod-16", "a100x8", "--lengths=1,2,3"), "did you mean h100x8?"),
        (("--on", "h100", "--lengths=1,2"), "prompt, chosen and rejected"),
        (("--on", "h100", "--lengths=16,20,60"), "longer than max_length 64"),
        (("--on", "h100", "--lengths=1,2,3", "--num_rows=0"), "expected a number of rows"),
        (("--on", "h100", "--lengths=1,2,3", "--prices=nowhere.yaml"), "no file of prices"),
        (("--on", "h100", "--lengths=1,2,3", "--packing=false"), "packing"),
        (("--on", "h100"), "datasets"),
        (("--on", "h100", "--lengths=1,2,3", "--prices=."), "found the folder"),
        (("--on", "h100", "--lengths=1,2,3", "--model_name_or_path=no/where"), "hf download no/where config.json"),
        (("--on", "h100", "--lengths=1,2,3", "--model_name_or_path=/"), "a folder with a config.json"),
        (("--on", "h100x999999", "--lengths=1,2,3"), "at most 1,024"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_planned(
    words: Callable[..., list[str]], options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = words()
    assert main([command, *rest, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "1 of" not in captured.err
    assert captured.out == ""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="here, plans for TPUs are compiled")
def test_tpus_without_their_compiler_leave_others_alone(
    words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("--on", "v5e-8", "v5p-8", "--lengths=16,20,24")) == 2
    assert "pip install libtpu" in capsys.readouterr().err
    assert main(words("--on", "v5e-8", "h100", "--lengths=16,20,24", "--json")) == 0
    tpu, gpu = json.loads(capsys.readouterr().out)["targets"]
    assert (tpu["fits"], gpu["fits"]) == (None, True)
    assert "libtpu" in tpu["failure"]


def test_a_folder_without_tokenizer_asks_for_lengths(
    words: Callable[..., list[str]], pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("--on=h100", datasets=pairs_file)) == 2
    assert "Give --lengths" in capsys.readouterr().err


def test_targets_are_words_after_on() -> None:
    line = parse(parser(), ["run.yaml", "--on", "v5e-16", "h100x8", "beta=0.2", "--on", "h200", "--json"])
    assert line.options.on == ["v5e-16", "h100x8", "h200"]
    assert (str(line.path), line.overrides, line.options.json) == ("run.yaml", ["--beta=0.2"], True)
    for words in (["--on=v5e-16,h200", "run.yaml"], ["--on", "v5e-16", "run.yaml"]):
        with pytest.raises(ValueError, match=r"run\.yaml"):
            parse(parser(), words)


@pytest.mark.full
@pytest.mark.parametrize(
    ("target", "compiler"), [("h100x2", "jax_cuda13_plugin"), pytest.param("v5e-4", "libtpu", id="v5e-4")]
)
def test_a_step_is_compiled_once_where_its_compiler_is(
    words: Callable[..., list[str]], target: str, compiler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"{compiler} is not installed, which compiles for {target}")
    asked = words("--on", target, "--lengths", "16,20,24", "--json")
    assert main(asked) == 0
    (first,) = json.loads(capsys.readouterr().out)["targets"]
    assert main(asked) == 0
    (second,) = json.loads(capsys.readouterr().out)["targets"]
    assert (first["how"], first["from_cache"], second["from_cache"]) == ("compiled", False, True)
    assert 1 <= first["compilations"] <= 3
    assert second["peak_bytes"] == first["peak_bytes"]


@pytest.mark.ci
def test_help_loads_no_jax() -> None:
    code = "import sys; from jdpo.cli.main import main; main(['plan', '--help']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--num_rows" in done.stdout
