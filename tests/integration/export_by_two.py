"""One of several processes that load a model folder onto a common mesh and export it, in good cases and bad.

    python export_by_two.py FOLDER DAMAGED OUT RESULTS

FOLDER is a model, DAMAGED the same with NaN in one tensor. What each case raised, or null, goes to RESULTS/<process>.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jdpo.checkpoint.hf_export import export_model
from jdpo.config import MeshConfig
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, abstract_params, logical_axes
from jdpo.models.weights.loading import load_params
from jdpo.processes import ending_together, is_first, join_cluster
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import param_shardings


def main(folder: Path, damaged: Path, out: Path, results: Path) -> None:
    """Runs the cases in turn: after a refused one the processes must be able to continue."""
    messages: dict[str, str | None] = {}
    model = Transformer(read_model_config(folder))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = param_shardings(logical_axes(model), abstract_params(model), mesh)

    def case(name: str, work: Callable[[], object]) -> None:
        try:
            work()
            messages[name] = None
        except (ValueError, OSError, RuntimeError) as error:
            messages[name] = str(error)

    def mean_beside(path: tuple[str, ...], leaf: jax.Array) -> Any:
        return leaf, float(jax.jit(jnp.mean)(leaf))  # of all shards: the processes wait for each other

    here = folder if is_first() else damaged
    case("NaN on the second", lambda: load_params(here, model, shardings, transform=mean_beside))
    case("no folder on the second", lambda: load_params(folder if is_first() else results / "none", model, shardings))
    params = load_params(folder, model, shardings)
    assert not params["stack"]["layer_0"]["mlp"]["gate"]["kernel"].is_fully_addressable
    tokenizer = load_tokenizer(folder, chat_template=None)

    def export(to: Path, weights: Any = params) -> None:
        export_model(
            weights,
            model.config,
            to,
            source_folder=folder,
            tokenizer=tokenizer.hf,
            end_token_ids=tokenizer.end_token_ids,
            max_shard_size="50KB",
        )

    scale = jax.jit(lambda leaf: leaf.at[0].set(jnp.inf))(params["final_norm"]["scale"])
    case("Inf", lambda: export(out / "infinite", params | {"final_norm": {"scale": scale}}))
    with on_second(small_files):
        case("small files", lambda: export(out / "small_files"))
    with on_second(no_threads):
        case("no threads", lambda: export(out / "no_threads"))
    case("a disk of its own", lambda: export((out if is_first() else out / "second") / "own_disk"))
    case("whole", lambda: export(out / "whole"))
    (results / str(jax.process_index())).write_text(json.dumps(messages))


@contextlib.contextmanager
def on_second(limit: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    with contextlib.nullcontext() if is_first() else limit():
        yield


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Imitates a disk that is full after 20 KB of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """Asks for a thread stack so large that no thread can be started."""
    before = threading.stack_size(2**46)
    yield
    threading.stack_size(before)


if __name__ == "__main__":
    join_cluster()
    with ending_together(str):
        main(*map(Path, sys.argv[1:]))
