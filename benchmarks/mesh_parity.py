"""Runs ten equal training steps on every mesh and micro-batch size, and compares their loss traces.

    python benchmarks/mesh_parity.py [--out DIR]

A small Llama with random weights, pairs of 256 to 400 tokens, AdamW at a constant 1e-4, shuffled epochs that end in a
remainder. Every case is a real run of the trainer, on fake CPU devices; one process for each number of devices and
dtype. Printed for each case: the largest relative difference of loss and gradient norm from the first case of its
kind (on one device), and the distance of the final params as a share of the distance that they moved.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 10
WORDS = ("river", "mountain", "paper", "winter", "green", "seven", "slow", "market", "letter", "window", "bread")
LOSS_BAR = {"float32": 3e-5, "float64": 1e-9}
"""Largest relative difference of the loss at any step."""
PARAMS_BAR = {"float32": 3e-4, "float64": 1e-9}
"""Largest distance of the final params over the way they went. Adam moves a weight by the sign of its gradient
in the first steps, so float32 rounding of a gradient near zero shows in full there."""


class Case(NamedTuple):
    """A run: command, dtype, number of devices, mesh, micro-batch size, and slices of the devices."""

    command: str
    dtype: str
    num_devices: int
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    micro_batch_size: int
    slices: int = 1

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), self.mesh, strict=True))
        slices = f" on {self.slices} slices" if self.slices > 1 else ""
        return f"{self.command} {self.dtype} {mesh}{slices}, micro-batch {self.micro_batch_size}"


class Trace(NamedTuple):
    """The outcome of a run: losses and gradient norms [steps], params before and after {path: array}."""

    loss: np.ndarray
    grad_norm: np.ndarray
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


class Inputs(NamedTuple):
    """A model folder, a file of pairs, and the number of rows per optimizer step."""

    model: Path
    rows: Path
    global_batch_size: int


MESHES = {
    (1, 1, 1): (8, 3, 1),  # the other cases are compared with the first
    (8, 1, 1): (1,),
    (1, 8, 1): (1,),
    (1, 4, 2): (2, 1),
    (2, 2, 2): (2,),
}
"""(data, fsdp, tensor) -> micro-batch sizes of a device; 3 is no divisor of the 8 rows of a step."""


def all_cases() -> list[Case]:
    """Returns every mesh and micro-batch size for DPO and three meshes for SFT, in both dtypes."""
    return [
        Case(command, dtype, int(np.prod(mesh)), mesh, micro)
        for dtype in LOSS_BAR
        for command, meshes in (("dpo", tuple(MESHES)), ("sft", ((1, 1, 1), (1, 8, 1), (1, 4, 2))))
        for mesh in meshes
        for micro in (MESHES[mesh] if command == "dpo" else MESHES[mesh][-1:])
    ] + [Case("dpo", dtype, 8, (2, 2, 2), 1, slices=2) for dtype in LOSS_BAR]


def write_inputs(
    folder: Path, *, hidden_size: int = 128, num_layers: int = 2, num_rows: int = 20, global_batch_size: int = 8
) -> Inputs:
    """Writes a random Llama and conversational pairs of 256 to 400 tokens."""
    from jdpo.quickstart.tiny_llama import write_model

    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))

    write_model(
        folder / "model", [text(12, 13) for _ in range(60)], hidden_size=hidden_size, num_layers=num_layers, seed=0
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": text(120, 180)}],
            "chosen": [{"role": "assistant", "content": text(130, 200)}],
            "rejected": [{"role": "assistant", "content": text(130, 200)}],
        }
        for _ in range(num_rows)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Inputs(folder / "model", path, global_batch_size)


def run_here(case: Case, inputs: Inputs, out: Path, num_steps: int = NUM_STEPS) -> Trace:
    """Runs a case in this process, which must have case.num_devices devices and jax in the case's dtype."""
    import jax

    from jdpo import Callback, RunView
    from jdpo.config import DPOConfig, SFTConfig, load_config
    from jdpo.training.run import train

    assert len(jax.devices()) == case.num_devices, (jax.devices(), case)
    settings = {
        "model_name_or_path": inputs.model,
        "datasets": inputs.rows,
        "output_dir": out,
        "cache_dir": out.parent / "cache",
        "max_length": 512,
        "global_batch_size": inputs.global_batch_size,
        "micro_batch_size": case.micro_batch_size,
        "max_steps": num_steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "compute_dtype": case.dtype,
        "export_dtype": "float32",
        "logging_steps": 1,
        "mesh.slices": case.slices,
        **{f"mesh.{axis}": size for axis, size in zip(("data", "fsdp", "tensor"), case.mesh, strict=True)},
    }
    config = load_config(
        {"dpo": DPOConfig, "sft": SFTConfig}[case.command],
        overrides=[f"{key}={value}" for key, value in settings.items()],
    )
    snapshots: dict[int, dict[str, np.ndarray]] = {}

    class Keep(Callback):
        def on_start(self, run: RunView) -> None:
            self.on_step(run)

        def on_step(self, run: RunView) -> None:
            if run.step in (0, num_steps):
                leaves = jax.tree_util.tree_leaves_with_path(run.params)
                # A copy: on the CPU an array may share its memory with the params, which the next step reuses.
                snapshots[run.step] = {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}

    train(config, callbacks=[Keep()])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss, grad_norm = (np.array([line[name] for line in lines]) for name in ("loss", "grad_norm"))
    return Trace(loss, grad_norm, snapshots[0], snapshots[num_steps])


def run_apart(cases: Iterable[Case], inputs: Inputs, out: Path, num_steps: int = NUM_STEPS) -> dict[Case, Trace]:
    """Runs cases in separate processes, one for each number of devices and dtype."""
    traces = {}
    for (num_devices, dtype), group in groupby(cases, key=lambda case: (case.num_devices, case.dtype)):
        together = list(group)
        folders = [out / str(case).replace(" ", "_") for case in together]
        request = [
            num_steps,
            [inputs.model, inputs.rows, inputs.global_batch_size],
            list(zip(together, folders, strict=True)),
        ]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": str(dtype == "float64").lower(),
            # The last of two values of a flag counts; the caller's other flags stay.
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        subprocess.run(
            [sys.executable, __file__, "--worker", json.dumps(request, default=str)],
            env=environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        traces |= {case: _read(folder) for case, folder in zip(together, folders, strict=True)}
    return traces


def _work(request: Sequence[Any]) -> None:
    num_steps, (model, rows, global_batch_size), runs = request
    inputs = Inputs(Path(model), Path(rows), global_batch_size)
    for (command, dtype, num_devices, mesh, micro, slices), folder in runs:
        case = Case(command, dtype, num_devices, tuple(mesh), micro, slices)
        trace = run_here(case, inputs, Path(folder) / "run", num_steps)
        np.savez(Path(folder) / "trace.npz", loss=trace.loss, grad_norm=trace.grad_norm)
        np.savez(Path(folder) / "before.npz", **trace.before)
        np.savez(Path(folder) / "after.npz", **trace.after)


def _read(folder: Path) -> Trace:
    trace = np.load(folder / "trace.npz")
    before, after = dict(np.load(folder / "before.npz")), dict(np.load(folder / "after.npz"))
    return Trace(trace["loss"], trace["grad_norm"], before, after)


class Distance(NamedTuple):
    """The difference of two traces: largest relative differences, and the params' share of their way."""

    loss: float
    grad_norm: float
    params: float


def distance(trace: Trace, expected: Trace) -> Distance:
    """Returns differences relative to `expected`; infinite if one of them is NaN."""

    def relative(found: np.ndarray, wanted: np.ndarray) -> float:
        assert found.shape == wanted.shape, (found.shape, wanted.shape)
        return float(np.max(np.abs(found - wanted) / np.abs(wanted)))

    apart = sum(float(np.sum(np.square(trace.after[name] - after))) for name, after in expected.after.items())
    way = sum(float(np.sum(np.square(after - expected.before[name]))) for name, after in expected.after.items())
    assert trace.after.keys() == expected.after.keys()
    found = Distance(
        relative(trace.loss, expected.loss), relative(trace.grad_norm, expected.grad_norm), float(np.sqrt(apart / way))
    )
    return Distance(*(value if np.isfinite(value) else np.inf for value in found))


def main() -> int:
    """Runs every case and prints the table; the exit code is 1 if a case misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the runs go; default: a temporary folder")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        cases = sorted(all_cases(), key=lambda case: (case.dtype, case.num_devices))
        traces = run_apart(cases, write_inputs(out / "inputs"), out)
    past = 0
    print(f"| run of {NUM_STEPS} steps | loss, first to last | loss | grad_norm | params |\n|---|---|---|---|---|")
    for case in all_cases():
        first = next(other for other in all_cases() if (other.command, other.dtype) == (case.command, case.dtype))
        apart, loss = distance(traces[case], traces[first]), traces[case].loss
        figures = " | ".join(f"{value:.1e}" for value in apart) if case != first else "- | - | -"
        print(f"| {case} | {loss[0]:.4f} to {loss[-1]:.4f} | {figures} |")
        past += apart.loss > LOSS_BAR[case.dtype] or apart.params > PARAMS_BAR[case.dtype]
    print(f"{past} past the bar (loss {LOSS_BAR}, params {PARAMS_BAR})")
    return 1 if past else 0


if __name__ == "__main__":
    sys.exit(main())
