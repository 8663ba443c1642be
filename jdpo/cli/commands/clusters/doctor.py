"""`jdpo doctor [CONFIG] [key=value ...]`: checks a cluster, or one machine, before a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jdpo.cli.parsing import CommandLine, Parser, add_config, add_help, add_keys, parse
from jdpo.cli.run_options import add_task, choose_task, keys_given, print_help, read_config
from jdpo.config import CONFIGS

if TYPE_CHECKING:
    from jdpo.doctor.local_facts import Given

_REFERENCE = "reference"
_PLACEHOLDERS = ("model_name_or_path", "datasets", "output_dir")


def parser(*, complete: bool = False) -> Parser:
    """Returns the parser of the command, whose help also lists the keys of a run if it is `complete`."""
    parser = Parser(
        "doctor",
        "[CONFIG.yaml] [--KEY VALUE | KEY=VALUE ...] [--timeout SECONDS]",
        "Checks a cluster before a run. Start it on every host with the launcher that will start the run; each process "
        "finds its place as a run does, and process 0 prints one page: processes and devices found and by which "
        "detection, a psum over all devices, whether every process can write and read output_dir and cache_dir and "
        "whether they share them, the same code, versions, config, data and environment everywhere, clocks, free disk "
        "and memory. Nothing is trained and no weights are read.\n\n"
        "Without CONFIG, it checks everything except output_dir, config, data and model; without a cluster, this "
        "process alone.\n\n"
        "Exit code: 0 if a run can start, 1 if there is a problem, 2 if the command line or the config is wrong, 75 if "
        "processes are missing, which the page names.",
        epilog="The keys are those of `jdpo dpo --help` and `jdpo sft --help`.",
    )
    options = add_help(parser)
    add_config(parser, options)
    options.add_argument(
        "--timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="Seconds to wait for the other processes to come, and for the devices to answer (default: 300).",
    )
    add_task(options, [*CONFIGS, _REFERENCE])
    add_keys(parser, CONFIGS["dpo"], hidden=not complete)
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = parser()
    line = parse(arguments, words)
    if print_help(command, arguments, CONFIGS["dpo"], line.help):
        return 0
    from jdpo.doctor.checkup import check_cluster

    return check_cluster(lambda: _given(line), timeout=line.options.timeout)


def _given(line: CommandLine) -> Given | None:
    """Returns the config of a command line, in which required keys may be missing if it names no file."""
    from jdpo.doctor.local_facts import Given

    if line.path is None and not line.overrides:
        return None
    task, _ = choose_task(line)
    missing = set(_PLACEHOLDERS) - set(keys_given(line)) if line.path is None else set[str]()
    if task == _REFERENCE:  # which has the keys of `jdpo dpo`, and no output_dir
        task, missing = "dpo", missing | {"output_dir"}
    placeholders = [f"--{key}=none" for key in sorted(missing)]
    config = read_config(CONFIGS[task], line._replace(overrides=[*line.overrides, *placeholders]))
    return Given(config, frozenset(missing))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number of seconds such as 300, found {text!r}")
    return seconds
