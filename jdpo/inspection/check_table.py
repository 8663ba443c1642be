"""The words and thresholds of every finding: which rows it counts, its effect on training, and what to do."""

from __future__ import annotations

from typing import NamedTuple


class Above(NamedTuple):
    """Shares of rows above which a check is a fault or a warning; None: never. Below both it is a note."""

    fault: float | None = None
    warning: float | None = None


class Check(NamedTuple):
    """A check; `what`, `effect` and `remedy` are format strings in those that do not count rows."""

    above: Above
    what: str
    effect: str
    remedy: str


FAULT, WARNING, NOTE = Above(fault=0.0, warning=0.0), Above(warning=0.0), Above()
"""Thresholds of checks that are a fault or a warning as soon as one row has them, and of those that never are."""

# fmt: off
CHECKS: dict[str, Check] = {
    "leakage": Check(FAULT, "evaluation rows whose prompt is trained on",
        "evaluation measures memory as well as preference: eval accuracy comes out too high",
        "leave eval_datasets out and set eval_fraction, which holds rows out by a hash of their prompt"),
    "no_prompt": Check(FAULT, "pairs whose sides start with the assistant, as nothing was taken as their prompt",
        "answers are learnt without what they answer, or the pairs are dropped",
        "name the column of the prompt in column_map: {prompt: <column>}, or begin both sides with the conversation"),
    "special_tokens": Check(FAULT, "rows of conversations whose text has a special token of the tokenizer written out",
        "it becomes the real token: whoever wrote the text can end a turn or open one in another's name",
        "remove or rewrite these rows, or break the token up (a space inside is enough)"),
    "bos_twice": Check(FAULT, "rows that start with BOS twice",
        "no model has seen such a start",
        "the chat template writes BOS: take it out of the template or of the text"),
    "bos_in_answer": Check(FAULT, "rows with an answer that starts with BOS",
        "the model learns to begin a new text where it should answer",
        "take BOS out of the text"),
    "bos_inside": Check(FAULT, "rows with BOS inside the sequence",
        "the model sees a text begin in the middle of another, which it never did before",
        "if the data hold rendered text, take BOS out of it; the chat template may write it twice"),
    "no_end": Check(Above(fault=0.01, warning=0.0), "rows with an answer that is whole and has no end token behind it",
        "it is not learnt where to stop: sampled answers run on",
        "set chat_template to one that ends a turn with a special token; chatml is built in"),
    "end_twice": Check(FAULT, "rows with an answer that ends in its end token twice",
        "the model is taught to write the end again after the end",
        "take the end token out of the text: the chat template, or jdpo for plain text, writes it"),
    "end_inside": Check(FAULT, "rows with an end token inside an answer",
        "the model is taught to stop early, or to go on after it has stopped",
        "take the end token out of the text"),
    "answer_starts_in_prompt": Check(FAULT,
        "rows with a completion that starts before the end of the prompt's last turn",
        "the model is trained to write words of its user",
        "use a chat template that writes a marker or a newline between a turn and the answer to it"),
    "prompt_rebuilt": Check(WARNING,
        "rows with a prompt that the chat template writes differently once an answer follows",
        "the answer is learnt after the prompt as inference writes it, not as it is written in a longer conversation",
        "look at the first with --rows; nothing, if its prompt is what the model will see"),
    "prompt_shortened": Check(WARNING,
        "rows with a prompt whose end the chat template takes away once an answer follows",
        "the model is trained on a context that differs from the one it sees at inference, where the generation "
        "prompt also writes, say, an opened thought",
        "use a chat template whose generation prompt and answers agree, or write the thoughts into the answers if "
        "the template keeps them"),
    "content_unwritten": Check(WARNING, "rows whose answer has content that the chat template does not write",
        "what the file has there is not learnt; the rest of the answer is",
        "use a chat template that writes it, or move it into the content"),
    "dropped": Check(Above(fault=0.1, warning=0.01), "rows dropped",
        "what is left may be another mixture than was meant",
        "see the reasons under 'not trained on'"),
    "shown_only": Check(FAULT, "rows dropped because the turn to learn is marked as shown only",
        "nothing is learnt from them",
        "remove the mark (weight, train, loss, loss_mask) or the row; where earlier turns are to be learnt, use "
        "`jdpo sft` with loss_on: assistant_turns"),
    "ties": Check(NOTE, "rows whose answers are tied, which are not trained on",
        "usual for votes and ranks: a tie does not say which answer is better",
        "nothing, unless there are more than was meant"),
    "answer_cut": Check(Above(fault=0.25, warning=0.05), "rows with an answer cut at max_length",
        "the end of the answer is not seen; where one side is cut more often, length decides instead of quality",
        "raise max_length, or leave such rows out of the file"),
    "too_long_for_model": Check(FAULT, "rows longer than the positions the model was made for",
        "positions that the model never learnt: its log-probs there mean little",
        "lower max_length to the model's max_position_embeddings"),
    "contradictions": Check(Above(fault=0.01, warning=0.0), "pairs that stand in the data the other way round as well",
        "the two cancel out: they cost time and hold accuracy down",
        "decide which is right; noisy labels are what label_smoothing and robust losses are for"),
    "negative_margins": Check(Above(fault=0.01, warning=0.0), "pairs whose rejected side has the higher score",
        "either the columns are read the wrong way round, or scores and labels disagree",
        "look at the first; set column_map, or min_margin: 0 to drop them"),
    "no_bos": Check(WARNING, "rows without the BOS that the tokenizer puts before text",
        "harmless where the model's own chat template goes without; otherwise log-probs start from an unusual place",
        "with a template of one's own, begin it with {{ bos_token }}"),
    "plain_text": Check(WARNING, "rows in plain text, to which the chat template is not applied",
        "a chat model is trained on text without its turns, and answers its users in another format than it learnt",
        "write prompt and sides as lists of {role, content}; leave it where the text holds the format already"),
    "same_row": Check(Above(warning=0.02), "rows that say again what an earlier one says",
        "they weigh double, and each epoch is more than one pass over them",
        "remove the copies"),
    "same_prompt": Check(NOTE, "rows whose prompt an earlier row has, with other answers",
        "usual for ranked answers; otherwise prompts that come often weigh more",
        "nothing, unless it is not meant"),
    "prompt_cut": Check(Above(fault=0.25, warning=0.05), "rows with a prompt cut at max_prompt_length",
        "the beginning of the conversation, a system turn with it, is gone",
        "raise max_prompt_length, or set it to null"),
    "control": Check(WARNING, "rows with control characters other than tab and newline",
        "tokens that no user writes; often a file that was converted wrongly",
        "look at the first, and clean the file"),
    "bidi": Check(WARNING, "rows with characters that turn the direction of text around",
        "what a reviewer sees is not what the model reads",
        "look at the first in `--rows` or the HTML page, where they are written out"),
    "invisible": Check(Above(warning=0.01), "rows with characters that cannot be seen (zero width, tags, soft hyphens)",
        "the same words become other tokens; tags can hide a text from people that the model reads",
        "remove them"),
    "replacement": Check(Above(warning=0.001), "rows with U+FFFD, which stands for text that was decoded wrongly",
        "the original characters are lost, and the model learns to write the sign",
        "read the file with its right encoding and convert it again"),
    "surrogate": Check(WARNING, "rows with half a surrogate pair, which is no text",
        "these rows are dropped",
        "convert the file again"),
    "special_tokens_in_plain_text": Check(NOTE, "rows in plain text that have special tokens written out",
        "they become the real tokens, as is meant where the text holds a rendered template",
        "nothing, if it is meant"),
    "answer_changed": Check(WARNING, "rows with an answer that the chat template does not write letter for letter",
        "another answer is learnt than stands in the file",
        "look at the first with --rows; spaces around an answer are often trimmed, which does no harm"),
    "turn_changed": Check(Above(warning=0.05),
        "rows with an earlier turn that the chat template leaves out or does not write whole",
        "the answer is learnt without what it answers; templates of reasoning models drop earlier thoughts on purpose",
        "look at the first; use a template that writes all turns"),
    "tools_unused": Check(WARNING, "rows with tools that the chat template does not write",
        "the model does not see which tools it may call; calls that the template writes are learnt without them",
        "use a chat template that writes tools"),
    "would_merge": Check(NOTE, "rows whose prompt and answer would be other tokens if tokenized together",
        "the boundary is exact in training; at inference the first token may be split otherwise",
        "end prompts without a space, and begin answers with one"),
}

OTHERS: dict[str, Check] = {
    "tokenizer_too_large": Check(FAULT, "the tokenizer has {tokens} tokens and the model's embedding {vocab_size} rows",
        "there is no embedding for some tokens; training refuses to start",
        "use the tokenizer that belongs to the model"),
    "tokenizer": Check(WARNING, "{warning}",
        "a server that reads tokenizer.json alone feeds the model other tokens than those it is trained on",
        "save the tokenizer again with the transformers version that serves it, or correct tokenizer_config.json"),
    "untrained_tokens": Check(FAULT, "tokens of the training rows whose embedding was never trained: {tokens}",
        "their embedding is zero or below 1 % of the median norm: gradients there are large, and adapters cannot "
        "change it",
        "set init_untrained_tokens: true, which starts them at the mean of the trained rows (not with lora), or use "
        "a chat template of tokens that the model knows"),
    "started_tokens": Check(NOTE, "tokens of the training rows whose embedding was never trained: {tokens}",
        "they start at the mean of the trained rows",
        "nothing, if it is meant"),
    "length_bias": Check(NOTE, "the chosen side is the {way} one in {share} of the pairs that differ in length, by "
        "{difference} tokens in the mean of all",
        "a policy that learns length alone reaches a reward accuracy of {accuracy} on such pairs, and its answers grow "
        "{way}; read an accuracy below that as no more than length",
        "compare with loss_type sigmoid_norm, simpo or ld_alpha, which weigh length down; watch the length of samples"),
    "no_evaluation": Check(NOTE, "nothing is held out for evaluation",
        "training metrics alone do not tell learning from memorising",
        "set eval_fraction: 0.05, or eval_datasets"),
    "few_evaluation_rows": Check(NOTE, "{count} evaluation rows",
        "a measured accuracy of 0.60 may be anything from {low} to {high} (95 %)",
        "hold more rows out, or do not rank checkpoints by small differences"),
}
# fmt: on


def thresholds() -> list[str]:
    """Returns a line for every check that can be a fault."""
    lines = [
        "model: config.json cannot be read, it has fewer positions than max_length and cannot go beyond, or the "
        "tokenizer has more tokens than the embedding has rows",
        "untrained_tokens: any token of the training rows has an embedding of zero or below 1 % of the median norm "
        "(seen where the weights are there), and init_untrained_tokens is not set",
    ]
    faults = {name: check for name, check in CHECKS.items() if check.above.fault is not None}
    for name, check in faults.items():
        lines.append(f"{name}: {f'more than {check.above.fault:.0%} of' if check.above.fault else 'any'} {check.what}")
    return lines
