"""What is looked for in the rows of a run: above which share it is a warning or a fault, what it does, what to do."""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    """A check of a share of rows: above `fault` (`warning`) it is one, below both a note; None: never."""

    what: str
    fault: float | None
    warning: float | None
    effect: str
    remedy: str


CHECKS: dict[str, Check] = {
    "leakage": Check(
        "evaluation rows whose prompt is trained on",
        0.0,
        0.0,
        "evaluation measures memory as well as preference: eval accuracy comes out too high",
        "leave eval_datasets out and set eval_fraction, which holds rows out by a hash of their prompt",
    ),
    "no_prompt": Check(
        "pairs whose sides start with the assistant, as nothing was taken as their prompt",
        0.0,
        0.0,
        "answers are learnt without what they answer, or the pairs are dropped",
        "name the column of the prompt in column_map: {prompt: <column>}, or begin both sides with the conversation",
    ),
    "special_tokens": Check(
        "rows of conversations whose text has a special token of the tokenizer written out",
        0.0,
        0.0,
        "it becomes the real token: whoever wrote the text can end a turn or open one in another's name",
        "remove or rewrite these rows, or break the token up (a space inside is enough)",
    ),
    "bos_twice": Check(
        "rows that start with BOS twice",
        0.0,
        0.0,
        "no model has seen such a start",
        "the chat template writes BOS: take it out of the template or of the text",
    ),
    "bos_in_answer": Check(
        "rows with an answer that starts with BOS",
        0.0,
        0.0,
        "the model learns to begin a new text where it should answer",
        "take BOS out of the text",
    ),
    "bos_inside": Check(
        "rows with BOS inside the sequence",
        0.0,
        0.0,
        "the model sees a text begin in the middle of another, which it never did before",
        "if the data hold rendered text, take BOS out of it; the chat template may write it twice",
    ),
    "no_end": Check(
        "rows with an answer that is whole and has no end token behind it",
        0.01,
        0.0,
        "it is not learnt where to stop: sampled answers run on",
        "set chat_template to one that ends a turn with a special token; chatml is built in",
    ),
    "end_twice": Check(
        "rows with an answer that ends in its end token twice",
        0.0,
        0.0,
        "the model is taught to write the end again after the end",
        "take the end token out of the text: the chat template, or jdpo for plain text, writes it",
    ),
    "end_inside": Check(
        "rows with an end token inside an answer",
        0.0,
        0.0,
        "the model is taught to stop early, or to go on after it has stopped",
        "take the end token out of the text",
    ),
    "answer_starts_in_prompt": Check(
        "rows with a completion that starts before the end of the prompt's last turn",
        0.0,
        0.0,
        "the model is trained to write words of its user",
        "use a chat template that writes a marker or a newline between a turn and the answer to it",
    ),
    "prompt_rebuilt": Check(
        "rows with a prompt that the chat template writes differently once an answer follows",
        None,
        0.0,
        "the answer is learnt after the prompt as inference writes it, not as it is written in a longer conversation",
        "look at the first with --rows; nothing, if its prompt is what the model will see",
    ),
    "prompt_shortened": Check(
        "rows with a prompt whose end the chat template takes away once an answer follows",
        None,
        0.0,
        "the model is trained on a context that differs from the one it sees at inference, where the generation prompt "
        "also writes, say, an opened thought",
        "use a chat template whose generation prompt and answers agree, or write the thoughts into the answers if the "
        "template keeps them",
    ),
    "content_unwritten": Check(
        "rows whose answer has content that the chat template does not write",
        None,
        0.0,
        "what the file has there is not learnt; the rest of the answer is",
        "use a chat template that writes it, or move it into the content",
    ),
    "dropped": Check(
        "rows dropped",
        0.10,
        0.01,
        "what is left may be another mixture than was meant",
        "see the reasons under 'not trained on'",
    ),
    "shown_only": Check(
        "rows dropped because the turn to learn is marked as shown only",
        0.0,
        0.0,
        "nothing is learnt from them",
        "remove the mark (weight, train, loss, loss_mask) or the row; where earlier turns are to be learnt, use `jdpo "
        "sft` with loss_on: assistant_turns",
    ),
    "ties": Check(
        "rows whose answers are tied, which are not trained on",
        None,
        None,
        "usual for votes and ranks: a tie does not say which answer is better",
        "nothing, unless there are more than was meant",
    ),
    "answer_cut": Check(
        "rows with an answer cut at max_length",
        0.25,
        0.05,
        "the end of the answer is not seen; where one side is cut more often, length decides instead of quality",
        "raise max_length, or leave such rows out of the file",
    ),
    "too_long_for_model": Check(
        "rows longer than the positions the model was made for",
        0.0,
        0.0,
        "positions that the model never learnt: its log-probs there mean little",
        "lower max_length to the model's max_position_embeddings",
    ),
    "contradictions": Check(
        "pairs that stand in the data the other way round as well",
        0.01,
        0.0,
        "the two cancel out: they cost time and hold accuracy down",
        "decide which is right; noisy labels are what label_smoothing and robust losses are for",
    ),
    "negative_margins": Check(
        "pairs whose rejected side has the higher score",
        0.01,
        0.0,
        "either the columns are read the wrong way round, or scores and labels disagree",
        "look at the first; set column_map, or min_margin: 0 to drop them",
    ),
    "no_bos": Check(
        "rows without the BOS that the tokenizer puts before text",
        None,
        0.0,
        "harmless where the model's own chat template goes without; otherwise log-probs start from an unusual place",
        "with a template of one's own, begin it with {{ bos_token }}",
    ),
    "plain_text": Check(
        "rows in plain text, to which the chat template is not applied",
        None,
        0.0,
        "a chat model is trained on text without its turns, and answers its users in another format than it learnt",
        "write prompt and sides as lists of {role, content}; leave it where the text holds the format already",
    ),
    "same_row": Check(
        "rows that say again what an earlier one says",
        None,
        0.02,
        "they weigh double, and each epoch is more than one pass over them",
        "remove the copies",
    ),
    "same_prompt": Check(
        "rows whose prompt an earlier row has, with other answers",
        None,
        None,
        "usual for ranked answers; otherwise prompts that come often weigh more",
        "nothing, unless it is not meant",
    ),
    "prompt_cut": Check(
        "rows with a prompt cut at max_prompt_length",
        0.25,
        0.05,
        "the beginning of the conversation, a system turn with it, is gone",
        "raise max_prompt_length, or set it to null",
    ),
    "control": Check(
        "rows with control characters other than tab and newline",
        None,
        0.0,
        "tokens that no user writes; often a file that was converted wrongly",
        "look at the first, and clean the file",
    ),
    "bidi": Check(
        "rows with characters that turn the direction of text around",
        None,
        0.0,
        "what a reviewer sees is not what the model reads",
        "look at the first in `--rows` or the HTML page, where they are written out",
    ),
    "invisible": Check(
        "rows with characters that cannot be seen (zero width, tags, soft hyphens)",
        None,
        0.01,
        "the same words become other tokens; tags can hide a text from people that the model reads",
        "remove them",
    ),
    "replacement": Check(
        "rows with U+FFFD, which stands for text that was decoded wrongly",
        None,
        0.001,
        "the original characters are lost, and the model learns to write the sign",
        "read the file with its right encoding and convert it again",
    ),
    "surrogate": Check(
        "rows with half a surrogate pair, which is no text",
        None,
        0.0,
        "these rows are dropped",
        "convert the file again",
    ),
    "special_tokens_in_plain_text": Check(
        "rows in plain text that have special tokens written out",
        None,
        None,
        "they become the real tokens, as is meant where the text holds a rendered template",
        "nothing, if it is meant",
    ),
    "answer_changed": Check(
        "rows with an answer that the chat template does not write letter for letter",
        None,
        0.0,
        "another answer is learnt than stands in the file",
        "look at the first with --rows; spaces around an answer are often trimmed, which does no harm",
    ),
    "turn_changed": Check(
        "rows with an earlier turn that the chat template leaves out or does not write whole",
        None,
        0.05,
        "the answer is learnt without what it answers; templates of reasoning models drop earlier thoughts on purpose",
        "look at the first; use a template that writes all turns",
    ),
    "tools_unused": Check(
        "rows with tools that the chat template does not write",
        None,
        0.0,
        "the model does not see which tools it may call; calls that the template writes are learnt without them",
        "use a chat template that writes tools",
    ),
    "would_merge": Check(
        "rows whose prompt and answer would be other tokens if tokenized together",
        None,
        None,
        "the boundary is exact in training; at inference the first token may be split otherwise",
        "end prompts without a space, and begin answers with one",
    ),
}
"""Checks by name, in the order in which they are reported within a severity."""


def thresholds() -> list[str]:
    """One line a check that can be a fault, for people."""
    lines = [
        "model: config.json cannot be read, it has fewer positions than max_length and cannot go beyond, or the "
        "tokenizer has more tokens than the embedding has rows",
        "untrained_tokens: any token of the training rows has an embedding of zero or below 1 % of the median norm "
        "(seen where the weights are there), and init_untrained_tokens is not set",
    ]
    for name, check in CHECKS.items():
        if check.fault is not None:
            lines.append(f"{name}: {'any' if check.fault == 0 else f'more than {check.fault:.0%} of'} {check.what}")
    return lines
