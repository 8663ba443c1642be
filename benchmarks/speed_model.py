"""Model folders of random weights in their true shape, with a tokenizer that has a word for every id.

Every trainer reads the same folder. Nothing here imports torch or jax.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"
SPECIAL = (PAD, END, UNKNOWN)
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] + ' ' }}{% if message['role'] == 'assistant' %}{{ '" + END + " ' }}{% endif %}"
    "{% endfor %}"
)
"""Content, and after an answer its end: a prompt of P words is P tokens, an answer of C words C + 1."""

ROPE_THETA = 1_000_000.0
"""Tunix's Llama has no other, whatever its config says."""

SHARD_BYTES = 4 * 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a Llama."""

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    tied: bool
    dtype: str = "float32"

    @property
    def backbone(self) -> int:
        """Number of weights in all matrices except embedding and head: N in ladder_flops.py."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.num_layers * self.d_model * (2 * queries + 2 * keys + 3 * self.d_ff)

    @property
    def head(self) -> int:
        """Number of weights in the head's matrix: h in ladder_flops.py."""
        return self.d_model * self.vocab_size


LLAMA_22M = ModelShape(
    d_model=384,
    num_layers=6,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    d_ff=1024,
    vocab_size=32000,
    tied=True,
)
LLAMA_1_5B = ModelShape(
    d_model=1536,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    d_ff=8960,
    vocab_size=151936,
    tied=True,
)
"""Qwen2.5-1.5B's sizes. Its family has biases on top, but transformers reads a tokenizer of that family in Qwen2's own
way, whatever the folder says, and a word would not be a token."""

LLAMA_8B = ModelShape(
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    vocab_size=128256,
    tied=False,
    dtype="bfloat16",
)


def tiny(shape: ModelShape) -> ModelShape:
    """Returns a model of the same kind, small enough to try the whole benchmark in seconds."""
    return dataclasses.replace(
        shape, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=128, vocab_size=512
    )


def write_model(shape: ModelShape, folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a Hugging Face folder with random weights and the tokenizer, one weight shard at a time."""
    folder.mkdir(parents=True)
    _write_tokenizer(shape.vocab_size, folder)
    _write_json(folder / "config.json", hf_config(shape))
    _write_json(folder / "generation_config.json", {"eos_token_id": 1, "pad_token_id": 0})
    rng = np.random.default_rng(seed)
    shards = list(_shards(shape, shard_bytes))
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        _write_shard(shape, tensors, folder / name, rng)
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        size = _bytes(shape) * sum(int(np.prod(dims)) for dims in tensor_shapes(shape).values())
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Returns Hugging Face's names and shapes of all weights."""
    d, queries, keys = shape.d_model, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (queries, d),
        "self_attn.k_proj.weight": (keys, d),
        "self_attn.v_proj.weight": (keys, d),
        "self_attn.o_proj.weight": (d, queries),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (shape.d_ff, d),
        "mlp.up_proj.weight": (shape.d_ff, d),
        "mlp.down_proj.weight": (d, shape.d_ff),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, d)}
    for index in range(shape.num_layers):
        tensors |= {f"model.layers.{index}.{name}": dims for name, dims in layer.items()}
    tensors["model.norm.weight"] = (d,)
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab_size, d)
    return tensors


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """Returns the content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": shape.dtype,
    }


def _bytes(shape: ModelShape) -> int:
    return {"float32": 4, "bfloat16": 2}[shape.dtype]


def _shards(shape: ModelShape, shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Returns the tensors of each file, in order."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, dims in tensor_shapes(shape).items():
        added = _bytes(shape) * int(np.prod(dims))
        if shard and size + added > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name], size = dims, size + added
    yield shard


def _write_shard(shape: ModelShape, tensors: dict[str, tuple[int, ...]], path: Path, rng: np.random.Generator) -> None:
    import ml_dtypes
    from safetensors.numpy import save_file

    dtype = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[shape.dtype]
    values = {name: _random(name, dims, rng).astype(dtype) for name, dims in tensors.items()}
    save_file(values, path, metadata={"format": "pt"})


def _random(name: str, dims: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draws matrices of unit gain, and norm scales around 1: scales of 1 would hide a wrong order."""
    values = rng.standard_normal(dims, dtype=np.float32)
    if "norm" in name:
        return 1 + 0.1 * values
    return values * np.float32(dims[-1] ** -0.5 if len(dims) > 1 else 0.1)


def _write_tokenizer(vocab_size: int, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    names = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "model_max_length": 10**6,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
