"""Binds every name in `jdpo.loss_specs.LOSSES` to the function that computes it."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jdpo.losses import coupled, pairwise, reference_free
from jdpo.losses.pairwise import LossInputs

LossFunction = Callable[[LossInputs], jax.Array]
"""Returns the loss of each pair, float [b]."""

FUNCTIONS: dict[str, LossFunction] = {**pairwise.FUNCTIONS, **coupled.FUNCTIONS, **reference_free.FUNCTIONS}
"""Every preference loss by name. A family's own table is at the end of its file, so that a loss is added in one."""
