from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jdpo.checkpoint.hf_export import parse_size
from jdpo.checkpoint.output_folders import MARKER
from jdpo.json_files import read_json
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, abstract_params
from jdpo.models.weights.embedding_rows import started_rows
from jdpo.models.weights.loading import load_params
from jdpo.models.weights.resize import resize_embeddings
from tests.checkpoint.conftest import TEMPLATE
from tests.golden_models import GOLDEN_MODELS as GOLDEN
from tests.golden_models import golden_models

BF16 = np.dtype(ml_dtypes.bfloat16)


def assert_same_tensors(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert values.dtype == right[name].dtype, name
        np.testing.assert_array_equal(values, right[name], err_msg=name)


@pytest.mark.parametrize("case", golden_models())
def test_untouched_params_come_back_bitwise_in_their_dtype(export: Callable[..., Path], case: str) -> None:
    out = export(case)
    assert_same_tensors(load_file(out / "model.safetensors"), load_file(GOLDEN / case / "model.safetensors"))
    assert read_model_config(out) == read_model_config(GOLDEN / case)


def test_the_files_of_an_export(export: Callable[..., Path], tokenizer: Any) -> None:
    out = export(model_card="# a card\n")
    assert (out / "README.md").read_text() == "# a card\n"
    source, written = (json.loads((path / "config.json").read_text()) for path in (GOLDEN / "llama", out))
    assert written == source | {"eos_token_id": [0, 1], "pad_token_id": 2}
    assert written["dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [0, 1], "pad_token_id": 2}
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(out)
    assert again.chat_template == TEMPLATE
    text = [{"role": "user", "content": "abc abd"}]
    assert again.apply_chat_template(text, tokenize=False) == "user: abc abd<|end|>"
    assert again("abc abd").input_ids == tokenizer("abc abd").input_ids
    assert sorted(path.name for path in out.parent.iterdir()) == ["model"]


@pytest.mark.parametrize("generation", [None, {"do_sample": True}], ids=["no file", "file without end tokens"])
def test_end_tokens_of_config_json_are_kept_where_generation_config_has_none(
    export: Callable[..., Path], tmp_path: Path, generation: dict[str, Any] | None
) -> None:
    source = copy_of("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [7, 9, 1]}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    out = export(source=source, end_token_ids=[0])
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [0, 7, 9, 1]


def test_generation_config_is_carried_over_and_end_tokens_are_listed_once(
    export: Callable[..., Path], tmp_path: Path
) -> None:
    source = copy_of("llama", tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_p": 0.9, "eos_token_id": 7}))
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    out = export(source=source, end_token_ids=[0, 1, 1], export_dtype="float32")
    assert json.loads((out / "generation_config.json").read_text()) == {
        "do_sample": True,
        "top_p": 0.9,
        "eos_token_id": [0, 1, 7],
        "pad_token_id": 2,
    }
    written = json.loads((out / "config.json").read_text())
    assert written["torch_dtype"] == "float32"
    assert "dtype" not in written


@pytest.mark.parametrize(
    ("export_dtype", "dtype"), [("float32", np.float32), ("bfloat16", BF16), ("float16", np.float16)]
)
def test_one_dtype_for_all(export: Callable[..., Path], export_dtype: str, dtype: Any) -> None:
    tensors = load_file(export(export_dtype=export_dtype) / "model.safetensors")
    source = load_file(GOLDEN / "llama" / "model.safetensors")
    assert_same_tensors(tensors, {name: values.astype(dtype) for name, values in source.items()})


def test_source_dtype_is_each_tensors_own(export: Callable[..., Path], tmp_path: Path) -> None:
    source = copy_of("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32) + np.float32(1e-5)
    save_file(tensors, source / "model.safetensors")
    assert_same_tensors(load_file(export(source=source) / "model.safetensors"), tensors)


def test_small_shards_with_an_index(export: Callable[..., Path]) -> None:
    out = export(max_shard_size="3KB")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(sum(v.nbytes for v in load_file(out / name).values()) <= 3000 for name in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {name: load_file(out / file_name)[name] for name, file_name in index["weight_map"].items()}
    assert_same_tensors(tensors, load_file(GOLDEN / "llama" / "model.safetensors"))
    assert index["metadata"] == {
        "total_parameters": sum(values.size for values in tensors.values()),
        "total_size": sum(values.nbytes for values in tensors.values()),
    }
    again = load_params(out, read_model_config(out))
    jax.tree.map(np.testing.assert_array_equal, again, load_params(GOLDEN / "llama", read_model_config(out)))


def test_sharded_params_and_a_larger_vocabulary(export: Callable[..., Path]) -> None:
    model = Transformer(read_model_config(GOLDEN / "llama"))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def spread(leaf: Any) -> NamedSharding:
        axes = ["fsdp" if size % 8 == 0 else None for size in leaf.shape]
        first = axes.index("fsdp") if "fsdp" in axes else len(axes)
        return NamedSharding(mesh, PartitionSpec(*(axis if i == first else None for i, axis in enumerate(axes))))

    params = load_params(GOLDEN / "llama", model, jax.tree.map(spread, abstract_params(model)))
    rows = started_rows(GOLDEN / "llama", model.config, np.array([40, 41]), np.ones(40, bool), 0)
    grown, grown_model = resize_embeddings(params, model, 42, rows)
    out = export(params=grown, config=grown_model.config)
    tensors, source = (load_file(folder / "model.safetensors") for folder in (out, GOLDEN / "llama"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[name].shape == (42, 16)
        tensors[name] = tensors[name][:40]
    assert_same_tensors(tensors, source)
    assert read_model_config(out) == grown_model.config


def test_an_older_export_is_replaced_whole_and_debris_is_cleared(export: Callable[..., Path]) -> None:
    out = export(model_card="old")
    (out / "stale.bin").touch()
    (out.parent / ".model.writing").mkdir()
    (out.parent / ".model.writing" / "half").touch()
    assert export(model_card="new") == out
    assert (out / "README.md").read_text() == "new"
    assert not (out / "stale.bin").exists()
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_a_failed_export_leaves_the_older_one(export: Callable[..., Path]) -> None:
    out = export()
    before = (out / "model.safetensors").read_bytes()
    params = load_params(GOLDEN / "llama", read_model_config(GOLDEN / "llama"))
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(1e6)
    with pytest.raises(ValueError, match=r"tensor model.norm.weight holds values that float16 cannot"):
        export(params=params, export_dtype="float16")
    assert (out / "model.safetensors").read_bytes() == before


def test_a_folder_that_is_not_an_export_is_not_replaced(export: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(ValueError, match=r"is not an export of jdpo .*, so it is not replaced"):
        export(out=tmp_path / "thesis")
    assert os.listdir(tmp_path / "thesis") == ["chapter1.tex"]
    (tmp_path / "empty").mkdir()
    assert (export(out=tmp_path / "empty") / "config.json").is_file()


def test_a_model_that_jdpo_did_not_export_is_not_replaced(export: Callable[..., Path], tmp_path: Path) -> None:
    """Any model has a config.json next to its weights; an export is known by more."""
    other = copy_of("llama", tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not an export of jdpo"):
        export(out=other)
    assert load_file(other / "model.safetensors")


@pytest.mark.parametrize(("out", "how"), [("base", "is"), ("base/inner/out", "is inside"), (".", "contains")])
def test_the_source_is_never_replaced(export: Callable[..., Path], tmp_path: Path, out: str, how: str) -> None:
    """Holds even if the source is an export itself."""
    base = copy_of("llama", tmp_path / "base")
    for folder in (base, tmp_path):
        (folder / MARKER).write_text("{}")
    with pytest.raises(ValueError, match=rf"{how} {base}, which is an input of this export"):
        export(source=base, out=tmp_path / out)
    assert load_file(base / "model.safetensors")


def test_a_link_and_a_dot_are_followed(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    export(out=tmp_path / "link", model_card="first")
    export(out=tmp_path / "link", model_card="second")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model" / "README.md").read_text() == "second"
    assert os.listdir(tmp_path / "disk") == ["model"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(out=Path("."))
    assert (tmp_path / "here" / "config.json").is_file()


def test_a_rename_that_fails_brings_the_older_export_back(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(model_card="old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".writing"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        export(model_card="new")
    assert (out / "README.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_was_killed_between_its_renames_is_recovered(
    export: Callable[..., Path], tmp_path: Path
) -> None:
    out = export(model_card="old")
    out.rename(tmp_path / ".model.replaced")
    params = load_params(GOLDEN / "llama", read_model_config(GOLDEN / "llama"))
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(1e6)
    with pytest.raises(ValueError, match="holds values that float16 cannot"):
        export(params=params, export_dtype="float16")
    assert (out / "README.md").read_text() == "old"
    export(model_card="new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_options(export: Callable[..., Path], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="export_dtype: expected source, float32, bfloat16, float16, found 'int4'"):
        export(export_dtype="int4")
    for size in ("5", "GB", "-1GB", "0GB", "5 cows"):
        with pytest.raises(ValueError, match="max_shard_size: expected a size such as 5GB"):
            parse_size(size)
    assert parse_size("5 gb") == 5 * 10**9
    import dataclasses

    small = dataclasses.replace(read_model_config(GOLDEN / "llama"), vocab_size=len(tokenizer) - 1)
    with pytest.raises(ValueError, match=rf"the tokenizer has {len(tokenizer)} tokens"):
        export(config=small)


@pytest.mark.torch
@pytest.mark.parametrize("case", golden_models())
def test_transformers_loads_the_folder_and_gives_the_same_logits(export: Callable[..., Path], case: str) -> None:
    import torch
    import transformers

    from jdpo.models.transformer import make_apply_fn

    model = Transformer(read_model_config(GOLDEN / case))
    params = jax.tree.map(lambda leaf: leaf * 1.1, load_params(GOLDEN / case, model))
    out = export(case, params=params, export_dtype="float32", max_shard_size="4KB")
    own_class = getattr(transformers, read_json(out / "config.json")["architectures"][0])
    loaded, report = own_class.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.generation_config.eos_token_id == [0, 1]
    if model.config.moe is not None:
        loaded.set_experts_implementation("eager")  # the other kernels need sizes that are multiples of 16 bytes
    tokens = np.random.default_rng(1).integers(0, 40, (2, 9))
    with torch.no_grad():
        expected = loaded(torch.tensor(tokens)).logits.numpy()
    logits = jax.jit(make_apply_fn(model))(params, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def copy_of(case: str, folder: Path) -> Path:
    folder.mkdir()
    for path in (GOLDEN / case).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
