"""The text of generated tokens, with the tokenizers and templates of five families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jdpo.data.schemas.formats import Dropped, preference_rows
from jdpo.data.tokens.boundaries import TokenSplit, split_rows
from jdpo.data.tokens.prompt_tokens import encode_prompt
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.generation.asking.answer_text import PieceDecoder, content_of, decoded, text_after
from tests.data.conftest import save_byte_level, save_metaspace

GOLDEN = Path(__file__).parents[1] / "golden" / "token_parity"
FAMILIES = ("chatml", "llama_3", "mistral", "qwen_2_5", "zephyr")
ASK = [{"role": "user", "content": "The sky?"}]


def tokenizer_of(family: str) -> Tokenizer:
    return load_tokenizer(GOLDEN / family, chat_template=None)


def learnt(row: RowTexts, tokenizer: Tokenizer) -> TokenSplit:
    (split,) = split_rows([row], tokenizer)
    assert isinstance(split, TokenSplit)
    return split


@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_an_answer_learns_the_tokens_that_were_generated(family: str) -> None:
    tokenizer = tokenizer_of(family)
    tried = 0
    for line in (GOLDEN / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        for row in preference_rows(json.loads(line), "row"):
            if isinstance(row, Dropped):
                continue
            texts = RowTexts(row.prompt, (row.chosen,), "row", row.tools, row.template_kwargs)
            (split,) = split_rows([texts], tokenizer)
            prompt = encode_prompt(texts._replace(completions=()), tokenizer)
            # Where training's prompt is another, no answer to the prompt can give its tokens.
            if isinstance(split, Dropped) or split.prompt != prompt:
                continue
            (completion,) = split.completions
            ends = [place for place, token in enumerate(completion) if token in tokenizer.end_token_ids]
            generated = completion[: ends[0]] if ends else completion
            content = content_of(texts, prompt, generated, tokenizer)
            side = content if texts.is_text else [{"role": "assistant", "content": content}]
            again = learnt(texts._replace(completions=(side,)), tokenizer)
            assert again.prompt + again.completions[0][: len(generated)] == prompt + generated, content
            tried += 1
    assert tried >= 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_the_tokens_of_training(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for prompt, answer in ((ASK, [{"role": "assistant", "content": "Blue."}]), ("The sky is", " blue")):
        row = RowTexts(prompt, (answer,), "row")
        assert encode_prompt(row, tokenizer) == learnt(row, tokenizer).prompt


def test_a_prompt_that_no_template_takes_is_dropped_with_the_reason() -> None:
    assert encode_prompt(RowTexts([], (), "row"), tokenizer_of("chatml")) == Dropped("empty prompt", "row")
    system = [{"role": "system", "content": "x"}, {"role": "system", "content": "x"}]
    found = encode_prompt(RowTexts(system, (), "row"), tokenizer_of("mistral"))
    assert isinstance(found, Dropped)
    assert found.reason == "refused by the chat template"


@pytest.mark.parametrize("text", ["Grüße 🎉 nach 東京!", " two  spaces ", "\n\n", "👩\u200d🚀"])
def test_pieces_are_whole_characters_and_together_the_text(tmp_path: Path, text: str) -> None:
    byte_level = load_tokenizer(save_byte_level(tmp_path / "bytes", ["The sky is blue."] * 9), chat_template=None)
    (ids,) = byte_level.encode([text])
    context = byte_level.encode(["The sky is"])[0]
    decoder = PieceDecoder(byte_level, context)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) == text == text_after(context, ids, byte_level)
    assert not any("\ufffd" in piece for piece in pieces)
    # Of a character that is cut off, the rest comes at the end.
    cut = PieceDecoder(byte_level, context)
    assert "".join([*map(cut.push, ids[:-1]), cut.finish()]) == text_after(context, ids[:-1], byte_level)


def test_a_decoder_that_drops_the_first_space_keeps_it_after_a_context(tmp_path: Path) -> None:
    metaspace = load_tokenizer(save_metaspace(tmp_path / "meta", ["the sky is blue"] * 9), chat_template=None)
    context, ids = metaspace.encode(["the sky"])[0], metaspace.encode(["is blue"])[0]
    assert decoded(ids, metaspace) == "is blue"
    assert text_after(context, ids, metaspace) == " is blue"
    decoder = PieceDecoder(metaspace, context)
    assert "".join(map(decoder.push, ids)) == " is blue"
    assert content_of(RowTexts("the sky", (), "row"), context, ids, metaspace) == " is blue"


def test_unusual_spellings_keep_their_text() -> None:
    tokenizer = tokenizer_of("qwen_2_5")
    prompt = encode_prompt(RowTexts(ASK, (), "row"), tokenizer)
    assert not isinstance(prompt, Dropped)
    letters = [token for letter in " sky " for token in tokenizer.encode([letter])[0]]
    assert content_of(RowTexts(ASK, (), "row"), prompt, letters, tokenizer) == " sky "
