"""Multimodal folders in and out: only the text part is trained, and without training an answer to an image stays."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jdpo.checkpoint.hf_export import export_model
from jdpo.cli.main import main
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, init_params
from jdpo.models.weights.folder_names import carried
from tests.models.torch_cases import DELTA, torch_model

pytestmark = [
    pytest.mark.torch,
    # As in tests/models/lora/test_peft_torch.py.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

ROPE = {"rope_type": "default", "rope_theta": 100.0}
OWN: dict[str, dict[str, Any]] = {
    "Gemma3": {"sliding_window": 16, "sliding_window_pattern": 2, "num_hidden_layers": 3},
    "Mistral3": {"tie_word_embeddings": False},
    "Qwen2_5_VL": {"rope_parameters": ROPE},
    "Qwen3VL": {"rope_parameters": ROPE, "tie_word_embeddings": True},
    "Qwen3_5": {**DELTA, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
}
LORA = {"lora.r": 4, "lora.alpha": 8}
IMAGE_SIZE, NUM_IMAGE_TOKENS = 16, 4


def write_source(prefix: str, toy_model: Path, folder: Path) -> Path:
    """Writes a multimodal model of random weights with the toy's tokenizer and a processor's settings."""
    toy = json.loads((toy_model / "config.json").read_text())
    kept = {key: toy[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in toy}
    shape = {"vocab_size": toy["vocab_size"] + 4, "max_position_embeddings": 256, "head_dim": 12, **kept}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, **OWN[prefix]}
    shutil.copytree(toy_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch_model(prefix, shape, 0).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": IMAGE_SIZE}))
    return folder


def answer(folder: Path, base: Path | None = None) -> tuple[np.ndarray, list[int]]:
    """Returns the logits of a prompt with an image, and a greedy answer to it.

    Args:
      base: the model of an adapter.
    """
    import torch
    import transformers

    config = json.loads(((base or folder) / "config.json").read_text())
    own_class = getattr(transformers, config["architectures"][0])
    model = own_class.from_pretrained(base or folder, attn_implementation="eager", dtype=torch.float32).eval()
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder)).eval()
    image_token = config.get("image_token_id", config.get("image_token_index"))
    tokens = torch.tensor([[5, 6, *[image_token] * NUM_IMAGE_TOKENS, 7, 8, 9]])
    torch.manual_seed(0)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if config["model_type"].startswith("qwen"):
        num_patches, width = (IMAGE_SIZE // 4) ** 2, 3 * 2 * 4 * 4
        inputs |= {"pixel_values": torch.randn(num_patches, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        inputs["mm_token_type_ids"] = (tokens == image_token).int()
    else:
        inputs["pixel_values"] = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    if config["model_type"] == "gemma3":
        inputs["token_type_ids"] = (tokens == image_token).int()
    if config["model_type"] == "mistral3":
        inputs["image_sizes"] = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]])
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
        other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
        assert not np.allclose(model(**other).logits.numpy(), logits), "the image matters"
        found = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return logits, found[0, tokens.shape[1] :].tolist()


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: values for path in folder.glob("*.safetensors") for name, values in load_file(path).items()}


@pytest.mark.parametrize("prefix", OWN)
def test_training_changes_only_the_text_part(
    run_words: Callable[..., list[str]],
    toy_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prefix: str,
) -> None:
    source = write_source(prefix, toy_model, tmp_path / "source")
    before, (logits, tokens) = tensors_of(source), answer(source)
    others = carried(before, read_model_config(source))
    assert len(others) > 10
    runs: dict[str, dict[str, Any]] = {
        # Zero in float32, which the key itself does not take.
        "still": {"learning_rate": 1e-60},
        "trained": {"learning_rate": 1e-2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
        "merged": {"learning_rate": 1e-1, **LORA, "lora.merge": "true"},
        "adapter": {"learning_rate": 1e-1, **LORA},
    }
    answers = {}
    for name, settings in runs.items():
        words = run_words(
            model_name_or_path=source, output_dir=tmp_path / name, max_steps=2, max_shard_size="20KB", **settings
        )
        assert main(["dpo", *words]) == 0
        assert f"{source} has {len(others)} tensors" in capsys.readouterr().err
        out = tmp_path / name / "model"
        answers[name] = new_logits, new_tokens = answer(out, source if name == "adapter" else None)
        assert np.array_equal(new_logits, logits) == (name == "still"), name
        if name == "still":
            assert new_tokens == tokens
        if name == "adapter":
            continue
        after = tensors_of(out)
        assert after.keys() == before.keys()
        moved = {key for key in before if after[key].tobytes() != before[key].tobytes()}
        assert not moved & others.keys()
        assert bool(moved) == (name != "still")
        assert (out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    # PEFT puts the adapters on the text part, where jdpo trained them.
    np.testing.assert_allclose(answers["adapter"][0], answers["merged"][0], atol=1e-4)
    # A checkpoint exported by the command.
    step = tmp_path / "trained" / "checkpoints" / "2"
    assert main(["export", str(step), str(tmp_path / "exported")]) == 0
    exported, trained = tensors_of(tmp_path / "exported"), tensors_of(tmp_path / "trained" / "model")
    assert {key: values.tobytes() for key, values in exported.items()} == {
        key: values.tobytes() for key, values in trained.items()
    }


@pytest.mark.parametrize("chat_template", [None, "chatml"], ids=["unchanged tokenizer", "other template"])
def test_a_processor_loads_from_an_export(toy_model: Path, tmp_path: Path, chat_template: str | None) -> None:
    from PIL import Image
    from transformers import AutoProcessor, AutoTokenizer, Gemma3ImageProcessor, Gemma3Processor

    source, out = write_source("Gemma3", toy_model, tmp_path / "source"), tmp_path / "out"
    own = {"boi_token": "<boi>", "image_token": "<image>", "eoi_token": "<eoi>"}
    tokenizer = AutoTokenizer.from_pretrained(toy_model, extra_special_tokens=own)
    images = Gemma3ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    Gemma3Processor(images, tokenizer, image_seq_length=NUM_IMAGE_TOKENS).save_pretrained(source)
    config = dataclasses.replace(read_model_config(source), vocab_size=len(tokenizer) + 2)  # chatml adds two tokens
    loaded = load_tokenizer(source, chat_template=chat_template)
    params = init_params(Transformer(config), jax.random.key(0))
    export_model(
        params,
        config,
        out,
        source_folder=source,
        tokenizer=loaded.hf,
        tokenizer_folder=source,
        end_token_ids=loaded.end_token_ids,
    )
    processors = [AutoProcessor.from_pretrained(folder) for folder in (source, out)]
    picture = Image.new("RGB", (20, 20), "green")
    before, after = (each(text="<boi> a sky", images=[picture], return_tensors="np") for each in processors)
    assert before.keys() == after.keys() >= {"input_ids", "pixel_values"}
    for key in before:
        np.testing.assert_array_equal(np.asarray(before[key]), np.asarray(after[key]), err_msg=key)
    assert (processors[1].chat_template != processors[0].chat_template) == (chat_template is not None)
