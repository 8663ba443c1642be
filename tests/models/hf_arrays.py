"""Params as the tensors of a checkpoint, for tests that compare them with the loaded ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jdpo.models.model_config import ModelConfig
from jdpo.models.transformer import Params
from jdpo.models.weights.host_arrays import host_tensors


def hf_arrays(params: Params, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, host array in its layout): the exact inverse of `load_params`."""
    for name, take in host_tensors(params, config):
        parts = take()
        values = np.empty(parts[0][0].hf_shape, parts[0][1].dtype)
        for piece, part in parts:
            piece.view.array(values.reshape(-1))[...] = part
        yield name, values
