"""`jdpo sft CONFIG [key=value ...]` and `jdpo dpo CONFIG [key=value ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jdpo import exit_codes
from jdpo.cli.cluster import in_cluster
from jdpo.cli.failures import INTERRUPTED
from jdpo.cli.parsing import CONFIG_USAGE, Parser, add_config, add_help, add_keys, parse
from jdpo.cli.run_options import log, print_help, read_config
from jdpo.config import CONFIGS, OutputSettings, to_yaml
from jdpo.safe_text import terminal_lines

_DESCRIPTIONS = {
    "sft": "Trains a Hugging Face model on completions: supervised fine-tuning, the stage before preferences.",
    "dpo": "Trains a Hugging Face model on pairs of a chosen and a rejected completion: Direct Preference Optimization "
    "and related losses.",
}


def parser(command: str) -> Parser:
    """Returns the parser of a training command: its options, and every key of its config."""
    parser = Parser(
        command,
        CONFIG_USAGE,
        f"{_DESCRIPTIONS[command]} Settings come from the YAML file, then from the command line; values are written as "
        "in YAML.",
        epilog="Examples:\n\n"
        f"    jdpo {command} model_name_or_path=MODEL datasets=rows.jsonl output_dir=runs/1\n"
        f"    jdpo {command} configs/{command}.yaml learning_rate=5e-7 mesh.fsdp=4 --dry_run\n"
        f"    jdpo {command} --help learning_rate",
    )
    options = add_help(parser)
    add_config(parser, options)
    options.add_argument(
        "--print_config", action="store_true", help="Print the whole config as YAML, defaults included, and exit."
    )
    options.add_argument(
        "--dry_run",
        action="store_true",
        help="Validate config, data and model config without loading weights; print the plan and per-device memory; "
        "exit.",
    )
    add_keys(parser, CONFIGS[command])
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    arguments = parser(command)
    line = parse(arguments, words)
    if print_help(command, arguments, CONFIGS[command], line.help):
        return 0
    config = read_config(CONFIGS[command], line)
    if line.options.print_config:
        print(to_yaml(config), end="")
        return 0
    # Training is imported only after joining: jax must know the other processes before it looks for devices.
    with in_cluster(config, command, words, trains=True):
        if line.options.dry_run:
            from jdpo.training.dry_run import dry_run

            dry_run(config, lambda text: print(terminal_lines(text), flush=True))
            return 0
        from jdpo.training.mirroring import MirrorIncomplete
        from jdpo.training.run import train

        try:
            return train(config).exit_code
        except MirrorIncomplete as error:
            log(f"jdpo: error: {error}")
            return error.exit_code
        except KeyboardInterrupt:  # a second Ctrl-C; the first one would have saved a checkpoint
            log(interrupted(config))
            return exit_codes.INTERRUPTED


def interrupted(output: OutputSettings) -> str:
    """Returns what is left of a run that was ended in the middle of a step, and how to continue, as a message."""
    from jdpo.checkpoint.steps import complete_steps

    folder = Path(output.output_dir) / "checkpoints"
    steps = complete_steps(folder)
    found = f"the last checkpoint is step {steps[-1]} in {folder}" if steps else f"there is no checkpoint in {folder}"
    return f"{INTERRUPTED}; {found}. To {'continue from it' if steps else 'start again'}, run the same command again"
