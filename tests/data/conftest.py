"""Tokenizers made on the spot. Ids of the word-level ones can be written down by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


def save_word_level(
    folder: Path,
    words: Sequence[str],
    *,
    specials: dict[str, str] | None = None,
    markers: Sequence[str] = (),
    adds_bos: bool = False,
    chat_template: str | None = None,
) -> Path:
    r"""Saves a tokenizer whose ids follow the order given: `<unk>` 0, the special tokens and markers, then `words`.

    Text is cut into newlines, punctuation, and words with the space before them (" Hi" and "Hi" are two words).
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = {"eos_token": "</s>"} if specials is None else specials
    vocabulary = dict.fromkeys(["<unk>", *specials.values(), *markers, *words])
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?\w+|[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        bos = specials["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **specials)
    hf.add_tokens(list(markers), special_tokens=True)
    hf.chat_template = chat_template
    hf.save_pretrained(folder)
    return folder


def save_byte_level(folder: Path, texts: Sequence[str], *, vocab_size: int = 400, **specials: str) -> Path:
    """Saves a byte-level BPE trained on `texts`, as GPT-2, Llama 3 and Qwen have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = specials or {"eos_token": "<|endoftext|>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=sorted(set(specials.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
    return folder


def save_metaspace(folder: Path, texts: Sequence[str]) -> Path:
    """Saves a Unigram tokenizer that puts BOS and a space before any text, as SentencePiece models do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf.save_pretrained(folder)
    return folder


@pytest.fixture
def word_level(tmp_path: Path) -> Callable[..., Path]:
    """Returns `save_word_level` bound to a folder of the test."""
    return lambda words, **options: save_word_level(tmp_path / "tokenizer", words, **options)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE that merges common words and a space before them."""
    texts = ["The capital of France is Paris. The capital of Ireland is Dublin."] * 20
    return save_byte_level(tmp_path_factory.mktemp("tokenizers") / "byte", texts)


@pytest.fixture(scope="session")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SentencePiece-like tokenizer."""
    texts = ["The capital of France is Paris.", "The capital of Ireland is Dublin.", "Paris", "Dublin"] * 10
    return save_metaspace(tmp_path_factory.mktemp("tokenizers") / "unigram", texts)
