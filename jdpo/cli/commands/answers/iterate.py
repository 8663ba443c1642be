"""`jdpo iterate LOOP.yaml`: rounds of generate, score, pair, dpo and compare."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from jdpo.cli.main import COMMANDS
from jdpo.cli.parsing import CONFIG_USAGE, Parser, add_config, add_help, add_keys, parse
from jdpo.cli.run_options import log, print_help
from jdpo.config import CONFIGS, DatasetConfig, ModelSettings, load_config, to_yaml
from jdpo.iteration.loop_settings import LoopSettings
from jdpo.safe_text import terminal


def parser() -> Parser:
    """Returns the parser of the command: its options, and every key of a loop."""
    parser = Parser(
        "iterate",
        CONFIG_USAGE,
        "Improves a model in rounds. Each round asks it new prompts, scores its answers, makes pairs of them, trains "
        "on the pairs, and compares the new model with the one before on held-out prompts. Every stage is an ordinary "
        "jdpo command. The loop can be stopped at any time; the same command continues it.",
        epilog="Examples:\n\n    jdpo iterate loop.yaml --dry_run\n    jdpo iterate --help replay",
    )
    options = add_help(parser)
    add_config(parser, options)
    options.add_argument(
        "--print_config", action="store_true", help="Print the whole config as YAML, defaults included, and exit."
    )
    options.add_argument(
        "--dry_run", action="store_true", help="Check config and prompts, print the commands of all rounds, and exit."
    )
    add_keys(parser, LoopSettings)
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "iterate", command
    arguments = parser()
    line = parse(arguments, words)
    if print_help(command, arguments, LoopSettings, line.help):
        return 0
    loop = load_config(LoopSettings, line.path, line.overrides, log=log)
    if line.options.print_config:
        print(to_yaml(loop), end="")
        return 0
    from jdpo.iteration.loop import iterate, planned_commands
    from jdpo.iteration.round_plan import LoopFolder
    from jdpo.iteration.stage_process import run_stage

    rounds = planned_commands(loop)
    # What is wrong in the last stage is reported now, not after hours of the first.
    for planned in rounds[-1]:
        _check_words(planned.words)
    folder = Path(loop.output_dir)
    if folder.is_file():
        raise ValueError(f"output_dir {terminal(folder)} is a file; expected a folder")
    if line.options.dry_run or not LoopFolder(folder).settings.is_file():
        _check_files(loop, remote=not line.options.dry_run)
    if line.options.dry_run:
        for planned in [one for stages in rounds for one in stages]:
            print(terminal(planned))
        return 0
    return iterate(loop, lambda stage, lock: run_stage(stage.words, lock=lock), _log)


def _check_files(loop: LoopSettings, *, remote: bool) -> None:
    """Finds prompts, pairs, facts and scorers.

    Args:
      remote: also finds models, which may be on the hub, and the servers of judges.

    Raises:
      ValueError, ConnectionError: one of them does not exist, or cannot be read.
    """
    from jdpo.comparison.figures.fact_figures import read_facts
    from jdpo.data.schemas.formats import check_rows
    from jdpo.data.sources import open_source
    from jdpo.generation.prompts import SAMPLE_ROWS
    from jdpo.iteration.prompt_rounds import read_split
    from jdpo.models.families import read_model_config, read_reward_config
    from jdpo.models.weights.hub_models import resolve_folder
    from jdpo.scoring.scorers import check_scorer, parse_by
    from jdpo.training.setup.model_sources import find_sources

    split = read_split(loop)
    if loop.compare.facts is not None:
        read_facts(loop.compare.facts)
    if loop.compare.pairs is not None:
        # Read as prompts above, which rows that are no pairs may be as well.
        check_rows(list(islice(open_source(DatasetConfig(path=loop.compare.pairs)).rows(), SAMPLE_ROWS)))
    if remote:
        # As `jdpo dpo` does; the output_dir of a run could be asked, but is no model to train.
        settings = ModelSettings(model_name_or_path=loop.model_name_or_path)
        read_model_config(find_sources(settings).model_folder)
    for group, questions in ((loop.score, split.rounds[0]), (loop.compare, split.held_out)):
        by = parse_by(group.by)
        given = {name: getattr(group, name, None) for name in ("rubric", "judge_model", "api_key_env", "comparisons")}
        if by.kind == "reward":
            # The scorer itself would take the devices, which the stages need.
            if remote:
                read_reward_config(resolve_folder(by.argument))
        elif by.kind != "judge" or remote:
            check_scorer(by, questions, {name: value for name, value in given.items() if value is not None})


def _check_words(words: Sequence[str]) -> None:
    """Parses a command line as the command itself does.

    Raises:
      ValueError: an option is unknown, or a value is of the wrong type or out of range.
    """
    name, *rest = words
    if name in CONFIGS:
        load_config(CONFIGS[name], None, rest)
    else:
        importlib.import_module(COMMANDS[name][0]).parser().parse_args(rest)


def _log(text: str) -> None:
    print(terminal(text), flush=True)
