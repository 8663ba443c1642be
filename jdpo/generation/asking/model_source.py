"""Answers of a loaded model, for the files of `jdpo generate`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from jdpo._version import __version__
from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens.prompt_tokens import encode_prompt
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.generation.loaded_model import LoadedModel
from jdpo.generation.values import Answer, Question, Sampling, Unanswered

TOO_LONG = "the prompt leaves none of the model's positions for an answer"

BATCH_NOTE = "bfloat16: the mesh, the device and the questions of a batch may change an answer"


class ModelSource:
    """Answers questions with a model in this process."""

    def __init__(
        self, model: LoadedModel, sampling: Sampling, on_answer: Callable[[int], None] = lambda num_tokens: None
    ) -> None:
        """
        Args:
          model: the model to ask.
          sampling: how its answers are drawn.
          on_answer: called with the number of tokens of each answer, as soon as it is drawn.
        """
        self._model, self._sampling, self._on_answer = model, sampling, on_answer

    def describe(self) -> dict[str, Any]:
        """Returns digests and precision; where rounding may change an answer, also what the rounding depends on."""
        model = self._model
        device = model.mesh.devices.flat[0]
        computed_on = {
            "mesh": {axis: size for axis, size in model.mesh.shape.items() if size > 1},
            "device": device.device_kind,
        }
        description: dict[str, Any] = {
            "model_digest": model.digest,
            "template_digest": model.tokenizer.digest,
            "end_token_ids": list(model.end_token_ids),
            "dtype": model.dtype,
            # Another version may draw or round in another way, and a folder has answers of one kind.
            "jdpo": __version__,
            "jax": importlib.metadata.version("jax"),
            "about": {"model": model.name},
        }
        # In float32 on CPUs, tokens are the same for every mesh and batch.
        if model.dtype == "float32" and device.platform == "cpu":
            description["about"] |= computed_on
        else:
            description |= {**computed_on, "note": BATCH_NOTE}
        return description

    def answers(
        self, questions: Sequence[Question], num_samples: int, following: Sequence[Question] = ()
    ) -> list[Answer | Unanswered]:
        """Draws `num_samples` answers to each question; one too long for the model has none, with that reason.

        `following` is not begun: in bfloat16 answers depend on what shares their batch.
        """
        rows = [RowTexts(one.prompt, (), one.origin, one.tools, one.template_kwargs) for one in questions]
        encoded = [self._encoded(row) for row in rows]
        places = [place for place, ids in enumerate(encoded) if not isinstance(ids, str)]
        found: list[list[Answer | Unanswered]] = [[] for _ in questions]
        for question, ids, of_question in zip(questions, encoded, found, strict=True):
            if isinstance(ids, str):
                of_question += [Unanswered(question.prompt_id, sample, ids) for sample in range(num_samples)]
        prompts = [ids for ids in encoded if not isinstance(ids, str)]
        for drawn in self._model.draw(prompts, num_samples, self._sampling):
            place = places[drawn.prompt]
            answer = self._model.answer_of(drawn, questions[place].prompt_id, rows[place], prompts[drawn.prompt])
            found[place].append(answer)
            self._on_answer(len(drawn.tokens))
        # Shorter answers are complete earlier.
        return [one for of_question in found for one in sorted(of_question, key=lambda one: one.sample)]

    def _encoded(self, row: RowTexts) -> list[int] | str:
        """Returns the tokens of a prompt, or why it cannot be answered."""
        ids = encode_prompt(row, self._model.tokenizer)
        if isinstance(ids, Dropped):
            return ids.reason
        return TOO_LONG if len(ids) >= self._model.model.config.max_positions else ids
