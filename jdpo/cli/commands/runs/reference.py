"""`jdpo reference CONFIG [key=value ...]`: the reference's log-probs, computed once and kept for every later run."""

from __future__ import annotations

from collections.abc import Sequence

from jdpo.cli.cluster import in_cluster
from jdpo.cli.parsing import CONFIG_USAGE, Parser, add_config, add_help, add_keys, parse
from jdpo.cli.run_options import print_help, read_config
from jdpo.config import CONFIGS
from jdpo.safe_text import terminal_lines

DPO = CONFIGS["dpo"]
"""The keys of this command are those of `jdpo dpo`."""


def parser(*, complete: bool = False) -> Parser:
    """Returns the parser of the command.

    Args:
      complete: whether its help lists the keys, too.
    """
    parser = Parser(
        "reference",
        CONFIG_USAGE,
        "Computes the log-probs of every training and evaluation row of a `jdpo dpo` run under the frozen reference, "
        "and stores them in cache_dir. Runs of `jdpo dpo` with the same model, rows, max_length, template and "
        "compute_dtype then read them from there, whatever their loss, beta, learning rate, seed or row order, and do "
        "not hold the reference in memory.\n\n"
        "The command may be stopped at any time: run again, it computes only what is missing or damaged. It does not "
        "write to output_dir, which may be left out.",
        epilog="The keys are those of `jdpo dpo --help`.",
    )
    add_config(parser, add_help(parser))
    add_keys(parser, DPO, hidden=not complete)
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = parser()
    line = parse(arguments, words)
    if print_help(command, arguments, DPO, line.help):
        return 0
    # output_dir is required but not written, so it need not be given.
    config = read_config(DPO, line._replace(overrides=[*line.overrides, "output_dir=none"]))
    with in_cluster(config, command, words, trains=False):
        from jdpo.processes import is_first
        from jdpo.training.interrupt import StopRequest
        from jdpo.training.reference.reference_source import compute_reference
        from jdpo.training.setup.row_order import BuildStopped

        def log(text: str) -> None:
            if is_first():
                print(terminal_lines(text), flush=True)

        with StopRequest() as stop:
            try:
                compute_reference(config, log, stopped=stop.asked)
            except BuildStopped:
                log("stopped by a signal; what was computed is kept. Run the same command again to continue")
                return stop.exit_code
    return 0
