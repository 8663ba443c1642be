"""Whole runs of `jdpo.train` on a small model, each in a process of its own: `small_runs.py RUN.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from speed_data import read_lengths, synthesize, write_rows
from speed_model import ModelShape, write_model

SMALL = ModelShape(
    d_model=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=512, vocab_size=2048, tied=True
)
"""Heads of 64, so that the kernels of attention are those of large models."""

MAX_LENGTH = 512


class Inputs(NamedTuple):
    """The model folder and the rows of small runs."""

    model: Path
    rows: Path


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """A run.

    Attributes:
      inputs: model and rows.
      output_dir: its folder; a run that is there is resumed.
      num_steps: steps of the whole run.
      compute_dtype: as in a config.
      stop_at: the step after which this start stops, or None.
      result: the JSON file for what came of it.
    """

    inputs: Inputs
    output_dir: Path
    num_steps: int
    compute_dtype: str
    result: Path
    stop_at: int | None = None

    def written(self) -> Path:
        """Writes the run as JSON next to its result; returns that file."""
        path = self.result.with_suffix(".run.json")
        path.write_text(json.dumps(dataclasses.asdict(self), default=str), encoding="utf-8")
        return path


def write_inputs(folder: Path, *, tiny: bool, num_pairs: int) -> Inputs:
    """Writes the small model and pairs with the lengths of real dialogues, short enough for the CPU."""
    shape = dataclasses.replace(SMALL, d_model=64, num_layers=2, num_heads=1, num_kv_heads=1, d_ff=128, vocab_size=512)
    shape = shape if tiny else SMALL
    write_model(shape, folder / "model")
    lengths = read_lengths("hh")
    fit = lengths[(lengths[:, 0] + lengths[:, 1:].max(1)) <= (96 if tiny else MAX_LENGTH)]
    write_rows(synthesize(fit[:num_pairs], shape.vocab_size), folder / "rows.jsonl")
    return Inputs(folder / "model", folder / "rows.jsonl")


def train_small(run: SmallRun) -> dict[str, Any]:
    """Trains; returns the lines of metrics.jsonl, a digest of the exported weights, and the device."""
    import jax

    from jdpo import Callback, RunView, train
    from jdpo.config import DPOConfig, load_config

    class Stop(Callback):
        def on_step(self, view: RunView) -> None:
            if view.step == run.stop_at:
                view.stop("the device check resumes it")

    settings = {
        "model_name_or_path": run.inputs.model,
        "datasets": run.inputs.rows,
        "output_dir": run.output_dir,
        "cache_dir": run.output_dir.parent / "cache",
        "max_length": MAX_LENGTH,
        "global_batch_size": 8,
        "max_steps": run.num_steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "compute_dtype": run.compute_dtype,
        "export_dtype": "float32",
        "reference": "live",
        "logging_steps": 1,
    }
    result = train(
        load_config(DPOConfig, None, [f"{key}={value}" for key, value in settings.items()]), callbacks=[Stop()]
    )
    lines = (run.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "step": result.step,
        "device_kind": jax.devices()[0].device_kind,
        "lines": [json.loads(line) for line in lines],
        "weights": None if result.model_dir is None else digest(result.model_dir),
    }


def digest(model: Path) -> str:
    """Returns a digest of the bytes of all exported weights, name by name."""
    from safetensors.numpy import load_file

    found = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        for name, array in sorted(load_file(path).items()):
            found.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def main(path: Path) -> None:
    """Runs what a file describes."""
    values = json.loads(path.read_text(encoding="utf-8"))
    inputs = Inputs(*map(Path, values.pop("inputs")))
    places = {name: Path(values.pop(name)) for name in ("output_dir", "result")}
    run = SmallRun(inputs=inputs, **places, **values)
    run.result.write_text(json.dumps(train_small(run)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
