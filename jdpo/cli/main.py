"""`jdpo COMMAND ...`: finds the command, calls it, and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "sft": ("jdpo.cli.train", "supervised fine-tuning: the stage before preferences"),
    "dpo": ("jdpo.cli.train", "Direct Preference Optimization of a Hugging Face model"),
    "inspect": ("jdpo.cli.inspect", "what a run would train on, looked at before it trains"),
    "reference": ("jdpo.cli.reference", "the reference's log-probs, computed once and kept for every later run"),
    "export": ("jdpo.cli.export", "a Hugging Face model folder from any checkpoint of a run"),
    "quickstart": ("jdpo.cli.quickstart", "the whole way on a tiny model made from nothing, in minutes"),
}


def usage() -> str:
    """What `jdpo --help` prints."""
    lines = [f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: jdpo COMMAND ...", "", *lines, "", "`jdpo COMMAND --help` lists a command's keys."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
      the exit code: 0 done, 1 the run failed, 2 the command line or its input is wrong, 128 + n stopped by
      signal n.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from jdpo._version import __version__

        print(__version__)
        return 0
    command, *rest = words
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"jdpo: unknown command {command!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    # Tokenizers warn when a process forks after using threads; the only forks here are helpers of other libraries.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers advises to install PyTorch, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return int(importlib.import_module(COMMANDS[command][0]).main(command, rest))
    except ValueError as error:
        return _fail(error, 2)
    except (FloatingPointError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130


def _fail(error: Exception, code: int) -> int:
    from jdpo.config.addresses import public_text

    print(public_text(f"jdpo: error: {error}"), file=sys.stderr)
    if os.environ.get("JDPO_TRACEBACK"):
        import traceback

        print(public_text("".join(traceback.format_exception(error))), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
