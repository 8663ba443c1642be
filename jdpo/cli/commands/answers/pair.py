"""`jdpo pair GEN [GEN2]`: preference pairs made of sampled answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.cli.option_types import not_empty
from jdpo.cli.parsing import Parser, add_help, spellings
from jdpo.safe_text import terminal
from jdpo.words import figure

if TYPE_CHECKING:
    from jdpo.pairing.answers_read import Material
    from jdpo.pairing.candidates import PairRules

STRATEGIES = {
    "best_worst": "the best answer is chosen and the worst rejected",
    "best_random": "the best answer is chosen and a random worse one rejected",
    "adjacent": "each answer is chosen over the next worse one",
    "delta": "answers of GEN are chosen over those of GEN2, without scores",
    "human": "you choose between two answers in the terminal",
}


def parser() -> Parser:
    """Returns the parser of the command."""
    parser = Parser(
        "pair",
        "GEN [GEN2] --output PAIRS.jsonl [--strategy NAME] ...",
        "Makes preference pairs of the answers in a folder of `jdpo generate`, for `jdpo dpo`. What becomes of every "
        "answer is counted by reason, in a table and in PAIRS.report.json. The pairs follow from the answers, the "
        "scores and the options: the same command writes the same file.",
        epilog="Strategies:\n\n" + "\n".join(f"    {name:<13}{text}" for name, text in STRATEGIES.items()),
    )
    arguments = parser.add_argument_group("Arguments")
    options = add_help(parser, keys=False)
    arguments.add_argument("folders", metavar="GEN", nargs="+", type=not_empty, help="A folder of `jdpo generate`.")
    options.add_argument(
        "--output",
        required=True,
        metavar="PAIRS.jsonl",
        type=not_empty,
        help="The file to write. An older one is replaced.",
    )
    options.add_argument(
        "--strategy",
        choices=tuple(STRATEGIES),
        default="best_worst",
        help="Which answers are compared; see below (default: best_worst).",
    )
    options.add_argument(
        "--score", metavar="NAME", help="Order answers by these scores of GEN; by default the only ones there."
    )
    _add_rules(options)
    return parser


def _add_rules(options: Any) -> None:
    options.add_argument(
        *spellings("--min_margin"),
        type=float,
        metavar="X",
        help="Drop pairs whose scores differ by less. Equal scores never make a pair.",
    )
    options.add_argument(
        *spellings("--max_length_gap"), type=int, metavar="N", help="Drop pairs whose lengths differ by more than N."
    )
    options.add_argument(
        *spellings("--length_unit"),
        choices=("tokens", "words", "characters"),
        metavar="UNIT",
        help="Unit of lengths: tokens, words or characters; by default tokens, or words if a server did not return "
        "tokens.",
    )
    options.add_argument(
        *spellings("--max_per_prompt"),
        type=int,
        metavar="N",
        help="Most pairs of one prompt; by default 1 for best_worst and best_random, all for the others.",
    )
    options.add_argument(
        "--dedupe",
        type=float,
        metavar="X",
        help="Treat answers as one whose Jaccard similarity of word 3-grams is at least X, such as 0.8; by default "
        "only equal texts are one.",
    )
    options.add_argument(
        *spellings("--allow_cut_off"),
        action="store_true",
        help="Also choose answers that were cut off at max_new_tokens. Without it they are only rejected.",
    )
    options.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="Seed of random picks and of the order of `human` (default: 0).",
    )


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "pair", command
    asked = parser().parse_args(words)
    from rich.console import Console

    from jdpo.pairing.answers_read import read_material
    from jdpo.pairing.candidates import PairRules
    from jdpo.pairing.pair_files import check_output, write_pairs
    from jdpo.pairing.pair_report import notes_of, table_of

    rules = PairRules(
        strategy=asked.strategy,
        min_margin=asked.min_margin,
        max_length_gap=asked.max_length_gap,
        max_per_prompt=asked.max_per_prompt,
        dedupe=asked.dedupe,
        allow_cut_off=asked.allow_cut_off,
        seed=asked.seed,
    )
    output = Path(asked.output)
    check_output(output)
    material = read_material([Path(one) for one in asked.folders], rules, score=asked.score, unit=asked.length_unit)
    # No markup and no highlighting: names of files are shown as they are.
    console = Console(markup=False, highlight=False, soft_wrap=True)
    report = (
        _ask(output, material, rules, console) if rules.strategy == "human" else write_pairs(output, material, rules)
    )
    console.print(table_of(report))
    for line in notes_of(report):
        console.print(terminal(line))
    console.print(terminal(f"done: {figure(report['pairs']['kept'], 'pair')} in {output}"))
    return 0


def _ask(output: Path, material: Material, rules: PairRules, console: Any) -> dict[str, Any]:
    """Lets a person choose, and writes the pairs of all choices made so far."""
    from jdpo.pairing.choices import ChoiceFile, ask
    from jdpo.pairing.pair_files import write_pairs

    path = output.with_name(f"{output.stem}.choices.jsonl")
    with ChoiceFile(path, material.sources[0].digest) as choices:
        if not ask(material.groups, rules, choices, console, sys.stdin):
            console.print(terminal(f"stopped; the same command continues. Choices are in {path}"))
        return write_pairs(output, material, rules, choices.choice)
