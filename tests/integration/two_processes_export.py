"""One process of an export by two: loads a folder onto a mesh over both, and writes it again.

    python two_processes_export.py FOLDER OUT CASE

CASE is "whole", or "damaged": an infinity in a tensor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jdpo.checkpoint.hf_export import export_model
from jdpo.config import MeshConfig
from jdpo.data.tokenizer import load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.hf_weights import load_params
from jdpo.models.transformer import Transformer, abstract_params, logical_axes
from jdpo.processes import join_cluster
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import param_shardings


def main(folder: Path, out: Path, case: str) -> int:
    """Returns 2 where the export is refused."""
    join_cluster()
    model = Transformer(read_model_config(folder))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = param_shardings(logical_axes(model), abstract_params(model), mesh)
    try:
        params = load_params(folder, model, shardings)
        kernel = params["stack"]["layer_0"]["mlp"]["gate"]["kernel"]
        assert not kernel.is_fully_addressable
        if case == "damaged":
            params["final_norm"]["scale"] = jax.jit(lambda leaf: leaf.at[0].set(jnp.inf))(params["final_norm"]["scale"])
        tokenizer = load_tokenizer(folder, chat_template=None)
        export_model(
            params,
            model.config,
            out,
            source_folder=folder,
            tokenizer=tokenizer.hf,
            end_token_ids=tokenizer.end_token_ids,
            max_shard_size="50KB",
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
