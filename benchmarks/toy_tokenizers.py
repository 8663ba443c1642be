r"""Tokenizers of the kinds that models have, trained on a few texts, for the checks of templates and tokens.

| kind | vocabulary | BOS before plain text | EOS |
|---|---|---|---|
| byte | byte-level BPE over Qwen's words | none | `<|endoftext|>` |
| byte_bos | byte-level BPE over Llama 3's words | `<|begin_of_text|>` | `<|end_of_text|>` |
| pad_is_eos | byte-level BPE over GPT-2's words | none | `<|endoftext|>`, which is the pad token too |
| pieces | BPE over words with their space, bytes for the rest, as Mistral's | `<s>` | `</s>` |
| legacy_pieces | Unigram, the same, a space after every special token, as Llama 2's | `<s>` | `</s>`, added too |

Words decide what can merge across the end of a prompt. Qwen and Llama 3 keep all newlines of a gap in one word; GPT-2
gives the last to the word after them, so that "\n\n" alone and before an answer are other tokens. Newlines are bytes
to `pieces`, and parts of pieces to `legacy_pieces`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = ("byte", "byte_bos", "pad_is_eos", "pieces", "legacy_pieces")

DIGITS = {"byte": r"\p{N}", "byte_bos": r"\p{N}{1,3}"}
WORDS = {
    kind: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for kind, digits in DIGITS.items()
}
"""The rules that cut text into words that no token spans; GPT-2's way is that of `tokenizers` itself."""

BYTES = [f"<0x{value:02X}>" for value in range(256)]


def train_tokenizer(kind: str, texts: Sequence[str], vocab_size: int) -> Any:
    """Trains a Hugging Face tokenizer of one of `KINDS`; if bytes are pieces, they come on top of `vocab_size`."""
    if kind == "byte":
        return _wrapped(_byte_level(texts, vocab_size, WORDS[kind], "<|endoftext|>"), eos="<|endoftext|>")
    if kind == "pad_is_eos":
        return _wrapped(_byte_level(texts, vocab_size, None, "<|endoftext|>"), eos="<|endoftext|>", pad="<|endoftext|>")
    if kind == "byte_bos":
        bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
        tokenizer = _byte_level(texts, vocab_size, WORDS[kind], bos, eos)
        _add_around(tokenizer, bos)
        return _wrapped(tokenizer, bos=bos, eos=eos)
    assert kind in KINDS, kind
    tokenizer = _pieces(texts, vocab_size, legacy=kind == "legacy_pieces")
    _add_around(tokenizer, "<s>", "</s>" if kind == "legacy_pieces" else None)
    return _wrapped(tokenizer, bos="<s>", eos="</s>", unk="<unk>")


def give_template(tokenizer: Any, template: Path, markers: Sequence[str]) -> None:
    """Makes the template the tokenizer's own, and each of its markers one token."""
    tokenizer.add_tokens(list(markers), special_tokens=True)
    tokenizer.chat_template = template.read_text(encoding="utf-8")


def _byte_level(texts: Sequence[str], vocab_size: int, words: str | None, *specials: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _pieces(texts: Sequence[str], vocab_size: int, *, legacy: bool) -> Any:
    """Trains without bytes, which no trainer adds, and rebuilds the tokenizer with them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = ["<unk>", "<s>", "</s>"]
    options: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": specials, "show_progress": False}
    trained = Tokenizer(models.Unigram() if legacy else models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if legacy else "first")
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **options) if legacy else trainers.BpeTrainer(**options)
    trained.train_from_iterator(texts if legacy else [line for text in texts for line in text.splitlines()], trainer)
    state = json.loads(trained.to_str())["model"]
    model: Any
    if legacy:
        pieces = [(piece, score) for piece, score in state["vocab"] if piece not in specials]
        vocabulary = [(piece, 0.0) for piece in (*specials, *BYTES)]
        model = models.Unigram([*vocabulary, *pieces], unk_id=0, byte_fallback=True)
    else:
        words = sorted(state["vocab"], key=state["vocab"].get)
        ids = {word: index for index, word in enumerate(dict.fromkeys([*specials, *BYTES, *words]))}
        merges = [tuple(merge) for merge in state["merges"]]
        model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _add_around(tokenizer: Any, bos: str, eos: str | None = None) -> None:
    """Makes the tokenizer put BOS before plain text, and EOS after it."""
    from tokenizers import processors

    specials = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    template = f"{bos} $A {eos}" if eos else f"{bos} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)


def _wrapped(tokenizer: Any, **specials: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": token for name, token in specials.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
