"""`jdpo compare BEFORE AFTER`: what changed between two models, with intervals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.cli.failures import leaving_on_signals
from jdpo.cli.model_options import add_model, add_sampling, check_models, log, opening, sampling_of
from jdpo.cli.option_types import above_zero, count, first_given, folder_to_write, not_empty
from jdpo.cli.parsing import Parser, add_help, spellings
from jdpo.cli.server_options import add_judge_options
from jdpo.safe_text import terminal

if TYPE_CHECKING:
    from jdpo.comparison.comparison_run import CompareSettings
    from jdpo.comparison.fail_if import Condition
    from jdpo.comparison.measuring import Material
    from jdpo.scoring.scorers import By

_OF_PROMPTS = ("n", "temperature", "top_p", "max_new_tokens", "seed", "num_prompts", "chat")
_OF_PAIRS = ("beta", "max_length", "cache_dir")
_JUDGE_OPTIONS = ("rubric", "judge_model", "api_key_env", "concurrency", "timeout", "retries")


def parser() -> Parser:
    """Returns the parser of the command."""
    parser = Parser(
        "compare",
        "BEFORE AFTER [AFTER2 ...] --output_dir CMP [--pairs FILE] [--prompts FILE] [--facts FILE] ...",
        "Compares models and writes compare.json, compare.html and rows.parquet to CMP. Every figure has a 95 % "
        "interval over prompts. Give any of held-out pairs, prompts to answer and facts. The command may be stopped: "
        "given again, it keeps the answers and verdicts that are there.",
        epilog="docs/compare.md describes every figure, and what it does not tell.",
    )
    arguments = parser.add_argument_group("Arguments")
    options = add_help(parser, keys=False)
    arguments.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        type=not_empty,
        help="The model before, then one or more models after: each a model folder or hub name, an adapter, the "
        "output_dir of a run, or checkpoints/STEP of one. The model before is the reference of the implicit reward.",
    )
    options.add_argument(
        *spellings("--output_dir"), required=True, type=folder_to_write, metavar="CMP", help="The folder to write."
    )
    add_material(options)
    options.add_argument(
        "--prompts",
        metavar="FILE",
        type=not_empty,
        help="Prompts for both models to answer, in any schema that jdpo reads; of pairs, the prompts.",
    )
    options.add_argument(
        *spellings("--fail_if"),
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="Exit with code 1 if a condition holds, such as 'kl > 20' or 'facts.accuracy < -0.02'. A name means "
        "the difference, or the value of a figure without one; add .before, .after, .low or .high for others.",
    )
    _add_sampling(parser.add_argument_group("Answers"))
    _add_judge(parser.add_argument_group("Win rate"))
    add_model(parser.add_argument_group("Models"))
    return parser


def add_material(options: Any) -> None:
    """Adds the options of `jdpo eval` and `jdpo compare` on held-out rows."""
    options.add_argument(
        "--pairs",
        nargs="+",
        default=[],
        metavar="FILE",
        type=not_empty,
        help="Held-out preference pairs; each file or hub dataset has figures of its own.",
    )
    options.add_argument(
        "--facts",
        metavar="FILE",
        type=not_empty,
        help="Rows of question (or prompt, or messages) and answer: the probability of right answers.",
    )
    options.add_argument(
        "--beta",
        type=above_zero,
        metavar="BETA",
        help="Beta of the implicit reward; by default that of the run that the model comes from, or 0.1.",
    )
    options.add_argument(
        *spellings("--max_length"),
        type=count,
        metavar="N",
        help="Longest sequence of a pair in tokens; longer ones are cut (default: 2048, or the model's positions).",
    )
    options.add_argument(
        *spellings("--cache_dir"),
        type=not_empty,
        metavar="DIR",
        help="Where tokenized pairs are kept, as in training (default: ~/.cache/jdpo).",
    )


def _add_sampling(group: Any) -> None:
    group.add_argument("--n", type=count, default=1, metavar="N", help="Answers to each prompt (default: 1).")
    add_sampling(group, max_new_tokens=256)
    group.add_argument(
        *spellings("--num_prompts"), type=count, metavar="N", help="Ask the first N different prompts (default: all)."
    )
    group.add_argument("--chat", action="store_true", help="Make plain text prompts the user turn of a conversation.")


def _add_judge(group: Any) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--judge",
        metavar="URL",
        type=not_empty,
        help="Let a model on an OpenAI-compatible server judge, in both orders.",
    )
    which.add_argument("--reward", metavar="MODEL", type=not_empty, help="The answer with the larger reward wins.")
    which.add_argument(
        "--by",
        metavar="SCORER",
        type=not_empty,
        help="Any scorer of `jdpo score`, such as exact:COLUMN or rule:FUNCTION.",
    )
    add_judge_options(group)


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code, 1 if a condition of --fail_if holds."""
    assert command == "compare", command
    options = parser()
    asked = options.parse_args(words)
    if len(asked.models) < 2:
        raise ValueError("expected at least two models, BEFORE and AFTER; `jdpo eval MODEL` looks at one")
    # Imported here, so that --help loads no jax.
    from rich.console import Console

    from jdpo.comparison.compare_files import write_comparison
    from jdpo.comparison.compare_table import print_comparison
    from jdpo.comparison.comparison_run import compare
    from jdpo.comparison.fail_if import failures

    # Everything that can be wrong in the command is found before a model is loaded.
    conditions = _conditions(asked)
    check_material(asked, options)
    settings = _settings(asked)
    with (
        leaving_on_signals("the same command keeps the answers that are there"),
        opening(command, asked.dtype, asked.chat_template) as load,
    ):
        document = compare(settings, load, log)
    write_comparison(document, settings.output_dir, log)
    print_comparison(document, Console())
    failed = [
        f"{comparison.after.name}: {line}"
        for comparison in document.comparisons
        for line in failures(conditions, comparison)
    ]
    for line in failed:
        print(terminal(f"--fail_if: {line}"), file=sys.stderr)
    return int(bool(failed))


def _conditions(asked: argparse.Namespace) -> list[Condition]:
    from jdpo.comparison.fail_if import parse_condition

    given = [f"--{name}" for name in ("pairs", "prompts", "facts") if getattr(asked, name)]
    if not given:
        raise ValueError("nothing to compare on: give --pairs, --prompts or --facts")
    given += ["a judge"] if asked.judge or asked.reward or asked.by else []
    return [parse_condition(text, given) for text in asked.fail_if]


def _settings(asked: argparse.Namespace) -> CompareSettings:
    from jdpo.comparison.comparison_run import CompareSettings
    from jdpo.scoring.scorers import check_scorer

    by, options = _by(asked)
    if by is not None and not asked.prompts:
        raise ValueError("a win rate needs answers: give --prompts as well")
    check_models(asked.models)
    material = _material(asked)
    if by is not None and material.prompts is not None:
        check_scorer(by, material.prompts.questions, options)
    return CompareSettings(
        before=asked.models[0],
        afters=asked.models[1:],
        material=material,
        output_dir=Path(asked.output_dir),
        betas=[beta_for(model, asked.beta) for model in asked.models[1:]],
        by=by,
        scorer_options=options,
        described=_described(asked, by),
    )


def _material(asked: argparse.Namespace) -> Material:
    from jdpo.comparison.figures.fact_figures import read_facts
    from jdpo.comparison.measuring import Material
    from jdpo.config import DatasetConfig
    from jdpo.generation.prompts import read_prompts

    prompts = None
    if asked.prompts:
        prompts = read_prompts(DatasetConfig(path=asked.prompts), num_prompts=asked.num_prompts, chat=asked.chat)
        for line in prompts.lines():
            log(line)
    return Material(
        pairs=asked.pairs,
        prompts=prompts,
        facts=read_facts(asked.facts) if asked.facts else (),
        sampling=sampling_of(asked),
        num_samples=asked.n,
        max_length=asked.max_length,
        cache_dir=asked.cache_dir,
    )


def _by(asked: argparse.Namespace) -> tuple[By | None, dict[str, Any]]:
    """Returns what decides which answer wins, with its options."""
    from jdpo.scoring.scorers import KINDS, parse_by

    named = {"judge": asked.judge, "reward": asked.reward}
    text = asked.by or next((f"{kind}:{value}" for kind, value in named.items() if value), None)
    options = {name: value for name in _JUDGE_OPTIONS if (value := getattr(asked, name)) is not None}
    if text is None:
        if options:
            raise ValueError(f"--{next(iter(options))} is an option of --judge, which is not given")
        return None, {}
    by = parse_by(text)
    if unread := [name for name in options if name not in KINDS[by.kind].options]:
        raise ValueError(f"--{unread[0]} is an option of --judge, and {by.kind} does not read it")
    return by, options


def _described(asked: argparse.Namespace, by: By | None) -> dict[str, Any]:
    from jdpo.config import public_text

    names = ("n", "temperature", "top_p", "max_new_tokens", "seed", "num_prompts", "chat", "max_length", "dtype")
    texts = ("prompts", "facts", "rubric", "judge_model", "chat_template")
    places = {name: public_text(value) for name in texts if (value := getattr(asked, name))}
    return {
        "pairs": [public_text(path) for path in asked.pairs],
        **places,
        "by": None if by is None else by.text,
        **{name: getattr(asked, name) for name in names},
    }


# --- shared with `jdpo eval`


def check_material(asked: argparse.Namespace, options: Parser) -> None:
    """Refuses options about prompts or pairs where there are none.

    Raises:
      ValueError: naming the option.
    """
    for needed, names in (("prompts", _OF_PROMPTS), ("pairs", _OF_PAIRS)):
        # `jdpo eval` has no prompts, and none of their options.
        if not getattr(asked, needed, True) and (given := first_given(asked, names, options)):
            raise ValueError(f"{given} is an option of --{needed}, which is not given")


def beta_for(model: str, given: float | None) -> float:
    """Returns beta of the implicit reward of a model, and says where it comes from."""
    from jdpo.comparison.comparison_run import BETA, beta_of

    if given is not None:
        return given
    found = beta_of(model)
    if found is None:
        log(f"beta: {BETA}, the default, since {model} is not a run of `jdpo dpo`; --beta sets another")
        return BETA
    log(f"beta: {found:g}, as in the run that {model} comes from")
    return found
