"""`jdpo quickstart`: standard training and DPO side by side, on a tiny model made from nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdpo.config import command_of, parse_overrides
from jdpo.quickstart.experiment import Settings, Workplace, prepare, run_all
from jdpo.words import did_you_mean

DEFAULT_OUTPUT_DIR = "quickstart"

DESCRIPTIONS = {
    "output_dir": "output folder; the same command again continues there, or only prints the report",
    "frequencies": "how often the corpus gives the first, second and third answer",
    "countries": "countries in the corpus; a quarter of them are never corrected",
    "seed": "seed of the random weights, the order of rows and the sampled answers",
    "hidden_size": "width of the model, a multiple of 64",
    "num_layers": "layers of the model",
    "pretrain_steps": "steps of pre-training",
    "pretrain_batch_size": "rows per step of pre-training",
    "pretrain_learning_rate": "peak learning rate of pre-training",
    "steps": "steps of both corrections",
    "batch_size": "right answers, or pairs, per step of both corrections",
    "learning_rate": "peak learning rate of both corrections",
    "beta": "DPO: how strongly the policy is held to the reference",
    "probes": "approximate number of measurements per run",
}


def usage() -> str:
    """Returns the text of `jdpo quickstart --help`."""
    defaults = {"output_dir": DEFAULT_OUTPUT_DIR} | dataclasses.asdict(Settings())
    lines = ["usage: jdpo quickstart [--key value | --key=value | key=value ...]", ""]
    for key, text in DESCRIPTIONS.items():
        default = defaults[key]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        lines.append(f"  --{key:<26}{text} [{shown}]")
    return "\n".join(lines)


def main(command: str, words: Sequence[str]) -> int:
    """Runs the experiment, or goes on with it, and reports.

    Returns:
      0, or 128 + n when signal n stopped it.

    Raises:
      ValueError: an unknown key, a value of the wrong kind, or an output_dir that holds something else.
    """
    assert command == "quickstart", command
    if "--help" in words or "-h" in words:
        print(usage())
        return 0
    path, settings = read_settings(words)
    from rich.console import Console

    from jdpo.quickstart.report import write_report
    from jdpo.quickstart.samples import sample_answers
    from jdpo.quickstart.tables import print_report

    console = Console()
    place = Workplace(path)
    prepare(place, settings)
    outcome = run_all(place, settings, lambda line: console.print(f"\n[bold]{line}[/bold]"))
    if outcome.exit_code:
        return outcome.exit_code
    sampled = sample_answers(place, settings)
    results, sentences, files = write_report(place, settings, outcome.measurements, sampled)
    print_report(console, results, sampled, sentences, files)
    return 0


def read_settings(words: Sequence[str]) -> tuple[Path, Settings]:
    """Output folder and settings from words of the command line.

    >>> read_settings(["--frequencies", "5,4,1", "--steps=10"])[1].frequencies
    (5, 4, 1)
    """
    values: dict[str, Any] = dict(parse_overrides(words))
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
    """A value as its default's type."""
    parts = value if isinstance(value, list) else str(value).split(",")
    wanted = {tuple: "three whole numbers such as 6,3,1", int: "a whole number", float: "a number"}[type(default)]
    try:
        return tuple(int(str(part)) for part in parts) if isinstance(default, tuple) else type(default)(str(value))
    except ValueError:
        raise ValueError(f"{key} is {value!r}: {wanted} is expected") from None
