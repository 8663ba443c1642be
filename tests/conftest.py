"""Eight fake CPU devices, no network, one cache of compiled programs, and the toys that many tests share."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before jax is imported anywhere: a process can set its devices up once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Every test traces its own functions, but most of the programs have been compiled before, by another test or in an
# earlier run. The key of an entry covers the program, the compiler's version and options and the flags above, so an
# entry never goes stale; jdpo's own `compilation_cache` does nothing if this folder is named.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".compiled")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import numpy as np
import pytest

pytest_plugins = ["tests.cpu_seconds"]

QUICK_COMPILER = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""Compiling a toy's step takes 2 seconds with XLA's newer emitters of fused loops, and half a second with the older
ones in one piece. Later versions have only the newer ones, and refuse to start with a flag that is gone."""

PROGRAMS = Path(__file__).resolve().parents[1] / ".compiled"
MOST_BYTES = 2 * 2**30
"""When the compiled programs of earlier runs take more, they are dropped."""

WORDS = [
    "river",
    "mountain",
    "paper",
    "winter",
    "green",
    "seven",
    "slow",
    "market",
    "letter",
    "window",
    "bread",
    "music",
    "field",
    "stone",
    "light",
    "road",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    sizes = parser.getgroup("jdpo").addoption
    sizes("--all", action="store_true", help="run every test")
    sizes("--ci", action="store_true", help="run the tests marked ci and no others")
    sizes("--extras", action="store_true", help="run the tests marked extras and no others")


def pytest_configure(config: pytest.Config) -> None:
    # Compiling takes most of the suite's time, most of it spent on optimizing toy programs. With --all programs are
    # compiled as users have them. jax reads these variables when it first asks for devices, which is later.
    if not config.getoption("--all"):
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the processes that tests start
        jax.config.update("jax_disable_most_optimizations", True)
        if version("jaxlib").startswith("0.10."):
            os.environ["XLA_FLAGS"] += QUICK_COMPILER
    is_worker = hasattr(config, "workerinput")  # of xdist
    if not is_worker and sum(path.stat().st_size for path in PROGRAMS.glob("*")) > MOST_BYTES:
        shutil.rmtree(PROGRAMS)


def runs(config: pytest.Config, marks: set[str]) -> bool:
    """Returns whether a test with these marks is part of this run."""
    if "torch" in marks and not importlib.util.find_spec("torch"):
        return False
    if config.getoption("--extras") or "extras" in marks:
        return config.getoption("--extras") and "extras" in marks
    if config.getoption("--all"):
        return True
    return not marks & {"full", "torch"} and ("ci" in marks) == config.getoption("--ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Deselected, not skipped: a suite has no tests that it does not run.
    dropped = [item for item in items if not runs(config, {mark.name for mark in item.iter_markers()})]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
    assert len(jax.devices()) == 8, "XLA_FLAGS came too late: something imported jax before conftest"


def sentence(rng: np.random.Generator, num_words: int) -> str:
    """Returns random words, so that lengths and tokens vary."""
    return " ".join(rng.choice(WORDS, num_words)) + "."


def chat_pairs(num_rows: int, seed: int = 0, words: tuple[int, int] = (3, 12)) -> list[dict[str, Any]]:
    """Returns preference rows in explicit conversational form; chosen and rejected always differ."""
    rng = np.random.default_rng(seed)
    low, high = words

    def turn(role: str, tail: str = "") -> list[dict[str, str]]:
        return [{"role": role, "content": sentence(rng, int(rng.integers(low, high))) + tail}]

    return [
        {"prompt": turn("user"), "chosen": turn("assistant", " yes"), "rejected": turn("assistant", " no")}
        for _ in range(num_rows)
    ]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_llama(**fields: Any) -> Any:
    """Returns the `ModelConfig` of a small Llama without biases; keyword arguments replace its fields.

    `windows` gives one window per layer, for layers that differ in nothing else.
    """
    from jdpo.models.model_config import LayerKind, ModelConfig, RopeConfig

    num_layers = fields.get("num_layers", 2)
    windows = fields.pop("windows", (None,) * num_layers)

    own: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 64,
        "num_layers": num_layers,
        "d_model": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "d_ff": 192,
        "norm_eps": 1e-6,
        "layers": tuple(LayerKind(rope=RopeConfig(theta=1e4), window=window) for window in windows),
        "tie_embeddings": False,
        "qkv_bias": False,
        "o_bias": False,
        "max_positions": 1024,
    }
    return ModelConfig(**{**own, **fields})


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a Llama with 2 layers of width 64 and a chat template."""
    from jdpo.quickstart.tiny_llama import write_model

    folder = tmp_path_factory.mktemp("models") / "toy"
    rng = np.random.default_rng(0)
    write_model(folder, [sentence(rng, 12) for _ in range(50)], hidden_size=64, num_layers=2, seed=0)
    return folder


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Twenty conversational pairs as JSONL."""
    return write_jsonl(tmp_path / "pairs.jsonl", chat_pairs(20))


@pytest.fixture
def run_words(toy_model: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Returns the command-line words of a small DPO run on one device; keyword arguments override them."""

    def words(**overrides: Any) -> list[str]:
        values = {
            "model_name_or_path": toy_model,
            "datasets": pairs_file,
            "output_dir": tmp_path / "run",
            "cache_dir": tmp_path / "cache",
            "max_length": 64,
            "global_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "remat": "none",
            "mesh.data": 8,
            "mesh.fsdp": 1,
        } | overrides
        return [f"{key}={value}" for key, value in values.items()]

    return words
