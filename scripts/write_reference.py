"""Writes docs/keys.md and docs/commands.md, the reference of configs and commands, from the code.

python scripts/write_reference.py      # after a key of a config or an option of a command was changed
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jdpo.cli.main import COMMANDS
from jdpo.cli.parsing import Parser
from jdpo.config import DatasetConfig, DPOConfig, LoraConfig, MeshConfig, OptimizerConfig, SFTConfig, WatchdogConfig
from jdpo.config.groups import PreferenceSettings
from jdpo.config.key_specs import REQUIRED, KeySpec, as_yaml, key_specs
from jdpo.config.keys import CONFIGS
from jdpo.config.value_types import Settings
from jdpo.loss_specs import OPTIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"

GROUPS: tuple[type[Settings], ...] = (DatasetConfig, LoraConfig, MeshConfig, OptimizerConfig, WatchdogConfig)
"""Classes of keys that have keys of their own."""

WRITTEN_BY = "This page is written by `scripts/write_reference.py` from the code; a test compares the two."

KEYS_INTRODUCTION = f"""\
# Config keys

Every key of `jdpo dpo` and `jdpo sft`, with its values and its default. A YAML file needs only what differs from the
defaults, and the command line overrides the file: `jdpo dpo run.yaml --beta 0.2 --mesh.tensor 2`. In Python the keys
are the arguments of `jdpo.DPOConfig` and `jdpo.SFTConfig`. `jdpo dpo --help KEY` tells everything about one key, and
[Coming from other trainers](coming_from.md) maps the keys of TRL, LLaMA-Factory, axolotl and Tunix.

{WRITTEN_BY}
"""

COMMANDS_INTRODUCTION = f"""\
# Commands

Every command with its arguments and options, as `jdpo COMMAND --help` shows them. Options may be written with
underscores or dashes. All commands exit with 0 when they are done, 1 when they fail, 2 when the command line or its
input is wrong, 75 when another process of the run is gone, and 128 + n when signal n stops them.

{WRITTEN_BY}
"""


# --- keys


def keys_page() -> str:
    """Returns the text of docs/keys.md."""
    parts = [KEYS_INTRODUCTION, "## `jdpo dpo`\n", *_tables(DPOConfig), "## `jdpo sft`\n", _sft()]
    for cls in GROUPS:
        first, _, _ = (cls.__doc__ or "").partition("\n")
        parts += [f"## `{cls.__name__}`\n", f"{first}\n", *_tables(cls)]
    return "\n".join(parts).rstrip() + "\n"


def _own_specs(cls: type[Settings]) -> list[KeySpec]:
    # Losses and their options have tables of their own, so that a new one changes one page.
    return [spec for spec in key_specs(cls) if "." not in spec.name and spec.name not in OPTIONS]


def _tables(cls: type[Settings]) -> Iterator[str]:
    """Yields the tables of a class, each with its heading where there are several."""
    specs = _own_specs(cls)
    headings = dict.fromkeys(spec.heading for spec in specs)
    for heading in headings:
        if len(headings) > 1:
            yield f"### {heading}\n"
        yield _table([spec for spec in specs if spec.heading == heading])
        if heading == PreferenceSettings.heading:
            yield "`beta` and the options of the losses: [Options](losses.md#options-that-compose).\n"


def _sft() -> str:
    common = {spec.name: spec for spec in key_specs(DPOConfig)}
    specs = _own_specs(SFTConfig)
    own = [spec for spec in specs if spec != common.get(spec.name)]
    names = {spec.name for spec in specs}
    without = dict.fromkeys(spec.heading for spec in key_specs(DPOConfig) if spec.name not in names)
    return f"The keys of `jdpo dpo` except those of {' and '.join(without)}. Other defaults:\n\n{_table(own)}"


def _table(specs: list[KeySpec]) -> str:
    lines = ["| key | value | default | |", "| --- | --- | --- | --- |"]
    for spec in specs:
        group = f"[{spec.group.__name__}](#{spec.group.__name__.lower()})" if spec.group else ""
        value = ", ".join(spec.choices) if spec.choices else group or spec.kind
        value = "one or a list of [the losses](losses.md#what-each-one-is)" if spec.name == "loss_type" else value
        value += f", {spec.bounds}" if spec.bounds else ""
        value += " or null" if spec.nullable else ""
        default = "required" if spec.default is REQUIRED else f"`{as_yaml(spec.default)}`"
        default = "see there" if isinstance(spec.default, dict) else default
        lines.append(f"| `{spec.name}` | {value} | {default} | {spec.description} |")
    return "\n".join(lines) + "\n"


# --- commands


def commands_page() -> str:
    """Returns the text of docs/commands.md."""
    parts = [COMMANDS_INTRODUCTION]
    for name, (module, _) in COMMANDS.items():
        loaded = importlib.import_module(module)
        is_training = name in CONFIGS
        parser: Parser = loaded.parser(name) if is_training else loaded.parser()
        parts += [f"## `jdpo {name}`\n", f"```text\n{(parser.usage or '').strip()}\n```\n"]
        parts.append(f"{_text(parser.description)}\n")
        groups = [group for group in parser._action_groups if any(map(_is_shown, group._group_actions))]
        # The keys of a training command have a page of their own.
        parts += [_options(group) for group in groups if not is_training or group.title == "Options"]
        if is_training:
            parts.append(f"Every key of the config is an option, too: [Config keys](keys.md#jdpo-{name}).\n")
    return "\n".join(parts).rstrip() + "\n"


def _is_shown(action: argparse.Action) -> bool:
    return action.help is not argparse.SUPPRESS and action.dest != "help"


def _options(group: argparse._ArgumentGroup) -> str:
    actions = [action for action in group._group_actions if _is_shown(action)]
    lines = [f"| {group.title} | |", "| --- | --- |"]
    for action in actions:
        value = action.metavar if isinstance(action.metavar, str) else ""
        if not value and action.choices:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        # One of the two spellings, and of an argument without dashes its name.
        name = action.option_strings[0] if action.option_strings else ""
        lines.append(f"| `{f'{name} {value}'.strip()}` | {_text(action.help, vars(action))} |")
    return "\n".join(lines) + "\n"


def _text(text: str | None, values: Mapping[str, object] | None = None) -> str:
    """Returns a text of argparse as one line of Markdown."""
    filled = (text or "") % (values or {}) if values is not None else text or ""
    return " ".join(filled.replace("\xa0", " ").split()).replace("|", "\\|").replace("<", "\\<")


PAGES: dict[str, Callable[[], str]] = {"keys.md": keys_page, "commands.md": commands_page}
"""Name of a page in docs/ -> the function that returns its text."""


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote {DOCS / name}")
