"""Full fine-tuning or LoRA of a model of true size: time, MFU, memory and kernels, on two kinds of rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import traceback
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

EQUAL, REAL = "512/300/300", "hh"
"""Lengths of prompt, chosen and rejected: equal ones, whose steps have one shape, and those of HH-RLHF."""

AT_ONCE = 8192


class Case(NamedTuple):
    """Rows and settings of a run; `chosen` if jdpo chooses what its memory is spent on, which then must work."""

    rows: str
    variant: str
    tokens_per_step: int
    settings: dict[str, Any]
    chosen: bool


CASES = (
    # One program, as benchmarks/aot.py compiles it, before anything that takes longer.
    Case(EQUAL, "dots, 8,192 at once", AT_ONCE, {"remat": "dots", "max_tokens_per_device": AT_ONCE}, False),
    # Fewer tokens than a device takes at once at most, so that steps are one micro-batch where memory allows.
    Case(REAL, "as jdpo chooses", 3 * AT_ONCE, {}, True),
    Case(EQUAL, "as jdpo chooses", 3 * AT_ONCE, {}, True),
)
STEPS, SECONDS = 24, 35.0
"""Steps of a case at most, and its seconds without compilations."""

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
    for case in CASES:
        if result["cases"] and ends - time.monotonic() < (5 if request["tiny"] else LEAST_LEFT):
            print(f"> {name}: {case.rows}, {case.variant}: no time left", flush=True)
            break
        found = figures_of(name, case, folder, request, ends)
        result["cases"].append(found)
        if case.chosen:
            result["checks"][f"{case.rows} runs"] = "error" not in found
        if "error" not in found:
            kernels = set(found["attention_expected"]) <= set(found["attention"])
            result["checks"][f"kernels {case.rows}"] = kernels and result["checks"].get(f"kernels {case.rows}", True)
        print(f"> {name}: {told(found)}", flush=True)
        save(result)


def figures_of(name: str, case: Case, folder: Path, request: dict[str, Any], ends: float) -> dict[str, Any]:
    """Returns the figures of a case, or its error.

    Args:
      ends: of the time of the part.
    """
    found: dict[str, Any] = {"rows": case.rows, "variant": case.variant}
    try:
        setup = setup_of(name, case, folder, request)
        with running(setup, request) as pool:
            prepared = prepare(setup, RandomLogps(setup.model.config.vocab_size), pool)
            state, frozen = random_state(setup, prepared.steps.assembly)
            seconds = min(SECONDS, max(ends - time.monotonic() - 10, 1))
            _, timed, losses = run_steps(setup, prepared.steps, state, frozen, seconds=seconds)
            return found | figures(setup, prepared, timed, losses)
    except Exception as error:  # such as too little memory, which says something too
        traceback.print_exc()
        return found | {"error": first_line(error)}


def first_line(error: Exception) -> str:
    """Returns the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def setup_of(name: str, case: Case, folder: Path, request: dict[str, Any]) -> Setup:
    """Returns the setup of a case."""
    return make_setup(
        folder,
        rows=case.rows,
        lora=name == "lora",
        num_steps=6 if request["tiny"] else STEPS,
        # A toy's rows have an eighth of the lengths.
        tokens_per_step=case.tokens_per_step // (32 if request["tiny"] else 1),
        tiny=request["tiny"],
        **case.settings,
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


def told(found: dict[str, Any]) -> str:
    """Returns a line about a case."""
    if "error" in found:
        return f"{found['rows']}, {found['variant']}: {found['error']}"
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%} ({found['mfu_executed']:.1%} executed)"
    return (
        f"{found['rows']}, {found['variant']}: {found['step_seconds']['median']:.3g} s per step{mfu}, "
        f"{found['tokens_per_second']:,.0f} tokens/s, remat {found['remat']}, "
        f"{found['max_tokens_per_device']:,} tokens at once"
    )
