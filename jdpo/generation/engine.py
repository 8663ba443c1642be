"""The generation engine: answers of a model to prompts of token ids.

A prompt is computed once, and all its answers read its keys and values. Answers are computed in rows, many at the same
time; a row whose answer is complete begins another one while the others go on.

Every draw has its own key, made from the seed, the prompt's tokens, the sample's number and the token's index in the
answer. So an answer does not depend on the other answers of a batch, on their order, or on the number of devices. (The
logits are sums of floats, whose last bits may depend on them. In float32 a draw almost never does; in bfloat16 it may.)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jdpo.generation import row_programs
from jdpo.generation.row_programs import Orders, Report, Rows
from jdpo.generation.schedule import Schedule, choose_layout, slots_for
from jdpo.generation.values import FinishReason, Sampling
from jdpo.models.transformer import Params, Transformer, Weights
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.on_mesh import OnMesh
from jdpo.sharding.placement import fetch

# Steps of one call of the device, after which the host looks at the rows.
_STEPS = 32
# Tails begin with this many slots, so that attention over the first tokens of long answers reads few.
_FIRST_TAIL_SLOTS = 64
# Prompts and columns per device of one large computation; many prompts at once use a device well, few waste nothing.
_MOST_PROMPTS, _MOST_COLUMNS = 8, 1024
# The number of end tokens is padded to a multiple, because another number would compile another program.
_END_IDS = 4
# Idle rows, as a share of all, at which the device returns for new work: each return costs about a step.
_PATIENCE = 1 / 16


class Drawn(NamedTuple):
    """One answer.

    Attributes:
      prompt: index of its prompt in the argument of `Engine.run`.
      sample: its number among the answers to the prompt, from 0.
      tokens: its token ids, including the token that ends it.
      logps: log-probability of each token under the model itself (temperature 1, all tokens).
      finish_reason: "stop" if an end token ends it, "length" if it is cut off at `max_new_tokens`.
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
      prefills: how often prompts were computed, by the shape (prompts, columns) of the computation.

    Raises:
      ValueError: max_slots is below 1, or an end token is not in the model's vocabulary.
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
        # Rematerialization is for gradients, and flax would wrap every layer for it.
        self.model, self.params = model.clone(remat="none"), params
        self.sampling, self.mesh, self.max_slots = sampling, mesh, max_slots
        self.end_token_ids = tuple(sorted({int(token) for token in end_token_ids}))
        self._check_tokens(self.end_token_ids, "end_token_ids")
        self.prefills: Counter[tuple[int, int]] = Counter()
        self._decoder = self.model.clone(unrolled=True)
        self._weights = self._call(row_programs.decoding_weights, params, model=self.model)

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
        if num_samples < 1:
            raise ValueError(f"num_samples: expected 1 or more, found {num_samples}")
        self._check(prompts)
        return self._in_order(prompts, num_samples)

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
        work = _Work(self, [prompt], range(sample, sample + 1), num_steps=1)
        return (pair for _, new in work.advance_all() for pair in zip(*new[:2], strict=True))

    def _in_order(self, prompts: Sequence[Sequence[int]], num_samples: int) -> Iterator[Drawn]:
        work, complete = _Work(self, prompts, range(num_samples), num_steps=_STEPS), {}
        tokens: dict[tuple[int, int], tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
        order = ((prompt, sample) for prompt in range(len(prompts)) for sample in range(num_samples))
        due = next(order, None)
        for answer, (new_tokens, new_logps, is_complete) in work.advance_all():
            tokens[answer][0].extend(new_tokens)
            tokens[answer][1].extend(new_logps)
            if is_complete:
                ids, logps = tokens.pop(answer)
                reason: FinishReason = "stop" if ids[-1] in self.end_token_ids else "length"
                complete[answer] = Drawn(*answer, ids, logps, reason)
            while due in complete:
                yield complete.pop(due)
                due = next(order, None)

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        most, new = self.model.config.max_positions, self.sampling.max_new_tokens
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {index} is empty: a model needs at least one token to continue")
            if len(prompt) + new > most:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {new} these are more than the "
                    f"model's {most} positions"
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

    def _call(self, program: Any, *args: Any, **static: Any) -> Any:
        """Runs a program on the mesh."""
        return (program if self.mesh is None else OnMesh(self.mesh, program))(*args, **static)


class _Work:
    """The answers of one call, from the first prompt to the last token."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], samples: Sequence[int], *, num_steps: int
    ) -> None:
        self._engine, self._prompts, self._num_steps = engine, prompts, num_steps
        self._num_shards = 1 if engine.mesh is None else num_batch_shards(engine.mesh)
        self._layout = choose_layout(max(1, len(prompts)), len(samples), engine.max_slots, self._num_shards)
        # Short prompts first: prompts of similar lengths share the cache, whose slots grow with the longest.
        order = sorted(range(len(prompts)), key=lambda index: (self._columns(index), index))
        self._schedule = Schedule(order, samples, self._layout)
        self._digests = np.zeros((self._layout.places, 2), np.uint32)
        self._samples = np.zeros(self._layout, np.int32)
        # The host's copy of the rows' counts.
        self._counts = np.zeros(self._layout, np.int32)
        self._slots = (0, 0)

    def advance_all(self) -> Iterator[tuple[tuple[int, int], tuple[list[int], list[float], bool]]]:
        """Yields ((prompt, sample), (new tokens, their logps, is complete)) until all answers are complete."""
        rows: Rows | None = None
        while True:
            admitted, fresh = self._schedule.admit(), np.zeros(self._layout, bool)
            for at, sample in self._schedule.assign().items():
                fresh[at], self._samples[at], self._counts[at] = True, sample, 0
            working = self._schedule.working()
            if not working:
                return
            rows = self._insert(self._with_slots(rows, working), admitted)
            rows, report = self._advance(rows, fresh)
            for at, answer in working.items():
                first, last = self._counts[at], report.count[at]
                # Index 0 has the first token of a fresh row; other rows' new tokens begin at index 1.
                new = slice(0, last) if fresh[at] else slice(1, 1 + last - first)
                is_complete = not report.active[at]
                if is_complete:
                    self._schedule.finish(*at)
                yield answer, (report.tokens[(new, *at)].tolist(), report.logps[(new, *at)].tolist(), is_complete)
            self._counts = np.array(report.count)

    def _columns(self, prompt: int) -> int:
        return min(slots_for(len(self._prompts[prompt])), self._engine.model.config.max_positions)

    def _with_slots(self, rows: Rows | None, working: Mapping[tuple[int, int], tuple[int, int]]) -> Rows:
        """Returns rows with enough slots for the prompts and for the tokens of the next steps."""
        call, most = self._engine._call, self._engine.sampling.max_new_tokens
        needed = min(max(int(self._counts[at]) for at in working) + self._num_steps, most)
        prompt_slots = max(self._slots[0], max(self._columns(prompt) for prompt, _ in working.values()))
        tail_slots = max(self._slots[1], min(slots_for(max(needed, _FIRST_TAIL_SLOTS)), slots_for(most)))
        slots = {"prompt_slots": prompt_slots, "tail_slots": tail_slots}
        if rows is None:
            places, rows_per_place = self._layout
            shape = {"num_places": places, "num_rows": rows_per_place}
            rows = call(row_programs.empty_rows, model=self._engine.model, **shape, **slots)
        elif (prompt_slots, tail_slots) != self._slots:
            rows = call(row_programs.resize, rows, **slots)
        self._slots = prompt_slots, tail_slots
        return rows

    def _insert(self, rows: Rows, admitted: Mapping[int, int]) -> Rows:
        """Computes the prompts of places that begin one."""
        by_columns: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for place, prompt in admitted.items():
            self._digests[place] = prompt_digest(self._prompts[prompt])
            by_columns[self._columns(prompt)].append((place, prompt))
        for columns, group in by_columns.items():
            large = max(1, min(_MOST_PROMPTS, _MOST_COLUMNS // columns)) * self._num_shards
            while group:
                size = large if len(group) >= large else self._num_shards
                rows = self._insert_batch(rows, group[:size], size, columns)
                group = group[size:]
        return rows

    def _insert_batch(self, rows: Rows, batch: Sequence[tuple[int, int]], size: int, columns: int) -> Rows:
        engine, tokens = self._engine, np.zeros((size, columns), np.int32)
        # One token of padding prompts is real, as attention needs one; they go to a place past the last one.
        lengths, places = np.ones(size, np.int32), np.full(size, self._layout.places, np.int32)
        for index, (place, prompt) in enumerate(batch):
            ids = self._prompts[prompt]
            tokens[index, : len(ids)], lengths[index], places[index] = ids, len(ids), place
        engine.prefills[size, columns] += 1
        logits, keys = engine._call(row_programs.prefill, engine.params, tokens, lengths, model=engine.model)
        inserted: Rows = engine._call(row_programs.insert, rows, places, lengths, logits, keys)
        return inserted

    def _advance(self, rows: Rows, fresh: np.ndarray) -> tuple[Rows, Report]:
        engine, sampling, ids = self._engine, self._engine.sampling, self._engine.end_token_ids
        orders = Orders(
            seed=np.uint32(sampling.seed),
            digests=self._digests,
            samples=self._samples,
            fresh=fresh,
            end_ids=np.array(ids + (-1,) * (-len(ids) % _END_IDS or _END_IDS), np.int32),
            max_new_tokens=np.int32(sampling.max_new_tokens),
            num_steps=np.int32(self._num_steps),
            has_waiting=self._schedule.has_waiting(),
            has_prompts=np.bool_(self._schedule.has_prompts()),
            patience=np.int32(max(1, int(fresh.size * _PATIENCE))),
        )
        static = {
            "model": engine._decoder,
            # Another seed or length compiles no second program.
            "sampling": dataclasses.replace(sampling, seed=0, max_new_tokens=1),
            "most_steps": _STEPS,
        }
        rows, report = engine._call(row_programs.advance, engine._weights, rows, orders, **static)
        return rows, fetch(report)


def prompt_digest(prompt: Sequence[int]) -> np.ndarray:
    """Returns 64 bits of a digest of a prompt's tokens, uint32 [2], from which its answers' keys are made."""
    digest = hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).digest()
    return np.frombuffer(digest[:8], "<u4").astype(np.uint32)
