"""`jdpo compare BEFORE AFTER`: what changed between two models, with intervals."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.cli.failures import leaving_on_signals
from jdpo.cli.parsing import Parser, add_help, folder_to_write, spellings
from jdpo.safe_text import terminal, terminal_lines

if TYPE_CHECKING:
    from jdpo.comparison.comparison_run import CompareSettings
    from jdpo.comparison.fail_if import Condition
    from jdpo.comparison.measuring import Material
    from jdpo.scoring.scorers import By

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
        type=_text,
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
        type=_text,
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
        type=_text,
        help="Held-out preference pairs; each file or hub dataset has figures of its own.",
    )
    options.add_argument(
        "--facts",
        metavar="FILE",
        type=_text,
        help="Rows of question (or prompt, or messages) and answer: the probability of right answers.",
    )
    options.add_argument(
        "--beta",
        type=_above_zero,
        metavar="BETA",
        help="Beta of the implicit reward; by default that of the run that the model comes from, or 0.1.",
    )
    options.add_argument(
        *spellings("--max_length"),
        type=_count,
        metavar="N",
        help="Longest sequence of a pair in tokens; longer ones are cut (default: 2048, or the model's positions).",
    )
    options.add_argument(
        *spellings("--cache_dir"),
        type=_text,
        metavar="DIR",
        help="Where tokenized pairs are kept, as in training (default: ~/.cache/jdpo).",
    )


def add_model(group: Any) -> None:
    """Adds the options of `jdpo eval` and `jdpo compare` on how models are run."""
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="Dtype of weights and computation (default: auto, float32 on CPU, bfloat16 on TPU and GPU).",
    )
    group.add_argument(
        *spellings("--chat_template"),
        type=_text,
        metavar="TEMPLATE",
        help="Chat template for models without one: a Jinja file, or chatml.",
    )


def _add_sampling(group: Any) -> None:
    group.add_argument("--n", type=_count, default=1, metavar="N", help="Answers to each prompt (default: 1).")
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="Divides the logits; 0 is greedy (default: 1)."
    )
    group.add_argument(
        *spellings("--top_p"),
        type=float,
        default=1.0,
        metavar="P",
        help="Draw from the most probable tokens with this probability in all (default: 1).",
    )
    group.add_argument(
        *spellings("--max_new_tokens"),
        type=_count,
        default=256,
        metavar="N",
        help="Largest number of tokens of an answer, which is cut off there (default: 256).",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="Seed of the draws (default: 0).")
    group.add_argument(
        *spellings("--num_prompts"), type=_count, metavar="N", help="Ask the first N different prompts (default: all)."
    )
    group.add_argument("--chat", action="store_true", help="Make plain text prompts the user turn of a conversation.")


def _add_judge(group: Any) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--judge", metavar="URL", type=_text, help="Let a model on an OpenAI-compatible server judge, in both orders."
    )
    which.add_argument("--reward", metavar="MODEL", type=_text, help="The answer with the larger reward wins.")
    which.add_argument(
        "--by", metavar="SCORER", type=_text, help="Any scorer of `jdpo score`, such as exact:COLUMN or rule:FUNCTION."
    )
    group.add_argument("--rubric", metavar="FILE", help="Text that tells the judge what makes an answer better.")
    group.add_argument(*spellings("--judge_model"), metavar="NAME", help="The server's model, if it has several.")
    group.add_argument(
        *spellings("--api_key_env"), metavar="NAME", help="Environment variable that holds the server's key."
    )
    group.add_argument("--concurrency", type=_count, metavar="N", help="Most requests at a time.")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="Longest time for one reply.")
    group.add_argument("--retries", type=int, metavar="N", help="How often a failed request is sent again.")


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code, 1 if a condition of --fail_if holds."""
    assert command == "compare", command
    asked = parser().parse_args(words)
    if len(asked.models) < 2:
        raise ValueError("expected at least two models, BEFORE and AFTER; `jdpo eval MODEL` looks at one")
    from rich.console import Console

    from jdpo.comparison.compare_files import write_comparison
    from jdpo.comparison.compare_table import print_comparison
    from jdpo.comparison.comparison_run import compare
    from jdpo.comparison.fail_if import failures

    # Everything that can be wrong in the command is found before a model is loaded.
    conditions = _conditions(asked)
    settings = _settings(asked)
    with leaving_on_signals("the same command keeps the answers that are there"), opening(asked) as load:
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
    from jdpo.generation.values import Sampling

    prompts = None
    if asked.prompts:
        prompts = read_prompts(DatasetConfig(path=asked.prompts), num_prompts=asked.num_prompts, chat=asked.chat)
        for line in prompts.lines():
            log(line)
    return Material(
        pairs=asked.pairs,
        prompts=prompts,
        facts=read_facts(asked.facts) if asked.facts else (),
        sampling=Sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            max_new_tokens=asked.max_new_tokens,
            seed=asked.seed,
        ),
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
    places = {name: public_text(value) for name in ("prompts", "facts") if (value := getattr(asked, name))}
    return {
        "pairs": [public_text(path) for path in asked.pairs],
        **places,
        "by": None if by is None else by.text,
        **{name: getattr(asked, name) for name in names},
    }


# --- shared with `jdpo eval`


def check_models(models: Sequence[str]) -> None:
    """Finds all models before the first one is loaded."""
    from jdpo.training.opening import check_model

    for model in models:
        check_model(model)


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


def opening(asked: argparse.Namespace) -> Any:
    """Returns a context manager that gives the function which opens a model; compiled programs are kept."""
    import contextlib
    import os
    from collections.abc import Iterator

    from jdpo.config import MeshConfig
    from jdpo.data.prepared.prepare import cache_folder
    from jdpo.generation.loaded_model import LoadedModel
    from jdpo.processes.detection import find_cluster
    from jdpo.training.opening import load
    from jdpo.training.setup.numerics import persistent_cache

    cluster = find_cluster(os.environ)
    if cluster is not None and cluster.num_processes > 1:
        raise ValueError(
            f"jdpo eval and jdpo compare run in one process, and this one is one of {cluster.num_processes} "
            f"({cluster.source}). Start the command once, on one host, and set JAX_NUM_PROCESSES=1"
        )

    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        def opens(model: str) -> LoadedModel:
            found = load(model, dtype=asked.dtype, mesh=MeshConfig(), chat_template=asked.chat_template)
            log(f"model: {found.name}, {found.dtype}, on {found.mesh.size} device{'s' if found.mesh.size > 1 else ''}")
            return found

        with persistent_cache(cache_folder(None) / "programs"):
            yield opens

    return opened()


def _text(word: str) -> str:
    """Refuses an empty word, which as a path would be the current folder."""
    if not word.strip():
        raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
    return word


def _above_zero(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {word!r}")
    return value


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, found {word!r}")
    return int(word)


def log(text: str) -> None:
    """Writes a line to stderr, so that stdout has results alone."""
    print(terminal_lines(text), file=sys.stderr, flush=True)
