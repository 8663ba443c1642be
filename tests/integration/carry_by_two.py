"""One of several processes that load the text part of a multimodal model and export the model again.

python carry_by_two.py FOLDER OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax

from jdpo.checkpoint.hf_export import export_model
from jdpo.config import MeshConfig
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, abstract_params, logical_axes
from jdpo.models.weights.loading import load_params
from jdpo.processes import ending_together, join_cluster
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import param_shardings


def main(folder: Path, out: Path) -> None:
    model = Transformer(read_model_config(folder))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = load_params(folder, model, param_shardings(logical_axes(model), abstract_params(model), mesh))
    assert not params["embed"]["embedding"].is_fully_addressable
    tokenizer = load_tokenizer(folder, chat_template=None)
    export_model(
        jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree))(params),
        model.config,
        out,
        source_folder=folder,
        tokenizer=tokenizer.hf,
        end_token_ids=tokenizer.end_token_ids,
        max_shard_size="10KB",
    )


if __name__ == "__main__":
    join_cluster()
    with ending_together(str):
        main(*map(Path, sys.argv[1:]))
