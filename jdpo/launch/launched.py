"""The result of a launcher: files, the commands that start the run, and what the user should know."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jdpo.durable import write_durably
from jdpo.launch.request import LaunchRequest


class Advice(NamedTuple):
    """Something that the user may want to do before or after the launch.

    Attributes:
      what: a sentence about it.
      command: a command line of the shell for it; empty if there is none.
    """

    what: str
    command: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Files and commands that a launcher has made of a request.

    Attributes:
      files: path -> content, as `LaunchRequest.folder` / name. A script ends in .sh, and is made executable.
      commands: the commands that start the run, in order; each is a list of words, the first is a program on PATH.
      installs: program -> how to install it, for every program that the commands need.
      before: what has to be done once before the first launch, such as storing secrets.
      after: how to watch the run, and how to end it.
      failed: what to try if a command fails.
    """

    files: Mapping[Path, str]
    commands: tuple[tuple[str, ...], ...]
    installs: Mapping[str, str]
    before: tuple[Advice, ...] = ()
    after: tuple[Advice, ...] = ()
    failed: tuple[Advice, ...] = ()

    def described(self) -> str:
        """Returns every file and command as text, for `--dry_run`."""
        parts = [f"# {path}\n{text.rstrip()}\n" for path, text in self.files.items()]
        parts += ["# Commands:\n" + "\n".join(f"$ {shlex.join(words)}" for words in self.commands) + "\n"]
        return "\n".join(parts)

    def write(self) -> None:
        """Writes the files.

        Raises:
          OSError: their folder cannot be written.
        """
        for path, text in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, text)
            if path.suffix == ".sh":
                path.chmod(0o755)

    def check_programs(self) -> None:
        """Checks that the programs that the commands need are installed.

        Raises:
          ValueError: one is not on PATH.
        """
        for program, how in self.installs.items():
            if shutil.which(program) is None:
                raise ValueError(
                    f"{program} is not on PATH: {how}. `--dry_run` prints every file and command without it"
                )


def export_secrets(request: LaunchRequest, what: str) -> Advice:
    """Returns the advice to set the secrets of a run in a shell.

    Args:
      what: the sentence that says in which shell.
    """
    return Advice(what, " ".join(["export", *(f"{name}=..." for name in request.secrets)]))


def put_paths(request: LaunchRequest, folder: str, *, on: str, by: str) -> list[Advice]:
    """Returns the advice to copy the files and folders that the config names to shared storage.

    Args:
      folder: the folder in which the run starts.
      on: the storage, in a word.
      by: those that read it, in a word.
    """
    return [
        Advice(f"Put {path} on the {on}: the {by} look for it at {PurePosixPath(folder) / path}.")
        for path in request.local_paths()
    ]


def listed_advice(heading: str, advice: tuple[Advice, ...]) -> str:
    """Returns advice as lines of text; empty without advice."""
    if not advice:
        return ""
    lines = [line for each in advice for line in (f"  {each.what}", *([f"    {each.command}"] if each.command else []))]
    return "\n".join([heading, *lines])
