"""`jdpo inspect` on the configs of runs: what it prints, writes, and exits with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import jdpo
from jdpo.cli.commands.runs.inspect import parser
from jdpo.cli.main import main
from jdpo.cli.parsing import parse
from jdpo.cli.run_options import choose_task
from jdpo.config import CONFIGS, DPOConfig, SFTConfig
from jdpo.models.weights.hub_models import resolve_folder


@pytest.fixture
def no_weights(toy_model: Path, tmp_path: Path) -> Path:
    """The toy model without its weights."""
    folder = tmp_path / "small"
    shutil.copytree(toy_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_it_needs_no_weights_and_leaves_nothing_but_the_cache(
    capsys: pytest.CaptureFixture[str], run_words: Callable[..., list[str]], no_weights: Path, tmp_path: Path
) -> None:
    before = set(tmp_path.iterdir())
    assert main(["inspect", *run_words(model_name_or_path=no_weights)]) == 0
    out = capsys.readouterr().out
    assert "What jdpo dpo would train on" in out
    assert "20 of 20 kept" in out
    assert "3 steps of 8 pairs" in out
    assert set(tmp_path.iterdir()) - before == {tmp_path / "cache"}
    with pytest.raises(ValueError, match=r"no \*\.safetensors weights"):
        resolve_folder(str(no_weights))


def test_only_json_goes_to_standard_output(
    capsys: pytest.CaptureFixture[str], run_words: Callable[..., list[str]], tmp_path: Path
) -> None:
    page = tmp_path / "report" / "page.html"
    words = ["--json", f"--html={page}", "--rows", "2", *run_words()]
    assert main(["inspect", *words]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == f"wrote {page}\n"
    assert document["train"]["rows_kept"] == 20
    assert len(document["rows"]) == 2
    assert all(row["origin"] in page.read_text(encoding="utf-8") for row in document["rows"])
    assert main(["inspect", *words]) == 0
    assert json.loads(capsys.readouterr().out) == document


def test_strict_fails_only_on_faults(
    capsys: pytest.CaptureFixture[str], run_words: Callable[..., list[str]], pairs_file: Path
) -> None:
    assert main(["inspect", "--strict", *run_words()]) == 0
    assert "no_evaluation" in capsys.readouterr().out
    leaking = run_words(eval_datasets=pairs_file)
    assert main(["inspect", *leaking, "--strict"]) == 1
    assert main(["inspect", *leaking]) == 0
    assert "fault" in capsys.readouterr().out


def test_rows_are_shown_token_by_token(capsys: pytest.CaptureFixture[str], run_words: Callable[..., list[str]]) -> None:
    assert main(["inspect", *run_words(), "--rows", "1", "--ids"]) == 0
    out = capsys.readouterr().out
    assert "Row 1: pairs.jsonl:" in out
    assert "prompt, not learnt" in out
    assert "`jdpo inspect --ids`" in " ".join(out.split())  # Python code reads this line, too
    assert "<|im_end|>[2]" in out
    assert "Row 2" not in out


def test_the_task_is_inferred_from_keys_that_only_one_command_has(tmp_path: Path) -> None:
    words = ["model_name_or_path=m", "datasets=d"]
    config = tmp_path / "run.yaml"
    config.write_text("model_name_or_path: m\ndatasets: d\nloss_on: assistant_turns\n")

    def task_of(words: list[str], *task: str) -> tuple[type, str]:
        name, chosen_by = choose_task(parse(parser(), [*words, *task]))
        return CONFIGS[name], chosen_by

    task, chosen_by = task_of([str(config)])
    assert task is SFTConfig
    assert "loss_on" in chosen_by
    assert "--task dpo" in chosen_by
    assert task_of([str(config)], "--task", "dpo")[0] is task_of([str(config), "beta=0.2"])[0] is DPOConfig
    assert task_of([*words, "--loss_type", "ipo"]) == (DPOConfig, "loss_type is a key of `jdpo dpo` alone")
    assert task_of(words)[0] is DPOConfig
    assert "--task sft" in task_of(words)[1]
    assert task_of(words, "--task=sft") == (SFTConfig, "set by --task")


def test_a_supervised_run_is_inspected_as_one(
    capsys: pytest.CaptureFixture[str], run_words: Callable[..., list[str]]
) -> None:
    assert main(["inspect", *run_words(), "--task", "sft", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "sft"
    assert "completion" in document["train"]["lengths"]


def test_options_may_be_anywhere_and_leave_the_keys_of_the_run_alone() -> None:
    words = ["run.yaml", "--beta", "0.2", "--rows=3", "--html", "a.html", "--shuffle", "--strict"]
    line = parse(parser(), words)
    assert (line.options.rows, line.options.html, line.options.strict) == (3, Path("a.html"), True)
    assert (line.path, line.overrides) == (Path("run.yaml"), ["--beta=0.2", "--shuffle"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows"], "--rows: expected a number of rows"),
        (["--rows", "many"], "expected a number of rows such as 3, found 'many'"),
        (["--html", "--json"], "--html: expected the path"),
        (["--task", "rl"], "--task: invalid choice"),
        (["--json=yes"], "--json takes no value"),
        (["--ids", "a=b"], "--ids needs --rows"),
        (["--row", "2"], "unknown key 'row'"),
    ],
)
def test_wrong_options_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_an_unknown_key_does_not_hide_that_output_dir_need_not_be_given(
    run_words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in run_words() if not word.startswith("output_dir")]
    assert main(["inspect", *words, "--nonsense"]) == 2
    assert "output_dir" not in capsys.readouterr().err


def test_help_lists_options_and_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--help"]) == 0
    out = capsys.readouterr().out
    for words in ("--rows N", "--html FILE", "--strict", "leakage: any", "dropped: more than 10% of"):
        assert words in out


def test_a_model_that_jdpo_cannot_train_is_a_fault_and_the_data_are_still_shown(
    capsys: pytest.CaptureFixture[str], run_words: Callable[..., list[str]], no_weights: Path
) -> None:
    config = json.loads((no_weights / "config.json").read_text())
    (no_weights / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert main(["inspect", *run_words(model_name_or_path=no_weights), "--json", "--strict"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert "model_type 'mamba' is not supported" in document["findings"][0]["summary"]
    assert document["train"]["rows_kept"] == 20


def test_a_model_that_ends_before_max_length_is_a_fault_as_it_is_for_training(
    capsys: pytest.CaptureFixture[str], run_words: Callable[..., list[str]], no_weights: Path
) -> None:
    text = json.loads((no_weights / "config.json").read_text())
    own = {"model_type": "gpt2", "n_positions": 48, "n_embd": 64, "n_layer": 2, "n_head": 4}
    (no_weights / "config.json").write_text(json.dumps(own | {"vocab_size": text["vocab_size"]}))
    words = run_words(model_name_or_path=no_weights)
    assert main(["inspect", *words, "max_length=49", "--json", "--strict"]) == 1
    finding = json.loads(capsys.readouterr().out)["findings"][0]
    assert finding["severity"] == "fault"
    assert main(["dpo", *words, "max_length=49", "--dry_run"]) == 2
    refused = capsys.readouterr().err
    assert "has 48 positions (a learned vector for each) and cannot go beyond" in refused
    assert finding["summary"] in refused, "in the words of training"
    assert main(["inspect", *words, "max_length=48", "--json"]) == 0
    assert "positions" not in json.loads(capsys.readouterr().out)["findings"][0]["summary"]


@pytest.fixture
def sft_adapter(no_weights: Path, tmp_path: Path) -> Path:
    """The output of `jdpo sft` with lora: an adapter, and a chat template of its own."""
    folder = tmp_path / "adapter"
    shutil.copytree(no_weights, folder, ignore=shutil.ignore_patterns("config.json"))
    path = folder / "tokenizer_config.json"
    words = json.loads(path.read_text(encoding="utf-8"))
    template = words["chat_template"].replace("<|im_start|>", "<|im_start|>the ")
    path.write_text(json.dumps(words | {"chat_template": template}), encoding="utf-8")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(no_weights)}))
    save_file({"a": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_is_inspected_on_its_base_and_with_its_own_template(
    run_words: Callable[..., list[Any]], no_weights: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "chat.jsonl"
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "river green?"}], **sides}
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    digests = []
    for words in (
        run_words(model_name_or_path=sft_adapter, datasets=rows),
        run_words(model_name_or_path=no_weights, datasets=rows, **{"lora.adapter": sft_adapter}),
        run_words(model_name_or_path=no_weights, datasets=rows),
    ):
        done = run_alone([*words, "--json"])
        assert done.returncode == 0, done.stderr
        assert done.stderr.endswith("[]\n"), "without jax"
        document = json.loads(done.stdout)
        assert document["model"]["problem"] is None
        digests.append(document["train"]["digest"])
    assert digests[0] == digests[1] != digests[2]


def run_alone(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from jdpo.cli.main import main; code = main(sys.argv[1:]); "
        "print([name for name in ('jax', 'flax', 'optax', 'orbax') if name in sys.modules], file=sys.stderr); "
        "sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "inspect", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(jdpo.__file__).parents[1])} | environment,
        check=False,
    )


def test_no_accelerator_is_touched_and_a_poor_terminal_is_no_error(run_words: Callable[..., list[Any]]) -> None:
    done = run_alone([*run_words(), "--rows", "1"], PYTHONIOENCODING="ascii", COLUMNS="70")
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("[]\n")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 70
