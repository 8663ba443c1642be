"""`jdpo.tokenize_pairs`: preference rows as people write them become the token ids that `jdpo.pack` takes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jdpo.config import DatasetConfig
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.sources.given_rows import Rows, form_of
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.models.weights.hub_models import resolve_folder
from jdpo.types import MaskedPair
from jdpo.words import figure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WITHOUT_SCORES = "without scores"
"""Name of the count of rows without scores, among rows with scores."""


class TokenizedPairs(NamedTuple):
    """Pairs as token ids, and what became of the rows that were read.

    Attributes:
      rows: the pairs that are kept, in their order, each a dict of int32 arrays as `jdpo.pack` takes it.
      score_margins: float32 [rows], by how much each chosen answer was scored higher; None unless every kept row has
        scores.
      counts: {name: number of rows}: read, kept, dropped by reason, cut, "without scores" where only some rows have
        none, and other remarks.
      summary: the counts as lines of text, with the first row of each.
    """

    rows: list[dict[str, Any]]
    score_margins: np.ndarray | None
    counts: dict[str, int]
    summary: str


def tokenize_pairs(
    rows: Rows,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    loss_on_every_turn: bool = False,
    chat_template: str | None = None,
) -> TokenizedPairs:
    """Reads, checks and tokenizes preference rows as `jdpo.train` does, for a training loop of your own.

    Args:
      rows: a `datasets.Dataset`, a list of dicts, or the path of a file, in any format of pairs in docs/data.md.
      tokenizer: a model folder or hub name, or a loaded tokenizer of transformers.
      max_length: maximum number of tokens of prompt and completion; longer completions are cut on the right.
      max_prompt_length: maximum number of tokens of the prompt, which is cut on the left; None: no limit.
      loss_on_every_turn: learn every assistant turn after the turns that both sides share, not the last one alone; the
        rows then have masks.
      chat_template: a Jinja file, "chatml", or the name of one of the tokenizer's templates; None: its own.

    Raises:
      ValueError: rows or tokenizer cannot be read, no row is left, or tokenizing them has a fault that would ruin a
        model. The message says where and why.
    """
    with tempfile.TemporaryDirectory(prefix="jdpo-tokenize-") as name:
        folder = Path(name)
        form = form_of(rows, "rows")
        path = Path(str(rows)) if form is None else folder / f"rows{form.ending}"
        if form is not None:
            form.write(path)
        data = prepare_pairs(
            [DatasetConfig(path=str(path))],
            _loaded(tokenizer, folder / "tokenizer", chat_template),
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            loss_on="assistant_turns" if loss_on_every_turn else "completion",
            cache_dir=folder / "cache",
        )
        # Copied, because the tokens are read from a file of this folder.
        pairs = [_copied(data[index]) for index in range(len(data))]
        unscored = np.flatnonzero(np.isnan(data.margins))
        margins = None if len(unscored) else np.array(data.margins)
        # Without the folder, which is about to go.
        summary, counts = data.summary().replace(f"{folder}{os.sep}", ""), dict(data.counts)
        if 0 < len(unscored) < len(pairs):
            counts[WITHOUT_SCORES] = len(unscored)
            summary += (
                f"\n  note: {len(unscored):,} of {figure(len(pairs), 'kept row')} are without scores (the first: "
                f"number {unscored[0]:,} of those kept, from 0), so score_margins is None"
            )
        return TokenizedPairs(pairs, margins, counts, summary)


def _copied(pair: Any) -> dict[str, Any]:
    masks = ("chosen_mask", "rejected_mask") if isinstance(pair, MaskedPair) else ()
    return {name: np.array(getattr(pair, name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids", *masks)}


def _loaded(tokenizer: Any, folder: Path, chat_template: str | None) -> Tokenizer:
    if isinstance(tokenizer, str | os.PathLike):
        folder = resolve_folder(str(tokenizer), weights=False)
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        raise ValueError(
            f"tokenizer: expected a model folder, a hub name or a tokenizer of transformers, found "
            f"{type(tokenizer).__name__}"
        )
    return load_tokenizer(folder, chat_template=chat_template)
