"""The choice among a tokenizer's chat templates, and the variables that a template gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jdpo.data.templates.chat_template import RESERVED, ChatTemplate
from jdpo.types import Message
from jdpo.words import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names in transformers of a tokenizer's only template, and of its template for conversations with tools."""


@dataclass(frozen=True)
class Renderer:
    """Renders conversations like `apply_chat_template` of the tokenizer, within the bounds of `ChatTemplate`.

    Attributes:
      templates: {name: template}; the only template of a tokenizer is called default.
      special_tokens: {name: token}, such as bos_token, which are variables of the template.
      kwargs: `chat_template_kwargs` of the config.
      takes_parts: whether the template gets contents as lists of {type: text, text}.
    """

    templates: Mapping[str, ChatTemplate]
    special_tokens: Mapping[str, Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    takes_parts: bool = False

    def template_for(self, tools: Sequence[Any] | None) -> ChatTemplate | None:
        """Returns the template for conversations with these tools, or None if the tokenizer has none."""
        # The same choice as in transformers.
        if tools is not None and TOOL_USE in self.templates:
            return self.templates[TOOL_USE]
        return self.templates.get(DEFAULT)

    @property
    def variables(self) -> frozenset[str]:
        """The names that the templates read and that a user may set."""
        read = frozenset[str]().union(*(template.variables for template in self.templates.values()))
        # Setting one of these would change the conversation or the tokens, not an option of the template.
        return read - RESERVED - self.special_tokens.keys()

    def check_kwargs(self, kwargs: Mapping[str, Any], place: str) -> None:
        """Refuses keys of `chat_template_kwargs` that no template reads.

        Raises:
          ValueError: no template reads a key; the message suggests the most similar name.
        """
        known = self.variables
        for key in kwargs:
            if key in known:
                continue
            if not self.templates:
                raise ValueError(f"{place}: {key!r} is a variable of a chat template, but the tokenizer has none")
            hint = did_you_mean(key, known)
            raise ValueError(
                f"{place}: the chat template does not read {key!r}"
                + (f"; {hint} " if hint else ". ")
                + (f"It reads {', '.join(sorted(known))}" if known else "It reads no key of this kind")
            )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a conversation; see `ChatTemplate.render`.

        Args:
          kwargs: the row's own `chat_template_kwargs`, which override those of the config.

        Raises:
          ValueError: the tokenizer has no template for such a conversation.
        """
        template = self.template_for(tools)
        if template is None:
            raise ValueError("the tokenizer has no chat template for this conversation")
        return template.render(
            [_in_parts(message) for message in messages] if self.takes_parts else messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            # Later ones win: the row over the config over the tokenizer.
            variables={**self.special_tokens, **self.kwargs, **(kwargs or {})},
        )

    def with_parts(self) -> Renderer:
        """Returns a renderer that gives contents to the template as lists of parts."""
        return replace(self, takes_parts=True)


def renderer_of(hf: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> Renderer:
    """Returns a renderer with the tokenizer's current templates and special tokens."""
    own: Any = hf.chat_template
    texts = own if isinstance(own, dict) else {DEFAULT: own} if own else {}
    templates = {str(name): ChatTemplate(str(text)) for name, text in texts.items()}
    return Renderer(templates, dict(hf.special_tokens_map), dict(kwargs))


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
