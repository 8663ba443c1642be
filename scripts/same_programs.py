"""Prints what a refactor must not change, as one JSON document: programs, metrics and configs of six small runs.

    python scripts/same_programs.py --out before.json          # on the unchanged tree
    python scripts/same_programs.py --against before.json      # after the change; exits 1 and names each difference

The document holds three things:

* `runs.NAME.programs`: the digest of the lowered StableHLO of every program of at least MIN_LINES lines (training step,
  evaluation step, reference scoring, and a few that prepare the state), with its size and how often it was compiled.
  Names of modules and functions, result_info and locations are removed before hashing, so that moving or renaming code
  changes nothing. The order of a program's arguments counts.
* `runs.NAME.metrics`: the lines of metrics.jsonl without time, throughput and memory (UNSTABLE).
* `runs.NAME.config` and `shipped.FILE`: resolved_config.yaml of each run, and what it would be for every file in
  configs/.

Everything goes through the command line, so nothing here depends on where code lives in jdpo. The runs train the model
and rows of tests/golden/trl_dpo on eight fake CPU devices. Compare documents that were made on one machine with the
same versions of Python and jax; `versions` tells. `--keep DIR` keeps the normalised programs as DIR/DIGEST.mlir, so
that two versions of one can be compared by diff.

It takes about two CPU minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests" / "golden" / "trl_dpo"

MIN_LINES = 150
"""Programs of fewer lines are left out: casts, random bits and other helpers that host code calls one at a time."""

UNSTABLE = re.compile(r".*_per_second|.*seconds|mfu.*|peak_memory_gib")
"""Keys of metrics.jsonl that no two runs agree on."""

COMMON: dict[str, Any] = {
    "model_name_or_path": "toy-llama",
    "datasets": "train.jsonl",
    "eval_datasets": "eval.jsonl",
    "max_length": 160,
    "global_batch_size": 8,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "eval_steps": 2,
    "logging_steps": 1,
    "compilation_cache": "false",
    "mesh.fsdp": 1,
}

RUNS: dict[str, dict[str, Any]] = {
    # Full fine-tuning on a mesh fsdp x tensor, packed, two micro-batches per step, reference in the step.
    "live": {
        "reference": "live",
        "remat": "full",
        "micro_batch_size": 4,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "mesh.data": 2,
    },
    # Reference log-probs computed once; a sum of losses; remat and tokens per device are chosen by trial compilation.
    "cached": {
        "reference": "cached",
        "loss_type": "[sigmoid, ipo]",
        "loss_weights": "[1.0, 0.5]",
        "rpo_alpha": 0.1,
        "optimizer": "adamw_bf16",
        "mesh.fsdp": 8,
    },
    # Adapters on an int8 base; the reference is the base.
    "lora": {
        "reference": "live",
        "attention": "blockwise",
        "lora.r": 4,
        "lora.use_rslora": "true",
        "lora.base_dtype": "int8",
        "compute_dtype": "bfloat16",
        "remat": "dots",
        "mesh.fsdp": 4,
        "mesh.tensor": 2,
    },
    # Experts along a mesh axis of their own, with the router's loss.
    "moe": {
        "model_name_or_path": "toy-moe",
        "reference": "live",
        "router_aux_loss_coef": 0.05,
        "remat": "none",
        "mesh.data": 2,
        "mesh.expert": 4,
    },
    # No pairs and no reference; padded batches.
    "sft": {
        "datasets": "messages.jsonl",
        "eval_datasets": "messages.jsonl",
        "loss_on": "assistant_turns",
        "packing": "false",
        "optimizer": "adafactor",
        "remat": "attention",
        "mesh.fsdp": 8,
    },
    # Padded batches; state that the loss carries from step to step, weights of tokens, a reference that moves.
    "padded": {
        "reference": "live",
        "packing": "false",
        "loss_type": "bco_pair",
        "bco_running_delta": "true",
        "ld_alpha": 0.5,
        "use_weighting": "true",
        "sync_ref_model": "true",
        "ref_model_sync_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "remat": "none",
        "mesh.data": 8,
    },
}
"""Name -> the settings in which a run differs from COMMON."""


def main() -> int:
    """Writes or compares the document that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the document to this file")
    parser.add_argument("--against", type=Path, help="compare with this document instead of printing")
    parser.add_argument("--keep", type=Path, help="folder for the normalised programs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time [2]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-programs-") as folder:
        document = record_all(Path(folder), arguments.keep, arguments.jobs)
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    if not arguments.against:
        print(text, end="")
        return 0
    found = list(differences(json.loads(arguments.against.read_text(encoding="utf-8")), document))
    print("\n".join(found) or f"same as {arguments.against}: {summary(document)}")
    return 1 if found else 0


def record_all(folder: Path, keep: Path | None, jobs: int) -> dict[str, Any]:
    """Returns the whole document; `folder` is empty and holds all that the runs write."""
    write_inputs(folder)
    with ThreadPoolExecutor(jobs) as pool:
        runs = dict(zip(RUNS, pool.map(lambda name: record_run(folder, name, RUNS[name], keep), RUNS), strict=True))
        paths = training_configs()
        shipped = dict(zip([path.name for path in paths], pool.map(resolved_config, paths), strict=True))
    versions = {name: version(name) for name in ("jax", "jaxlib", "numpy")} | {"python": platform.python_version()}
    return {"versions": versions, "runs": runs, "shipped": shipped}


def training_configs() -> list[Path]:
    """Returns the shipped configs of `jdpo sft` and `jdpo dpo`."""
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    return [path for path in paths if "rounds" not in yaml.safe_load(path.read_text(encoding="utf-8"))]


def write_inputs(folder: Path) -> None:
    """Writes the models and rows of all runs."""
    shutil.copytree(TOY / "model", folder / "toy-llama")
    write_moe(folder / "toy-moe")
    lines = (TOY / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(lines[40:]), encoding="utf-8")
    rows = [json.loads(line) for line in lines]
    messages = [json.dumps({"messages": row["prompt"] + row["chosen"]}) + "\n" for row in rows]
    (folder / "messages.jsonl").write_text("".join(messages), encoding="utf-8")


def write_moe(folder: Path) -> None:
    """Writes a Mixtral with random weights and the tokenizer of the toy."""
    shutil.copytree(TOY / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "dtype": "float32"}
    config |= {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    width, inner, vocab, keys = config["hidden_size"], config["intermediate_size"], config["vocab_size"], 32
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    for layer in (f"model.layers.{index}" for index in range(config["num_hidden_layers"])):
        shapes |= {f"{layer}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (keys, width) for name in "kv"}
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (config["num_local_experts"], width)
        for expert in (f"{layer}.block_sparse_moe.experts.{index}" for index in range(config["num_local_experts"])):
            shapes |= {f"{expert}.w1.weight": (inner, width), f"{expert}.w3.weight": (inner, width)}
            shapes[f"{expert}.w2.weight"] = (width, inner)
    rng = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def record_run(folder: Path, name: str, settings: Mapping[str, Any], keep: Path | None = None) -> dict[str, Any]:
    """Trains with COMMON and `settings` in `folder` and returns what the run computed.

    Raises:
      RuntimeError: the run failed; the message holds what it printed.
    """
    values = COMMON | {"output_dir": name, "cache_dir": f"{name}-cache"} | settings
    words = [f"{key}={value}" for key, value in values.items()]
    # The dumps are what jax hands to the compiler, so a program that is lowered and never compiled is not among them.
    dump = {"JAX_DUMP_IR_TO": str(folder / f"{name}-dump"), "JAX_DUMP_IR_MODES": "stablehlo"}
    commands = ["sft"] if name == "sft" else ["reference", "dpo"] if settings["reference"] == "cached" else ["dpo"]
    for command in commands:
        jdpo([command, *words], folder, {**dump, "JAX_INCLUDE_DEBUG_INFO_IN_DUMPS": "0"})
    run = folder / name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "programs": digests(folder / f"{name}-dump", keep),
        "metrics": [{key: value for key, value in line.items() if not UNSTABLE.fullmatch(key)} for line in lines],
        "config": yaml.safe_load((run / "resolved_config.yaml").read_text(encoding="utf-8")),
    }


def resolved_config(path: Path) -> Any:
    """Returns the whole config that a run of a shipped file would have, defaults included."""
    command = "sft" if "sft" in path.stem else "dpo"
    return yaml.safe_load(jdpo([command, str(path), "--print_config"], ROOT, {}))


def jdpo(words: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Runs a command of this tree's jdpo in `folder` and returns what it printed."""
    own = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "jdpo.cli.main", *words]
    done = subprocess.run(command, cwd=folder, env=os.environ | own | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`jdpo {' '.join(words)}` failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def digests(dump: Path, keep: Path | None = None) -> dict[str, str]:
    """Returns the digest of every large program in a folder of jax's dumps -> its size and how often it is there."""
    texts = [normalised(path.read_text(encoding="utf-8")) for path in sorted(dump.glob("*.mlir"))]
    found = Counter(text for text in texts if text.count("\n") >= MIN_LINES)
    named = {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in found}
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        for digest, text in named.items():
            (keep / f"{digest}.mlir").write_text(text, encoding="utf-8")
    return {digest: f"{text.count(chr(10))} lines, compiled {found[text]}x" for digest, text in named.items()}


_INFO = r'jax\.(?:result|arg)_info = "(?:[^"\\]|\\.)*"'
_SYMBOL = re.compile(r'(?<!custom_call )@("(?:[^"\\]|\\.)*"|[\w$.-]+)')


def normalised(text: str) -> str:
    """Returns a StableHLO module without its names: symbols become @0, @1, ... in order of appearance.

    Targets of custom calls, such as @Sharding, are part of the computation and stay.

    >>> normalised('module @jit_step { func.func public @main() -> (f32 {jax.result_info = "loss"})')
    'module @0 { func.func public @1() -> (f32)'
    """
    text = re.sub(rf" \{{{_INFO}\}}", "", text)
    text = re.sub(rf", {_INFO}|{_INFO}, ", "", text)
    numbers: dict[str, str] = {}
    return _SYMBOL.sub(lambda match: numbers.setdefault(match[1], f"@{len(numbers)}"), text)


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yields a line for each place where two documents differ.

    >>> list(differences({"a": [1, 2], "b": 3}, {"a": [1, 5]}))
    ['a.1: 2 before, 5 now', 'b: 3 before, missing now']
    """
    if isinstance(before, list) and isinstance(after, list):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            here = f"{place}.{key}" if place else str(key)
            if key not in after:
                yield f"{here}: {before[key]!r} before, missing now"
            elif key not in before:
                yield f"{here}: missing before, {after[key]!r} now"
            else:
                yield from differences(before[key], after[key], here)
    elif before != after:
        yield f"{place}: {before!r} before, {after!r} now"


def summary(document: Mapping[str, Any]) -> str:
    """Returns the numbers of things in a document, in words."""
    runs = document["runs"].values()
    programs, lines = (sum(len(run[key]) for run in runs) for key in ("programs", "metrics"))
    return (
        f"{len(runs)} runs, {programs} programs, {lines} lines of metrics, {len(document['shipped'])} shipped configs"
    )


if __name__ == "__main__":
    sys.exit(main())
