"""The argparse parsers of the commands that read a run's config: its keys as options, in the forms people write them.

jdpo dpo CONFIG.yaml beta=0.2 --max-length 512 --mesh.fsdp=4 --lora
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jdpo.config import Settings, command_of
from jdpo.config.key_specs import REQUIRED, KeySpec, as_yaml, key_specs
from jdpo.config.reading import unreadable
from jdpo.words import did_you_mean

CONFIG_USAGE = "[CONFIG.yaml] [--KEY VALUE | --KEY=VALUE | KEY=VALUE ...]"

_LISTED_ONCE = {"datasets": "Keys of each entry of datasets and eval_datasets", "eval_datasets": None}
"""Groups whose keys cannot be options, since there are several of them -> the heading above their keys, or None."""


_NO_BREAK = "\xa0"
"""A space at which lines of the help are not broken."""


class _Formatter(argparse.HelpFormatter):
    """Wraps each line of a text on its own, with the indentation that it has."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(line, width, subsequent_indent=" " * (len(line) - len(line.lstrip())), break_on_hyphens=False)
            for line in text.split("\n")
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def format_help(self) -> str:
        return super().format_help().replace(_NO_BREAK, " ")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, as those of everything else."""

    def __init__(self, command: str, usage: str, description: str, *, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"jdpo {command}",
            usage=f"jdpo {command} {usage}",
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,  # a prefix may become ambiguous when a key is added
            # --help takes a key here, which argparse's own does not.
            add_help=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises what argparse found, with the nearest option, or the command that has an option which this lacks."""
        named = re.search(r"--([\w.-]+)", message.partition("unrecognized arguments:")[2])
        elsewhere = command_of(named[1].replace("-", "_")) if named else ""
        near = did_you_mean(f"--{named[1]}", self._option_string_actions, cutoff=0.75) if named else ""
        raise ValueError(f"{message}; {elsewhere or near or f'`{self.prog} --help` lists the options'}")


class _Override(argparse.Action):
    """Collects a key with its value as a word for `load_config`; a switch without a value as `--key`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        word = self.option_strings[0] if values is None else f"{self.option_strings[0]}={values}"
        # Words and not values: the config reads them as YAML, in the order in which they were given.
        namespace.words = [*namespace.words, word]


def add_help(parser: argparse.ArgumentParser, *, keys: bool = True) -> Any:
    """Adds --help, which takes a key where the command has keys; returns the group of the options."""
    group = parser.add_argument_group("Options")
    if keys:
        group.add_argument(
            "-h", "--help", nargs="?", metavar="KEY", help="Show this help, or everything about one key, and exit."
        )
    else:
        group.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    return group


def spellings(name: str) -> tuple[str, ...]:
    """Returns the spellings of an option: with underscores, as keys are written, and with dashes.

    >>> spellings("--max_new_tokens")
    ('--max_new_tokens', '--max-new-tokens')
    """
    return tuple(dict.fromkeys((name, name.replace("_", "-"))))


def add_config(parser: argparse.ArgumentParser, options: Any) -> None:
    """Adds the config file: the first argument, or --config."""
    parser.add_argument("file", nargs="?", metavar="CONFIG.yaml", help=argparse.SUPPRESS)
    options.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="Read settings from this YAML file; the first argument may name it as well. Keys on the command line "
        "override those of the file.",
    )


def add_keys(parser: argparse.ArgumentParser, cls: type[Settings], *, hidden: bool = False) -> None:
    """Adds an option for each key, under the heading of its group; keys of groups have headings of their own.

    Args:
      hidden: whether `--help` leaves them out.
    """
    sections: dict[str, Any] = {}
    for spec in key_specs(cls):
        group, _, inner = spec.name.rpartition(".")
        if group in _LISTED_ONCE:
            if (title := _LISTED_ONCE[group]) and not hidden:
                _list_key(_section(parser, sections, title), spec, inner)
            continue
        title = f"Keys of {group} (--{group}.KEY VALUE; in YAML {group}: {{KEY: VALUE}})" if group else spec.heading
        _section(parser, sections, title).add_argument(
            f"--{spec.name}",
            action=_Override,
            dest="words",
            # The defaults are those of the config, so a key that is not given leaves nothing in the namespace.
            default=argparse.SUPPRESS,
            nargs="?" if spec.switch else None,
            metavar=spec.metavar,
            help=argparse.SUPPRESS if hidden else described(spec),
        )


def _section(parser: argparse.ArgumentParser, sections: dict[str, Any], title: str) -> Any:
    if title not in sections:
        sections[title] = parser.add_argument_group(title)
    return sections[title]


def _list_key(section: Any, spec: KeySpec, name: str) -> None:
    """Lists a key that is no option in a section of the help."""
    action = argparse.Action([], dest=name, metavar=name, help=described(spec))
    section._group_actions.append(action)  # argparse has no public way to show what it does not parse


def described(spec: KeySpec) -> str:
    """Returns a key's line of help: its description, and its default or that it is required."""
    default = "(required)" if spec.default is REQUIRED else f"(default: {_default(spec)})"
    listed = f" Choices: {', '.join(spec.choices)}." if spec.choices and spec.choices[0] not in spec.metavar else ""
    # argparse formats help texts with %, so a percent sign is written twice.
    return f"{spec.description}{listed} {kept(default)}".replace("%", "%%")


def kept(words: str) -> str:
    """Returns words for a text of help that are to stay on one line."""
    return words.replace(" ", _NO_BREAK)


def _default(spec: KeySpec) -> str:
    return "see below" if isinstance(spec.default, dict) else as_yaml(spec.default)


class CommandLine(NamedTuple):
    """The parts of a command line.

    Attributes:
      path: the config file, or None.
      overrides: keys with their values, as words for `load_config`.
      options: the command's own options.
      help: the key to explain, empty for the whole help, None if no help is asked for.
    """

    path: Path | None
    overrides: list[str]
    options: argparse.Namespace
    help: str | None


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> CommandLine:
    """Parses the words of a command line that may hold keys, which stay in their order.

    Raises:
      ValueError: two config files, or an option without its value.
    """
    if (asked := _help_asked(words, parser)) is not None:
        return CommandLine(None, [], argparse.Namespace(), asked)
    found, unknown = parser.parse_known_args(joined(words, parser), argparse.Namespace(words=[], config=[]))
    files = [*([found.file] if getattr(found, "file", None) else []), *(found.config or [])]
    if not all(files):
        raise ValueError("--config needs the path of a YAML file")
    if len(files) > 1:
        raise ValueError(f"two config files, {' and '.join(sorted(files))}; give one, and keys that override it")
    return CommandLine(Path(files[0]) if files else None, [*found.words, *unknown], found, None)


def _help_asked(words: Sequence[str], parser: argparse.ArgumentParser) -> str | None:
    """Returns the key after --help, which may be written as an option; an option of the command itself is no key."""
    # `words` is where keys of the config go; every other option is the command's own.
    own = {option for action in parser._actions if action.dest != "words" for option in action.option_strings}
    for position, word in enumerate(words):
        name, _, key = word.partition("=")
        if name in ("-h", "--help"):
            key = key or "".join(words[position + 1 : position + 2])
            key = key.removeprefix("--").partition("=")[0].replace("-", "_")
            return "" if f"--{key}" in own else key
    return None


def _unexpected(word: str, done: Sequence[str], parser: argparse.ArgumentParser) -> ValueError:
    """Returns the error about a word that is neither a key, nor a value, nor the first word.

    Args:
      done: the words before it, in the form of `joined`.
    """
    actions = {option: action for action in parser._actions for option in action.option_strings}
    before, equals, value = done[-1].partition("=")
    if f"--{before}" in actions:  # `beta 0.2`, where beta is read as the config file
        return ValueError(f"cannot read {word!r}; did you mean `--{before} {word}`?")
    if (option := f"--{word.lstrip('-')}") in actions:
        return ValueError(f"cannot read {word!r}; did you mean `{option}`?")
    if equals and before in actions and actions[before].metavar == "LIST":
        return ValueError(f"cannot read {word!r}; write several values as a list: `{before} '[{value}, {word}]'`")
    if _is_yaml(word) and not done[0].startswith("--"):
        return ValueError(f"two config files, {done[0]} and {word}; give one, and keys that override it")
    return unreadable(word)


def _is_yaml(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def joined(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Writes each key with its value as one word, `--key=value`, in whichever form it was given.

    argparse alone would take `-1e-3` for an option, `beta=0.2` for an argument and the value of an unknown key for
    another argument.

    Raises:
      ValueError: a flag with a value, or a word that is neither a key nor the first one.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--max_length"), parser.add_argument("--json", action="store_true")
    >>> joined(["run.yaml", "beta=0.2", "--max-length", "512", "--simpo_gamma", "-1e-3", "--json"], parser)
    ['run.yaml', '--beta=0.2', '--max_length=512', '--simpo_gamma=-1e-3', '--json']
    """
    options = {option: action.nargs for action in parser._actions for option in action.option_strings}
    done: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not (equals or word.startswith("--")):
            if done:
                raise _unexpected(word, done, parser)
            done.append(word)
            continue
        option = "--" + name.removeprefix("--").replace("-", "_")
        # An unknown key may have a value or none: which keys exist is checked with the whole config.
        nargs = options.get(option, "?")
        if nargs == "+":  # several values, each as an option of its own, which argparse collects
            values = [value] if equals else []
            while not equals and rest and not (rest[0].startswith("--") or "=" in rest[0] or _is_yaml(rest[0])):
                values.append(rest.pop(0))
            done += [f"{option}={each}" for each in values or [""]]
        elif nargs == 0:
            if equals:
                raise ValueError(f"{option} takes no value, found {value!r}")
            done.append(option)
        elif equals:
            done.append(f"{option}={value}")
        elif rest and not rest[0].startswith("--"):
            done.append(f"{option}={rest.pop(0)}")
        else:
            done.append(option if nargs == "?" else f"{option}=")
    return done
