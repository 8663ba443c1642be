"""`jdpo inspect CONFIG [key=value ...]`: shows what a run would train on, before it trains."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jdpo.cli.train import config_file, read_config
from jdpo.config import CONFIGS, DPOConfig, SFTConfig, TrainConfig, load_yaml, parse_overrides
from jdpo.safe_text import terminal, terminal_lines

DESCRIPTION = """Reads the rows of a `jdpo dpo` or `jdpo sft` run as the run does, through the same cache, and shows
what it would train on: rows read, dropped and cut, lengths, padding, duplicates, length bias, prompts in both training
and evaluation, invisible characters. It needs only the model's tokenizer and config.json. Nothing is trained, no
accelerator is used, and output_dir is not written. All other words are those of the run: the keys of `jdpo dpo --help`
and `jdpo sft --help`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's own options; words that it does not know belong to the run."""
    from jdpo.inspection.check_table import thresholds

    width = min(shutil.get_terminal_size().columns, 120) - 2
    faults = [textwrap.fill(line, width, initial_indent="  ", subsequent_indent="    ") for line in thresholds()]
    made = _Parser(
        "jdpo inspect",
        usage="jdpo inspect [CONFIG.yaml] [KEY=VALUE ...] [options]",
        description=textwrap.fill(DESCRIPTION, width),
        epilog="\n".join(["faults, for --strict:", *faults]),
        allow_abbrev=False,  # --id would otherwise be --ids, and --h a key of the run
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rows = "show the N rows that the run sees first, token by token"
    made.add_argument("--rows", type=_num_rows, default=0, metavar="N", help=rows)
    made.add_argument("--ids", action="store_true", help="show the id of each of their tokens")
    made.add_argument("--html", type=Path, metavar="FILE", help="write the report as one self-contained page")
    made.add_argument("--json", action="store_true", help="print the report as one JSON document")
    made.add_argument("--strict", action="store_true", help="exit with 1 if a fault is found")
    made.add_argument(
        "--task", choices=list(CONFIGS), help="the command that would train; default: decided by the keys"
    )
    return made


def _num_rows(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of rows such as 3, found {text!r}")
    return int(text)


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command.

    Returns:
      0; with --strict, 1 if a fault is found.

    Raises:
      ValueError: the command line, the config or the rows cannot be read.
    """
    assert command == "inspect", command
    if "--help" in words or "-h" in words:
        print(parser().format_help(), end="")
        return 0
    options, rest = parser().parse_known_args(words)
    if options.ids and not options.rows:
        raise ValueError("--ids needs --rows N: it shows the ids of the tokens of these rows")
    config, chosen_by = read_run(rest, options.task)
    from jdpo.inspection.document import inspect_run

    document = inspect_run(config, chosen_by=chosen_by, say=_say, num_rows=options.rows)
    if options.html is not None:
        from jdpo.inspection.html_page import write_page

        page = options.html.expanduser()
        write_page(document, page)
        _say(f"wrote {terminal(page)}")
    if options.json:
        print(json.dumps(document, allow_nan=False))
    else:
        from rich.console import Console

        from jdpo.inspection.terminal_view import print_document

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for bars and signs, if the terminal has no Unicode
        print_document(document, Console(), with_ids=options.ids)
    return int(options.strict and any(one["severity"] == "fault" for one in document["findings"]))


def _say(text: str) -> None:
    print(terminal_lines(text), file=sys.stderr, flush=True)


def read_run(words: Sequence[str], task: str | None) -> tuple[TrainConfig, str]:
    """Returns the config of a run and, in words, why it is taken for one of `jdpo dpo` or `jdpo sft`.

    Raises:
      ValueError: see `load_config`; or keys of both commands are set.
    """
    chosen_by = "as --task says"
    if task is None:
        task, chosen_by = _task_of(_keys(words))
    # output_dir is required but not written, so it need not be given.
    return read_config(CONFIGS[task], [*words, "output_dir=none"]), chosen_by


def _task_of(keys: Sequence[str]) -> tuple[str, str]:
    """Decides by the keys that only one of the two commands has.

    >>> _task_of(["datasets", "beta"])
    ('dpo', 'beta is a key of `jdpo dpo` alone')
    >>> _task_of(["datasets", "loss_on"])[0], _task_of(["datasets"])[0]
    ('sft', 'dpo')
    """
    of_dpo, of_sft = ({field.name for field in dataclasses.fields(cls)} for cls in (DPOConfig, SFTConfig))
    dpo_keys, sft_keys = ([key for key in keys if key in own] for own in (of_dpo - of_sft, of_sft - of_dpo))
    if dpo_keys and sft_keys:
        raise ValueError(
            f"{dpo_keys[0]} is a key of `jdpo dpo` alone and {sft_keys[0]} of `jdpo sft` alone; leave one of them out"
        )
    for task, found in (("dpo", dpo_keys), ("sft", sft_keys)):
        if found:
            return task, f"{found[0]} is a key of `jdpo {task}` alone"
    if "loss_on" in keys:  # both have it, but supervised runs set it far more often
        return "sft", "loss_on without a key of `jdpo dpo` alone is taken for sft; --task dpo for the other"
    return "dpo", "no key tells dpo from sft, so it is taken for dpo; --task sft for the other"


def _keys(words: Sequence[str]) -> list[str]:
    """Returns the top-level keys of config file and command line; what is wrong with them is reported later."""
    import yaml

    path, words = config_file(words)
    values: Any = None
    if path is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            values = load_yaml(path.read_text(encoding="utf-8"))
    keys = [str(key) for key in values] if isinstance(values, dict) else []
    return keys + [key.partition(".")[0] for key, _ in parse_overrides(words)]
