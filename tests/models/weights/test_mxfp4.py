"""Checkpoints whose experts are in MXFP4: the numbers, sharded reading, refusals, and the export in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.checkpoint.hf_export import export_model
from jdpo.config import MeshConfig
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, abstract_params, logical_axes
from jdpo.models.weights.loading import load_params
from jdpo.models.weights.mxfp4 import decoded
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import param_shardings
from tests.models.mxfp4_folders import read_plainly, write_folders

EVERY_BYTE = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in MXFP4 and in bfloat16."""
    root = tmp_path_factory.mktemp("mxfp4")
    write_folders(root / "quantized", root / "plain")
    return root / "quantized", root / "plain"


def test_every_byte_under_every_scale() -> None:
    for scale in range(255):
        scales = np.full(len(EVERY_BYTE), scale, np.uint8)
        with np.errstate(over="ignore"):
            expected = read_plainly(EVERY_BYTE[:, None], scales[:, None]).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(decoded(EVERY_BYTE, scales), expected.reshape(-1).view(np.uint16))
    not_numbers = decoded(EVERY_BYTE, np.full(len(EVERY_BYTE), 255, np.uint8)).view(ml_dtypes.bfloat16)
    assert np.isnan(not_numbers.astype(np.float32)).all()


@pytest.mark.torch
def test_numbers_are_bitwise_those_of_transformers() -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = np.concatenate([np.broadcast_to(EVERY_BYTE, (255, 16, 16)), rng.integers(0, 256, (255, 16, 16))], axis=1)
    scales = np.broadcast_to(np.arange(255)[:, None], blocks.shape[:2])
    blocks, scales = (np.ascontiguousarray(x, np.uint8) for x in (blocks, scales))
    theirs = convert_moe_packed_tensors(torch.tensor(blocks[None]), torch.tensor(scales[None]), dtype=torch.bfloat16)
    ours = decoded(blocks.reshape(-1, 16), scales.reshape(-1)).reshape(1, 255, -1).swapaxes(1, 2)
    np.testing.assert_array_equal(theirs.view(torch.uint16).numpy(), ours)


@pytest.mark.torch
def test_transformers_has_the_logits_of_the_quantized_folder_and_of_its_export(
    folders: tuple[Path, Path], toy_model: Path, tmp_path: Path
) -> None:
    import torch
    import transformers

    write_folders(
        tmp_path / "quantized", tmp_path / "plain", vocab_size=len(load_tokenizer(toy_model, chat_template=None).hf)
    )
    export(tmp_path / "quantized", toy_model, tmp_path / "out")
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 40, (2, 20)))

    def logits(folder: Path) -> np.ndarray:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.set_experts_implementation("eager")
        with torch.no_grad():
            found: np.ndarray = model(tokens).logits.numpy()
        return found

    expected = logits(tmp_path / "quantized")
    np.testing.assert_array_equal(logits(tmp_path / "out"), expected)
    model = Transformer(read_model_config(tmp_path / "quantized"))
    ours = model.apply({"params": load_params(tmp_path / "quantized", model)}, tokens.numpy(), np.ones((2, 20), bool))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("slab_bytes", [2**12, 2**25])
def test_both_folders_have_the_same_weights_on_any_mesh(folders: tuple[Path, Path], slab_bytes: int) -> None:
    """Splits the inputs of kernels over fsdp=4, so that parts begin within groups of 32."""
    quantized, plain = folders
    model = Transformer(read_model_config(quantized))
    assert model.config == read_model_config(plain)
    expected = load_params(plain, model, dtype=jnp.bfloat16)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=2))
    shardings = param_shardings(logical_axes(model), abstract_params(model), mesh)
    found = load_params(quantized, model, shardings, dtype=jnp.bfloat16, slab_bytes=slab_bytes)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    kernel = found["stack"]["layer_0"]["mlp"]["experts"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 2, 16, 32)


def export(source: Path, toy_model: Path, out: Path) -> None:
    config = read_model_config(source)
    tokenizer = load_tokenizer(toy_model, chat_template=None).hf
    params = load_params(source, config)
    export_model(params, config, out, source_folder=source, tokenizer=tokenizer, end_token_ids=[])


def test_an_export_is_the_bfloat16_folder(toy_model: Path, tmp_path: Path) -> None:
    vocab_size = len(load_tokenizer(toy_model, chat_template=None).hf)
    write_folders(tmp_path / "quantized", tmp_path / "plain", vocab_size=vocab_size)
    export(tmp_path / "quantized", toy_model, tmp_path / "out")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert set(found) == set(expected)
    for name, values in found.items():
        np.testing.assert_array_equal(values.view(np.uint16), expected[name].view(np.uint16), err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"
    assert read_model_config(tmp_path / "out") == read_model_config(tmp_path / "plain")


SCALES = "model.layers.1.mlp.experts.down_proj_scales"
BLOCKS = SCALES.replace("_scales", "_blocks")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(SCALES), "found no such tensor"),
        (lambda tensors: tensors.update({SCALES: tensors[SCALES][:2]}), r"U8 of shape \(4, 64, 1\)"),
        (lambda tensors: tensors.update({SCALES: tensors[SCALES].astype(np.int8)}), "found I8 of shape"),
        (lambda tensors: tensors[SCALES].__setitem__((0, 3, 0), 255), r"down_proj_blocks in .* holds NaN or Inf"),
        (lambda tensors: tensors.update({BLOCKS: tensors[BLOCKS][..., :8]}), r"groups, 16\), found .* 8\)"),
        (
            lambda tensors: tensors.update({BLOCKS: tensors[BLOCKS].reshape(-1)[:16], SCALES: np.array(120, np.uint8)}),
            r"groups, 16\), found \(16,\)",
        ),
    ],
)
def test_damaged_tensors_are_refused(folders: tuple[Path, Path], tmp_path: Path, change: Any, message: str) -> None:
    tensors = load_file(folders[0] / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path, read_model_config(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: quantized weights cannot be trained"),
        ({"swiglu_limit": 0.0}, "swiglu_limit: expected a number above 0, found 0.0"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
    ],
)
def test_other_settings_are_refused_by_name(
    folders: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    config = json.loads((folders[0] / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config") as error:
        read_model_config(tmp_path)
    assert message in str(error.value)
