r"""The end of a conversation's prompt, found so that nothing of a prompt is learnt.

P is the prompt with the generation prompt, W the conversation with an answer. Most templates write W so that it starts
with P. Then W is tokenized as it is, and the completion starts where the tokens of P and W first differ:

    P  <|im_start|>user \n Hi <|im_end|> \n <|im_start|>assistant \n
    W  <|im_start|>user \n Hi <|im_end|> \n <|im_start|>assistant \n | Hello <|im_end|> \n

Some templates remove the end of the generation prompt once an answer follows. W stays as it is, and the row is counted:

    P  <User> Hi <Assistant> <think> \n
    W  <User> Hi <Assistant> | Hello <eos>

Others write the messages of the prompt differently once an answer follows. Then the answer is put after P, if it can be
separated from what the template writes before it; otherwise the row is dropped:

    P  [INST] Be kind. Hi [/INST]
    W  [INST] Hi [/INST] Hello <eos>   ->   [INST] Be kind. Hi [/INST] | Hello <eos>
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens.row_notes import all_words, words
from jdpo.data.tokens.row_rendering import Written, conversation, encode_rendered, write_bare
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.types import Message

REWRITTEN = "the chat template writes the prompt differently once an answer follows"

SHORTER_PREFIX = "with an answer whose first token takes in the end of the prompt, which is learnt with it"
PROMPT_SHORTENED = "with a prompt whose end the chat template takes away once an answer follows (an opened thought?)"
PROMPT_REBUILT = "with a prompt that the chat template changes once an answer follows, kept as it is at inference"
STARTS_IN_PROMPT = "with a completion that starts before the end of the prompt's last turn"

_OPENED_THOUGHT = re.compile(
    r"(?P<open>[<\[]\|?)(?P<start>start_)?(?P<name>[\w:]*(?:think|thought|reason)\w*)(?P<close>\|?[>\]])\s*\Z",
    re.IGNORECASE,
)
"""Marker of a thought that a generation prompt opens at its end: `<think>`, `<seed:think>`, `<|START_THINKING|>`."""


class Encoded(NamedTuple):
    """A conversation as text and as token ids.

    Attributes:
      written: the texts that were tokenized.
      prompt: the ids of `written.asked`.
      sequences: the ids of each of `written.wholes`.
      notes: the names under which the row is counted.
    """

    written: Written
    prompt: list[int]
    sequences: list[list[int]]
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """The number of leading tokens that the prompt shares with every sequence: the start of the completions."""
        return min(_shared(self.prompt, sequence) for sequence in self.sequences)


def encode_conversations(rows: Sequence[Written], tokenizer: Tokenizer) -> list[Encoded | Dropped]:
    """Tokenizes conversations so that only the answer follows the prompt in each."""
    ends = end_text(tokenizer)
    encoded = _encode([_without_headers(row, ends) for row in rows], tokenizer)
    results: list[Encoded | Dropped] = list(encoded)
    # Only rows whose tokens differ from the prompt before its end need a closer look.
    short = [index for index, one in enumerate(encoded) if one.length < len(one.prompt)]
    bares = [write_bare(encoded[index].written.row, tokenizer) for index in short]
    bare_ids = iter(encode_rendered([bare for bare in bares if bare is not None], tokenizer))
    rebuilt: dict[int, Written] = {}
    needed: dict[int, int] = {}
    for index, bare in zip(short, bares, strict=True):
        one = encoded[index]
        # The prompt without its generation prompt shows where its last turn ends.
        needed[index] = len(one.prompt) if bare is None else _shared(one.prompt, next(bare_ids))
        # The text is the prompt's; only a token reaches across the boundary.
        if all(whole.startswith(one.written.asked) for whole in one.written.wholes):
            results[index] = one._replace(notes=_merge_notes(one, needed[index], tokenizer))
        # All turns of the prompt are there, and only the end of the generation prompt is missing.
        elif one.length >= needed[index]:
            results[index] = one._replace(notes=(PROMPT_SHORTENED,))
        else:
            new = _rebuilt(one.written, bare)
            results[index] = Dropped(REWRITTEN, one.written.row.origin)
            if new is not None:
                rebuilt[index] = new
    for index, one in zip(rebuilt, _encode(list(rebuilt.values()), tokenizer), strict=True):
        results[index] = one._replace(notes=(PROMPT_REBUILT, *_merge_notes(one, needed[index], tokenizer)))
    return results


def _encode(rows: Sequence[Written], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokenizes all texts in one call, so that the tokenizer can use all cores."""
    ids = iter(encode_rendered([text for row in rows for text in (row.asked, *row.wholes)], tokenizer))
    return [Encoded(row, next(ids), [next(ids) for _ in row.wholes]) for row in rows]


def _merge_notes(one: Encoded, needed: int, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the notes of a row whose conversations, as text, start with the prompt.

    Args:
      one: the row.
      needed: number of the prompt's tokens up to the end of its last turn.
      tokenizer: the tokenizer of the row.
    """
    if one.length == len(one.prompt):
        return ()
    # Whitespace that the template writes between turns belongs to no turn.
    if tokenizer.hf.decode(one.prompt[one.length : needed]).strip():
        return (SHORTER_PREFIX, STARTS_IN_PROMPT)
    return (SHORTER_PREFIX,)


def _without_headers(row: Written, ends: re.Pattern[str]) -> Written:
    sides = map(conversation, row.row.completions)
    wholes = [
        without_header(whole, row.asked, words(side[-1]), ends) for whole, side in zip(row.wholes, sides, strict=True)
    ]
    return row._replace(wholes=wholes)


def without_header(whole: str, asked: str, content: str, ends: re.Pattern[str]) -> str:
    r"""Cuts off the header of a next answer, which some templates write after every conversation.

    Args:
      whole: the conversation with an answer.
      asked: the prompt with the generation prompt.
      content: the text of the answer.
      ends: matches the tokens that end a turn, with the whitespace after them.

    >>> without_header("Hi<end>\nbot: Yes<end>\nbot: ", "Hi<end>\nbot: ", "Yes", re.compile(r"<end>\s*"))
    'Hi<end>\nbot: Yes<end>\n'
    >>> without_header("user: Hi bot: Yes<end>bot: ", "user: Hi bot: ", "Yes", re.compile(r"<end>\s*"))
    'user: Hi bot: Yes<end>'
    """
    same_end = len(whole) - len(common_prefix(whole[::-1], asked[::-1]))  # from here on both texts are equal
    start = len(common_prefix(whole, asked))
    # The end of turn is searched for after the answer, which may itself contain end tokens as text.
    found = whole.find(content.strip(), start)
    for end in ends.finditer(whole, start if found < 0 else found + len(content.strip())):
        # What follows the end of turn is also the end of the prompt, so it is the header of a next answer.
        if same_end <= end.end() < len(whole):
            return whole[: end.end()]
    return whole


def end_text(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Returns a pattern for the tokens that end an answer in rendered text, with the whitespace after them."""
    tokens: Any = tokenizer.hf.convert_ids_to_tokens(list(tokenizer.end_token_ids))
    return re.compile(rf"(?:{'|'.join(map(re.escape, tokens))})\s*")


def _rebuilt(row: Written, bare: str | None) -> Written | None:
    """Rewrites conversations as the prompt of inference followed by their answers; None if that would not be safe.

    Args:
      row: a row whose conversations do not start with the prompt.
      bare: the prompt without a generation prompt.
    """
    # The conversation must contain the whole generation prompt. A part found alone would lose or repeat the rest.
    header = "" if bare is None else row.asked[len(common_prefix(row.asked, bare)) :]
    prompt = conversation(row.row.prompt)
    wholes = []
    for whole, side in zip(row.wholes, map(conversation, row.row.completions), strict=True):
        suffix = _longest_suffix(row.asked, whole)
        # rfind: earlier turns of the conversation have the same header.
        answer = whole[whole.rfind(suffix) + len(suffix) :]
        if len(suffix) < max(len(header), 1) or not _holds_the_answer_alone(answer, side, prompt[-1]):
            return None
        # The prompt opens a thought; an answer without its end would be learnt as part of the thought.
        if not _closes_thought(row.asked, answer):
            return None
        wholes.append(row.asked + answer)
    return row._replace(wholes=wholes)


def _longest_suffix(text: str, within: str) -> str:
    """Returns the longest suffix of a text that occurs in another text.

    >>> _longest_suffix("Be kind. Hi [/INST]", "[INST] Hi [/INST] Hello"), _longest_suffix("Hi", "Yes")
    (' Hi [/INST]', '')
    """
    low, high = 0, len(text)
    while low < high:  # binary search: if a suffix occurs, so do all shorter ones
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[len(text) - middle :] in within else (low, middle - 1)
    return text[len(text) - low :]


def _holds_the_answer_alone(text: str, side: Sequence[Message], last: Message) -> bool:
    """Returns whether a text contains all content of a side (or the names of its calls) and none of the last message.

    Content of the last message that the side itself repeats does not count.
    """
    content = [word for message in side if (word := words(message).strip())] or _call_names(side)
    if not content or any(word not in text for word in content):
        return False
    # If the last message occurs in the rest, the cut was before it, and it would be learnt.
    foreign = [word for word in (words(last).strip(), *_call_names([last])) if word]
    further = [
        value for message in side for key, value in message.items() if key != "content" and isinstance(value, str)
    ]
    own = "\n".join([all_words(list(side)), *further])
    return all(text.count(word) <= own.count(word) for word in foreign)


def _call_names(messages: Sequence[Message]) -> list[str]:
    """Returns the names of the functions that messages call."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [str(function.get("name")) for function in functions if isinstance(function, dict)]


def opened_thought(asked: str) -> str:
    """Returns the marker, with the whitespace after it, of a thought that a prompt opens at its end; else nothing.

    >>> opened_thought("Hi <think>\\n"), opened_thought("Hi")
    ('<think>\\n', '')
    """
    opened = _OPENED_THOUGHT.search(asked)
    return opened.group() if opened is not None else ""


def _closes_thought(asked: str, answer: str) -> bool:
    """Returns whether an answer closes the thought that the prompt opens; True if the prompt opens none.

    >>> _closes_thought("Hi <think>\\n", "Hm.</think>Yes"), _closes_thought("Hi <think>", "Yes")
    (True, False)
    """
    opened = _OPENED_THOUGHT.search(asked)
    if opened is None:
        return True
    if opened["start"]:
        closing = f"{opened['open']}END_{opened['name']}{opened['close']}"
    else:
        closing = f"{opened['open']}/{opened['name']}{opened['close']}"
    return closing.lower() in answer.lower()


def common_prefix(first: str, second: str) -> str:
    """Returns the longest common prefix of two texts.

    >>> common_prefix("The sky", "That is")
    'Th'
    """
    if second.startswith(first):
        return first
    low, high = 0, min(len(first), len(second))
    while low < high:  # binary search over slices, which is much faster than a loop over characters
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return first[:low]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Counts the leading tokens that are equal.

    >>> _shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
