"""Tokens whose embedding rows were never trained: those that a run adds, and those of the model that its rows hold.

Imports no jax: `jdpo inspect` looks at rows where there may be none to run on.
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


class Start(NamedTuple):
    """What tokens start a run with.

    Attributes:
      rows: in place of what the model's files hold; None: nothing is started.
      lines: for the person who started the run.
    """

    rows: StartedRows | None
    lines: tuple[str, ...]


def find_untrained(folder: Path, model: ModelConfig, tokenizer: Tokenizer, data: PreparedData) -> list[UntrainedToken]:
    """Finds the tokens of the source tokenizer that the rows hold and whose embedding was never trained.

    Args:
      folder: of the model; its embedding is read.
      model: as its config.json says.
      data: tokenized rows.

    Raises:
      ValueError: the embedding cannot be read.
    """
    untrained = np.flatnonzero(untrained_rows(row_norms(folder, model), source_tokens(tokenizer, model.vocab_size)))
    if not len(untrained):
        return []
    found = data.rows_with(untrained)
    tokens = tokenizer.hf.convert_ids_to_tokens([*found])
    return [
        UntrainedToken(id, token, num_rows, data[first].origin)
        for (id, (num_rows, first)), token in zip(found.items(), tokens, strict=True)
    ]


def source_tokens(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """bool [vocab_size], True where the tokenizer has a token that this run did not add."""
    ids = set(tokenizer.hf.get_vocab().values()) - set(added_ids(tokenizer))
    is_token = np.zeros(vocab_size, bool)
    is_token[[id for id in ids if id < vocab_size]] = True
    return is_token


def added_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that the chat template added."""
    return [int(id) for id in tokenizer.hf.convert_tokens_to_ids([*tokenizer.added_tokens])]


def refuse_added_tokens(tokenizer: Tokenizer) -> None:
    """Refuses tokens that the chat template added, where adapters alone are trained.

    Raises:
      ValueError: naming them.
    """
    if tokenizer.added_tokens:
        names = _joined([terminal(token) for token in tokenizer.added_tokens])
        raise ValueError(
            f"chat_template adds tokens ({names}), whose rows would stay as they start: under lora embed_tokens and an "
            "untied lm_head are frozen. Train all weights first (`jdpo sft` without lora), or use a template of tokens "
            "that the model has"
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
    """Settles which tokens start at the mean of the trained rows: those that the run adds, and others on demand.

    Args:
      tokenizer: the model's, with what the run adds to it.
      folder, model: whose rows are looked at, and what its config.json says.
      vocab_size: rows of the embedding in training.
      data: the training rows.
      seed: of the noise in the embeddings that are started.
      adapted: whether adapters alone are trained, and embedding and head are frozen.
      whose: begins the lines; "the reference model's " for a model other than the one that is trained.

    Raises:
      ValueError: the embedding cannot be read, or it is frozen and the rows hold tokens that it knows nothing of.
    """
    untrained = find_untrained(folder, model, tokenizer, data)
    lines = []
    if untrained and adapted:
        raise ValueError(
            f"lora: the training rows hold {_named(untrained)}, whose embedding was never trained (it is zero or below "
            "1 % of the median norm) and stays so: embed_tokens and an untied lm_head are frozen under lora. Train all "
            "weights first (`jdpo sft` without lora, init_untrained_tokens: true), or use a chat template of tokens "
            "that the model knows"
        )
    if untrained and not settings.init_untrained_tokens:
        lines.append(
            f"warning: {whose}embedding of {_named(untrained)} was never trained: it is zero or below 1 % of the "
            "median norm. The training rows hold it; init_untrained_tokens: true starts it at the mean of the trained "
            "rows"
        )
    started = [*zip(added_ids(tokenizer), tokenizer.added_tokens, strict=True)]
    if settings.init_untrained_tokens:
        started += [(token.id, token.token) for token in untrained]
    ids = sorted({id for id, _ in started} | set(range(model.vocab_size, vocab_size)))
    if not ids:
        return Start(None, tuple(lines))
    rows = started_rows(folder, model, np.array(ids), source_tokens(tokenizer, model.vocab_size), seed)
    names = [f"{terminal(token)} (id {id})" for id, token in sorted(started)]
    lines.append(
        f"{whose}embedding of {_joined(names)} starts at the mean of {rows.num_trained:,} trained rows, plus a little "
        "noise"
    )
    return Start(rows, tuple(lines))


def _named(tokens: Sequence[UntrainedToken]) -> str:
    return _joined([f"{terminal(token.token)} (id {token.id}, in {row_count(token.num_rows)})" for token in tokens])


def _joined(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
