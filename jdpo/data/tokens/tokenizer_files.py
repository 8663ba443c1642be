"""Reading the tokenizer of a model folder, and comparing two ways of reading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.json_files import read_json
from jdpo.quiet_transformers import be_quiet
from jdpo.safe_text import terminal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN_TEMPLATE = "chatml"

_OF_PROCESSOR = "chat_template.json"

PROBE_TEXTS = (
    "Hello, world!",
    " Paris is the capital of France.",
    "  two  spaces   and three",
    "line one\nline two\n\nafter a blank line\r\n",
    "\ttabs\tand trailing space ",
    "don't, can't, I'LL, we've",
    "1234567890 3.14159 -42 1,000,000",
    "def area(w, h):\n    return w * h  # comment",
    "naïve café, Zürich, e\u0301",
    "首都は東京です。中文字符",
    "Привет, мир. Γειά σου",
    "مرحبا بالعالم שלום",
    "नमस्ते दुनिया สวัสดี",
    "😀 👩\u200d🔬 🇫🇷",
    "https://example.com/a?b=c&d=%20#e",
    '{"name": "look", "arguments": {"at": "sky"}}',
    "<b>bold</b> & <|not_special|> [INST]",
    "ALLCAPS camelCase snake_case kebab-case",
    "∑ x² ≤ ∞ → ½ €",
    "\u00a0\u2003\u200bodd spaces\ufeff",
)
"""Texts of many kinds. Tokenizers with different settings give different tokens for some of them."""


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder, without network and without running code of the folder.

    Raises:
      ValueError: the folder has no usable tokenizer.
    """
    be_quiet()
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a Hugging Face model folder with tokenizer files")
    try:
        # Without an explicit trust_remote_code, transformers asks on the terminal, and "y" runs code of the folder.
        hf: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # broken files make transformers and tokenizers raise all kinds of errors
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder}: the tokenizer needs Python code of the folder (auto_map in tokenizer_config.json), which "
                "jdpo never runs; expected a tokenizer_class of transformers"
            ) from None
        raise ValueError(
            f"{folder}: no usable tokenizer in this folder; expected tokenizer.json and tokenizer_config.json "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error
    if not hf.chat_template and (folder / _OF_PROCESSOR).is_file():
        # Of a multimodal model: transformers reads this file for its processor, but not for its tokenizer.
        hf.chat_template = read_json(folder / _OF_PROCESSOR).get("chat_template")
    return hf


def reading_difference(hf: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """Compares the tokenizer that transformers loads from a folder with its tokenizer.json alone.

    transformers may rebuild parts of a tokenizer from tokenizer_config.json. Servers that read tokenizer.json would
    then feed the model other tokens than it was trained on.

    Returns:
      A sentence with an example; None if the two agree or there is no tokenizer.json.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    direct = tokenizers.Tokenizer.from_file(str(path))
    # tokenizer.json may store padding and truncation, which have nothing to do with the vocabulary.
    direct.no_padding()
    direct.no_truncation()
    differing = []
    for text in PROBE_TEXTS:
        ours = hf(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        theirs = direct.encode(text, add_special_tokens=False).ids
        if list(ours) != theirs:
            differing.append((text, list(ours), theirs))
    if not differing:
        return None
    text, ours, theirs = differing[0]
    return (
        f"AutoTokenizer and tokenizer.json give {len(differing)} of {len(PROBE_TEXTS)} probe texts other tokens "
        f"({terminal(text)!r} is {_start(hf, ours)} and {_start(hf, theirs)}); training uses AutoTokenizer's"
    )


def _start(hf: PreTrainedTokenizerBase, ids: list[int]) -> str:
    tokens = [terminal(token) for token in hf.convert_ids_to_tokens(ids[:4])]
    return f"[{' '.join(tokens)}{' ...' if len(ids) > 4 else ''}]"


def template_text(name: str, hf: PreTrainedTokenizerBase) -> str:
    """Returns the text of the template that a user names: the built-in one, or a file.

    Raises:
      ValueError: there is no such template.
    """
    if name == BUILT_IN_TEMPLATE:
        text = resources.files("jdpo.data.templates").joinpath("chatml.jinja").read_text(encoding="utf-8")
        # A model that was trained with BOS first keeps it. GPT-2 has a BOS token too, but was trained without it.
        return "{{- bos_token -}}" + text if adds_bos(hf) else text
    path = Path(name).expanduser()
    if not path.is_file():
        own = f", nor a template of the tokenizer ({', '.join(map(terminal, named_templates(hf)))})"
        raise ValueError(
            f"chat_template: {name!r} is neither a file nor the built-in {BUILT_IN_TEMPLATE!r}"
            + (own if named_templates(hf) else "")
        )
    return path.read_text(encoding="utf-8")


def named_templates(hf: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns {name: template} for a tokenizer with several templates; empty if it has one or none."""
    own: Any = hf.chat_template
    return {str(name): str(text) for name, text in own.items()} if isinstance(own, dict) else {}


def adds_bos(hf: PreTrainedTokenizerBase) -> bool:
    """Returns whether the tokenizer puts BOS before plain text."""
    return hf.bos_token_id is not None and hf("a")["input_ids"][:1] == [hf.bos_token_id]


def tokenizer_digest(hf: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    """Returns a digest of the tokenizer and of everything that changes its output.

    It covers vocabulary, merges and normalization (tokenizer.json, if there is one), special tokens, templates and
    their variables.
    """
    backend: Any = getattr(hf, "backend_tokenizer", None)
    parts = {
        "class": type(hf).__name__,
        # The serialized backend also covers merges and normalization, which a vocabulary alone does not.
        "tokenizer": sorted(hf.get_vocab().items()) if backend is None else backend.to_str(),
        "special": {name: str(token) for name, token in hf.special_tokens_map.items()},
        "template": hf.chat_template,
        # Only if given, so that caches from before this setting stay valid.
        **({"template_kwargs": dict(kwargs)} if kwargs else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
