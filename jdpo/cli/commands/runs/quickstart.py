"""`jdpo quickstart`: standard training and DPO side by side, on a tiny model trained from scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdpo.cli.parsing import Parser, add_help, joined, kept
from jdpo.config import command_of, parse_overrides
from jdpo.config.key_specs import as_yaml
from jdpo.quickstart.experiment_settings import Settings
from jdpo.words import did_you_mean

DEFAULT_OUTPUT_DIR = "quickstart"

DESCRIPTIONS = {
    "output_dir": "Output folder. The same command continues there, or only prints the report.",
    "frequencies": "How often the corpus gives the first, second and third answer.",
    "countries": "Countries in the corpus; a quarter of them are never corrected.",
    "seed": "Seed of the random weights, the order of rows and the sampled answers.",
    "hidden_size": "Width of the model, a multiple of 64.",
    "num_layers": "Layers of the model.",
    "pretrain_steps": "Steps of pre-training.",
    "pretrain_batch_size": "Rows per step of pre-training.",
    "pretrain_learning_rate": "Peak learning rate of pre-training.",
    "steps": "Steps of both corrections.",
    "batch_size": "Right answers, or pairs, per step of both corrections.",
    "learning_rate": "Peak learning rate of both corrections.",
    "beta": "DPO: strength of the pull towards the reference.",
    "probes": "Approximate number of measurements per run.",
}
_METAVARS = {int: "INT", float: "FLOAT", tuple: "A,B,C", str: "FOLDER"}


def parser() -> Parser:
    """Returns the parser of the command, with an option for each key."""
    parser = Parser(
        "quickstart",
        "[--KEY VALUE | --KEY=VALUE | KEY=VALUE ...]",
        "Trains a tiny language model from scratch on a corpus with wrong answers, corrects it by standard training "
        "and by DPO, and reports the difference. It takes minutes on a laptop.",
    )
    add_help(parser, keys=False)
    group = parser.add_argument_group("Keys")
    defaults = {"output_dir": DEFAULT_OUTPUT_DIR} | dataclasses.asdict(Settings())
    for key, text in DESCRIPTIONS.items():
        default = defaults[key]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else as_yaml(default)
        group.add_argument(f"--{key}", metavar=_METAVARS[type(default)], help=f"{text} {kept(f'(default: {shown})')}")
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the experiment, or continues it, and reports.

    Returns:
      0, or 128 + n if signal n stopped it.

    Raises:
      ValueError: an unknown key, a value of the wrong type, or an output_dir that holds something else.
    """
    assert command == "quickstart", command
    if "--help" in words or "-h" in words:
        print(parser().format_help(), end="")
        return 0
    path, settings = read_settings(words)
    from rich.console import Console

    from jdpo.quickstart.experiment import Workplace, prepare, run_all
    from jdpo.quickstart.report import write_report
    from jdpo.quickstart.samples import sample_answers
    from jdpo.quickstart.terminal_report import print_report

    console = Console()
    place = Workplace(path)
    prepare(place, settings)
    outcome = run_all(place, settings, lambda line: console.print(f"\n[bold]{line}[/bold]"))
    if outcome.exit_code:
        return outcome.exit_code
    sampled = sample_answers(place, settings)
    print_report(console, *write_report(place, settings, outcome.measurements, sampled))
    return 0


def read_settings(words: Sequence[str]) -> tuple[Path, Settings]:
    """Returns output folder and settings from the words of a command line.

    >>> read_settings(["--frequencies", "5,4,1", "--steps=10"])[1].frequencies
    (5, 4, 1)
    """
    arguments = parser()
    # Unknown words are read as keys below, since their errors name the nearest key.
    found, unknown = arguments.parse_known_args(joined(words, arguments))
    given = {key: value for key, value in vars(found).items() if value is not None}
    values: dict[str, Any] = given | dict(parse_overrides(unknown))
    for key, value in values.items():
        if not value or not str(value).strip():
            raise ValueError(f"--{key} needs a value: {DESCRIPTIONS.get(key, 'see --help')}")
    path = Path(str(values.pop("output_dir", DEFAULT_OUTPUT_DIR)))
    known = {field.name: field.default for field in dataclasses.fields(Settings)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"unknown key {key!r}{_nearest(key)}; `jdpo quickstart --help` lists the keys")
        values[key] = _read(key, value, known[key])
    return path, Settings(**values)


def _nearest(key: str) -> str:
    if hint := did_you_mean(key, DESCRIPTIONS):
        return f"; {hint}"
    return f", {elsewhere}" if (elsewhere := command_of(key)) else ""


def _read(key: str, value: Any, default: Any) -> Any:
    """Returns a value with the type of its default."""
    # `[6,3,1]` is a list already; `6,3,1` is text.
    parts = value if isinstance(value, list) else str(value).split(",")
    wanted = {tuple: "three whole numbers such as 6,3,1", int: "a whole number", float: "a number"}[type(default)]
    try:
        return tuple(int(str(part)) for part in parts) if isinstance(default, tuple) else type(default)(str(value))
    except ValueError:
        raise ValueError(f"{key} is {value!r}: {wanted} is expected") from None
