"""Compares loading and exporting a checkpoint with safetensors' load_file and save_file: time and anonymous memory.

    python benchmarks/weights.py [--gib 4] [--rounds 5] [--only load|export] [--folder DIR] [--report FILE]

The checkpoint is a Llama of random bfloat16 weights in files of at most 1 GiB, with layers of the size of a 1B
model's and as many of them as fill the size. Every load and every export runs in a process of its own. The arms take
turns, after one turn that is not counted and that brings the files into the page cache, and medians are compared.
Only the call is timed, with the compilation of its own programs but without imports. Before it, the process touches
as much memory as any arm needs and frees it, since a virtual machine may need seconds per GiB to get memory that it
has not used lately. Params in float32 are compared with load_file and a cast, which gives the same result. Both
exports end when the files are on the disk (fsync), and both write bfloat16.

Memory is the largest RssAnon in /proc/self/status while the call runs, which includes the interpreter and jax, and
for exports the params that are being written. The exit code is 1 if a figure is above its bar. Linux only; needs
twice the size on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ml_dtypes
import numpy as np

TIME_BARS = {"load bfloat16": 1.56, "load float32": 1.0, "export bfloat16": 2.0, "export float32": 2.0}
"""Largest time of jdpo relative to that of safetensors, by arm."""
MEMORY_BARS = {"load": 1.1, "export": 1.3}
"""Largest anonymous memory of jdpo relative to the bytes of the params."""
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCAB_SIZE = 32000
ARMS = {
    "load_file": "safetensors load_file",
    "load bfloat16": "jdpo, params in bfloat16",
    "load_file, widened": "safetensors load_file, then astype(float32)",
    "load float32": "jdpo, params in float32",
    "save_file": "safetensors save_file",
    "export bfloat16": "jdpo, params in bfloat16",
    "export float32": "jdpo, params in float32",
}
BASELINES = {
    "load bfloat16": "load_file",
    "load float32": "load_file, widened",  # the same result: load_file gives bfloat16
    "export bfloat16": "save_file",
    "export float32": "save_file",
}


def main() -> int:
    """Makes the checkpoint, measures all arms in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("load", "export"), default=None, help="measure one direction")
    parser.add_argument("--folder", type=Path, default=None, help="where the files go; default: a temporary folder")
    parser.add_argument("--report", type=Path, default=None, help="the tables as Markdown")
    parser.add_argument("--arm", choices=ARMS, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measured(arguments.arm, arguments.folder)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        num_params = make_checkpoint(folder / "model", arguments.gib)
        prefixes = {"load": ("load",), "export": ("export", "save")}.get(arguments.only, ("",))
        results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS if arm.startswith(prefixes)}
        for turn in range(arguments.rounds + 1):
            for arm in results:
                found = in_child(arm, folder)
                if turn:
                    results[arm].append(found)
                print(f"turn {turn}: {arm}: {found['seconds']:.2f} s, {found['peak'] / 2**30:.2f} GiB", flush=True)
    text, passed = report(results, num_params, arguments.rounds)
    print(text)
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")
    return 0 if passed else 1


def make_checkpoint(folder: Path, gib: float) -> int:
    """Writes a sharded Llama of random weights with safetensors itself; returns its number of parameters."""
    from safetensors.numpy import save_file

    folder.mkdir()
    d, f = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = d // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    ends = {"model.embed_tokens": (VOCAB_SIZE, d), "model.norm": (d,), "lm_head": (VOCAB_SIZE, d)}
    of_layer, of_ends = (sum(int(np.prod(shape)) for shape in shapes.values()) for shapes in (layer, ends))
    num_layers = max(1, round((gib * 2**30 / 2 - of_ends) / of_layer))
    shapes = dict(ends)
    for index in range(num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * int(np.prod(other)) for other in files[-1].values()) > 2**30 - 2**27:
            files.append({})
        files[-1][f"{name}.weight"] = shape
    rng, weight_map = np.random.default_rng(0), {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # Without the upper bit of the exponent every number is finite and below 2.
        values = {key: rng.integers(0, 2**16, shape, np.uint16) & 0xBFFF for key, shape in tensors.items()}
        save_file({key: bits.view(ml_dtypes.bfloat16) for key, bits in values.items()}, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": False,
        **SHAPE,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(int(np.prod(shape)) for shape in shapes.values())


def in_child(arm: str, folder: Path) -> dict[str, float]:
    """Runs an arm in a separate process."""
    command = [sys.executable, __file__, "--arm", arm, "--folder", str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(arm: str, folder: Path) -> dict[str, float]:
    """Measures seconds and the peak of anonymous memory of one arm, in this process."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.sync()  # so that this arm does not wait for the writes of an earlier one
    call = _call(arm, folder / "model", out)
    size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    np.empty(int(2.2 * size), np.uint8).fill(1)
    with AnonymousMemory() as memory:
        started, worked = time.perf_counter(), time.process_time()
        kept = call()
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    del kept
    shutil.rmtree(out)
    return {"seconds": seconds, "cpu": cpu, "peak": memory.peak}


def _call(arm: str, model: Path, out: Path) -> Any:
    from safetensors.numpy import load_file, save_file

    if arm == "load_file":
        return lambda: [load_file(path) for path in sorted(model.glob("*.safetensors"))]
    if arm == "load_file, widened":
        return lambda: [
            {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}
            for path in sorted(model.glob("*.safetensors"))
        ]
    if arm == "save_file":
        loaded = {path.name: load_file(path) for path in sorted(model.glob("*.safetensors"))}

        def save() -> None:
            for name, tensors in loaded.items():
                save_file(tensors, out / name)
                with (out / name).open("rb") as file:
                    os.fsync(file.fileno())

        return save
    import jax

    from jdpo.checkpoint.export_plan import plan_export, plan_shards
    from jdpo.checkpoint.shard_files import write_shards
    from jdpo.models.families import read_model_config
    from jdpo.models.weights.loading import load_params

    what, dtype = arm.split()
    config = read_model_config(model)
    if what == "load":
        jax.block_until_ready(jax.numpy.zeros(1))  # starts the backend
        return lambda: jax.block_until_ready(load_params(model, config, dtype=dtype))
    params = load_params(model, config, dtype=dtype)
    plan = plan_export(config, model, "source")
    return lambda: write_shards(params, config, plan, plan_shards(plan.tensors, 2**30), out)


class AnonymousMemory:
    """Records the peak of this process's anonymous memory while the context is open.

    Attributes:
      peak: bytes.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            done = self._done.wait(0.01)
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) * 1024)
            if done:
                return


def report(results: dict[str, list[dict[str, float]]], num_params: int, rounds: int) -> tuple[str, bool]:
    """Returns the table as Markdown, and True if every figure is within its bar."""
    from machine import machine_line

    lines = [
        "# Loading and exporting weights",
        "",
        f"`python benchmarks/weights.py`: {num_params:,} parameters, {2 * num_params / 2**30:.2f} GiB of bfloat16 in "
        f"files of 1 GiB that are in the page cache; medians of {rounds} turns, range in brackets.",
        "",
        f"Machine: {machine_line(('jax', 'safetensors', 'numpy'))}; "
        f"load average over 15 minutes {os.getloadavg()[2]:.1f}.",
        "",
        "| | seconds | CPU seconds | over safetensors (bar) | peak anonymous GiB | over the params (bar) |",
        "|---|---|---|---|---|---|",
    ]
    passed = True
    for arm, own in results.items():
        seconds, peak = [found["seconds"] for found in own], max(found["peak"] for found in own)
        worked = median(found["cpu"] for found in own)
        times = f"{median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]"
        cells = [times, f"{worked:.2f}", "1", f"{peak / 2**30:.2f}", ""]
        if arm in BASELINES:
            ratio = median(seconds) / median(found["seconds"] for found in results[BASELINES[arm]])
            held = peak / (num_params * (4 if arm.endswith("32") else 2))
            time_bar, memory_bar = TIME_BARS[arm], MEMORY_BARS[arm.split()[0]]
            cells[2], cells[4] = f"{ratio:.2f} ({time_bar})", f"{held:.2f} ({memory_bar})"
            passed &= ratio <= time_bar and held <= memory_bar
        what = "export" if arm.startswith(("export", "save")) else "load"
        lines.append(f"| {what}: {ARMS[arm]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"All within their bars: {'yes' if passed else 'no'}.", ""]), passed


if __name__ == "__main__":
    sys.exit(main())
