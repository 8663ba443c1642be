"""Writes an untrained Llama: a tokenizer trained on the corpus and a Hugging Face folder of random weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdpo.durable import sync_path
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

_LEAST_VOCAB = 256 + 3

_WEIGHTS = "model.safetensors"
_MADE_BY = {"made_by": "jdpo.random_model"}
"""Metadata of the weights of a random model, by which a folder is known that may be written again."""


def random_model(
    folder: str | Path,
    texts: Iterable[str],
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    vocab_size: int = _MAX_VOCAB,
    max_positions: int = _POSITIONS,
    chat: bool = True,
    seed: int = 0,
) -> Path:
    """Writes a small Llama with random weights and a tokenizer of its own, to try things out without a download.

    The folder is a Hugging Face model folder, and appears as a whole or not at all. The same arguments give the same
    bytes, and a random model that was made earlier is replaced.

    Args:
      folder: is created if missing.
      texts: training texts of the tokenizer; words that occur twice become one token each.
      hidden_size: model width, a multiple of 64.
      num_layers: number of decoder layers.
      vocab_size: maximum number of tokens; the tokenizer has fewer if the texts are few.
      max_positions: maximum tokens of a prompt with its answer.
      chat: True: the tokenizer has a ChatML template; False: it has none, as that of a base model.
      seed: seed of the random weights.

    Returns:
      The folder.

    Raises:
      ValueError: a size is out of range, there are no texts or other objects, or the folder holds something else.
    """
    folder = Path(folder).expanduser()
    if isinstance(texts, str):
        raise ValueError("texts: expected several texts, such as a list, found one str")
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Next to the folder, as a rename works only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".writing", dir=folder.parent) as place:
        staging = Path(place) / "model"
        write_model(
            staging,
            texts,
            hidden_size=hidden_size,
            num_layers=num_layers,
            vocab_size=vocab_size,
            max_positions=max_positions,
            chat=chat,
            seed=seed,
            metadata=_MADE_BY,
        )
        _publish(staging, folder)
    return folder


def _publish(staging: Path, folder: Path) -> None:
    """Makes a whole model durable, and moves it to its place."""
    for path in staging.iterdir():
        sync_path(path)
    if folder.exists():
        # File by file, as runs may be in the folder. The weights come first: by them it is known as a random model
        # after a kill, so that the next call goes on.
        for path in sorted(staging.iterdir(), key=lambda path: path.name != _WEIGHTS):
            path.replace(folder / path.name)
        sync_path(folder)
    else:
        staging.rename(folder)
    sync_path(folder.parent)


def _check_replaceable(folder: Path) -> None:
    """Refuses a folder with content that is not a random model, such as a trained one."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / _WEIGHTS, "np") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError):
        found = {}
    if not _MADE_BY.items() <= found.items():
        raise ValueError(f"{folder} exists and holds no model of jdpo.random_model; choose another folder")


def write_model(
    folder: Path,
    texts: Iterable[str],
    *,
    hidden_size: int,
    num_layers: int,
    seed: int,
    vocab_size: int = _MAX_VOCAB,
    max_positions: int = _POSITIONS,
    chat: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a random model, see `random_model`, over whatever the folder holds.

    Args:
      metadata: kept in the file of the weights.

    Raises:
      ValueError: a size is out of range, or there are no texts.
    """
    if hidden_size < 1 or hidden_size % (2 * _HEAD_WIDTH):
        raise ValueError(f"hidden_size is {hidden_size}; expected a multiple of {2 * _HEAD_WIDTH}")
    if vocab_size < _LEAST_VOCAB:
        raise ValueError(f"vocab_size is {vocab_size}; expected at least {_LEAST_VOCAB}: all bytes and special tokens")
    for name, size in (("num_layers", num_layers), ("max_positions", max_positions)):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected 1 or more")
    # Sorted, because the order of texts decides between merges with equal counts.
    given = list(texts)
    for index, text in enumerate(given):
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}]: expected a text, found {type(text).__name__}; give the text of the row")
    learnt = sorted(given)
    if not learnt:
        raise ValueError("texts: expected at least one text for the tokenizer to learn from, found none")
    folder.mkdir(parents=True, exist_ok=True)
    num_tokens = _write_tokenizer(folder, learnt, vocab_size, max_positions, chat=chat)
    # Ids of the special tokens, in the order given to the trainer.
    ends = {"eos_token_id": 2 if chat else 0, "pad_token_id": 0}
    config = _llama_config(num_tokens, hidden_size, num_layers, max_positions) | ends
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ends)
    _write_weights(folder / _WEIGHTS, config, np.random.default_rng(seed), {**(metadata or {}), "format": "pt"})


def _write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int, max_positions: int, *, chat: bool) -> int:
    """Trains a byte-level BPE tokenizer, writes its files and returns the size of its vocabulary."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END] if chat else [END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that any text can be tokenized
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END if chat else END_OF_TEXT,  # a turn ends in it, so every library stops there
        "pad_token": END_OF_TEXT,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", written | ({"chat_template": CHAT_TEMPLATE} if chat else {}))
    return int(tokenizer.get_vocab_size())


def _llama_config(vocab_size: int, hidden_size: int, num_layers: int, max_positions: int) -> dict[str, Any]:
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
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def _write_weights(path: Path, config: Mapping[str, Any], rng: np.random.Generator, metadata: dict[str, str]) -> None:
    """Writes random matrices of unit gain; those that write to the residual stream shrink with depth, as in GPT-2."""
    from safetensors.numpy import save

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
    saved = save(tensors, metadata=metadata)  # transformers refuses files without a format
    # safetensors writes metadata in random order; the same model has the same bytes.
    end = 8 + int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(saved[:8] + text.ljust(end - 8) + saved[end:])
