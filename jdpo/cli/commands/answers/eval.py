"""`jdpo eval MODEL --pairs FILE`: one model on held-out pairs and facts."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jdpo.cli.commands.answers.compare import add_material, beta_for, check_material
from jdpo.cli.model_options import add_model, check_models, log, opening
from jdpo.cli.parsing import Parser, add_help
from jdpo.safe_text import terminal, terminal_lines


def parser() -> Parser:
    """Returns the parser of the command."""
    parser = Parser(
        "eval",
        "MODEL [--reference MODEL] [--pairs FILE ...] [--facts FILE] [--json]",
        "Evaluates a model on held-out preference pairs and facts: log-probabilities, accuracy against a rule that "
        "reads lengths alone, and with a reference the implicit reward. Every figure has a 95 % interval over prompts.",
        epilog="docs/compare.md describes every figure, and what it does not tell.",
    )
    arguments = parser.add_argument_group("Arguments")
    options = add_help(parser, keys=False)
    arguments.add_argument(
        "model",
        metavar="MODEL",
        help="A model folder or hub name, an adapter, the output_dir of a run, or checkpoints/STEP of one.",
    )
    options.add_argument(
        "--reference", metavar="MODEL", help="The reference of the implicit reward, such as the model before training."
    )
    add_material(options)
    options.add_argument("--json", action="store_true", help="Print the report as one JSON document.")
    add_model(parser.add_argument_group("Models"))
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "eval", command
    options = parser()
    asked = options.parse_args(words)
    if not asked.pairs and not asked.facts:
        raise ValueError("nothing to evaluate on: give --pairs or --facts")
    check_material(asked, options)
    if asked.beta is not None and asked.reference is None:
        raise ValueError("--beta is that of the implicit reward, which needs a --reference")
    # Imported here, so that --help loads no jax.
    from rich.console import Console
    from rich.text import Text

    from jdpo.comparison.compare_table import figure_table
    from jdpo.comparison.comparison_run import BETA
    from jdpo.comparison.evaluating import evaluate
    from jdpo.comparison.figures.fact_figures import read_facts
    from jdpo.comparison.measuring import Material

    material = Material(
        pairs=asked.pairs,
        facts=read_facts(asked.facts) if asked.facts else (),
        max_length=asked.max_length,
        cache_dir=asked.cache_dir,
    )
    check_models([asked.model] if asked.reference is None else [asked.reference, asked.model])
    beta = BETA if asked.reference is None else beta_for(asked.model, asked.beta)
    with opening(command, asked.dtype, asked.chat_template) as load:
        found = evaluate(asked.model, asked.reference, material, beta, load, log)
    if asked.json:
        print(json.dumps(found.as_json(), allow_nan=False))
        return 0
    against = "" if found.reference is None else f" against {found.reference.name}"
    console = Console()
    console.print(Text(terminal(f"{found.model.name}{against}"), style="bold"))
    console.print(figure_table(found.figures))
    for warning in found.warnings:
        console.print(Text(f"note: {terminal_lines(warning)}", style="yellow"))
    return 0
