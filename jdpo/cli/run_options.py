"""The parts that commands on the config of a run share: its command and keys, help, and messages."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from jdpo.cli.key_help import key_help
from jdpo.cli.parsing import CommandLine, Parser
from jdpo.config import CONFIGS, Settings, load_config, load_yaml, parse_overrides
from jdpo.config.addresses import shown_text

C = TypeVar("C", bound=Settings)


def read_config(cls: type[C], line: CommandLine) -> C:
    """Returns the config of a command line: the settings of its file, if it has one, and overrides.

    Raises:
      ValueError: see `load_config`.
    """
    return load_config(cls, line.path, line.overrides, log=log, complete=True)


def print_help(command: str, parser: Parser, cls: type[Settings], key: str | None) -> bool:
    """Prints the help that a command line asks for, of one key or of the command; returns whether it did."""
    if key is None:
        return False
    print(key_help(command, cls, key) if key else parser.format_help(), end="\n" if key else "")
    return True


def add_task(options: Any, commands: Sequence[str] = tuple(CONFIGS)) -> None:
    """Adds --task, by which the user names the command that a config is for."""
    options.add_argument(
        "--task",
        choices=commands,
        help="The command that the config is for. By default the config's keys decide, or else it is dpo.",
    )


def choose_task(line: CommandLine) -> tuple[str, str]:
    """Returns the command that would train, and why it is that one, in words."""
    if line.options.task is not None:
        return line.options.task, "set by --task"
    keys = keys_given(line)
    of_dpo, of_sft = ({field.name for field in dataclasses.fields(CONFIGS[task])} for task in ("dpo", "sft"))
    # The task is inferred from keys of `jdpo dpo` only, so `jdpo sft` must not have keys of its own.
    assert of_sft <= of_dpo, "a key of `jdpo sft` alone would decide, too"
    for key in keys:
        if key in of_dpo - of_sft:
            return "dpo", f"{key} is a key of `jdpo dpo` alone"
    if "loss_on" in keys:  # both have it, but supervised runs set it far more often
        return "sft", "loss_on is set without a key of `jdpo dpo` alone; --task dpo selects the other command"
    return "dpo", "the default; --task sft selects the other command"


def keys_given(line: CommandLine) -> list[str]:
    """Returns the top-level keys of config file and command line; what is wrong with them is reported later."""
    import yaml

    values: Any = None
    if line.path is not None:
        # `read_config` reads the file again and reports what is wrong with it.
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            values = load_yaml(line.path.read_text(encoding="utf-8"))
    keys = [str(key) for key in values] if isinstance(values, dict) else []
    return keys + [key.partition(".")[0] for key, _ in parse_overrides(line.overrides)]


def log(text: str) -> None:
    """Prints a line for the user to standard error."""
    print(shown_text(text), file=sys.stderr, flush=True)
