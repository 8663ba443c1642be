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
    "leakage": Check(FAULT, "evaluation rows whose prompt is also in the training rows",
        "evaluation measures memory as well as preference, so eval accuracy is too high",
        "remove eval_datasets and set eval_fraction, which holds out rows by a hash of their prompt"),
    "no_prompt": Check(FAULT, "pairs without a prompt, whose sides start with the assistant",
        "the answers are learnt without the question, or the pairs are dropped",
        "name the prompt's column, column_map: {prompt: <column>}, or start both sides with the conversation"),
    "special_tokens": Check(FAULT, "rows of conversations whose text spells out a special token of the tokenizer",
        "it becomes the real token, so whoever wrote the text can end a turn or speak in another's name",
        "remove or rewrite these rows, or break up the token (a space inside it is enough)"),
    "bos_twice": Check(FAULT, "rows that start with BOS twice",
        "no model was trained on such a start",
        "the chat template writes BOS; remove it from the template or from the text"),
    "bos_in_answer": Check(FAULT, "rows with an answer that starts with BOS",
        "the model learns to start a new text where it should answer",
        "remove BOS from the text"),
    "bos_inside": Check(FAULT, "rows with BOS inside the sequence",
        "the model sees a text start in the middle of another one, which never happened in pre-training",
        "remove BOS from the data if they hold rendered text; otherwise the chat template may write it twice"),
    "no_end": Check(Above(fault=0.01, warning=0.0), "rows with a complete answer that no end token follows",
        "the model does not learn where to stop; sampled answers run on",
        "set chat_template to one that ends a turn with a special token, such as the built-in chatml"),
    "end_twice": Check(FAULT, "rows with an answer that ends in two end tokens",
        "the model learns to write a second end token after the first",
        "remove the end token from the text; the chat template writes it, or jdpo does for plain text"),
    "end_inside": Check(FAULT, "rows with an end token inside an answer",
        "the model learns to stop early, or to continue after it has stopped",
        "remove the end token from the text"),
    "answer_starts_in_prompt": Check(FAULT, "rows with a completion that starts before the prompt's last turn ends",
        "the model learns to write its user's words",
        "use a chat template that writes a marker or a newline between a turn and its answer"),
    "prompt_rebuilt": Check(WARNING, "rows whose prompt the chat template writes differently once an answer follows",
        "the answer is learnt after the prompt as inference writes it, not as a longer conversation writes it",
        "look at the first row with --rows; do nothing if its prompt is what the model will see"),
    "prompt_shortened": Check(WARNING, "rows whose prompt loses its end in the chat template once an answer follows",
        "the context differs from that at inference, where the generation prompt may also open a thought",
        "use a template whose generation prompt and answers agree, or put thoughts into answers if it keeps them"),
    "content_unwritten": Check(WARNING, "rows whose answer has content that the chat template does not write",
        "this content is not learnt; the rest of the answer is",
        "use a chat template that writes it, or move it into the content"),
    "dropped": Check(Above(fault=0.1, warning=0.01), "rows dropped",
        "the remaining rows may be a different mixture than intended",
        "see the reasons under 'Not trained on'"),
    "shown_only": Check(FAULT, "rows dropped because the turn to learn is marked as context only",
        "nothing is learnt from them",
        "remove the mark (weight, train, loss, loss_mask) or the row; loss_on: assistant_turns learns earlier turns"),
    "ties": Check(NOTE, "rows whose answers are tied, which are not trained on",
        "usual for votes and ranks: a tie does not show which answer is better",
        "nothing, unless there are more than expected"),
    "answer_cut": Check(Above(fault=0.25, warning=0.05), "rows with an answer cut at max_length",
        "the end of the answer is not seen; if one side is cut more often, length decides instead of quality",
        "raise max_length, or remove such rows from the file"),
    "too_long_for_model": Check(FAULT, "rows longer than the model's number of positions",
        "the model never learnt these positions, so its log-probs there mean little",
        "lower max_length to the model's max_position_embeddings"),
    "contradictions": Check(Above(fault=0.01, warning=0.0), "pairs that also occur with chosen and rejected swapped",
        "the two cancel out; they cost time and keep accuracy low",
        "decide which one is right; for noisy labels use label_smoothing or a robust loss"),
    "negative_margins": Check(Above(fault=0.01, warning=0.0), "pairs whose rejected side has the higher score",
        "either the columns are swapped, or scores and labels disagree",
        "look at the first row; set column_map, or set min_margin: 0 to drop these pairs"),
    "no_bos": Check(WARNING, "rows without the BOS that the tokenizer puts before text",
        "harmless if the model's own chat template omits it; otherwise log-probs start from an unusual state",
        "start a chat template of your own with {{ bos_token }}"),
    "plain_text": Check(WARNING, "rows in plain text, to which the chat template is not applied",
        "a chat model is trained on text without turns and answers in another format than it learnt",
        "write prompt and sides as lists of {role, content}; do nothing if the text already has the format"),
    "same_row": Check(Above(warning=0.02), "rows that repeat an earlier row",
        "they count twice, and each epoch is more than one pass over them",
        "remove the copies"),
    "same_prompt": Check(NOTE, "rows with the prompt of an earlier row and other answers",
        "usual for ranked answers; otherwise frequent prompts have more weight",
        "nothing, if this is intended"),
    "prompt_cut": Check(Above(fault=0.25, warning=0.05), "rows with a prompt cut at max_prompt_length",
        "the beginning of the conversation is lost, including a system turn",
        "raise max_prompt_length, or set it to null"),
    "control": Check(WARNING, "rows with control characters other than tab and newline",
        "users do not write such tokens; often a file was converted wrongly",
        "look at the first row and clean the file"),
    "bidi": Check(WARNING, "rows with characters that override the direction of text",
        "a reviewer does not see what the model reads",
        "look at the first row with --rows or on the HTML page, where these characters are written out"),
    "invisible": Check(Above(warning=0.01), "rows with invisible characters (zero width, tags, soft hyphens)",
        "the same words become other tokens, and tags can hide text from people that the model reads",
        "remove these characters"),
    "replacement": Check(Above(warning=0.001), "rows with U+FFFD, the sign for text that was decoded wrongly",
        "the original characters are lost, and the model learns to write the sign",
        "convert the file again from its right encoding"),
    "surrogate": Check(WARNING, "rows with half of a surrogate pair, which is not valid text",
        "these rows are dropped",
        "convert the file again"),
    "special_tokens_in_plain_text": Check(NOTE, "rows in plain text that spell out special tokens",
        "they become the real tokens, which is right if the text holds a rendered template",
        "nothing, if this is intended"),
    "answer_changed": Check(WARNING, "rows with an answer that the chat template does not write letter for letter",
        "the model learns another answer than the one in the file",
        "look at the first row with --rows; trimmed spaces around an answer are common and harmless"),
    "turn_changed": Check(Above(warning=0.05), "rows with an earlier turn that the chat template omits or shortens",
        "the answer is learnt without its context; templates of reasoning models drop earlier thoughts on purpose",
        "look at the first row; use a template that writes all turns"),
    "tools_unused": Check(WARNING, "rows with tools that the chat template does not write",
        "the model does not see which tools it may call, but learns the calls that the template writes",
        "use a chat template that writes tools"),
    "would_merge": Check(NOTE, "rows whose prompt and answer would become other tokens if tokenized together",
        "the boundary is exact in training; at inference the first token may be split differently",
        "end prompts without a space and start answers with one"),
}
"""Checks that count rows."""

OTHERS: dict[str, Check] = {
    "tokenizer_too_large": Check(FAULT, "the tokenizer has {tokens} tokens and the model's embedding {vocab_size} rows",
        "some tokens have no embedding; training refuses to start",
        "use the tokenizer that belongs to the model"),
    "tokenizer": Check(WARNING, "{warning}",
        "a server that reads tokenizer.json alone gives the model other tokens than it is trained on",
        "save the tokenizer again with the transformers version that serves it, or correct tokenizer_config.json"),
    "untrained_tokens": Check(FAULT, "tokens of the training rows whose embedding was never trained: {tokens}",
        "their embedding is zero or below 1 % of the median norm: gradients are large, and adapters cannot change it",
        "set init_untrained_tokens: true (not with lora), or use a chat template whose tokens the model knows"),
    "started_tokens": Check(NOTE, "tokens of the training rows whose embedding was never trained: {tokens}",
        "they start at the mean of the trained rows",
        "nothing, if this is intended"),
    "length_bias": Check(NOTE, "the chosen side is the {way} one in {share} of the pairs that differ in length; the "
        "mean difference of all pairs is {difference} tokens",
        "length alone gives a reward accuracy of {accuracy} on such pairs, and the policy learns {way} answers",
        "compare with loss_type sigmoid_norm, simpo or ld_alpha, which weigh length less; watch the samples' length"),
    "no_evaluation": Check(NOTE, "no rows are held out for evaluation",
        "training metrics alone do not distinguish learning from memorizing",
        "set eval_fraction: 0.05, or eval_datasets"),
    "few_evaluation_rows": Check(NOTE, "{count} evaluation rows",
        "a measured accuracy of 0.60 may be anything from {low} to {high} (95 %)",
        "hold out more rows, or do not rank checkpoints by small differences"),
}
# fmt: on


def thresholds() -> list[str]:
    """Returns a line for every check that can be a fault."""
    lines = [
        "model: jdpo cannot train the model of config.json, or not at max_length; or its tokenizer is too large",
        "untrained_tokens: any token of the training rows has an embedding that was never trained (checked if weights "
        "are present), and init_untrained_tokens is not set",
    ]
    faults = {name: check for name, check in CHECKS.items() if check.above.fault is not None}
    for name, check in faults.items():
        lines.append(f"{name}: {f'more than {check.above.fault:.0%} of' if check.above.fault else 'any'} {check.what}")
    return lines
