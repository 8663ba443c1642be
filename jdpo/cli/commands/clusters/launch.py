"""`jdpo launch LAUNCHER CONFIG --on MACHINE`: starts a run on a cluster, or prints the files and commands for it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdpo.cli.option_types import count, count_or_none, not_empty
from jdpo.cli.parsing import Parser, add_help, kept, spellings
from jdpo.config import command_of
from jdpo.config.addresses import shown_text
from jdpo.launch.launch_options import LaunchOption, options_of, read_options
from jdpo.launch.launched import Advice, Launch, listed_advice
from jdpo.launch.launchers import LAUNCHERS, launcher_of
from jdpo.launch.request import RUNS, LaunchRequest, make_request
from jdpo.launch.running import run_commands
from jdpo.planning.machines import machine_of

_USAGE = "LAUNCHER CONFIG.yaml [KEY=VALUE ...] --on MACHINE [--dry_run] ..."


def parser(launcher: str | None = None) -> Parser:
    """Returns the parser of the command.

    Args:
      launcher: the launcher whose options it has; None: those of all, as for the help.
    """
    shown = LAUNCHERS if launcher is None else {launcher: launcher_of(launcher)}
    parser = Parser(
        "launch",
        _USAGE,
        "Starts a run on a cluster, a TPU slice or a host: writes the files that this takes and calls kubectl, sbatch, "
        "sky or gcloud. After a preemption or a lost host the launcher starts the same command again, and the run "
        "continues from its last checkpoint; an error of the run ends it.\n\nLaunchers:\n\n"
        + "\n".join(f"    {name:<10}{each.summary}" for name, each in LAUNCHERS.items()),
        epilog="For example (with --dry_run, nothing is written or started):\n\n"
        + "\n".join(f"    jdpo launch {name} {each.example}" for name, each in shown.items()),
    )
    arguments = parser.add_argument_group("Arguments")
    arguments.add_argument("launcher", metavar="LAUNCHER", help=f"{', '.join(LAUNCHERS)}.")
    arguments.add_argument(
        "file", metavar="CONFIG.yaml", type=not_empty, help="The config of the run. Paths in it are those of the nodes."
    )
    arguments.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Keys that override those of the config.")
    _add_common_options(add_help(parser, keys=False))
    seen: set[str] = set()
    for name, each in shown.items():
        group = parser.add_argument_group(f"Options of {name}")
        # Several launchers may have an option of the same name and meaning; argparse takes it once.
        for one in options_of(each.options):
            if one.name not in seen:
                _add_option(group, one)
            seen.add(one.name)
    return parser


def _add_common_options(options: Any) -> None:
    options.add_argument(
        "--on",
        action="append",
        type=not_empty,
        metavar="MACHINE",
        help="What to run on, such as v6e-16, 2xv5e-16 or h100x8 (required).",
    )
    options.add_argument("--command", choices=RUNS, default="dpo", help="The jdpo command to run (default: dpo).")
    options.add_argument(
        *spellings("--dry_run"), action="store_true", help="Print every file and command; write and start nothing."
    )
    options.add_argument("--doctor", action="store_true", help="Run `jdpo doctor` on all nodes before each start.")
    options.add_argument(
        "--name",
        type=not_empty,
        metavar="NAME",
        help="Name of the job; by default made of CONFIG's name.",
    )
    options.add_argument(
        "--folder", type=not_empty, metavar="FOLDER", help="Where to write the files (default: output_dir/launch)."
    )
    options.add_argument(
        *spellings("--max_restarts"),
        type=count_or_none,
        default=20,
        metavar="N",
        help="How often the run is started again (default: 20).",
    )
    options.add_argument(
        "--env",
        action="append",
        type=not_empty,
        default=[],
        metavar="NAME=VALUE",
        help="Set an environment variable; may be repeated.",
    )
    options.add_argument(
        "--secret",
        action="append",
        type=not_empty,
        default=[],
        metavar="NAME",
        help="Take this environment variable from the launcher's store of secrets, so that its value is in no file; "
        "may be repeated. HF_TOKEN and the keys of the trackers in report_to are taken from there if they are stored.",
    )


def _add_option(group: Any, one: LaunchOption) -> None:
    default = f" {kept(f'(default: {one.default})')}" if one.default not in ("", None, False, ()) else ""
    text = (one.help + (" (required)" if one.required else default)).replace("%", "%%")
    names = spellings(f"--{one.name}")
    if one.kind is bool:
        group.add_argument(*names, action="store_true", help=text)
    elif one.kind is tuple:
        group.add_argument(*names, action="append", type=not_empty, default=[], metavar=one.metavar, help=text)
    else:
        kind: Any = count if one.kind is int else not_empty
        # None for what is not given: argparse would check a default as if it were.
        group.add_argument(*names, type=kind, metavar=one.metavar, help=text)


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns 0, 1 or 2, or the exit code of a program that failed."""
    assert command == "launch", command
    if words and words[0] in ("-h", "--help"):
        print(parser().format_help(), end="")
        return 0
    if not words or words[0].startswith("-"):
        raise ValueError(f"the launcher comes first, one of {', '.join(LAUNCHERS)}: `jdpo launch {_USAGE}`")
    asked = _parse(words)
    launch = _launch_of(asked)
    if asked.dry_run:
        _print(launch.described())
        plan = shlex.join(["jdpo", "plan", asked.file, *asked.overrides, "--on", asked.on])
        fits = Advice("See whether it fits, and how fast it is:", plan)
        _print(listed_advice("Before the first launch:", (fits, *launch.before)))
        _print(listed_advice("Then:", launch.after))
        return 0
    launch.check_programs()
    try:
        launch.write()
    except OSError as error:
        raise ValueError(f"cannot write the files of the launch: {error}; --folder names another folder") from error
    for path in launch.files:
        _print(f"wrote {path}")
    code = run_commands(launch.commands, _print)
    if code == 0:
        _print(listed_advice("Then:", launch.after))
    elif launch.failed:
        _print(listed_advice("What may help:", (*launch.failed, *launch.before)))
    return code


def planned(words: Sequence[str]) -> Launch:
    """Returns what a command line would write and run, and does neither.

    Args:
      words: those after `jdpo launch`.

    Raises:
      ValueError: see `main`.
    """
    return _launch_of(_parse(words))


def _launch_of(asked: argparse.Namespace) -> Launch:
    launcher = launcher_of(asked.launcher)
    own = {one.name: getattr(asked, one.name) for one in options_of(launcher.options)}
    return launcher.launch(_request(asked), read_options(launcher.options, own, asked.launcher))


def _parse(words: Sequence[str]) -> argparse.Namespace:
    own = parser(words[0])
    # Keys may be between options, so the words are not one run of positionals.
    try:
        asked = own.parse_intermixed_args(list(words))
    except ValueError as error:
        if "CONFIG.yaml" in str(error):  # argparse would ask for KEY=VALUE as well
            error = ValueError(f"the config is missing: `jdpo launch {words[0]} CONFIG.yaml --on MACHINE`")
        raise _foreign_option(error, words) from None
    if asked.on is None:
        raise ValueError("--on MACHINE is missing: what to run on, such as v6e-16, 2xv5e-16 or h100x8")
    if len(asked.on) > 1:
        raise ValueError(
            f"--on {' and '.join(asked.on)}: a run is launched on one machine; `jdpo plan` compares several"
        )
    asked.on = asked.on[0]
    for word in asked.overrides:
        if "=" not in word:
            raise ValueError(f"cannot read {word!r}; after the config come keys with their values, such as beta=0.2")
    return asked


def _foreign_option(error: ValueError, words: Sequence[str]) -> ValueError:
    """Returns the error about the options: a word may be an option of another launcher, or a key of the config."""
    given = {word.partition("=")[0].replace("-", "_").lstrip("_") for word in words if word.startswith("--")}
    own = {one.name for one in options_of(LAUNCHERS[words[0]].options)}
    for name, each in LAUNCHERS.items():
        theirs = given & ({one.name for one in options_of(each.options)} - own)
        if theirs:
            return ValueError(f"--{min(theirs)} is an option of `jdpo launch {name}`, not of {words[0]}")
    for name in sorted(given):
        if "key of" in command_of(name):
            return ValueError(f"--{name} is a key of the run's config; write it after the config as {name}=VALUE")
    return error


def _request(asked: argparse.Namespace) -> LaunchRequest:
    return make_request(
        command=asked.command,
        config_path=Path(asked.file),
        overrides=asked.overrides,
        machine=machine_of(asked.on),
        name=asked.name or "",
        folder=Path(asked.folder) if asked.folder else None,
        doctor=asked.doctor,
        max_restarts=asked.max_restarts,
        env=asked.env,
        secrets=asked.secret,
    )


def _print(text: str) -> None:
    if text:
        print(shown_text(text), flush=True)
