"""The generation engine: answers of a model to prompts of token ids.

A prompt is computed once, and all its answers read its keys and values. Answers are computed in rows, many at the same
time; a row whose answer is complete begins another one while the others continue.

Every draw has its own key, made from the seed, the prompt's tokens, the sample's number and the token's index in the
answer. So an answer does not depend on the other answers of a batch, on their order, or on the number of devices. (The
logits are sums of floats, whose last bits may depend on them. In float32 a draw almost never does; in bfloat16 it may.)
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jdpo.generation import row_programs
from jdpo.generation.answering import STEPS, Answering
from jdpo.generation.values import FinishReason, Sampling
from jdpo.models.transformer import Params, Transformer, Weights
from jdpo.sharding.on_mesh import OnMesh


class Drawn(NamedTuple):
    """One answer.

    Attributes:
      prompt: index of its prompt in the argument of `Engine.run`.
      sample: its number among the answers to the prompt, from 0.
      tokens: its token ids, including the token that ends it.
      logps: log-probability of each token under the model itself (temperature 1, all tokens).
      finish_reason: "stop" if an end token ends it, "length" if it is cut off at `max_new_tokens` or because the model
        has no positions left.
    """

    prompt: int
    sample: int
    tokens: list[int]
    logps: list[float]
    finish_reason: FinishReason


class Engine:
    """Answers prompts with one model and one way of drawing.

    Keeps a second copy of the weights, in the compute dtype and by layers, from which steps read fastest.

    Args:
      model: the model; its compute dtype is that of the computation and of the cache.
      params: its weights, plain or with adapters, placed on `mesh` if there is one.
      end_token_ids: an answer ends after the first of these tokens.
      sampling: how tokens are drawn.
      mesh: devices that share the work; None: the default device. Prompts are split over the batch axes, heads over
        `tensor`. With several processes all call the engine alike, and each gets all answers.
      max_slots: number of answers computed at the same time (on a mesh it is rounded up to divide evenly).

    Attributes:
      decoder: the model with unrolled layers, by which answers are drawn.
      weights, weight_bytes: those of `decoder`.
      prefills: how often prompts were computed, by the shape (prompts, columns) of the computation.

    Raises:
      ValueError: max_slots is below 1, an end token is not in the model's vocabulary, or the model is a reward model.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params | Weights,
        *,
        end_token_ids: Sequence[int],
        sampling: Sampling,
        mesh: Mesh | None = None,
        max_slots: int = 64,
    ) -> None:
        if max_slots < 1:
            raise ValueError(f"max_slots: expected 1 or more, found {max_slots}")
        if model.config.reward_head:
            raise ValueError("this is a reward model, which scores answers: use a language model to generate them")
        # Rematerialization is for gradients, and flax would wrap every layer for it.
        self.model, self.params = model.clone(remat="none"), params
        self.sampling, self.mesh, self.max_slots = sampling, mesh, max_slots
        self.end_token_ids = tuple(sorted({int(token) for token in end_token_ids}))
        self._check_tokens(self.end_token_ids, "end_token_ids")
        self.prefills: Counter[tuple[int, int]] = Counter()
        self.decoder = row_programs.decoder_of(self.model)
        self.weights = self.call(row_programs.decoding_weights, params, model=self.model)
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights))

    def with_sampling(self, sampling: Sampling) -> Engine:
        """Returns an engine with the same model and weights that draws in another way."""
        other = object.__new__(Engine)
        other.__dict__.update(self.__dict__, sampling=sampling, prefills=Counter())
        return other

    def run(self, prompts: Sequence[Sequence[int]], num_samples: int = 1) -> Iterator[Drawn]:
        """Yields `num_samples` answers to every prompt: all of the first prompt, then all of the second, and so on.

        Args:
          prompts: token ids; equal prompts get equal answers.

        Raises:
          ValueError: a prompt is empty, too long for the model, or has a token that the model does not know.
        """
        return self._in_order(self.run_as_completed(prompts, num_samples), len(prompts), num_samples)

    def run_as_completed(self, prompts: Sequence[Sequence[int]], num_samples: int = 1) -> Iterator[Drawn]:
        """Yields the answers of `run` as they are completed; the order follows from the arguments, not from timing.

        Raises:
          ValueError: as for `run`.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples: expected 1 or more, found {num_samples}")
        self._check(prompts)
        return self._completed(Answering(self, prompts, range(num_samples), num_steps=STEPS))

    def stream(self, prompt: Sequence[int], sample: int = 0) -> Iterator[tuple[int, float]]:
        """Yields (token, log-probability) of one answer, token by token; `run` draws the very same tokens.

        Args:
          sample: the answer's number, see `Drawn`.

        Raises:
          ValueError: as for `run`.
        """
        if sample < 0:
            raise ValueError(f"sample: expected 0 or more, found {sample}")
        self._check([prompt])
        work = Answering(self, [prompt], range(sample, sample + 1), num_steps=1)
        return (pair for _, new in work.advance_all() for pair in zip(*new[:2], strict=True))

    def _completed(self, work: Answering) -> Iterator[Drawn]:
        drawn: dict[tuple[int, int], tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
        for answer, (new_tokens, new_logps, is_complete) in work.advance_all():
            tokens, logps = drawn[answer]
            tokens += new_tokens
            logps += new_logps
            if is_complete:
                del drawn[answer]
                yield Drawn(*answer, tokens, logps, "stop" if tokens[-1] in self.end_token_ids else "length")

    def _in_order(self, answers: Iterator[Drawn], num_prompts: int, num_samples: int) -> Iterator[Drawn]:
        early: dict[tuple[int, int], Drawn] = {}
        order = itertools.product(range(num_prompts), range(num_samples))
        due = next(order, None)
        for answer in answers:
            early[answer.prompt, answer.sample] = answer
            while due in early:
                yield early.pop(due)
                due = next(order, None)

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        most = self.model.config.max_positions
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {index} is empty: a model needs at least one token to continue")
            if len(prompt) >= most:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens, which leaves none of the model's {most} positions for "
                    "an answer"
                )
            self._check_tokens(prompt, f"prompt {index}")

    def _check_tokens(self, tokens: Sequence[int], where: str) -> None:
        vocab_size = self.model.config.vocab_size
        unknown = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise ValueError(
                f"{where}: found the token id {unknown}, but the model's vocabulary has {vocab_size} tokens; use the "
                "tokenizer of this model"
            )

    def call(self, program: Any, *args: Any, **static: Any) -> Any:
        """Runs a program on the mesh."""
        return (program if self.mesh is None else OnMesh(self.mesh, program))(*args, **static)
