"""A run that is stopped and resumed in another process, next to the uninterrupted one: equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from parity_part import NUM_STEPS, train_apart
from small_runs import write_inputs

STOP_AT = NUM_STEPS // 2

FLAGS = {"gpu": "--xla_gpu_deterministic_ops=true"}
"""XLA_FLAGS by platform; TPUs and CPUs are deterministic by themselves."""

COMPARED = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins")


def run(name: str, request: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Measures the part."""
    scratch = Path(request["scratch"])
    inputs = write_inputs(scratch, tiny=request["tiny"], num_pairs=24)
    flags = FLAGS.get(request["before"]["machine"].get("platform"), "")
    # One folder for the compiled programs: the choice of kernels by measurement may differ from process to process.
    train = partial(train_apart, inputs, scratch / "runs", "auto", flags=flags, seconds=request["seconds"])
    whole = train()
    (scratch / "runs/run").rename(scratch / "runs/uninterrupted")
    first = train(stop_at=STOP_AT)
    resumed = train()
    same = {key: [line[key] for line in whole["lines"]] == [line[key] for line in resumed["lines"]] for key in COMPARED}
    save(
        {
            "device_kind": whole["device_kind"],
            "num_steps": NUM_STEPS,
            "stopped_at": first["step"],
            "flags": flags,
            "losses": {"uninterrupted": losses(whole), "resumed": losses(resumed)},
            "checks": {
                "stopped in the middle": first["step"] == STOP_AT and first["weights"] is None,
                **{f"same {key}": value for key, value in same.items()},
                "same weights": whole["weights"] is not None and whole["weights"] == resumed["weights"],
            },
        }
    )


def losses(found: dict[str, Any]) -> list[float]:
    """Returns the loss of every step."""
    return [line["loss"] for line in found["lines"]]
