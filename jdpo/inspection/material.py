"""What a report on a run's rows is made from: the rows as training will have them, and what stands in their files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jdpo.config import TrainConfig
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.inspection.raw_text import TextFacts
from jdpo.models.weights.embedding_rows import UntrainedToken


class ModelFacts(NamedTuple):
    """What config.json says.

    Attributes:
      max_positions, vocab_size: positions the model has, rows of its embedding; None where it cannot be read.
      problem: why the model cannot be trained, or not as the config asks; None where it can.
      untrained: tokens of the training rows whose embedding was never trained; None where no weights are there to see.
      starts_untrained: whether the run starts them at the mean of the trained rows.
    """

    max_positions: int | None
    vocab_size: int | None
    problem: str | None
    untrained: Sequence[UntrainedToken] | None = None
    starts_untrained: bool = False


class Part(NamedTuple):
    """Training rows, or evaluation rows.

    Attributes:
      data: as training will have them.
      texts: what the raw rows of each data set say; empty where they are those of the training rows.
    """

    data: PreparedData
    texts: tuple[TextFacts, ...]


class Material(NamedTuple):
    """What a report is made from.

    Attributes:
      command: "dpo" or "sft".
      chosen_by: why it is that command, in words.
      steps: the rows of each step of the first epoch, or of its first ones where it is long.
      epoch: what an epoch is, in words.
      steps_per_epoch, num_steps: of the run.
    """

    config: TrainConfig
    command: str
    chosen_by: str
    tokenizer: Tokenizer
    model: ModelFacts
    train: Part
    eval: Part | None
    steps: Sequence[np.ndarray]
    epoch: str
    steps_per_epoch: int
    num_steps: int
