"""`jdpo completion SHELL`: prints a script that completes commands, keys and values on TAB, for bash, zsh or fish."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from jdpo.cli.main import COMMANDS
from jdpo.cli.parsing import Parser, add_help
from jdpo.config import CONFIGS
from jdpo.planning.machines import machine_names

SHELLS = ("bash", "zsh", "fish")


def parser() -> Parser:
    """Returns the parser of the command's options."""
    parser = Parser(
        "completion",
        "{bash,zsh,fish}",
        "Prints a script with which the shell completes commands, keys and values of jdpo on TAB.",
        epilog="To install it:\n\n"
        "    jdpo completion bash > ~/.local/share/bash-completion/completions/jdpo\n"
        "    jdpo completion zsh > ~/.zfunc/_jdpo      (with fpath+=~/.zfunc before compinit)\n"
        "    jdpo completion fish > ~/.config/fish/completions/jdpo.fish",
    )
    arguments = parser.add_argument_group("Arguments")
    add_help(parser, keys=False)
    arguments.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    # Here and not above, since all other commands start without it.
    import shtab

    shell = parser().parse_args(words).shell
    print(shtab.complete(whole_parser(), shell=shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Returns one parser of all commands, whose options have the values that they take as choices."""
    whole = argparse.ArgumentParser(prog="jdpo", description="Direct Preference Optimization in JAX/Flax.")
    whole.add_argument("--version", action="store_true", help="Print the version and exit.")
    commands = whole.add_subparsers(dest="command")
    for name, (module, summary) in COMMANDS.items():
        loaded = importlib.import_module(module)
        if name in CONFIGS:
            parent = loaded.parser(name)
        elif name in ("inspect", "plan", "reference"):  # their own help hides the keys of a run
            parent = loaded.parser(complete=True)
        else:
            parent = loaded.parser()
        # The parent brings its own --help, and argparse refuses a second one.
        commands.add_parser(name, parents=[parent], add_help=False, help=summary, description=summary)
        for action in parent._actions:
            _offer_values(action)
    return whole


def _offer_values(action: argparse.Action) -> None:
    """Lets shtab offer what an option takes; while parsing, values are checked with the config as a whole."""
    metavar = str(action.metavar or "")
    if metavar.startswith("{"):
        action.choices = metavar.strip("{}").split(",")
    elif metavar == "BOOL":
        action.choices = ["true", "false"]
    elif metavar in ("TARGET", "MACHINE"):
        action.choices = machine_names()
    elif metavar in ("FILE", "CONFIG.yaml", "TEXT", "GROUP"):  # many texts are paths
        action.complete = importlib.import_module("shtab").FILE  # type: ignore[attr-defined]
