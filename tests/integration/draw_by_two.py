"""One of several processes that draw answers together; writes what it got to RESULTS/<process>.

python draw_by_two.py FOLDER RESULTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

from jdpo.config import MeshConfig
from jdpo.generation.engine import Drawn, Engine
from jdpo.generation.values import Sampling
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, abstract_params, logical_axes
from jdpo.models.weights.loading import load_params
from jdpo.processes import join_cluster
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import param_shardings

PROMPTS = [[3, 14, 15, 9, 26, 5], [35], [8, 9, 7, 9, 3, 2, 38, 4, 6, 2, 6, 4]]


def draw(folder: Path, axes: MeshConfig) -> list[Drawn]:
    """Draws answers on all devices of all processes."""
    model, mesh = Transformer(read_model_config(folder)), make_mesh(axes)
    params = load_params(folder, model, param_shardings(logical_axes(model), abstract_params(model), mesh))
    engine = Engine(
        model, params, end_token_ids=[4, 6, 9], sampling=Sampling(top_p=0.9, max_new_tokens=10), mesh=mesh, max_slots=8
    )
    return list(engine.run(PROMPTS, 4))


if __name__ == "__main__":
    join_cluster()
    answers = draw(Path(sys.argv[1]), MeshConfig(data=2, fsdp=2, tensor=2))
    Path(sys.argv[2], str(jax.process_index())).write_text(json.dumps(answers), encoding="utf-8")
