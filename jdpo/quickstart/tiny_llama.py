"""Writes an untrained Llama: a tokenizer trained on the corpus and a Hugging Face folder of random weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdpo.json_files import write_json

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML, without a system turn."""

_MAX_VOCAB = 4096
_HEAD_WIDTH = 32
_POSITIONS = 256


def write_model(folder: Path, texts: Iterable[str], *, hidden_size: int, num_layers: int, seed: int) -> None:
    """Writes a model folder that any Hugging Face tool can read; the same arguments give the same bytes.

    Args:
      folder: is created if missing.
      texts: training texts of the tokenizer; words that occur twice become one token each.
      hidden_size: model width, a multiple of 64.
      num_layers: number of decoder layers.
      seed: seed of the random weights.

    Raises:
      ValueError: hidden_size is not a multiple of 64.
    """
    if hidden_size % (2 * _HEAD_WIDTH):
        raise ValueError(f"hidden_size is {hidden_size}; expected a multiple of {2 * _HEAD_WIDTH}")
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(folder, texts)
    config = _llama_config(vocab_size, hidden_size, num_layers)
    write_json(folder / "config.json", config)
    ends = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    write_json(folder / "generation_config.json", ends)
    _write_weights(folder / "model.safetensors", config, np.random.default_rng(seed))


def _write_tokenizer(folder: Path, texts: Iterable[str]) -> int:
    """Trains a byte-level BPE tokenizer, writes its files and returns the size of its vocabulary."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCAB,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that any text can be tokenized
        show_progress=False,
    )
    # Sorted, because the order of texts decides between merges with equal counts.
    tokenizer.train_from_iterator(sorted(texts), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,  # a turn ends in it, so generation stops there in every library
            "pad_token": END_OF_TEXT,
            "model_max_length": _POSITIONS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return int(tokenizer.get_vocab_size())


def _llama_config(vocab_size: int, hidden_size: int, num_layers: int) -> dict[str, Any]:
    num_heads = hidden_size // _HEAD_WIDTH
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads // 2,  # grouped attention, as in current models
        "head_dim": _HEAD_WIDTH,
        "hidden_act": "silu",
        "max_position_embeddings": _POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "pad_token_id": 0,  # ids of the special tokens, in the order given to the trainer
        "eos_token_id": 2,
        "dtype": "float32",
    }


def _write_weights(path: Path, config: Mapping[str, Any], rng: np.random.Generator) -> None:
    """Writes random matrices of unit gain; those that write to the residual stream shrink with depth, as in GPT-2."""
    from safetensors.numpy import save_file

    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys_width = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return rng.normal(0.0, gain / np.sqrt(columns), (rows, columns)).astype(np.float32)

    residual_gain = 1.0 / np.sqrt(2 * layers)
    embedding = rng.normal(0.0, 1.0 / np.sqrt(width), (config["vocab_size"], width)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(width, np.float32)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": np.ones(width, np.float32),
            f"{name}.post_attention_layernorm.weight": np.ones(width, np.float32),
            f"{name}.self_attn.q_proj.weight": matrix(width, width),
            f"{name}.self_attn.k_proj.weight": matrix(keys_width, width),
            f"{name}.self_attn.v_proj.weight": matrix(keys_width, width),
            f"{name}.self_attn.o_proj.weight": matrix(width, width, residual_gain),
            f"{name}.mlp.gate_proj.weight": matrix(inner, width),
            f"{name}.mlp.up_proj.weight": matrix(inner, width),
            f"{name}.mlp.down_proj.weight": matrix(width, inner, residual_gain),
        }
    save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses files without a format
