"""Tokenizers with their chat templates: loading, rendering, and the special tokens that training depends on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from jdpo.data.templates import template_probe
from jdpo.data.templates.chat_template import TEMPLATE_DAY, RenderingTooSlow
from jdpo.data.templates.renderer import DEFAULT, Renderer, renderer_of
from jdpo.data.templates.template_probe import Probe
from jdpo.data.tokens import tokenizer_files
from jdpo.safe_text import terminal
from jdpo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", ".", "a")
"""Texts to put before a completion that is tokenized alone; see `Tokenizer.encode_completions`."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its chat template.

    Attributes:
      hf: the tokenizer of transformers, which is saved with the model.
      added_tokens: tokens that the chat template added to the vocabulary.
      end_token_ids: tokens that end an answer: the tokenizer's EOS, the template's end of turn, and its end of a call
        where that is another token.
      digest: content digest of vocabulary, special tokens and template.
      notes: sentences for the user on what was changed.
      source: the folder, for messages.
      probe: a question and its answer as rendered by the chat template.
      warnings: sentences for the user on likely faults in the tokenizer's files.
    """

    hf: PreTrainedTokenizerBase
    added_tokens: tuple[str, ...]
    end_token_ids: tuple[int, ...]
    digest: str
    notes: tuple[str, ...]
    source: str
    probe: Probe
    warnings: tuple[str, ...] = ()

    @cached_property
    def size(self) -> int:
        """The number of embedding rows that the token ids need."""
        # Vocabularies may have gaps, so the largest id can exceed the number of tokens.
        return max(len(self.hf), 1 + max(self.hf.get_vocab().values(), default=0))

    @property
    def has_chat_template(self) -> bool:
        return bool(self.hf.chat_template)

    @property
    def eos_token_id(self) -> int:
        """The EOS, which ends plain text."""
        assert isinstance(self.hf.eos_token_id, int)
        return self.hf.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """The token that fills up batches. Any id would do, since masks come from lengths."""
        pad = self.hf.pad_token_id
        return pad if isinstance(pad, int) else self.eos_token_id

    @cached_property
    def bos_token_id(self) -> int | None:
        """The BOS that this tokenizer puts before plain text, or None."""
        # Asked of the tokenizer itself: the settings for BOS differ between classes of tokenizers.
        ids = self.hf("a")["input_ids"]
        bos = self.hf.bos_token_id
        return bos if isinstance(bos, int) and len(ids) > 1 and ids[0] == bos else None

    @cached_property
    def special_text(self) -> re.Pattern[str]:
        """A pattern that matches special tokens spelled out in a text."""
        added = (token.content for token in self.hf.added_tokens_decoder.values() if token.special)
        # Longer tokens first, since a pattern takes the first alternative that matches.
        tokens = sorted({*added, *self.hf.all_special_tokens}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a conversation with the chat template.

        Args:
          messages: the turns.
          tools: JSON schemas of the tools that may be called; a template may leave them out.
          add_generation_prompt: append the header of the answer to come.
          kwargs: `chat_template_kwargs` of the row, which override those of the config.

        Raises:
          jinja2.TemplateError: the template refuses the conversation, or exceeds its bounds.
          RenderingTooSlow: rendering takes more than a minute. This ends the run, because hosts of different speed
            would not agree on which rows to drop.
          Exception: any other exception of an expression in the template.
        """
        try:
            return self._renderer.render(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, kwargs=kwargs
            )
        except RenderingTooSlow:
            raise RenderingTooSlow(_too_slow(self.source)) from None

    @property
    def _renderer(self) -> Renderer:
        return self.probe.renderer

    def check_template(self, tools: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, origin: str) -> None:
        """Checks that there is a chat template for a row's conversation, and that it reads the row's kwargs.

        Raises:
          ValueError: there is no template, or it does not read a key; the message names the row.
        """
        if self._renderer.template_for(tools) is None:
            raise ValueError(
                f"{origin} is a conversation, but the tokenizer in {self.source} {self._missing_template()}"
            )
        if kwargs:
            self._renderer.check_kwargs(kwargs, f"{origin}: chat_template_kwargs")

    def _missing_template(self) -> str:
        names = list(map(terminal, self._renderer.templates))
        if names:
            return (
                f"has several chat templates ({', '.join(names)}) and none called {DEFAULT}: choose one by name, "
                f"for example chat_template: {names[0]}"
            )
        return (
            "has no chat template; give --chat_template chatml (built in), or a Jinja file; in a config, chat_template"
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, without special tokens added."""
        if not texts:
            return []
        # Templates write special tokens themselves. `verbose` would warn of long texts, which are cut only later.
        encoded = self.hf(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts that follow a prompt, tokenized separately from it.

        SentencePiece tokenizers put a space before any text (`Paris` alone is `▁Paris`), which a completion must not
        gain. For them the text is tokenized after an anchor, whose tokens are then cut off.
        """
        unanchored = self.encode(texts)
        anchor_ids = self._anchor_ids
        if anchor_ids is None:
            return unanchored
        anchor, ids = anchor_ids
        anchored = self.encode([anchor + text for text in texts])
        return [
            # The anchor may merge with the text; then the text is tokenized alone.
            after_anchor[len(ids) :] if after_anchor[: len(ids)] == ids else alone
            for after_anchor, alone in zip(anchored, unanchored, strict=True)
        ]

    @cached_property
    def _anchor_ids(self) -> tuple[str, list[int]] | None:
        """An anchor and its ids if the tokenizer puts a space before text, otherwise None."""
        (letter,) = self.encode(["a"])
        # If two copies decode to "a a", the tokenizer has put a space before each.
        if self.hf.decode(letter + letter).strip() == "aa":
            return None
        for anchor in _ANCHORS:
            (ids,) = self.encode([anchor])
            # An anchor that the vocabulary lacks would decode to something else.
            if self.hf.unk_token_id not in ids:
                return anchor, ids
        return None


def load_tokenizer(
    folder: Path, *, chat_template: str | None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Loads the tokenizer of a model folder, without network.

    A template given by the user replaces the tokenizer's own. The markers that it writes around turns (one word in
    angle brackets, like `<|im_start|>` or `<end_of_turn>`, found by rendering a conversation) become single tokens, and
    are added to the vocabulary if it lacks them. The first marker after an answer becomes the EOS.

    Args:
      folder: a model folder with tokenizer files.
      chat_template: a Jinja file, "chatml" for the built-in template, the name of one of the tokenizer's several
        templates, or None for the tokenizer's own.
      chat_template_kwargs: variables for every rendering, such as {"enable_thinking": False}.

    Raises:
      ValueError: the folder has no tokenizer, the template is missing or broken or does not read a key of
        chat_template_kwargs, or no token ends an answer.
    """
    hf = tokenizer_files.read_tokenizer(folder)
    kwargs = dict(chat_template_kwargs or {})
    try:
        return _loaded(hf, folder, chat_template, kwargs)
    except RenderingTooSlow:
        raise ValueError(_too_slow(str(folder))) from None


def _too_slow(source: str) -> str:
    return (
        f"the chat template of {source} takes more than a minute to render one conversation; "
        "set chat_template to another"
    )


def _loaded(
    hf: PreTrainedTokenizerBase, folder: Path, chat_template: str | None, kwargs: Mapping[str, Any]
) -> Tokenizer:
    own_eos = hf.eos_token_id
    difference = tokenizer_files.reading_difference(hf, folder)  # before markers and EOS change the tokenizer
    warnings = () if difference is None else (difference,)
    notes: list[str] = []
    added: tuple[str, ...] = ()
    named = tokenizer_files.named_templates(hf)
    # Only templates from outside may bring markers that the vocabulary lacks.
    is_given = chat_template is not None and chat_template not in named
    if chat_template in named:
        notes.append(f"chat template: {chat_template}, one of the tokenizer's {len(named)}")
        hf.chat_template = named[str(chat_template)]
    elif chat_template is not None:
        notes.append(f"chat template: {chat_template}{', in place of its own' if hf.chat_template else ''}")
        hf.chat_template = tokenizer_files.template_text(chat_template, hf)
    elif named and DEFAULT not in named:
        notes.append(
            f"the tokenizer has several chat templates ({', '.join(named)}) and none called {DEFAULT}; choose one by "
            f"its name, for example chat_template: {next(iter(named))}"
        )
    renderer = renderer_of(hf, kwargs)
    renderer.check_kwargs(kwargs, "chat_template_kwargs")
    if kwargs:
        notes.append(f"chat_template_kwargs: {json.dumps(kwargs, ensure_ascii=False)}")
    probed = template_probe.probe(renderer)
    if is_given:
        _check_given(probed, str(chat_template))
        added = _add_markers(hf, template_probe.markers_of(probed))
        if added:
            notes.append(f"new tokens of the chat template: {' '.join(added)}")
    end_of_turn = template_probe.end_of_turn(hf, probed)
    if end_of_turn is not None and (is_given or own_eos is None):
        if end_of_turn != hf.eos_token:
            notes.append(f"EOS token: {end_of_turn}" + (f" (was {hf.eos_token})" if hf.eos_token else ""))
        # Generation stops at EOS, so that a model trained on this template must stop where the template ends a turn.
        hf.eos_token = end_of_turn
        # The template may write eos_token, which has just changed.
        probed = template_probe.probe(renderer_of(hf, kwargs))
    if hf.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no EOS token and "
            + ("its chat template ends a turn with no special token" if hf.chat_template else "no chat template")
            + ", so answers would never end; set eos_token in tokenizer_config.json, or chat_template: chatml"
        )
    notes += _template_notes(hf, probed, end_of_turn)
    known = [token for token in (hf.eos_token, end_of_turn) if isinstance(token, str)]
    end_of_call = template_probe.end_of_call(hf, probed, known) if probed.text else None
    turn_ids = [hf.convert_tokens_to_ids(token) for token in (end_of_turn, end_of_call) if token is not None]
    # All of them, because generation must stop at any token with which an answer may end.
    end_ids = tuple(dict.fromkeys(i for i in (hf.eos_token_id, *turn_ids, own_eos) if isinstance(i, int)))
    return Tokenizer(
        hf,
        added,
        end_ids,
        tokenizer_files.tokenizer_digest(hf, kwargs),
        tuple(map(terminal, (*notes, *warnings))),
        str(folder),
        probed,
        tuple(map(terminal, warnings)),
    )


def _check_given(probed: Probe, name: str) -> None:
    """Checks a chat template that the user gives.

    Raises:
      ValueError: it cannot be parsed, or does not render a conversation.
    """
    error = probed.refusal
    if isinstance(error, jinja2.TemplateSyntaxError):
        raise ValueError(f"chat_template {name}: line {error.lineno}: {error.message}") from None
    if not probed.text and isinstance(error, jinja2.TemplateError):
        raise ValueError(f"chat_template {name} refuses a question and its answer: {terminal(error)}") from None
    if not probed.text and error is not None:
        raise ValueError(f"chat_template {name} fails: {type(error).__name__}: {terminal(error)}") from error
    if template_probe.ANSWER not in probed.text:
        raise ValueError(f"chat_template {name} renders a conversation without the assistant's text")


def _add_markers(hf: PreTrainedTokenizerBase, found: Sequence[str]) -> tuple[str, ...]:
    """Makes every marker of the template a single token; returns those that the vocabulary did not have."""
    known = set(hf.all_special_tokens) | set(hf.get_added_vocab())
    markers = [marker for marker in found if marker not in known]
    vocabulary = hf.get_vocab()
    # As special tokens, which the tokenizer never splits, whatever text is around them.
    hf.add_tokens(markers, special_tokens=True)
    return tuple(marker for marker in markers if marker not in vocabulary)


def _template_notes(hf: PreTrainedTokenizerBase, probed: Probe, end_of_turn: str | None) -> list[str]:
    """Returns sentences on what the chat template does that a user may not expect."""
    notes = []
    if probed.refusal is not None:
        reason = str(probed.refusal)
        if not isinstance(probed.refusal, jinja2.TemplateError):
            reason = f"{type(probed.refusal).__name__}: {reason}"
        takes = f"; it takes them with {probed.wants}" if probed.text else ""
        notes.append(f"the chat template refuses a question and its answer: {reason}{takes}")
    if probed.text and end_of_turn is None:
        notes.append("the chat template ends an answer with no special token: it is not learnt where to stop")
    if probed.renderer.takes_parts:
        notes.append("the chat template takes contents as lists of {type: text, text}: every row is given to it so")
    lead = template_probe.lead_of_answers(probed)
    if lead.strip():
        notes.append(f"the chat template writes {lead!r} after the generation prompt: every answer is learnt with it")
    first = hf(probed.text, add_special_tokens=False)["input_ids"][:2] if probed.text else []
    if probed.text and tokenizer_files.adds_bos(hf) and first[:1] != [hf.bos_token_id]:
        notes.append(
            f"BOS: the chat template does not write {hf.bos_token}: conversations go without, plain text has it"
        )
    if any(template.asks_for_today for template in probed.renderer.templates.values()):
        notes.append(f"the chat template writes today's date; every row has {TEMPLATE_DAY:%d %B %Y} instead")
    if hf.bos_token_id is not None and first == [hf.bos_token_id] * 2:
        notes.append(f"the chat template writes {hf.bos_token} twice; jdpo takes one away, which others may not do")
    return notes
