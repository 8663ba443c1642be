"""`jdpo report RUN [RUN2 ...]`: report.html of a run, or a page that compares several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jdpo.cli.option_types import not_empty
from jdpo.cli.parsing import Parser, add_help
from jdpo.safe_text import terminal, terminal_lines


def parser() -> Parser:
    """Returns the parser of the command."""
    parser = Parser(
        "report",
        "RUN [RUN2 ...] [--output FILE]",
        "Writes one HTML page with the verdict on a run, its curves, answers, settings, data and times. Several runs "
        "are shown next to each other. A run may be in progress, stopped, failed or finished, and of an older version.",
        epilog="Every run writes its own report.html while it trains and at its end. A page loads nothing and runs no "
        "script, so it can be sent and opened anywhere.",
    )
    arguments = parser.add_argument_group("Arguments")
    options = add_help(parser, keys=False)
    arguments.add_argument("runs", metavar="RUN", nargs="+", type=not_empty, help="The output_dir of a run.")
    options.add_argument(
        "--output",
        metavar="FILE",
        type=not_empty,
        help="The page to write; by default report.html in the folder of the run or, of several runs, in the current "
        "folder.",
    )
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "report", command
    asked = parser().parse_args(words)
    runs = [Path(word).expanduser() for word in asked.runs]
    import jax

    # The value of a loss at the start is computed by jax; the run may be in progress and hold the accelerators.
    jax.config.update("jax_platforms", "cpu")
    from jdpo.training.pages.run_report import write_report
    from jdpo.training.run_dir import REPORT

    if asked.output is not None:
        out = Path(asked.output).expanduser()
        if out.is_dir():
            out = out / REPORT
        if out.suffix not in (".html", ".htm"):
            raise ValueError(f"--output: expected a file that ends in .html, or a folder, found {terminal(out)}")
    else:
        out = runs[0] / REPORT if len(runs) == 1 else Path(REPORT)
    write_report(runs, out)
    print(terminal_lines(f"done: {out}"))
    return 0
