"""`jdpo inspect CONFIG [key=value ...]`: shows what a run would train on, before it trains."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jdpo.cli.parsing import Parser, add_config, add_help, add_keys, parse
from jdpo.cli.run_options import add_task, choose_task, log, print_help, read_config
from jdpo.config import CONFIGS
from jdpo.safe_text import terminal


def parser(*, complete: bool = False) -> Parser:
    """Returns the parser of the command, whose help also lists the keys of a run if it is `complete`."""
    parser = Parser(
        "inspect",
        "[CONFIG.yaml] [--KEY VALUE | KEY=VALUE ...] [--rows N] ...",
        "Reads the rows of a `jdpo dpo` or `jdpo sft` run as the run does, through the same cache, and shows what it "
        "would train on: rows read, dropped and cut, lengths, padding, duplicates, length bias, prompts in both "
        "training and evaluation, invisible characters. It needs only the model's tokenizer and config.json; nothing "
        "is trained, no accelerator is used, and output_dir is not written.",
        epilog="The keys are those of `jdpo dpo --help` and `jdpo sft --help`.",
    )
    options = add_help(parser)
    add_config(parser, options)
    rows = "Show the first N rows that the run sees, token by token."
    options.add_argument("--rows", type=_number_of_rows, default=0, metavar="N", help=rows)
    options.add_argument("--ids", action="store_true", help="With --rows: show the id of each token, too.")
    page = "Write the report to FILE as one self-contained page for a browser."
    options.add_argument("--html", type=_page, metavar="FILE", help=page)
    options.add_argument("--json", action="store_true", help="Print the report as one JSON document.")
    options.add_argument("--strict", action="store_true", help="Exit with code 1 if the report contains a fault.")
    add_task(options)
    add_keys(parser, CONFIGS["dpo"], hidden=not complete)
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command.

    Returns:
      0; with --strict, 1 if there is a fault.

    Raises:
      ValueError: the command line, the config or the rows cannot be read.
    """
    arguments = parser()
    line = parse(arguments, words)
    if line.help is not None:
        from jdpo.reports.data_summary.check_table import thresholds

        faults = "\n".join(f"  {line}" for line in thresholds())
        arguments.epilog = f"{arguments.epilog}\n\nFaults, for --strict:\n\n{faults}"
        print_help(command, arguments, CONFIGS["dpo"], line.help)
        return 0
    options = line.options
    if options.ids and not options.rows:
        raise ValueError("--ids needs --rows N: it shows the ids of the tokens of these rows")
    task, chosen_by = choose_task(line)
    # output_dir is required but not written, so it need not be given. With its dashes, since `output_dir=none` would be
    # the value of an unknown option before it.
    config = read_config(CONFIGS[task], line._replace(overrides=[*line.overrides, "--output_dir=none"]))
    from jdpo.inspection.document import inspect_run

    document = inspect_run(config, chosen_by=chosen_by, log=log, num_rows=options.rows)
    if options.html is not None:
        from jdpo.inspection.html_page import write_page

        write_page(document, options.html)
        log(f"wrote {terminal(options.html)}")
    if options.json:
        # NaN is not JSON, and most readers refuse it.
        print(json.dumps(document, allow_nan=False))
    else:
        from rich.console import Console

        from jdpo.inspection.terminal_view import print_document

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for bars and signs, if the terminal has no Unicode
        print_document(document, Console(), with_ids=options.ids)
    return int(options.strict and any(one["severity"] == "fault" for one in document["findings"]))


def _number_of_rows(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of rows such as 3, found {text!r}")
    return int(text)


def _page(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected the path of the page to write")
    return Path(text).expanduser()
