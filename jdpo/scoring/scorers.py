"""The scorers of `jdpo score --by`: their names, what follows the name, and who makes them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jdpo.config.addresses import public_text
from jdpo.generation.values import Question
from jdpo.safe_text import terminal
from jdpo.scoring.protocol import Asked, Block, Scored, Scorer, cut
from jdpo.words import did_you_mean


class Kind(NamedTuple):
    """A kind of scorer.

    Attributes:
      argument: what follows the name and a colon, as shown to users; empty if nothing does.
      summary: what the score of an answer is.
      maker: "module:function" of (argument, blocks, **options) -> Scorer. It is imported only when it is used.
      options: options of the command that the maker takes, as keywords.
    """

    argument: str
    summary: str
    maker: str
    options: tuple[str, ...] = ()


_ANSWERS = "jdpo.scoring.answer_scorers"

KINDS = {
    "reward": Kind(
        "MODEL",
        "the output of a reward model, a Hugging Face *ForSequenceClassification folder or hub name",
        "jdpo.scoring.reward:reward_scorer",
        ("dtype", "max_length", "max_tokens_per_device"),
    ),
    "rule": Kind(
        "package.module:function",
        "what your function returns for (prompt, answer, columns)",
        f"{_ANSWERS}:rule_scorer",
    ),
    "exact": Kind(
        "COLUMN", "1 if the answer equals the prompt's value in this column, else 0", f"{_ANSWERS}:exact_scorer"
    ),
    "logp": Kind("", "log-probability under the model that answered, summed over tokens", f"{_ANSWERS}:logp_scorer"),
    "logp_per_token": Kind("", "mean log-probability of a token", f"{_ANSWERS}:logp_per_token_scorer"),
    "judge": Kind(
        "URL",
        "share of the answer's comparisons that it wins, as judged by a model on an OpenAI-compatible server",
        "jdpo.scoring.judge_scorer:judge_scorer",
        ("rubric", "comparisons", "seed", "judge_model", "api_key_env", "concurrency", "timeout", "retries"),
    ),
    "length": Kind("", "tokens, or characters if answers come without tokens", f"{_ANSWERS}:length_scorer"),
}
"""Name -> kind. A new scorer is added here, and nowhere else."""


class By(NamedTuple):
    """A parsed `--by`.

    Attributes:
      text: as it was given, without passwords.
      kind: its name in KINDS.
      argument: what follows the colon, or empty.
    """

    text: str
    kind: str
    argument: str


def parse_by(text: str) -> By:
    """Parses `--by`.

    Raises:
      ValueError: the kind is unknown, its argument is missing, or it takes none.

    >>> parse_by("exact:answer"), parse_by("length")
    (By(text='exact:answer', kind='exact', argument='answer'), By(text='length', kind='length', argument=''))
    """
    name, colon, argument = text.partition(":")
    if name not in KINDS:
        hint = did_you_mean(name, KINDS)
        known = ", ".join(f"{key}:{kind.argument}" if kind.argument else key for key, kind in KINDS.items())
        raise ValueError(
            f"--by {terminal(public_text(text))}: no such scorer; {f'{hint} ' if hint else ''}the scorers are {known}"
        )
    wanted = KINDS[name].argument
    if wanted and not argument:
        raise ValueError(f"--by {name}: expected {name}:{wanted}")
    if colon and not wanted:
        raise ValueError(f"--by {terminal(text)}: {name} takes nothing after its name; write --by {name}")
    return By(public_text(text), name, argument)


def default_name(by: By) -> str:
    """Returns the name of the files of a scorer for which no name is given.

    >>> default_name(parse_by("rule:my.rules:is_short")), default_name(parse_by("logp"))
    ('rule-my.rules-is_short', 'logp')
    """
    # The last part of a path or address: the folder that a model is in says little.
    part = by.text.removeprefix(by.kind).rstrip("/").rpartition("/")[2].lstrip(":")
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{by.kind}-{part}" if part else by.kind).strip("-.")[:100]


def make_scorer(by: By, blocks: Sequence[Block], options: dict[str, Any]) -> Scorer:
    """Makes a scorer.

    Args:
      blocks: all that it may be given.
      options: the options that were given, by name.

    Raises:
      ValueError: an option is not of this scorer, or the scorer cannot be made.
    """
    kind = KINDS[by.kind]
    for name in options:
        if name not in kind.options:
            readers = [key for key, other in KINDS.items() if name in other.options]
            raise ValueError(f"--{name} is an option of --by {' and '.join(readers)}, and {by.kind} does not read it")
    module, _, function = kind.maker.partition(":")
    scorer: Scorer = getattr(importlib.import_module(module), function)(by.argument, blocks, **options)
    return _Named(by, scorer)


def check_scorer(by: By, questions: Sequence[Question], options: dict[str, Any]) -> None:
    """Makes a scorer once without answers, so that one that is not there is found before there are answers.

    Raises:
      ValueError, ConnectionError: the scorer cannot be made, or the judge's server does not respond.
    """
    make_scorer(by, cut(Asked(question, []) for question in questions), options)


class _Named(NamedTuple):
    """A scorer whose description starts with how it was asked for."""

    by: By
    scorer: Scorer

    def describe(self) -> dict[str, Any]:
        return {"by": self.by.text, **self.scorer.describe()}

    def score(self, block: Block) -> Scored:
        return self.scorer.score(block)
