"""Writes the tokenizer of an exported folder: the source's files if nothing changed, else files that all loaders read.

transformers 5 saves a tokenizer with class names and keys that transformers 4 and software built on it do not read. A
run changes only the chat template, the tokens that it adds, and EOS, so the rest of the source's tokenizer_config.json
is kept.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jdpo.data.tokens.tokenizer_files import read_tokenizer
from jdpo.json_files import read_json, write_json

CONFIG_NAME, SPECIAL_NAME = "tokenizer_config.json", "special_tokens_map.json"

_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    SPECIAL_NAME,
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt")  # never *.py
_MORE_TEMPLATES = "additional_chat_templates"

_GENERIC_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers 4 that reads only tokenizer.json; transformers 5 knows the name too."""

_OF_LOADING = ("is_local", "local_files_only", "backend", "name_or_path")
"""Keys on how a process loaded the tokenizer, which do not belong into an export."""


def write_tokenizer(folder: Path, tokenizer: Any, source: Path | None) -> None:
    """Writes the files of a tokenizer.

    Args:
      folder: the folder to write to.
      tokenizer: a transformers PreTrainedTokenizerBase.
      source: the folder that it was loaded from; None if it was made in memory.
    """
    loaded = None if source is None else _loaded(source)
    if source is not None and loaded is not None and _state(loaded) == _state(tokenizer):
        # Byte for byte: another version of transformers would write even an unchanged tokenizer differently.
        for path in tokenizer_files(source):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        return
    tokenizer.save_pretrained(str(folder))
    saved = read_json(folder / CONFIG_NAME)
    origin = {} if source is None else _json_or_empty(source / CONFIG_NAME)
    write_json(folder / CONFIG_NAME, _config(tokenizer, saved, origin, loaded))
    special = {} if source is None else _json_or_empty(source / SPECIAL_NAME)
    if special:
        # Software built on transformers 4 reads this file as well, so it must not keep the old values.
        special["eos_token"] = tokenizer.eos_token
        special["additional_special_tokens"] = _additional(tokenizer, special, origin, loaded)
        write_json(folder / SPECIAL_NAME, special)


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the tokenizer's files in a model folder; symlinks are followed, code is omitted."""
    found = [path for path in folder.iterdir() if is_tokenizer_file(path.name)]
    found += [path for path in (folder / _MORE_TEMPLATES).glob("*") if path.suffix in _SUFFIXES]
    return sorted(path for path in found if path.is_file())


def is_tokenizer_file(name: str) -> bool:
    """Returns True if a file of this name in a model folder belongs to its tokenizer."""
    return name.endswith(_SUFFIXES) and any(fnmatch(name, pattern) for pattern in _PATTERNS)


def _loaded(source: Path) -> Any:
    """Loads the source's tokenizer without the run's changes. Returns None if it cannot be loaded any more."""
    try:
        return read_tokenizer(source)
    except ValueError:
        return None


def _state(tokenizer: Any) -> dict[str, Any]:
    """Returns everything that affects tokenization, except padding and truncation, which every call sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {} if backend is None else json.loads(backend.to_str())
    return {
        "backend": {key: value for key, value in state.items() if key not in ("padding", "truncation")},
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }


def _config(tokenizer: Any, saved: dict[str, Any], origin: dict[str, Any], loaded: Any) -> dict[str, Any]:
    """Returns tokenizer_config.json: the source's with the changes or, if it has none, the one transformers saved."""
    config = {key: value for key, value in (origin or saved).items() if key not in _OF_LOADING}
    config.pop("chat_template", None)  # saved in a file of its own
    if "chat_template" in saved:
        config["chat_template"] = saved["chat_template"]
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = _GENERIC_CLASS
    if loaded is None or tokenizer.eos_token != loaded.eos_token:
        config["eos_token"] = tokenizer.eos_token
    additional = _additional(tokenizer, config, {}, loaded)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 5; a dictionary in transformers 4
        del config["extra_special_tokens"]
    if additional:
        config["additional_special_tokens"] = additional
    if "added_tokens_decoder" in config:
        known = {str(id): _as_json(token) for id, token in sorted(tokenizer.added_tokens_decoder.items())}
        config["added_tokens_decoder"] = known | config["added_tokens_decoder"]
    return config


def _additional(tokenizer: Any, *configs: Any) -> list[Any]:
    """Returns the special tokens without a name, of the configs and of the run, without duplicates."""
    *of_source, loaded = configs
    listed: list[Any] = []
    for config in of_source:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed += config[key] if isinstance(config.get(key), list) else []
    before = set() if loaded is None else set(loaded.get_vocab())
    brought = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    listed += [token for token in brought if loaded is not None and token not in before]
    return list({_text(token): token for token in listed}.values())


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _as_json(token: Any) -> dict[str, Any]:
    """Returns an AddedToken in the form of tokenizer_config.json."""
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": token.content, **{flag: getattr(token, flag) for flag in flags}}


def _json_or_empty(path: Path) -> dict[str, Any]:
    """Returns a JSON object, or {} if the file does not exist or is invalid, since no loader could read it either."""
    with contextlib.suppress(ValueError):
        return read_json(path) if path.is_file() else {}
    return {}
