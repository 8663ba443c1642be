"""`jdpo score GEN --by SCORER`: scores of sampled answers, by a reward model, a judge, a rule or a column."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdpo.cli.model_options import log
from jdpo.cli.option_types import count, not_empty
from jdpo.cli.parsing import Parser, add_help, spellings
from jdpo.cli.server_options import add_judge_options
from jdpo.generation.answer_files import read_answers
from jdpo.safe_text import terminal
from jdpo.scoring.protocol import cut, grouped
from jdpo.scoring.score_blocks import score_answers
from jdpo.scoring.score_files import SCORES, answers_digest, check_name, read_about
from jdpo.scoring.score_summary import summary_lines
from jdpo.scoring.scorers import KINDS, default_name, make_scorer, parse_by
from jdpo.words import clock, figure

PROGRESS_SECONDS = 10.0


def parser() -> Parser:
    """Returns the parser of the command."""
    lines = []
    for name, kind in KINDS.items():
        start = f"    {name}:{kind.argument}" if kind.argument else f"    {name}"
        lines += [start, f"        {kind.summary}"]
    parser = Parser(
        "score",
        "GEN --by SCORER [--name NAME] ...",
        "Scores the answers in a folder of `jdpo generate` and writes GEN/scores/NAME.jsonl, which `jdpo pair` reads. "
        "A scorer that compares answers also writes GEN/verdicts/NAME.jsonl. An answer without a score has null and "
        "the reason. A command that is stopped continues where it was when it is given again.",
        epilog="Scorers:\n\n" + "\n".join(lines),
    )
    arguments = parser.add_argument_group("Arguments")
    options = add_help(parser, keys=False)
    arguments.add_argument("folder", metavar="GEN", type=not_empty, help="A folder of `jdpo generate`.")
    options.add_argument(
        "--by", required=True, metavar="SCORER", type=not_empty, help="What scores the answers; see below."
    )
    options.add_argument(
        "--name", metavar="NAME", help="Name of the files of scores; by default it follows from the scorer."
    )
    options.add_argument(
        "--overwrite", action="store_true", help="Replace scores of this name that are there, whatever made them."
    )
    _add_reward_options(parser.add_argument_group("Options of reward:MODEL"))
    _add_judge_options(parser.add_argument_group("Options of judge:URL"))
    return parser


def _add_reward_options(group: Any) -> None:
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help="Dtype of the computation; auto: bfloat16 on TPU and GPU, float32 on CPU (default: auto).",
    )
    group.add_argument(
        *spellings("--max_length"),
        type=count,
        metavar="N",
        help="Most tokens of a conversation; a longer one has no score. By default the positions of the model.",
    )
    group.add_argument(
        *spellings("--max_tokens_per_device"),
        type=count,
        metavar="N",
        help="Most tokens of a device's part of a batch (default: 8192).",
    )


def _add_judge_options(group: Any) -> None:
    add_judge_options(group)
    group.add_argument(
        "--comparisons",
        type=count,
        metavar="N",
        help="Most comparisons of answers to one prompt, each in both orders (default: 16).",
    )
    group.add_argument("--seed", type=int, metavar="N", help="Seed of the choice of comparisons (default: 0).")


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "score", command
    asked = parser().parse_args(words)
    by = parse_by(asked.by)
    names = {name for kind in KINDS.values() for name in kind.options}
    options = {name: value for name in sorted(names) if (value := getattr(asked, name)) is not None}
    name = asked.name if asked.name is not None else default_name(by)
    check_name(name)
    folder = Path(asked.folder)
    _, questions, answers = read_answers(folder)
    given = list(answers)
    if not given:
        raise ValueError(f"{folder} has no answers to score")
    digest, blocks = answers_digest(questions, given), cut(grouped(questions, given))
    scorer = make_scorer(by, blocks, options)
    is_new = score_answers(folder, name, scorer, blocks, digest=digest, overwrite=asked.overwrite, progress=_Progress())
    print("\n".join(map(terminal, summary_lines(folder, name))))
    about = read_about(folder, SCORES, name)
    if about is not None and not about["num_scores"]:
        log("warning: no answer has a score; the table says why")
    path = folder / SCORES / f"{name}.jsonl"
    print(terminal(f"done: {path}" if is_new else f"these scores were there already: {path}"))
    return 0


class _Progress:
    """Logs every few seconds how many answers have their scores, and the time left."""

    def __init__(self) -> None:
        self._found: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._found is None:
            # Scores of an earlier call took none of this time.
            self._found, self._started, self._logged = done, now, now
            if done:
                log(f"{figure(done, 'answer')} of {total:,} had their scores already")
        elif now >= self._logged + PROGRESS_SECONDS:
            self._logged = now
            rate = (done - self._found) / (now - self._started)
            left = clock((total - done) / rate)
            log(f"scored {done:,} of {figure(total, 'answer')}, {rate:,.1f} per second, {left} left")
