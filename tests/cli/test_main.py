"""The command line itself: help, exit codes, print_config and dry_run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo._version import __version__
from jdpo.cli.main import COMMANDS, main
from jdpo.config import DPOConfig, keys_of, load_config
from tests.conftest import chat_pairs, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert max(map(len, printed.splitlines())) <= 80
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == __version__ + "\n"


def test_command_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{key} " in printed for key in keys_of(DPOConfig) if "datasets." not in key)


def test_a_mistyped_command_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dop"]) == 2
    assert "unknown command 'dop'; did you mean 'dpo'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("train", "`jdpo sft` trains on completions, `jdpo dpo` on pairs"),
        ("orpo", "that is `jdpo dpo --loss_type orpo`"),
        ("run.yaml", "the command comes first, as in `jdpo dpo CONFIG.yaml`"),
        ("--beta", "the command comes first"),
        ("x\x1b[31m", r"unknown command 'x\x1b[31m'"),
    ],
)
def test_a_word_that_is_not_a_command_points_to_one(capsys: pytest.CaptureFixture[str], word: str, hint: str) -> None:
    assert main([word]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["quickstart", "--datasets", "x"], "unknown key 'datasets', it is a key of `jdpo sft` and `jdpo dpo`"),
        (["export", "run", "out", "--beta", "1"], "unrecognized arguments: --beta 1; it is a key of `jdpo dpo`"),
        (["export", "run", "out", "--rows", "1"], "it is an option of `jdpo inspect`"),
        (["inspect", "--merge"], "unknown key 'merge' on the command line; it is an option of `jdpo export`"),
        (["reference", "--html", "x"], "it is an option of `jdpo inspect`"),
    ],
)
def test_options_of_other_commands_say_whose_they_are(
    capsys: pytest.CaptureFixture[str], words: list[str], shown: str
) -> None:
    assert main(words) == 2
    assert shown in capsys.readouterr().err


def test_a_config_file_comes_first_or_after_config(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_words: Callable[..., list[str]]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("beta: 0.25\nloss_type: dpo\n")
    printed = []
    for words in (
        [str(path), *run_words()],
        ["--config", str(path), *run_words()],
        [*run_words(), f"--config={path}"],
        [*run_words(), f"config={path}"],
    ):
        assert main(["dpo", *words, "--print_config"]) == 0
        captured = capsys.readouterr()
        assert captured.err == "loss_type: dpo means sigmoid\n"
        printed.append(captured.out)
    assert "beta: 0.25" in printed[0]
    assert len(set(printed)) == 1
    assert main(["inspect", "--config", str(path), *run_words()]) == 0
    assert "beta is a key of `jdpo dpo` alone" in capsys.readouterr().out
    for words, error in (
        ([str(path), "--config", str(path)], "two config files"),
        ([str(path), "other.yaml"], "two config files"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config", "--beta", "1"], "--config needs the path of a YAML file"),
    ):
        assert main(["dpo", *words]) == 2
        assert error in capsys.readouterr().err


def test_print_config_prints_a_config_that_reads_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_words: Callable[..., list[str]]
) -> None:
    words = run_words(beta=0.25)
    assert main(["dpo", *words, "--print_config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(DPOConfig, path) == load_config(DPOConfig, None, words)
    assert not (tmp_path / "run").exists()


def test_dry_run_checks_everything_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_words: Callable[..., list[str]]
) -> None:
    assert main(["dpo", *run_words(), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "20 kept" in printed
    assert "3 steps of 8 pairs" in printed
    assert not (tmp_path / "run").exists()
    assert main(["dpo", *run_words(global_batch_size=9), "--dry_run"]) == 2
    assert "use a multiple of 8, such as 8, 16, 24" in capsys.readouterr().err


def test_a_dry_run_compares_with_the_run_in_output_dir_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_words: Callable[..., list[str]]
) -> None:
    words = run_words(max_steps=2, save_steps=1)
    assert main(["dpo", *words]) == 0
    run = tmp_path / "run"

    def dry_run(*more: str) -> tuple[int, str]:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        code, printed = main(["dpo", *words, *more, "--dry_run"]), capsys.readouterr()
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
        return code, printed.out + printed.err

    capsys.readouterr()
    code, printed = dry_run()
    assert code == 0
    assert f"the run in {run} is finished" in printed
    code, printed = dry_run("--beta=0.3")
    assert code == 2
    assert "beta: 0.1 before, 0.3 now" in printed

    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "2")
    assert "would resume from the checkpoint of step 1 of 2" in dry_run()[1]
    shutil.move(run / "checkpoints" / "1", run / "checkpoints" / "3")
    code, printed = dry_run()
    assert code == 2
    assert "rename it to 1" in printed
    shutil.move(run / "checkpoints" / "3", run / "checkpoints" / "damaged-1-then")
    code, printed = dry_run()
    assert code == 1
    assert "damaged-1-then" in printed
    write_jsonl(tmp_path / "pairs.jsonl", chat_pairs(21))
    code, printed = dry_run()
    assert code == 2
    assert "the training rows has changed" in printed


def test_errors_go_to_stderr_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "bta=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jdpo: error: ")
    assert "did you mean 'beta'?" in captured.err


TEMPLATE = (
    "{% if 'refuse' in messages[0]['content'] %}{{ raise_exception('\\x1b[31mRED\\x07\\nfake: ok') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_escape_codes_in_foreign_text_are_shown_and_not_obeyed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run_words: Callable[..., list[str]]
) -> None:
    """Covers escape codes in a data file's name and in a template's error, both in a run's lines and in an error."""
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = chat_pairs(20)
    rows[0]["prompt"][0]["content"] = "refuse this"
    file = write_jsonl(folder / "train-\x1b[31m\nfake-👩\u200d🚀.jsonl", rows)
    words = run_words(datasets=folder, chat_template=tmp_path / "template.jinja")
    assert main(["dpo", *words, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "train-\\x1b[31m\\nfake-👩\u200d🚀.jsonl:1" in printed
    assert "refused by the chat template: \\x1b[31mRED\\x07\\nfake: ok" in printed
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert not any(line.strip().startswith("fake") for line in printed.splitlines())
    file.write_text('{"prompt"')
    assert main(["dpo", *words, "--dry_run"]) == 2
    shown = capsys.readouterr().err
    assert "train-\\x1b[31m\\nfake-👩\u200d🚀.jsonl:1: broken JSON" in shown
    assert "\x1b" not in shown


def test_names_within_weights_are_shown_and_do_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, toy_model: Path, run_words: Callable[..., list[str]]
) -> None:
    model = Path(shutil.copytree(toy_model, tmp_path / "model"))
    words = run_words(model_name_or_path=model)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "x\x1b[31m\nfake: ok": np.zeros(3, np.float32)}, model / "model.safetensors")
    assert main(["dpo", *words, "--dry_run"]) == 2
    assert "extra tensor x\\x1b[31m\\nfake: ok in model.safetensors" in (shown := capsys.readouterr().err)
    assert "\x1b" not in shown
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = {"weight_map": {"a": "part.safetensors", "b": "y\x1b\u202e.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["dpo", *words, "--dry_run"]) == 2
    assert "shard y\\x1b\\u202e.safetensors is listed" in (shown := capsys.readouterr().err)
    assert "\x1b" not in shown


def test_a_fault_of_jdpo_itself_and_a_log_line_are_safe_too(tmp_path: Path) -> None:
    code = """
import logging, warnings
from jdpo.cli.main import main
main(["dpo", "--help"])
logging.getLogger("some.library").warning("log %s", "\\x1b[31m")
logging.getLogger("jdpo.checkpoint.steps").warning("a folder is damaged")
own = logging.getLogger("a.library.with.a.handler")
own.addHandler(logging.StreamHandler())
own.warning("own log \\x1b[31m\\nfake: ok")
warnings.warn("warning \\x1b[31m")
raise RuntimeError("fault \\x1b[31m")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "some.library: log \\x1b[31m" in done.stderr
    assert "\nwarning: a folder is damaged\n" in done.stderr
    assert "own log \\x1b[31m\n    fake: ok\n" in done.stderr
    assert "UserWarning: warning \\x1b[31m" in done.stderr
    assert "RuntimeError: fault \\x1b[31m" in done.stderr
    assert "\x1b" not in done.stderr
