"""The distance between two models: exact divergences of the next token, on the answers of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jdpo.comparison.compare_document import Figure, Values
from jdpo.comparison.intervals import mean_of
from jdpo.comparison.packed_values import Divergences, completion_divergences
from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens.prompt_tokens import encode_prompt
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.generation.answer_files import AnswerFolder
from jdpo.generation.loaded_model import LoadedModel
from jdpo.models.transformer import float32_products
from jdpo.types import TokenizedCompletion

ByAnswer = dict[tuple[str, int], Divergences]
"""(prompt_id, sample) -> divergences at the tokens of an answer; forward is KL(after || before)."""


class Distances(NamedTuple):
    """Divergences on the answers of each model, empty if there are none, and the reason for that."""

    on_before: ByAnswer
    on_after: ByAnswer
    warnings: list[str]


def distances_of(
    first: LoadedModel,
    second: LoadedModel,
    before: AnswerFolder,
    after: AnswerFolder,
    log: Callable[[str], None],
) -> Distances:
    """Computes divergences on the answers of both models.

    Args:
      first, second: the models before and after.
      before, after: their answers.
    """
    if fault := _why_no_divergence(first, second):
        return Distances({}, {}, [f"no divergence between the models: {fault}"])
    log(f"divergence between {first.name} and {second.name}")
    found = []
    with float32_products(second.model):
        for own, answers in ((first, before), (second, after)):
            rows = dict(_answer_rows(own, answers))
            if not rows:  # every prompt was too long for the model
                return Distances({}, {}, [f"no divergence between the models: {own.name} gave no answer"])
            # In this order, so that forward is KL(after || before) whoever gave the answers.
            values = completion_divergences(second, first, list(rows.values()), lambda num_rows: None)
            found.append(dict(zip(rows, values, strict=True)))
    return Distances(found[0], found[1], [])


def _why_no_divergence(first: LoadedModel, second: LoadedModel) -> str:
    sizes = [one.model.config.vocab_size for one in (first, second)]
    if sizes[0] != sizes[1]:
        return f"their vocabularies have {sizes[0]:,} and {sizes[1]:,} tokens"
    # Embeddings of equal size may belong to tokenizers that have nothing in common.
    if first.tokenizer.hf.get_vocab() != second.tokenizer.hf.get_vocab():
        return "the same ids mean other tokens in their vocabularies"
    return ""


def _answer_rows(loaded: LoadedModel, answers: AnswerFolder) -> Iterator[tuple[tuple[str, int], TokenizedCompletion]]:
    """Yields the tokens of each answer with those of its prompt."""
    prompts: dict[str, list[int]] = {}
    for answer in answers.answers:
        if answer.prompt_id not in prompts:
            question = answers.questions[answer.prompt_id]
            row = RowTexts(question.prompt, (), question.origin, question.tools, question.template_kwargs)
            ids = encode_prompt(row, loaded.tokenizer)
            assert not isinstance(ids, Dropped), ids  # it has been answered
            prompts[answer.prompt_id] = ids
        prompt = prompts[answer.prompt_id]
        assert answer.tokens is not None
        tokens = np.array([*prompt, *answer.tokens], np.int32)
        mask = np.arange(len(tokens)) >= len(prompt)
        yield (answer.prompt_id, answer.sample), TokenizedCompletion(tokens, mask, answer.prompt_id)


def divergence_figures(distances: Distances) -> Iterator[Figure]:
    """Yields exact divergences: per answer, and per token on the answers of either model.

    A title that names no answers is about those of the first model in KL(first || second).
    """
    if not distances.on_after:
        return
    forward, reverse = "KL(after || before)", "KL(before || after)"
    sources = {"after": distances.on_after, "before": distances.on_before}
    for name, title, source, is_forward, per_token in (
        ("kl", f"{forward} per answer", "after", True, False),
        ("kl_per_token", f"{forward} per token", "after", True, True),
        ("kl_reverse", f"{reverse} per answer", "before", False, False),
        ("kl_reverse_per_token", f"{reverse} per token", "before", False, True),
        ("kl_per_token.on_before", f"{forward} per token, on answers before", "before", True, True),
        ("kl_reverse_per_token.on_after", f"{reverse} per token, on answers after", "after", False, True),
    ):
        of = sources[source]
        sums = np.array([(one.forward if is_forward else one.backward).sum(dtype=np.float64) for one in of.values()])
        tokens = np.array([len(one.forward) if per_token else 1 for one in of.values()], float)
        prompts = np.array([prompt_id for prompt_id, _ in of])
        # Weighted by tokens, a mean over answers is one over all tokens.
        estimate = mean_of(sums / tokens, prompts, tokens, at_least=0)
        yield Figure(
            name=name,
            title=title,
            section="divergence",
            unit="nats/token" if per_token else "nats",
            better="neither",
            all=Values(after=estimate, num_prompts=len(np.unique(prompts)), num_rows=len(of)),
            neutral=None,
        )
