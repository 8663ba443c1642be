"""A toy reward model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


def make_reward_folder(base: Path, folder: Path, num_labels: int = 1, **settings: object) -> Path:
    """Writes a causal model's folder as transformers' classifier saves it: a `score` in place of the head."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(num_labels)}}
    config |= {"architectures": ["LlamaForSequenceClassification"], **labels, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    score = np.random.default_rng(1).normal(0, 1, (num_labels, config["hidden_size"])).astype(np.float32)
    save_file({**tensors, "score.weight": score}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def reward_folder(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reward_folder(toy_model, tmp_path_factory.mktemp("rewards") / "toy")
