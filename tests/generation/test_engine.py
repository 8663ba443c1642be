from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jdpo.generation.engine import Drawn, Engine
from jdpo.generation.values import Sampling
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer
from jdpo.models.weights.loading import load_params

GOLDEN = Path(__file__).parents[1] / "golden" / "logits"
PROMPTS = [[3, 14, 15, 9, 26, 5], [35], [8, 9, 7, 9, 3, 2, 38, 4, 6, 2, 6, 4]]


@pytest.fixture(scope="module")
def loaded() -> tuple[Transformer, Any]:
    model = Transformer(read_model_config(GOLDEN / "qwen3"))
    return model, load_params(GOLDEN / "qwen3", model)


def engine(loaded: tuple[Transformer, Any], **options: Any) -> Engine:
    sampling = Sampling(**{"max_new_tokens": 8, "top_p": 0.95, **options})
    return Engine(*loaded, end_token_ids=[4], sampling=sampling, max_slots=4)


def tokens(answers: list[Drawn]) -> dict[tuple[int, int], list[int]]:
    return {(answer.prompt, answer.sample): answer.tokens for answer in answers}


def test_answers_are_in_order_and_do_not_depend_on_the_batch(loaded: tuple[Transformer, Any]) -> None:
    together = list(engine(loaded).run(PROMPTS, 3))
    assert [(answer.prompt, answer.sample) for answer in together] == [(p, s) for p in range(3) for s in range(3)]
    assert len({tuple(answer.tokens) for answer in together}) == 9
    alone = [tokens(list(engine(loaded).run([prompt], 3))) for prompt in PROMPTS]
    assert tokens(together) == {(p, s): found for p in range(3) for (_, s), found in alone[p].items()}
    assert [token for token, _ in engine(loaded).stream(PROMPTS[2], 1)] == tokens(together)[2, 1]
    assert tokens(list(engine(loaded, seed=1).run(PROMPTS, 3))) != tokens(together)


def test_bad_prompts_are_named(loaded: tuple[Transformer, Any]) -> None:
    assert list(engine(loaded).run([], 2)) == []
    for prompts, message in (
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 60], r"prompt 0 has 60 tokens.* 64 positions"),
        ([[1, 40]], r"prompt 0 has the token id 40"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(loaded).run(prompts)
