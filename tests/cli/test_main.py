"""The command line itself: help, exit codes, print_config and dry_run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jdpo._version import __version__
from jdpo.cli.main import COMMANDS, main
from jdpo.config import DPOConfig, keys_of, load_config


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == __version__ + "\n"


def test_command_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{key} " in printed for key in keys_of(DPOConfig) if key not in ("mesh", "optimizer"))


def test_a_mistyped_command_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dop"]) == 2
    assert "unknown command 'dop'; did you mean 'dpo'?" in capsys.readouterr().err


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


def test_errors_go_to_stderr_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "bta=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jdpo: error: ")
    assert "did you mean 'beta'?" in captured.err
