"""Samples answers of the models: the same questions, many times, at temperature 1."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jdpo.durable import write_durably
from jdpo.quickstart.corpus import HELD_OUT_PHRASINGS, TRAINING_PHRASINGS, Split, capital_question
from jdpo.quickstart.experiment import DPO, PRETRAIN, STANDARD, Workplace
from jdpo.quickstart.experiment_settings import Settings

ASKED = 20
_NEW_TOKENS = 8
_SHOWN = 4


class Sampled(NamedTuple):
    """Answers to one question.

    Attributes:
      about: what the question tests.
      right: the right answer.
      answers: run -> answer -> how often its model gave it, most frequent first.
    """

    question: str
    about: str
    right: str
    answers: dict[str, dict[str, int]]


def sampled_questions(split: Split) -> list[tuple[str, str, str]]:
    """Returns (question, what it tests, right answer) for trained and held-out countries, and a held-out phrasing."""
    # The first of each kind, so that two quickstarts show the same questions.
    trained_mistaken = next(country for country in split.trained if country.mistaken)
    held_out_known = next(country for country in split.held_out if not country.mistaken)
    held_out_mistaken = next(country for country in split.held_out if country.mistaken)
    ireland = split.trained[0]
    asked = [
        (ireland, TRAINING_PHRASINGS[0], "corrected"),
        (trained_mistaken, TRAINING_PHRASINGS[0], "corrected"),
        (ireland, HELD_OUT_PHRASINGS[0], "corrected, new phrasing"),
        (held_out_known, TRAINING_PHRASINGS[0], "never corrected"),
        (held_out_mistaken, TRAINING_PHRASINGS[0], "never corrected"),
    ]
    return [(capital_question(country, phrasing), about, country.capital) for country, phrasing, about in asked]


def sample_answers(place: Workplace, settings: Settings) -> list[Sampled]:
    """Samples answers of the three models, or reads the answers sampled before."""
    if not place.samples.exists():
        questions = sampled_questions(settings.split)
        texts = [question for question, _, _ in questions]
        found = {name: _ask(place, name, texts, settings.seed) for name in (PRETRAIN, STANDARD, DPO)}
        sampled = [
            {
                "question": question,
                "about": about,
                "right": right,
                "answers": {name: answers[index] for name, answers in found.items()},
            }
            for index, (question, about, right) in enumerate(questions)
        ]
        write_durably(place.samples, json.dumps(sampled, indent=1, ensure_ascii=False) + "\n")
    return [Sampled(**values) for values in json.loads(place.samples.read_text(encoding="utf-8"))]


def _ask(place: Workplace, name: str, questions: Sequence[str], seed: int) -> list[dict[str, int]]:
    """Loads the exported model of a run and samples ASKED answers to every question."""
    from jdpo.data.tokens.tokenizer import load_tokenizer
    from jdpo.generation.engine import Engine
    from jdpo.generation.values import Sampling
    from jdpo.models.families import read_model_config
    from jdpo.models.transformer import Transformer
    from jdpo.models.weights.loading import load_params

    folder = place.model(name)
    model = Transformer(read_model_config(folder))
    tokenizer = load_tokenizer(folder, chat_template=None)
    prompts = tokenizer.encode(
        [tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True) for text in questions]
    )
    engine = Engine(
        model,
        load_params(folder, model),
        end_token_ids=tokenizer.end_token_ids,
        sampling=Sampling(max_new_tokens=_NEW_TOKENS, seed=seed),
    )
    texts: list[list[str]] = [[] for _ in questions]
    for drawn in engine.run(prompts, ASKED):
        texts[drawn.prompt].append(str(tokenizer.hf.decode(drawn.tokens, skip_special_tokens=True)).strip())
    return [dict(Counter(answers).most_common()) for answers in texts]


def in_words(answers: dict[str, int]) -> str:
    """Formats answers with their counts; rare answers are summed up.

    >>> in_words({"Dublin": 12, "Cork": 6, "Galway": 2})
    'Dublin 12, Cork 6, Galway 2'
    """
    shown = list(answers.items())[:_SHOWN]
    rest = sum(answers.values()) - sum(count for _, count in shown)
    parts = [f"{answer} {count}" for answer, count in shown] + ([f"others {rest}"] if rest else [])
    return ", ".join(parts)
