"""`jdpo COMMAND ...`: finds the command, calls it, and turns errors into messages and exit codes."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from jdpo import exit_codes
from jdpo.cli.failures import INTERRUPTED, catch_early_interrupts, catch_early_sigterm, explain_failure, explain_input
from jdpo.cli.huge_pages import restart_with_huge_pages
from jdpo.loss_specs import LOSSES
from jdpo.quiet_transformers import be_quiet
from jdpo.words import did_you_mean

COMMANDS = {
    "sft": ("jdpo.cli.commands.runs.train", "train a model on completions, the stage before preferences"),
    "dpo": ("jdpo.cli.commands.runs.train", "train a model on preference pairs: DPO and related losses"),
    "inspect": ("jdpo.cli.commands.runs.inspect", "show what a run would train on, before it trains"),
    "report": ("jdpo.cli.commands.runs.report", "make the page of a run, or of several next to each other"),
    "reference": ("jdpo.cli.commands.runs.reference", "compute the reference's log-probs once, for all later runs"),
    "generate": ("jdpo.cli.commands.answers.generate", "draw answers of a model to many prompts"),
    "chat": ("jdpo.cli.commands.answers.chat", "talk to a model in the terminal, or to two side by side"),
    "export": ("jdpo.cli.commands.runs.export", "write a Hugging Face model folder from any checkpoint of a run"),
    "score": ("jdpo.cli.commands.answers.score", "score answers by a reward model, a judge, a rule or a column"),
    "pair": ("jdpo.cli.commands.answers.pair", "make preference pairs of sampled and scored answers"),
    "eval": ("jdpo.cli.commands.answers.eval", "evaluate a model on held-out pairs and facts"),
    "compare": ("jdpo.cli.commands.answers.compare", "show what changed between models, with intervals"),
    "iterate": ("jdpo.cli.commands.answers.iterate", "improve a model in rounds: generate, score, pair, dpo, compare"),
    "quickstart": ("jdpo.cli.commands.runs.quickstart", "train a tiny model from scratch and align it, in minutes"),
    "plan": ("jdpo.cli.commands.clusters.plan", "tell what a run takes on machines before you rent them"),
    "doctor": ("jdpo.cli.commands.clusters.doctor", "check a cluster, or this machine, before a run"),
    "launch": ("jdpo.cli.commands.clusters.launch", "start a run on a cluster, a TPU slice or a host, and restart it"),
    "completion": ("jdpo.cli.commands.completion", "print a script that completes jdpo's command lines in your shell"),
}
"""Command -> its module, and what it does."""

ON_HUGE_PAGES = ("sft", "dpo", "reference")
"""Commands that run a model over all rows, for which huge pages pay."""

_TRAINING = "`jdpo sft` trains on completions, `jdpo dpo` on pairs of a chosen and a rejected answer"
ELSEWHERE = {
    "train": _TRAINING,
    "finetune": _TRAINING,
    "fine-tune": _TRAINING,
    "pretrain": _TRAINING,
    **{loss: f"that is `jdpo dpo --loss_type {loss}`" for loss in LOSSES if loss not in COMMANDS},
    **dict.fromkeys(
        ("sample", "answer", "infer", "inference", "predict", "rollout"),
        "`jdpo generate MODEL --prompts FILE --output_dir GEN` draws answers of a model",
    ),
    **dict.fromkeys(("pairs", "annotate", "label"), "`jdpo pair GEN --output PAIRS.jsonl` makes pairs of answers"),
    **dict.fromkeys(("loop", "rounds", "online"), "`jdpo iterate LOOP.yaml` improves a model in rounds"),
    **dict.fromkeys(
        ("judge", "reward", "rank"), "`jdpo score GEN --by judge:URL`, or --by reward:MODEL, scores answers"
    ),
    "merge": "`jdpo export RUN OUT --merge` adds adapters to their base",
    "push": "`jdpo export RUN OUT --push_to_hub OWNER/NAME` uploads a model",
    "evaluate": "`jdpo eval MODEL --pairs FILE` evaluates a model on held-out pairs",
    **dict.fromkeys(
        ("plot", "curves", "metrics", "dashboard"), "`jdpo report RUN [RUN2 ...]` makes a page of curves and figures"
    ),
    **dict.fromkeys(
        ("estimate", "fit", "fits", "cost", "price", "memory", "size", "plans"),
        "`jdpo plan CONFIG.yaml --on v5e-16 h100x8` tells whether a run fits, how fast it is, and what it costs",
    ),
    "diff": "`jdpo compare BEFORE AFTER` shows what changed between two models",
    "ask": "`jdpo chat MODEL` answers messages in the terminal",
    "talk": "`jdpo chat MODEL` answers messages in the terminal",
    **dict.fromkeys(
        ("submit", "deploy", "cluster", "start", "jobset", "slurm", "sbatch", "srun", "skypilot", "sky", "kubectl"),
        "`jdpo launch LAUNCHER CONFIG --on MACHINE` starts a run on a cluster",
    ),
    **dict.fromkeys(
        ("check", "diagnose", "env", "preflight", "health", "selftest"),
        "`jdpo doctor CONFIG` checks every process of a cluster before a run",
    ),
    "config": "`jdpo dpo --print_config` prints the whole config of a run",
    "help": "`jdpo --help` lists the commands, `jdpo dpo --help` the keys of one",
    "dry_run": "`jdpo dpo ... --dry_run` checks a run without training, `jdpo plan` one on machines not at hand",
}
"""Names of commands elsewhere, and names of options -> what to write."""


def usage() -> str:
    """Returns the text of `jdpo --help`."""
    lines = [f"  {name:<12}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jdpo COMMAND [CONFIG.yaml] [--KEY VALUE ...]",
            "       jdpo --version",
            "",
            "Direct Preference Optimization in JAX/Flax.",
            "",
            "Commands:",
            *lines,
            "",
            "`jdpo COMMAND --help` describes a command and its keys,",
            "`jdpo dpo --help KEY` one key.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
      the exit code: see `jdpo.exit_codes`; 128 + n stopped by signal n.
    """
    # Only as a process of its own; a caller in Python keeps its signal handlers.
    if argv is None:
        catch_early_interrupts()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from jdpo._version import __version__

        print(__version__)
        return 0
    command, *rest = words
    # Before anything is loaded, and only as a process of its own, which it replaces.
    if argv is None and command in ON_HUGE_PAGES and not {"-h", "--help"} & {*rest}:
        restart_with_huge_pages()
        catch_early_sigterm()
    if command not in COMMANDS:
        print(_safe(f"jdpo: unknown command {command!r}{_instead_of(command)}\n\n{usage()}"), file=sys.stderr)
        return 2
    # Tokenizers warn when a process forks after using threads; the only forks here are helpers of other libraries.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    be_quiet()
    _make_lines_of_others_safe()
    try:
        # A command's module is imported only when it runs, so that `--help` is fast.
        return int(importlib.import_module(COMMANDS[command][0]).main(command, rest))
    # ValueErrors are the user's to fix: the message alone, without a traceback.
    except ValueError as error:
        return _fail(error, exit_codes.USAGE, explain_input(error, command))
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at the end, too
        # What a shell reports for a process that SIGPIPE ends.
        return 128 + signal.SIGPIPE
    except (FloatingPointError, OSError) as error:
        return _fail(error, exit_codes.FAILED)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return exit_codes.INTERRUPTED
    except Exception as error:
        # Anything unexpected is a bug, and a bug needs its traceback.
        if explain_failure(error) is None:
            raise
        return _fail(error, exit_codes.FAILED)


def _instead_of(command: str) -> str:
    """Returns what to type instead of something that is not a command."""
    if command in ELSEWHERE:
        return f"; {ELSEWHERE[command]}"
    if command.startswith("-") or "=" in command or command.endswith((".yaml", ".yml")):
        return "; the command comes first, as in `jdpo dpo CONFIG.yaml`"
    hint = did_you_mean(command, COMMANDS)
    return f"; {hint}" if hint else ""


def _fail(error: Exception, code: int, text: str | None = None) -> int:
    print(_safe(f"jdpo: error: {explain_failure(error) or text or error}"), file=sys.stderr)
    if os.environ.get("JDPO_TRACEBACK"):
        _print_traceback(error)
    return code


def _safe(text: str) -> str:
    from jdpo.config.addresses import shown_text

    return shown_text(text)


def _print_traceback(error: BaseException) -> None:
    import traceback

    print(_safe("".join(traceback.format_exception(error))), file=sys.stderr)


def _make_lines_of_others_safe() -> None:
    """Log lines, warnings and tracebacks, which libraries print as they are, name files and models too."""
    # Bugs of jdpo reach Python's own handler, whose traceback may quote names from files.
    sys.excepthook = lambda _, error, __: _print_traceback(error)
    logging.setLogRecordFactory(_SafeRecord)
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormat())
    logging.basicConfig(handlers=[handler])  # before a library does, whose format would be used otherwise
    warnings.formatwarning = _format_warning


class _SafeRecord(logging.LogRecord):
    """A log record, whoever formats it."""

    def getMessage(self) -> str:
        # Further lines are set in, so that a name with a line feed in it fakes no line of jdpo's own.
        return _safe(super().getMessage()).replace("\n", "\n    ")


class _LogFormat(logging.Formatter):
    """Writes lines of jdpo like its other messages, `warning: ...`, and those of libraries with their names."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        own = record.name.partition(".")[0] == "jdpo"
        return f"{record.levelname.lower()}: {record.message}" if own else f"{record.name}: {record.message}"


_format_as_python = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return _safe(_format_as_python(message, category, filename, lineno, line))


if __name__ == "__main__":
    sys.exit(main())
