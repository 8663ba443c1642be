"""Tokens whose embedding was never trained: tokens that a run adds, and tokens of the model that its rows contain.

Imports no jax, so that `jdpo inspect` works on machines without accelerators.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jdpo.config import ModelSettings
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.models.model_config import ModelConfig
from jdpo.models.weights.embedding_rows import (
    MOST_NAMED,
    StartedRows,
    UntrainedToken,
    row_count,
    row_norms,
    started_rows,
    untrained_rows,
)
from jdpo.safe_text import terminal
from jdpo.words import listed


class Start(NamedTuple):
    """The embedding rows that a run starts with.

    Attributes:
      rows: rows that replace those of the model's files; None: there are none.
      lines: what to log for the user.
    """

    rows: StartedRows | None
    lines: tuple[str, ...]


def find_untrained(folder: Path, model: ModelConfig, tokenizer: Tokenizer, data: PreparedData) -> list[UntrainedToken]:
    """Finds the tokens of the source tokenizer that the rows contain and whose embedding was never trained.

    Args:
      folder: of the model; its embedding is read.
      model: its config.json.
      data: tokenized rows.

    Raises:
      ValueError: the embedding cannot be read.
    """
    untrained = np.flatnonzero(untrained_rows(row_norms(folder, model), source_tokens(tokenizer, model.vocab_size)))
    if not len(untrained):
        return []
    # Only tokens that the rows contain: most models have unused embedding rows, which do no harm.
    found = data.rows_with(untrained)
    tokens = tokenizer.hf.convert_ids_to_tokens([*found])
    return [
        UntrainedToken(id, token, num_rows, data[first].origin)
        for (id, (num_rows, first)), token in zip(found.items(), tokens, strict=True)
    ]


def source_tokens(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Returns bool [vocab_size], True where the tokenizer has a token that this run did not add."""
    ids = set(tokenizer.hf.get_vocab().values()) - set(added_ids(tokenizer))
    is_token = np.zeros(vocab_size, bool)
    # Ids beyond the embedding have no row that could be untrained.
    is_token[[id for id in ids if id < vocab_size]] = True
    return is_token


def added_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of the tokens that the chat template added."""
    return [int(id) for id in tokenizer.hf.convert_tokens_to_ids([*tokenizer.added_tokens])]


def refuse_added_tokens(tokenizer: Tokenizer) -> None:
    """Refuses tokens that the chat template added where only adapters are trained.

    Raises:
      ValueError: naming them.
    """
    if tokenizer.added_tokens:
        names = listed([terminal(token) for token in tokenizer.added_tokens], MOST_NAMED)
        raise ValueError(
            f"chat_template adds tokens ({names}), whose embedding could not be trained: with lora, embed_tokens and "
            "an untied lm_head are frozen. Train all weights first (`jdpo sft` without lora), or use a template whose "
            "tokens the model has"
        )


def start_tokens(
    settings: ModelSettings,
    tokenizer: Tokenizer,
    folder: Path,
    model: ModelConfig,
    vocab_size: int,
    data: PreparedData,
    *,
    seed: int,
    adapted: bool,
    whose: str = "the ",
) -> Start:
    """Chooses the tokens that start at the mean of the trained rows: those that the run adds, and others if asked for.

    Args:
      tokenizer: of the model, with the tokens that the run adds to it.
      folder, model: the model whose embedding is read, and its config.json.
      vocab_size: rows of the embedding in training.
      data: the training rows.
      seed: of the noise in these embeddings.
      adapted: True if only adapters are trained, so that embedding and head are frozen.
      whose: begins the lines; "the reference model's " for a model other than the one that is trained.

    Raises:
      ValueError: the embedding cannot be read, or it is frozen and the rows contain tokens that it was not trained on.
    """
    untrained = find_untrained(folder, model, tokenizer, data)
    lines = []
    # Frozen rows would stay noise: an error, and not a warning.
    if untrained and adapted:
        raise ValueError(
            f"lora: the training rows contain {_named(untrained)}, whose embedding was never trained (it is zero or "
            "below 1 % of the median norm) and cannot be trained now: with lora, embed_tokens and an untied lm_head "
            "are frozen. Train all weights first (`jdpo sft` without lora, init_untrained_tokens: true), or use a chat "
            "template whose tokens the model knows"
        )
    if untrained and not settings.init_untrained_tokens:
        lines.append(
            f"warning: {whose}embedding of {_named(untrained)} was never trained: it is zero or below 1 % of the "
            "median norm. The training rows contain it; init_untrained_tokens: true starts it at the mean of the "
            "trained rows"
        )
    started = [*zip(added_ids(tokenizer), tokenizer.added_tokens, strict=True)]
    if settings.init_untrained_tokens:
        started += [(token.id, token.token) for token in untrained]
    # Rows beyond the model's vocabulary start too, whether the tokenizer uses them or not.
    ids = sorted({id for id, _ in started} | set(range(model.vocab_size, vocab_size)))
    if not ids:
        return Start(None, tuple(lines))
    rows = started_rows(folder, model, np.array(ids), source_tokens(tokenizer, model.vocab_size), seed)
    names = [f"{terminal(token)} (id {id})" for id, token in sorted(started)]
    lines.append(
        f"{whose}embedding of {listed(names, MOST_NAMED)} starts at the mean of {rows.num_trained:,} trained rows, "
        "plus a little noise"
    )
    return Start(rows, tuple(lines))


def _named(tokens: Sequence[UntrainedToken]) -> str:
    return listed(
        [f"{terminal(token.token)} (id {token.id}, in {row_count(token.num_rows)})" for token in tokens], MOST_NAMED
    )
