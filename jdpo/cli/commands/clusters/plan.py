"""`jdpo plan CONFIG --on TARGET ...`: will a run fit, on which mesh, how fast and at what cost, before renting."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jdpo import exit_codes
from jdpo.cli.option_types import not_empty
from jdpo.cli.parsing import CommandLine, Parser, add_config, add_help, add_keys, parse, spellings
from jdpo.cli.run_options import add_task, choose_task, log, print_help
from jdpo.config import CONFIGS, TrainConfig, load_config
from jdpo.planning.machines import Machine, machine_of
from jdpo.planning.plan_command.prices import read_prices

if TYPE_CHECKING:
    from jdpo.planning.plan_command.outlook import Outlook
    from jdpo.planning.plan_command.question import Question

NONE_FITS = exit_codes.FAILED
"""The exit code if the run fits none of the targets."""


def parser(*, complete: bool = False) -> Parser:
    """Returns the parser of the command, whose help also lists the keys of a run if it is `complete`."""
    parser = Parser(
        "plan",
        "CONFIG.yaml --on TARGET ... [--lengths P,C,R] [--KEY VALUE] ...",
        "Tells for each target whether a `jdpo dpo` or `jdpo sft` run fits, on which mesh, in which time and at what "
        "cost. The step is compiled here, without the target's devices: for TPUs that takes the "
        "package libtpu, for GPUs jax[cuda13], without which memory and time are estimated by formula. "
        "Weights are neither read nor downloaded: a model folder with config.json alone is enough.",
        epilog="Targets: v5e-16, v5p-64, v6e-16, tpu7x-8 (TPU slices by their names in the cloud), 2xv5e-16 (two "
        "slices), h100x8, h200 (GPUs; more than 8 in nodes of 8).\n\n"
        "Exit code: 0 if the run fits at least one target, 1 if it fits none, 2 if the command line or its input is "
        "wrong.\n\n"
        "Examples:\n\n"
        "    jdpo plan run.yaml --on v5e-16 v6e-16 h100x8 --lengths 512,300,300\n"
        "    jdpo plan run.yaml --on v5p-8 --prices prices.yaml --json lora.r=16\n\n"
        "The keys are those of `jdpo dpo --help` and `jdpo sft --help`.",
    )
    options = add_help(parser)
    add_config(parser, options)
    options.add_argument("--on", nargs="+", action="extend", metavar="TARGET", help="Machines to plan for; see below.")
    options.add_argument(
        "--lengths",
        metavar="LENGTHS",
        help="Tokens of prompt, chosen and rejected, such as 512,300,300, or of a supervised row; or a CSV file with a "
        "header and a line of them per row. By default the rows of the config are read and tokenized as the run would, "
        "or taken from its cache.",
    )
    options.add_argument(
        *spellings("--num_rows"), type=_number, metavar="N", help="Rows of an epoch, where --lengths does not tell it."
    )
    options.add_argument(
        *spellings("--no_tokenize"),
        action="store_true",
        help="Take lengths from the cache of an earlier run or `jdpo inspect` only; do not tokenize rows now.",
    )
    options.add_argument(
        "--prices", type=not_empty, metavar="FILE", help="YAML file of your prices; docs/plan.md has its form."
    )
    options.add_argument("--json", action="store_true", help="Print one JSON document.")
    add_task(options)
    add_keys(parser, CONFIGS["dpo"], hidden=not complete)
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command.

    Returns:
      0; 1 if the run fits none of the targets.

    Raises:
      ValueError: the command line, the config, the model's config.json, the lengths or the prices cannot be read.
    """
    arguments = parser()
    line = parse(arguments, words)
    if print_help(command, arguments, CONFIGS["dpo"], line.help):
        return 0
    options = line.options
    # Everything that costs nothing to check comes before the first compilation.
    machines = _machines(options.on)
    task, config = _config(line)
    prices = None if options.prices is None else read_prices(Path(options.prices).expanduser())
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are those that programs are compiled for
    from jdpo.planning.plan_command.one_target import check_compilers, target_outlook
    from jdpo.planning.plan_command.plan_document import plan_document
    from jdpo.planning.plan_command.planner_process import PlannerProcess
    from jdpo.planning.plan_command.question import model_sources, question_of, row_lengths

    check_compilers(machines)
    sources = model_sources(config)
    rows = row_lengths(config, sources, options.lengths, log, pairs=task == "dpo", tokenize=not options.no_tokenize)
    question, config = question_of(task, config, sources, rows, options.num_rows, prices)
    with PlannerProcess() as process:
        outlooks = [
            target_outlook(question, config, machine, process, f"{number} of {len(machines)}")
            for number, machine in enumerate(machines, start=1)
        ]
    if options.json:
        print(json.dumps(plan_document(question, outlooks), allow_nan=False, indent=1))
    else:
        _print(question, outlooks)
    return 0 if any(outlook.fits for outlook in outlooks) else NONE_FITS


def _machines(names: list[str] | None) -> list[Machine]:
    """Returns the targets, each once; all wrong names are reported together."""
    asked = [name for word in names or () for name in word.split(",") if name]
    if not asked:
        raise ValueError("give the targets to plan for, such as --on v5e-16 v5p-8 h100x8")
    machines, wrong = [], []
    for name in dict.fromkeys(asked):
        try:
            machines.append(machine_of(name))
        except ValueError as error:
            wrong.append(f"--on: {error}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return machines


def _config(line: CommandLine) -> tuple[str, TrainConfig]:
    """Returns the command that would train, and its config."""
    task, _ = choose_task(line)
    # Neither is used: output_dir is not written, and no program is run here that could be kept.
    words = [*line.overrides, "--output_dir=none", "--compilation_cache=false"]
    # Given lengths take the place of rows.
    config: TrainConfig = load_config(CONFIGS[task], line.path, words, log=log, complete=line.options.lengths is None)
    if not config.packing:
        raise ValueError("packing false: plans are made of packed steps; leave packing out")
    return task, config


def _print(question: Question, outlooks: list[Outlook]) -> None:
    from rich.console import Console

    from jdpo.planning.plan_command.plan_view import MOST_WIDTH, print_plan

    if sys.stdout.isatty():
        print_plan(question, outlooks, Console(highlight=False))
        return
    # A file or a pipe has neither colours nor a width of its own, and needs no spaces at the end of lines.
    text = io.StringIO()
    print_plan(question, outlooks, Console(file=text, width=MOST_WIDTH, highlight=False))
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def _number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of rows, at least 1, found {text!r}")
    return int(text)
