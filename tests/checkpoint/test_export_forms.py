"""An export stores experts as its source does, and has the tensors that belong to no part of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.models.families import read_model_config
from jdpo.models.weights.loading import load_params
from tests.golden_models import GOLDEN_MODELS
from tests.models.families.test_qwen_next import in_one_tensor


@pytest.mark.parametrize("fused", [True, False], ids=["in one tensor", "one by one"])
@pytest.mark.parametrize("case", ["qwen3_next", pytest.param("qwen3_5_moe", marks=pytest.mark.full)])
def test_experts_and_mtp_come_back_bitwise(export: Callable[..., Path], tmp_path: Path, case: str, fused: bool) -> None:
    tensors = load_file(GOLDEN_MODELS / case / "model.safetensors")
    if fused:
        tensors = in_one_tensor(tensors, 4)
    # Of a layer that predicts a further token; such layers have experts of their own.
    mtp = {"mtp.fc.weight": np.ones((16, 32), np.float32), "mtp.layers.0.mlp.experts.down_proj": np.ones((4, 16, 10))}
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors | mtp, source / "model.safetensors")
    (source / "config.json").write_bytes((GOLDEN_MODELS / case / "config.json").read_bytes())
    out = export(case, source=source, params=load_params(source, read_model_config(source)), max_shard_size="4KB")
    found = {name: values for path in out.glob("*.safetensors") for name, values in load_file(path).items()}
    expected = load_file(source / "model.safetensors")
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values, err_msg=name)
