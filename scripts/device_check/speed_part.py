"""Full fine-tuning or LoRA of a model of true size: time, MFU, memory and kernels, on two kinds of rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from part_process import ROOT
from random_model import RandomLogps, make_setup, parameters_of, random_state
from speed_model import LLAMA_22M, hf_config, tiny
from timed_steps import figures, prepare, run_steps

from jdpo.training.fit.compilation import compiler_threads
from jdpo.training.fit.memory_fit import memory_limit
from jdpo.training.setup.numerics import jax_settings
from jdpo.training.setup.run_setup import Setup
from jdpo.words import memory

GIB = 2**30


class Kind(NamedTuple):
    """A way to train: models of benchmarks/shapes, the largest first, and the bytes of state per parameter."""

    models: tuple[str, ...]
    bytes_per_parameter: float


KINDS = {
    "full": Kind(("Qwen2.5-1.5B", "Qwen2.5-0.5B", "SmolLM2-135M"), 16),
    "lora": Kind(("Llama-3.1-8B", "Llama-3.2-1B", "SmolLM2-135M"), 2.2),
}

FOR_ACTIVATIONS = 5 * GIB
"""Memory of a device that is left for gradients and activations when a model is chosen."""

ROWS = ("512/300/300", "hh")
"""Lengths of prompt, chosen and rejected: equal ones, whose steps have one shape, and those of HH-RLHF."""

TOKENS_PER_STEP = 32768
STEPS = 24
SECONDS = 35.0
"""Slots of a device in a step, about; the steps of a case at most, and its seconds without compilations."""

LEAST_LEFT = 60.0
"""No further case is started with fewer seconds left."""


def run(name: str, request: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Measures the part `name`, full or lora."""
    ends = time.monotonic() + request["seconds"]
    folder = model_folder(name, request)
    result: dict[str, Any] = {
        "device_kind": jax.devices()[0].device_kind,
        "model": folder.name,
        "parameters": parameters_of(folder),
        "cases": [],
        "checks": {},
    }
    print(f"> {name}: {folder.name}, {result['parameters']:,} parameters", flush=True)
    fixed: dict[str, Any] = {}
    state: Any = None
    for rows in ROWS:
        left = ends - time.monotonic()
        if result["cases"] and left < (5 if request["tiny"] else LEAST_LEFT):
            result["cases"].append({"rows": rows, "variant": "", "error": f"not started, {left:.0f} s were left"})
            save(result)
            break
        setup = setup_of(name, folder, rows, request, **fixed)
        with running(setup, request) as pool:
            prepared = prepare(setup, RandomLogps(setup.model.config.vocab_size), pool)
            # The weights of the first case are trained on in the next, whose state has the same shapes.
            if state is None:
                state = random_state(setup, prepared.steps.assembly)
            seconds = min(SECONDS, max(ends - time.monotonic() - 10, 1))
            trained, timed, losses = run_steps(setup, prepared.steps, *state, seconds=seconds)
        state = trained, state[1]
        case = {"rows": rows, "variant": "as jdpo chooses", **figures(setup, prepared, timed, losses)}
        result["cases"].append(case)
        result["checks"][f"kernels {rows}"] = set(case["attention_expected"]) <= set(case["attention"])
        save(result)
        print(f"> {name}: {told(case)}", flush=True)
        # Fewer programs are compiled to find out what fits.
        fixed = {"remat": case["remat"]}


def setup_of(name: str, folder: Path, rows: str, request: dict[str, Any], **settings: Any) -> Setup:
    """Returns the setup of a case."""
    return make_setup(
        folder,
        rows=rows,
        lora=name == "lora",
        num_steps=6 if request["tiny"] else STEPS,
        tokens_per_step=512 if request["tiny"] else TOKENS_PER_STEP,
        tiny=request["tiny"],
        **settings,
    )


@contextlib.contextmanager
def running(setup: Setup, request: dict[str, Any]) -> Iterator[ThreadPoolExecutor]:
    """Configures jax as a run does, and yields threads that compile."""
    cache = str(Path(request["scratch"]) / "cache")
    with jax_settings(setup.config, cache), compiler_threads() as pool:
        yield pool


def model_folder(name: str, request: dict[str, Any]) -> Path:
    """Returns the folder of the model that is asked for, or of the largest that fits.

    Raises:
      ValueError: there is no config.json, or no model fits.
    """
    if name in request["models"]:
        folder = Path(request["models"][name])
        if not (folder / "config.json").is_file():
            raise ValueError(f"--{name}_model {folder}: expected a folder with a config.json")
        return folder
    if request["tiny"]:
        folder = Path(request["scratch"]) / "tiny"
        folder.mkdir(exist_ok=True)
        shape = dataclasses.replace(tiny(LLAMA_22M), dtype="float32")
        (folder / "config.json").write_text(json.dumps(hf_config(shape)), encoding="utf-8")
        return folder
    kind, limit = KINDS[name], memory_limit()
    for model in kind.models:
        folder = ROOT / "benchmarks/shapes" / model
        if parameters_of(folder) * kind.bytes_per_parameter / jax.device_count() + FOR_ACTIVATIONS <= limit:
            return folder
    raise ValueError(f"a device has {memory(limit)} for a step, too little for {kind.models[-1]}")


def told(case: dict[str, Any]) -> str:
    """Returns a line about a case."""
    mfu = "" if case["mfu"] is None else f", MFU {case['mfu']:.1%} ({case['mfu_executed']:.1%} executed)"
    return (
        f"{case['rows']}: {case['step_seconds']['median']:.3g} s per step{mfu}, {case['tokens_per_second']:,.0f} "
        f"tokens/s, remat {case['remat']}, {case['max_tokens_per_device']:,} tokens at once"
    )
