"""`jdpo plan CONFIG --on TARGET ...`: will a run fit, on which mesh, how fast and at what cost, before renting."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jdpo import exit_codes
from jdpo.cli.option_types import not_empty
from jdpo.cli.parsing import CommandLine, Parser, add_config, add_help, add_keys, parse, spellings
from jdpo.cli.run_options import add_task, choose_task, log, print_help
from jdpo.config import CONFIGS, DPOConfig, TrainConfig, load_config
from jdpo.planning.machines import Machine, machine_of

if TYPE_CHECKING:
    from jdpo.planning.plan_command.outlook import Outlook
    from jdpo.planning.plan_command.plan_document import Question
    from jdpo.planning.plan_command.planner_process import PlannerProcess
    from jdpo.planning.plan_command.prices import Prices
    from jdpo.planning.plan_command.row_lengths import RowLengths
    from jdpo.training.setup.model_sources import Sources

NONE_FITS = exit_codes.FAILED
"""The exit code if the run fits none of the targets."""


def parser(*, complete: bool = False) -> Parser:
    """Returns the parser of the command, whose help also lists the keys of a run if it is `complete`."""
    parser = Parser(
        "plan",
        "CONFIG.yaml --on TARGET ... [--lengths P,C,R] [--KEY VALUE] ...",
        "Tells for each target whether a `jdpo dpo` or `jdpo sft` run fits, on which mesh, in which time and at what "
        "cost. The step is compiled here for the target's devices, which need not be at hand: for TPUs that takes the "
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
    prices = _prices(options.prices)
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are those that programs are compiled for
    _check_compilers(machines)
    sources = _sources(config)
    rows = _rows(config, sources, options, task)
    from jdpo.planning.plan_command.plan_document import plan_document
    from jdpo.planning.plan_command.planner_process import PlannerProcess

    question, config = _question(task, config, sources, rows, options.num_rows, prices)
    with PlannerProcess() as process:
        outlooks = [
            _outlook(question, config, machine, process, f"{number} of {len(machines)}")
            for number, machine in enumerate(machines, start=1)
        ]
    if options.json:
        print(json.dumps(plan_document(question, outlooks), allow_nan=False, indent=1))
    else:
        _print(question, outlooks)
    return 0 if any(outlook.fits for outlook in outlooks) else NONE_FITS


# --- what is asked


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


def _check_compilers(machines: list[Machine]) -> None:
    """Refuses targets of which none can be planned here.

    Raises:
      ValueError: all of them are TPUs, and their compiler is not installed.
    """
    from jdpo.planning.compile_only import missing_package

    if all(not machine.is_gpu and missing_package(machine) for machine in machines):
        names = ", ".join(machine.name for machine in machines)
        raise ValueError(
            f"planning for {names} needs libtpu, the compiler for TPUs, which is not installed here: "
            "`pip install libtpu` adds it, and it needs no TPU"
        )


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


def _prices(path: str | None) -> Prices | None:
    if path is None:
        return None
    from jdpo.planning.plan_command.prices import read_prices

    return read_prices(Path(path).expanduser())


def _sources(config: TrainConfig) -> Sources:
    """Returns the model's folder, which may hold config.json alone.

    Raises:
      ValueError: there is none, or it is an adapter.
    """
    from jdpo.training.setup.model_sources import find_sources

    try:
        sources = find_sources(config, weights=False)
    except ValueError as error:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.model_name_or_path):  # no name on the hub
            raise ValueError(f"{error}. A plan needs config.json alone") from error
        raise ValueError(
            f"{error}. A plan needs config.json alone: `hf download {config.model_name_or_path} config.json "
            "--local-dir FOLDER` fetches it where there is a network; then give model_name_or_path=FOLDER and --lengths"
        ) from error
    if sources.adapter_folder is not None:
        raise ValueError(
            f"a plan of a run that continues from an adapter ({sources.adapter_folder}) is not made; plan one that "
            f"starts a new adapter of the same rank: model_name_or_path={sources.model_folder} lora.r=RANK"
        )
    return sources


def _rows(config: TrainConfig, sources: Sources, options: argparse.Namespace, task: str) -> RowLengths:
    """Returns the lengths of the rows: those that are given, or those of the config's data."""
    from jdpo.planning.plan_command.given_lengths import check_lengths, read_lengths
    from jdpo.planning.plan_command.row_lengths import alike, listed_rows

    if options.lengths is not None:
        lengths = read_lengths(options.lengths)
        check_lengths(lengths, pairs=task == "dpo", max_length=config.max_length)
        if not options.lengths.endswith(".csv"):
            return alike(lengths[0], source="--lengths")
        return listed_rows(lengths, source=options.lengths)
    from jdpo.data.tokens.tokenizer import load_tokenizer
    from jdpo.planning.plan_command.data_lengths import lengths_of_data

    try:
        tokenizer = load_tokenizer(
            sources.tokenizer_folder,
            chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs,
        )
        return lengths_of_data(config, config, tokenizer, log, pairs=task == "dpo", tokenize=not options.no_tokenize)
    except (OSError, ValueError) as error:
        example = "512,300,300, for prompt, chosen and rejected" if task == "dpo" else "812, for a row"
        raise ValueError(
            f"the lengths of the rows are needed, and those of the config cannot be had here: {error}\n"
            f"Give --lengths, such as --lengths {example}, or a CSV file"
        ) from error


def _question(
    task: str, config: TrainConfig, sources: Sources, rows: RowLengths, num_rows: int | None, prices: Prices | None
) -> tuple[Question, TrainConfig]:
    """Returns what is asked of every target, and the config with the model's folder and a settled reference."""
    from jdpo.planning.plan_command.plan_document import Question
    from jdpo.planning.plan_command.run_length import run_length
    from jdpo.training.setup.tasks import task_for

    dpo = config if isinstance(config, DPOConfig) else None
    run = run_length(config, dpo, task_for(config), rows, num_rows=num_rows)
    if dpo is not None and run.reference != dpo.reference:
        config = dataclasses.replace(dpo, reference=run.reference)
    question = Question(
        command=task,
        model=sources.name,
        rows_per_step=config.global_batch_size,
        optimizer=config.optimizer,
        rows_per_device=config.micro_batch_size,
        rows=rows,
        run=run,
        prices=prices,
    )
    return question, dataclasses.replace(config, model_name_or_path=str(sources.model_folder))


# --- the answer


def _outlook(question: Question, config: TrainConfig, machine: Machine, process: PlannerProcess, place: str) -> Outlook:
    """Plans a target; whatever goes wrong is its own row."""
    from jdpo.data.prepared.prepare import cache_folder
    from jdpo.planning.compile_only import missing_package
    from jdpo.planning.plan_command.one_target import log_target, plan_by_name
    from jdpo.planning.plan_command.outlook import Outlook, outlook

    compiled = missing_package(machine) is None
    log_target(machine.name, f"{place}, {_usual_time(machine) if compiled else 'without a compiler'}")
    arguments = machine.name, config, question.rows.sample(config.seed), cache_folder(config.cache_dir)
    try:
        # A compiler may crash; a formula does not.
        plan = process.call(plan_by_name, *arguments) if compiled else plan_by_name(*arguments)
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return Outlook(machine=machine, plan=None, failure=f"{kind}{error}")
    return outlook(
        machine,
        plan,
        question.run,
        adapters=bool(config.lora),
        price_per_hour=None if question.prices is None else question.prices.per_hour(machine),
    )


def _usual_time(machine: Machine) -> str:
    one = "4 to 30 seconds" if machine.is_gpu else "1 to 3 minutes"
    return f"up to 3 compilations, which usually take {one} each; a plan that was made before comes from the cache"


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
