"""`jdpo sft CONFIG [key=value ...]` and `jdpo dpo CONFIG [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from jdpo.cli.cluster import in_cluster
from jdpo.config import CONFIGS, Settings, defaults_of, keys_of, load_config, public_text, to_yaml
from jdpo.safe_text import terminal_lines

C = TypeVar("C", bound=Settings)

FLAGS = {
    "--help": "print this text and exit",
    "--config FILE": "read settings from a YAML file; a file as the first argument does the same",
    "--print_config": "print the whole config as YAML, defaults included, and exit",
    "--dry_run": "validate config, data and model config without loading weights; print the plan and the memory per "
    "device, and exit",
}


def usage(command: str) -> str:
    """Returns the text of `jdpo dpo --help`: every key with its default."""
    cls = CONFIGS[command]
    defaults = _defaults(cls)
    lines = [
        f"usage: jdpo {command} [[--config] CONFIG.yaml] [--key value | --key=value | key=value ...]",
        "",
        f"example: jdpo {command} --model_name_or_path MODEL --datasets ROWS.jsonl --output_dir runs/first",
        "",
    ]
    lines += [f"  {flag:<32}{text}" for flag, text in FLAGS.items()] + [""]
    for key, text in keys_of(cls).items():
        if key not in GROUPS:
            lines.append(f"  --{key:<30}{text}{f' [{defaults[key]}]' if key in defaults else ''}")
    return "\n".join(lines)


DASHED = ("--dry-run", "--print-config")
GROUPS = ("mesh", "optimizer")


def _defaults(cls: type[Settings]) -> dict[str, str]:
    values = defaults_of(cls)
    for group in GROUPS:
        values |= {f"{group}.{key}": value for key, value in values.pop(group).items()}
    return {key: "null" if value is None else str(value) for key, value in values.items()}


def read_config(cls: type[C], words: Sequence[str]) -> C:
    """Returns the config of a command line: the settings of its file, if it has one, and overrides.

    Raises:
      ValueError: see `load_config`.
    """
    path, overrides = config_file(words)
    return load_config(cls, path, overrides, say=lambda text: print(terminal_lines(text), file=sys.stderr, flush=True))


def config_file(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Returns the config file of a command line, its first word or the one after --config, and the other words.

    Raises:
      ValueError: two files, or --config without one.

    >>> config_file(["run.yaml", "beta=1"]), config_file(["--beta", "1", "--config=run.yaml"])
    ((PosixPath('run.yaml'), ['beta=1']), (PosixPath('run.yaml'), ['--beta', '1']))
    """
    files: list[str] = []
    rest = list(words)
    if rest and not rest[0].startswith("--") and "=" not in rest[0]:
        files.append(rest.pop(0))
    for position, word in reversed(list(enumerate(rest))):
        name, equals, value = word.partition("=")
        if name.removeprefix("--") != "config" or not (equals or word == "--config"):
            continue
        del rest[position]
        if not equals and position < len(rest) and not rest[position].startswith("--"):
            value = rest.pop(position)
        if not value:
            raise ValueError("--config needs the path of a YAML file")
        files.append(value)
    if len(files) > 1:
        raise ValueError(f"two config files, {' and '.join(sorted(files))}; give one, and keys that override it")
    return Path(files[0]) if files else None, rest


def shown_error(text: str) -> str:
    """Returns the text of an error as it may be shown: without passwords in addresses, safe for a terminal."""
    return terminal_lines(public_text(text))


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    words = [word.replace("-", "_").replace("__", "--", 1) if word in DASHED else word for word in words]
    if "--help" in words or "-h" in words:
        print(usage(command))
        return 0
    print_config, only_said = ("--print_config" in words), ("--dry_run" in words)
    words = [word for word in words if word not in ("--print_config", "--dry_run")]
    config = read_config(CONFIGS[command], words)
    if print_config:
        print(to_yaml(config), end="")
        return 0
    with in_cluster(config, command, words, shown=shown_error, trains=True):
        if only_said:
            from jdpo.training.dry_run import dry_run

            dry_run(config, lambda text: print(terminal_lines(text), flush=True))
            return 0
        from jdpo.training.loop import train

        return train(config).exit_code
