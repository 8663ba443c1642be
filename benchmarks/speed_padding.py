"""Padding of a run of jdpo that passes once over all rows of a benchmark: by planning alone, nothing is trained."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
from speed_data import Selection, fitted
from speed_verdicts import Padding, Result

from jdpo.data.batching.packing_plan import pair_sizes, plan_run


def planned_padding(cut: np.ndarray, batch: int, max_tokens: int) -> tuple[float, np.ndarray]:
    """Returns the share of slots without a token over all steps, and of each step.

    Args:
      cut: int [rows, 3], tokens of prompt, chosen and rejected as trained on, in the order of training.
      batch: pairs per step.
      max_tokens: slots at once at most, as the run chose them.
    """
    sizes = pair_sizes(cut)
    steps = [np.arange(start, min(start + batch, len(cut))) for start in range(0, len(cut), batch)]
    plan = plan_run(sizes, steps, num_shards=1, max_tokens_per_device=max_tokens, sequences_per_row=None)
    shapes = [plan.step(indices).shape for indices in steps]
    slots = np.array([shape.num_micro * shape.num_rows * shape.num_slots for shape in shapes])
    real = np.array([sizes.slots[indices].sum() for indices in steps])
    return float(1 - real.sum() / slots.sum()), 1 - real / slots


def padding_of(result: Result, out: Path, selection: Selection, *, batch: int, max_length: int) -> Padding:
    """Returns the padding of jdpo's arm, and of its whole pass.

    Args:
      result: of the arm.
      out: a folder that it wrote.

    Raises:
      ValueError: its log disagrees with the plan about the measured steps.
    """
    logged = [float(line["padding"]) for line in result.runs[0].measured]
    max_tokens = json.loads((out / "run.json").read_text(encoding="utf-8"))["fit"]["max_tokens_per_device"]
    share, of_steps = planned_padding(fitted(selection.lengths, max_length), batch, max_tokens)
    steps = np.unique(selection.measured // batch)
    if not np.allclose(of_steps[steps], logged, atol=1e-6):
        raise ValueError(f"padding of the measured steps: planned {of_steps[steps].tolist()}, logged {logged}")
    return Padding(statistics.mean(logged), share, len(of_steps))


def memory_choice(out: Path) -> str:
    """Returns the memory settings that jdpo chose."""
    fit = json.loads((out / "run.json").read_text(encoding="utf-8"))["fit"]
    return f"remat {fit['remat']}, at most {fit['max_tokens_per_device']} tokens at once"
