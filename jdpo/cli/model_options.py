"""The options of commands that open models and draw answers, and how they open them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jdpo.cli.option_types import not_empty
from jdpo.cli.parsing import spellings
from jdpo.safe_text import terminal_lines
from jdpo.words import figure

if TYPE_CHECKING:
    from jdpo.generation.loaded_model import LoadedModel
    from jdpo.generation.values import Sampling


def add_model(group: Any) -> None:
    """Adds the options on how models are run."""
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="Dtype of weights and computation (default: auto, float32 on CPU, bfloat16 on TPU and GPU).",
    )
    group.add_argument(
        *spellings("--chat_template"),
        type=not_empty,
        metavar="TEMPLATE",
        help="Chat template for a model without one: a Jinja file, or chatml.",
    )


def add_sampling(group: Any, *, max_new_tokens: int) -> None:
    """Adds the options on how answers are drawn.

    Args:
      max_new_tokens: the default of that option.
    """
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="Divides the logits; 0 always takes the most probable token (default: 1).",
    )
    group.add_argument(
        *spellings("--top_p"),
        type=float,
        default=1.0,
        metavar="P",
        help="Draw from the smallest set of most probable tokens with at least this probability in all (default: 1, "
        "all tokens).",
    )
    group.add_argument(
        *spellings("--max_new_tokens"),
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"Largest number of tokens of an answer, which is cut off there (default: {max_new_tokens}).",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="Seed of the draws (default: 0).")


def sampling_of(asked: argparse.Namespace) -> Sampling:
    """Returns how answers are drawn, from the options of `add_sampling` and, where a command has it, top_k.

    Raises:
      ValueError: a value is out of range.
    """
    from jdpo.generation.values import Sampling

    return Sampling(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=getattr(asked, "top_k", None),
        max_new_tokens=asked.max_new_tokens,
        seed=asked.seed,
    )


def refuse_clusters(command: str, advice: str = "") -> None:
    """Refuses to be one of several processes, which would all do the same work and write the same files.

    Args:
      advice: a further way to run the command, as part of a sentence.

    Raises:
      ValueError: the environment is that of a launcher of several processes.
    """
    from jdpo.processes.detection import find_cluster

    found = find_cluster(os.environ)
    if found is not None and found.num_processes > 1:
        raise ValueError(
            f"jdpo {command} runs in one process, and this one is one of {found.num_processes} ({found.source}). Start "
            f"it once, on one host, and set JAX_NUM_PROCESSES=1{advice}"
        )


def check_models(models: Sequence[str]) -> None:
    """Finds all models before the first one is loaded.

    Raises:
      ValueError: there is no such model, or jdpo does not support it.
    """
    from jdpo.training.saved.opening import check_model

    for model in models:
        check_model(model)


@contextlib.contextmanager
def opening(command: str, dtype: Any, chat_template: str | None) -> Iterator[Callable[[str], LoadedModel]]:
    """Yields the function that opens a model on all devices; while entered, compiled programs are kept on disk.

    Raises:
      ValueError: this process is one of several.
    """
    # First, since the imports below take seconds.
    refuse_clusters(command)
    from jdpo.config import MeshConfig
    from jdpo.data.prepared.prepare import cache_folder
    from jdpo.training.saved.opening import load
    from jdpo.training.setup.numerics import persistent_cache

    def opened(model: str) -> LoadedModel:
        found = load(model, dtype=dtype, mesh=MeshConfig(), chat_template=chat_template)
        log_model(found)
        return found

    with persistent_cache(cache_folder(None) / "programs"):
        yield opened


def log_model(model: LoadedModel) -> None:
    """Logs what was opened, its dtype, and the devices that hold it."""
    log(f"model: {model.name}, {model.dtype}, on {figure(model.mesh.size, 'device')}")


def log(text: str) -> None:
    """Writes a line to stderr, so that stdout has results alone."""
    print(terminal_lines(text), file=sys.stderr, flush=True)
