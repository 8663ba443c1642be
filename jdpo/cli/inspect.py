"""`jdpo inspect CONFIG [key=value ...]`: what a run would train on, before it trains."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdpo.cli.train import config_file, read_config
from jdpo.config import CONFIGS, DPOConfig, SFTConfig, TrainConfig, load_yaml, parse_overrides
from jdpo.safe_text import terminal, terminal_lines

FLAGS = {
    "--rows N": "show the N rows that the run sees first, token by token",
    "--ids": "show the id of each token, too",
    "--html FILE": "write the report as one self-contained page for a browser",
    "--json": "print the report as one JSON document",
    "--strict": "exit with 1 if a fault is found",
    "--task dpo|sft": "the command that would train; by default the config's keys tell, else it is dpo",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks beside the run's own keys."""

    rows: int = 0
    ids: bool = False
    html: Path | None = None
    json: bool = False
    strict: bool = False
    task: str | None = None


def usage() -> str:
    """Returns the text of `jdpo inspect --help`."""
    from jdpo.inspection.check_table import thresholds

    return "\n".join(
        [
            "usage: jdpo inspect [[--config] CONFIG.yaml] [--key value | --key=value | key=value ...] [--rows N] ...",
            "",
            "Reads the rows of a `jdpo dpo` or `jdpo sft` run as the run does, through the same cache, and shows what",
            "it would train on: rows read, dropped and cut, lengths, padding, duplicates, length bias, prompts in both",
            "training and evaluation, invisible characters. It needs only the model's tokenizer and config.json;",
            "nothing is trained, no accelerator is used, and output_dir is not written.",
            "",
            *(f"  {flag:<18}{text}" for flag, text in FLAGS.items()),
            "",
            "The keys are those of `jdpo dpo --help` and `jdpo sft --help`.",
            "",
            "Faults, for --strict:",
            *(f"  {line}" for line in thresholds()),
        ]
    )


def main(command: str, words: Sequence[str]) -> int:
    """Parses, builds, calls.

    Returns:
      0; with --strict 1 where a fault is found.

    Raises:
      ValueError: the command line, the config or the rows cannot be read.
    """
    assert command == "inspect", command
    if "--help" in words or "-h" in words:
        print(usage())
        return 0
    options, rest = read_options(words)
    config, chosen_by = read_run(rest, options.task)
    from jdpo.inspection.document import document_of
    from jdpo.inspection.gather import gather

    material = gather(config, chosen_by=chosen_by, say=_say)
    document = document_of(material, num_rows=options.rows)
    if options.html is not None:
        from jdpo.inspection.html_page import write_page

        write_page(document, options.html)
        print(f"wrote {terminal(options.html)}", file=sys.stderr)
    if options.json:
        print(json.dumps(document, allow_nan=False))
    else:
        _print(document, with_ids=options.ids)
    return int(options.strict and any(one["severity"] == "fault" for one in document["findings"]))


def _say(text: str) -> None:
    print(terminal_lines(text), file=sys.stderr, flush=True)


def read_options(words: Sequence[str]) -> tuple[Options, list[str]]:
    """The options of the command and the words that are left for the run.

    Raises:
      ValueError: a value is missing or is not one.

    >>> read_options(["run.yaml", "--rows=2", "beta=1", "--json"])
    (Options(rows=2, ids=False, html=None, json=True, strict=False, task=None), ['run.yaml', 'beta=1'])
    """
    values: dict[str, Any] = {}
    rest: list[str] = []
    position = 0
    while position < len(words):
        name, equals, value = words[position].partition("=")
        position += 1
        if name in ("--json", "--strict", "--ids"):
            if equals:
                raise ValueError(f"{name} takes no value, found {value!r}")
            values[name[2:]] = True
        elif name in ("--rows", "--html", "--task"):
            if not equals:
                if position == len(words):
                    raise ValueError(f"{name} needs a value: {next(flag for flag in FLAGS if flag.startswith(name))}")
                value = words[position]
                position += 1
            values[name[2:]] = _value(name, value)
        else:
            rest.append(words[position - 1])
            if name.startswith("--") and not equals and position < len(words) and not words[position].startswith("--"):
                rest.append(words[position])  # the value of a key of the run, whatever it looks like
                position += 1
    if "ids" in values and not values.get("rows"):
        raise ValueError("--ids needs --rows N: it adds the ids of the tokens of the rows that are shown")
    return Options(**values), rest


def _value(name: str, text: str) -> Any:
    if name == "--html":
        if not text or text.startswith("--"):
            raise ValueError(f"--html needs the path of the page to write, found {text!r}")
        return Path(text).expanduser()
    if name == "--task":
        if text not in CONFIGS:
            raise ValueError(f"--task is {text!r}; expected dpo or sft")
        return text
    if not text.isdecimal():
        raise ValueError(f"--rows is {text!r}; expected a number of rows such as 3")
    return int(text)


def read_run(words: Sequence[str], task: str | None) -> tuple[TrainConfig, str]:
    """The config of a run, and how it was found which command's it is, in words.

    Raises:
      ValueError: see `load_config`; or keys of both commands are there.
    """
    chosen_by = "as --task says"
    if task is None:
        task, chosen_by = _task_of(_keys(words))
    # Not written, so it need not be given.
    return read_config(CONFIGS[task], [*words, "output_dir=none"]), chosen_by


def _task_of(keys: Sequence[str]) -> tuple[str, str]:
    """Keys that only one of the two commands has decide.

    >>> _task_of(["datasets", "beta"])
    ('dpo', 'beta is a key of `jdpo dpo` alone')
    >>> _task_of(["datasets", "loss_on"])[0], _task_of(["datasets"])[0]
    ('sft', 'dpo')
    """
    of_dpo, of_sft = ({field.name for field in dataclasses.fields(cls)} for cls in (DPOConfig, SFTConfig))
    dpo_keys = [key for key in keys if key in of_dpo - of_sft]
    sft_keys = [key for key in keys if key in of_sft - of_dpo]
    if dpo_keys and sft_keys:
        raise ValueError(
            f"{dpo_keys[0]} is a key of `jdpo dpo` alone and {sft_keys[0]} of `jdpo sft` alone; leave one of them out"
        )
    for task, found in (("dpo", dpo_keys), ("sft", sft_keys)):
        if found:
            return task, f"{found[0]} is a key of `jdpo {task}` alone"
    if "loss_on" in keys:  # which supervised runs set far more often
        return (
            "sft",
            "loss_on without a key of `jdpo dpo` alone is taken for sft; --task dpo for the other",
        )
    return "dpo", "no key tells dpo from sft, so it is taken for dpo; --task sft for the other"


def _keys(words: Sequence[str]) -> list[str]:
    """Top-level keys of the config file and the command line; what cannot be read is reported where it is read."""
    import yaml

    keys: list[str] = []
    path, words = config_file(words)
    if path is not None:
        try:
            values = load_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            values = None
        keys += [str(key) for key in values] if isinstance(values, dict) else []
    return keys + [key.partition(".")[0] for key, _ in parse_overrides(words)]


def _print(document: dict[str, Any], *, with_ids: bool) -> None:
    from rich.console import Console

    from jdpo.inspection.terminal_view import print_document

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # bars and signs, where the terminal has no Unicode
    print_document(document, Console(), with_ids=with_ids)
