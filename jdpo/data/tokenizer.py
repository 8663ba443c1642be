"""Loading a tokenizer, giving it a chat template where it has none, and what training needs to know of it."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdpo.safe_text import terminal
from jdpo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN_TEMPLATE = "chatml"

_MARKER = re.compile(r"<[^<>\s]*\w[^<>\s]*>")
"""What counts as a marker of a template, one word in angle brackets: `<|im_start|>`, `<start_of_turn>`, `</s>`."""

TEMPLATE_DAY = datetime.datetime(2024, 7, 26)
"""Stands for today where a chat template asks for it, so that the same rows are the same tokens on every day and host.

It is the day that Llama 3's templates write where nobody tells them one.
"""

_TODAY = re.compile(r"strftime_now\(\s*(['\"])(?P<format>.*?)\1\s*\)")
"""How a template asks for the day."""

_QUESTION, _ANSWER, _SYSTEM = "jdpoquestion", "jdpoanswer", "jdposystem"

_ANCHORS = ("\n", ".", "a")
"""Text to stand before a completion that is tokenized alone; see `Tokenizer.encode_completions`."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its chat template.

    Attributes:
      hf: the tokenizer itself, to be saved with the model.
      added_tokens: tokens that the chat template brought and the vocabulary did not have.
      end_token_ids: tokens that end an answer: the tokenizer's EOS and the template's end of turn.
      digest: content digest of vocabulary, special tokens and template.
      notes: sentences for the user on what was changed.
      source: the folder, for messages.
    """

    hf: PreTrainedTokenizerBase
    added_tokens: tuple[str, ...]
    end_token_ids: tuple[int, ...]
    digest: str
    notes: tuple[str, ...]
    source: str

    @cached_property
    def size(self) -> int:
        """How many embedding rows the token ids need."""
        return max(len(self.hf), 1 + max(self.hf.get_vocab().values(), default=0))

    @property
    def has_chat_template(self) -> bool:
        return bool(self.hf.chat_template)

    @property
    def eos_token_id(self) -> int:
        """Ends plain text."""
        assert isinstance(self.hf.eos_token_id, int)
        return self.hf.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """Fills up batches; its id means nothing, since masks come from lengths."""
        pad = self.hf.pad_token_id
        return pad if isinstance(pad, int) else self.eos_token_id

    @cached_property
    def bos_token_id(self) -> int | None:
        """The BOS that this tokenizer puts before plain text, None where it puts none."""
        ids = self.hf("a")["input_ids"]
        bos = self.hf.bos_token_id
        return bos if isinstance(bos, int) and len(ids) > 1 and ids[0] == bos else None

    @cached_property
    def special_text(self) -> re.Pattern[str]:
        """Finds special tokens that a text spells out."""
        added = (token.content for token in self.hf.added_tokens_decoder.values() if token.special)
        tokens = sorted({*added, *self.hf.all_special_tokens}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """A conversation as the chat template writes it.

        Args:
          messages: the turns.
          tools: what they may call, as JSON schemas; a template may leave them out.
          add_generation_prompt: write the header of the answer to come.

        Raises:
          jinja2.TemplateError: the template refuses the conversation.
          Exception: whatever else an expression of the template raises.
        """
        text = self.hf.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self._dated_template,
        )
        assert isinstance(text, str)
        return text

    @cached_property
    def _dated_template(self) -> str | None:
        """The chat template with `TEMPLATE_DAY` in place of today; None where it does not ask for the day."""
        text = self.hf.chat_template
        if not isinstance(text, str) or not _TODAY.search(text):
            return None
        return _TODAY.sub(lambda asked: repr(TEMPLATE_DAY.strftime(asked["format"])), text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added to them."""
        if not texts:
            return []
        encoded = self.hf(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that follow a prompt, tokenized apart from it.

        SentencePiece tokenizers put a space before any text (`Paris` alone is `▁Paris`), which a completion must
        not gain. There the text is tokenized behind an anchor, whose tokens are then cut off.
        """
        apart = self.encode(texts)
        anchor_ids = self._anchor_ids
        if anchor_ids is None:
            return apart
        anchor, ids = anchor_ids
        anchored = self.encode([anchor + text for text in texts])
        return [
            behind[len(ids) :] if behind[: len(ids)] == ids else alone
            for behind, alone in zip(anchored, apart, strict=True)
        ]

    @cached_property
    def _anchor_ids(self) -> tuple[str, list[int]] | None:
        """An anchor and its ids where text alone gains a space, else None."""
        (letter,) = self.encode(["a"])
        if self.hf.decode(letter + letter).strip() == "aa":
            return None
        for anchor in _ANCHORS:
            (ids,) = self.encode([anchor])
            if self.hf.unk_token_id not in ids:
                return anchor, ids
        return None


def load_tokenizer(folder: Path, *, chat_template: str | None) -> Tokenizer:
    """Loads the tokenizer of a model folder; no network is used.

    A template given by the user replaces the tokenizer's own. Markers that it writes around turns (one word in
    angle brackets, like `<|im_start|>` or `<end_of_turn>`; found by rendering a conversation) become single
    tokens, new ones where the vocabulary lacks them, and the first of them behind an answer becomes the EOS.

    Args:
      folder: a model folder with tokenizer files.
      chat_template: a Jinja file, "chatml" for the built-in one, or None for the tokenizer's own.

    Raises:
      ValueError: the folder holds no tokenizer, the template is missing or broken, or no token ends an answer.
    """
    hf = _read(folder)
    own_eos = hf.eos_token_id
    notes: list[str] = []
    added: tuple[str, ...] = ()
    if chat_template is not None:
        notes.append(f"chat template: {chat_template}{', in place of its own' if hf.chat_template else ''}")
        hf.chat_template = _template_text(chat_template, hf)
        added = _add_markers(hf, chat_template)
        if added:
            notes.append(f"new tokens of the chat template: {' '.join(added)}")
    end_of_turn = _end_of_turn(hf)
    if end_of_turn is not None and (chat_template is not None or own_eos is None):
        if end_of_turn != hf.eos_token:
            notes.append(f"EOS token: {end_of_turn}" + (f" (was {hf.eos_token})" if hf.eos_token else ""))
        hf.eos_token = end_of_turn
    if hf.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no EOS token and "
            + ("its chat template ends a turn with no special token" if hf.chat_template else "no chat template")
            + ": answers would never end. Set eos_token in tokenizer_config.json, or chat_template: chatml"
        )
    if hf.chat_template and end_of_turn is None:
        notes.append("the chat template ends an answer with no special token: it is not learnt where to stop")
    lead = _lead_of_answers(hf)
    if lead.strip():
        notes.append(f"the chat template writes {lead!r} behind the generation prompt: every answer is learnt with it")
    if _template_lacks_bos(hf):
        notes.append(
            f"BOS: the chat template does not write {hf.bos_token}: conversations go without, plain text has it"
        )
    if isinstance(hf.chat_template, str) and _TODAY.search(hf.chat_template):
        notes.append(f"the chat template writes today's date; {TEMPLATE_DAY:%d %B %Y} stands for it in every row")
    if _template_doubles_bos(hf):
        notes.append(f"the chat template writes {hf.bos_token} twice; jdpo takes one away, which others may not do")
    turn_id = None if end_of_turn is None else hf.convert_tokens_to_ids(end_of_turn)
    end_ids = tuple(dict.fromkeys(i for i in (hf.eos_token_id, turn_id, own_eos) if isinstance(i, int)))
    return Tokenizer(hf, added, end_ids, _digest(hf), tuple(map(terminal, notes)), str(folder))


def _read(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a Hugging Face model folder with tokenizer files is expected")
    try:
        # Left unset, trust_remote_code is asked for on the terminal, and "y" runs Python files of the folder.
        hf: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a broken file makes transformers and tokenizers raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder}: the tokenizer needs Python code of its own (auto_map in tokenizer_config.json), which jdpo "
                "never runs; expected a tokenizer_class that transformers has"
            ) from None
        raise ValueError(
            f"{folder}: no usable tokenizer in this folder; tokenizer.json and tokenizer_config.json are expected "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error
    return hf


def _template_text(name: str, hf: PreTrainedTokenizerBase) -> str:
    if name == BUILT_IN_TEMPLATE:
        text = resources.files("jdpo.data").joinpath("chatml.jinja").read_text(encoding="utf-8")
        # A model that always saw BOS first keeps seeing it; GPT-2 has one too, and never saw it.
        return "{{- bos_token -}}" + text if _adds_bos(hf) else text
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"chat_template: {name!r} is neither a file nor the built-in {BUILT_IN_TEMPLATE!r}")
    return path.read_text(encoding="utf-8")


def _adds_bos(hf: PreTrainedTokenizerBase) -> bool:
    return hf.bos_token_id is not None and hf("a")["input_ids"][:1] == [hf.bos_token_id]


def _template_lacks_bos(hf: PreTrainedTokenizerBase) -> bool:
    text = _question_and_answer(hf)
    return bool(text) and _adds_bos(hf) and hf(text, add_special_tokens=False)["input_ids"][:1] != [hf.bos_token_id]


def _add_markers(hf: PreTrainedTokenizerBase, name: str) -> tuple[str, ...]:
    """Makes every marker of the template one token; returns those that the vocabulary did not have."""
    text = _rendered_probe(hf, name)
    known = set(hf.all_special_tokens) | set(hf.get_added_vocab())
    markers = [marker for marker in dict.fromkeys(_MARKER.findall(text)) if marker not in known]
    vocabulary = hf.get_vocab()
    hf.add_tokens(markers, special_tokens=True)
    return tuple(marker for marker in markers if marker not in vocabulary)


def _rendered_probe(hf: PreTrainedTokenizerBase, name: str) -> str:
    """A conversation with every kind of turn that the template takes."""
    import jinja2

    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    texts = []
    for conversation in ([{"role": "system", "content": _SYSTEM}, *turns], turns):
        try:
            texts.append(hf.apply_chat_template(conversation, tokenize=False))
            texts.append(hf.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat_template {name}: line {error.lineno}: {error.message}") from None
        except jinja2.TemplateError as error:
            if conversation is turns:
                raise ValueError(f"chat_template {name} refuses a question and its answer: {terminal(error)}") from None
        except Exception as error:  # a template runs expressions, which raise whatever Python raises
            raise ValueError(f"chat_template {name} breaks: {type(error).__name__}: {terminal(error)}") from error
    if not any(_ANSWER in text for text in texts):
        raise ValueError(f"chat_template {name} writes a conversation without the assistant's words")
    return "".join(texts)


def _end_of_turn(hf: PreTrainedTokenizerBase) -> str | None:
    """The first special token that the template writes behind an assistant's words."""
    _, found, tail = _question_and_answer(hf).rpartition(_ANSWER)
    tokens = sorted({*hf.all_special_tokens, *hf.get_added_vocab()}, key=len, reverse=True)
    match = re.search("|".join(map(re.escape, tokens)), tail) if found and tokens else None
    return match.group() if match else None


def _lead_of_answers(hf: PreTrainedTokenizerBase) -> str:
    """What stands between the generation prompt and an answer: an empty thought, or a header for want of one."""
    whole = _question_and_answer(hf)
    if not whole:
        return ""
    question = [{"role": "user", "content": _QUESTION}]
    try:
        prompt = hf.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    except Exception:  # as in _question_and_answer
        return ""
    assert isinstance(prompt, str)
    return whole[len(prompt) :].partition(_ANSWER)[0] if whole.startswith(prompt) else ""


def _template_doubles_bos(hf: PreTrainedTokenizerBase) -> bool:
    bos = hf.bos_token_id
    return bos is not None and hf(_question_and_answer(hf), add_special_tokens=False)["input_ids"][:2] == [bos, bos]


def _question_and_answer(hf: PreTrainedTokenizerBase) -> str:
    """The shortest conversation as the template writes it; empty without a template, or where it fails."""
    if not hf.chat_template:
        return ""
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = hf.apply_chat_template(turns, tokenize=False)
    except Exception:  # it wants conversations of another kind; rows it refuses are counted
        return ""
    assert isinstance(text, str)
    return text


def _digest(hf: PreTrainedTokenizerBase) -> str:
    """Of vocabulary, merges, normalisation (tokenizer.json, where there is one), special tokens and template."""
    backend: Any = getattr(hf, "backend_tokenizer", None)
    parts = {
        "class": type(hf).__name__,
        "tokenizer": sorted(hf.get_vocab().items()) if backend is None else backend.to_str(),
        "special": {name: str(token) for name, token in hf.special_tokens_map.items()},
        "template": hf.chat_template,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
