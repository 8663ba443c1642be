"""The host's side of the engine: gives rows their work, and reads what they have drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jdpo.generation import row_programs
from jdpo.generation.row_programs import Orders, Report, Rows
from jdpo.generation.schedule import Layout, Schedule, choose_layout, columns_for, power_of_two
from jdpo.sharding.axes import num_batch_shards
from jdpo.sharding.placement import fetch

if TYPE_CHECKING:
    from jdpo.generation.engine import Engine

# Steps of one call of the device, after which the host looks at the rows.
STEPS = 32
# The cache begins with few slots, so that attention over the first tokens of long answers reads few. More slots from
# the start compile fewer programs, and cost little if reading them takes this share of the time for the weights.
_FEWEST_SLOTS, _SHARE_OF_WEIGHTS = 64, 1 / 8
# Prompts and columns per device of one large computation; many prompts at once use a device well, few waste nothing.
_MOST_PROMPTS, _MOST_COLUMNS = 8, 1024
# The number of end tokens is padded to a multiple, because another number would compile another program.
_END_IDS = 4
# Idle rows, as a share of all, at which the device returns for new work: each return costs about a step.
_PATIENCE = 1 / 16
# On a CPU a step with few rows is faster, which is worth compiling a program if the longest answer may take more steps.
_WORTH_COMPILING = 64


class Answering:
    """The answers of one call, from the first prompt to the last token.

    Args:
      engine: whose model draws them.
      prompts: token ids; see `Engine.run`.
      samples: numbers of the answers to each prompt.
      num_steps: largest number of tokens that a row draws before they are yielded, at most `STEPS`.
    """

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
            rows = None if rows is None else self._compacted(rows)
            work, fresh = self._schedule.next_work(), np.zeros(self._layout, bool)
            for at, sample in work.begun.items():
                fresh[at], self._samples[at], self._counts[at] = True, sample, 0
            working = self._schedule.working()
            if not working:
                return
            rows = self._insert(self._with_slots(rows, working), work.admitted)
            rows, report = self._advance(self._shared(rows, work.shared), fresh)
            for at, answer in working.items():
                first, last = self._counts[at], report.count[at]
                # Index 0 has the first token of a fresh row; other rows' new tokens begin at index 1.
                new = slice(0, last) if fresh[at] else slice(1, 1 + last - first)
                is_complete = not report.active[at]
                if is_complete:
                    self._schedule.finish(*at)
                yield answer, (report.tokens[(new, *at)].tolist(), report.logps[(new, *at)].tolist(), is_complete)
            self._counts = np.array(report.count)

    def _compacted(self, rows: Rows) -> Rows:
        """Drops three of four places when they have no use any more."""
        num_places, remainder = divmod(self._layout.places, 4 * self._num_shards)
        working = self._schedule.working()
        if jax.default_backend() != "cpu" or remainder or not num_places or not working:
            return rows
        most_left = self._engine.sampling.max_new_tokens - min(int(self._counts[at]) for at in working)
        kept = self._schedule.compact(num_places * self._num_shards) if most_left > _WORTH_COMPILING else None
        if kept is None:
            return rows
        self._layout = Layout(len(kept), self._layout.rows)
        self._digests, self._samples, self._counts = self._digests[kept], self._samples[kept], self._counts[kept]
        selected: Rows = self._engine.call(row_programs.select, rows, np.array(kept, np.int32))
        return selected

    def _shared(self, rows: Rows, shared: Mapping[int, int]) -> Rows:
        """Copies prompts to places that share the answers to them."""
        if not shared:
            return rows
        source = np.arange(self._layout.places, dtype=np.int32)
        for place, giving in shared.items():
            source[place] = giving
        self._digests = self._digests[source]
        copied: Rows = self._engine.call(row_programs.share, rows, source)
        return copied

    def _columns(self, prompt: int) -> int:
        return min(columns_for(len(self._prompts[prompt])), self._engine.model.config.max_positions)

    def _with_slots(self, rows: Rows | None, working: Mapping[tuple[int, int], tuple[int, int]]) -> Rows:
        """Returns rows with enough slots for the prompts and for the tokens of the next steps."""
        call, most = self._engine.call, self._engine.sampling.max_new_tokens
        needed = min(max(int(self._counts[at]) for at in working) + self._num_steps, most)
        columns = max(self._columns(prompt) for prompt, _ in working.values())
        prompt_slots = max(self._slots[0], columns, min(self._cheap_slots(self._layout.places), _MOST_COLUMNS))
        tail_slots = max(power_of_two(needed), self._cheap_slots(math.prod(self._layout)))
        tail_slots = max(self._slots[1], min(tail_slots, power_of_two(most)))
        slots = {"prompt_slots": prompt_slots, "tail_slots": tail_slots}
        if rows is None:
            places, rows_per_place = self._layout
            shape = {"num_places": places, "num_rows": rows_per_place}
            rows = call(row_programs.empty_rows, model=self._engine.model, **shape, **slots)
        elif (prompt_slots, tail_slots) != self._slots:
            rows = call(row_programs.resize, rows, **slots)
        self._slots = prompt_slots, tail_slots
        return rows

    def _cheap_slots(self, num_rows: int) -> int:
        """Returns a number of slots per row that costs little to read, at least `_FEWEST_SLOTS`."""
        config, engine = self._engine.model.config, self._engine
        num_values = 2 * max(1, len(config.layer_windows)) * config.num_kv_heads * config.head_dim * num_rows
        most = _SHARE_OF_WEIGHTS * engine.weight_bytes / (num_values * np.dtype(engine.model.compute_dtype).itemsize)
        return max(_FEWEST_SLOTS, power_of_two(int(most) + 1) // 2)

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
        logits, keys = engine.call(row_programs.prefill, engine.params, tokens, lengths, model=engine.model)
        inserted: Rows = engine.call(row_programs.insert, rows, places, lengths, logits, keys)
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
            uses_places=np.bool_(self._schedule.could_use_places()),
            patience=np.int32(max(1, int(fresh.size * _PATIENCE))),
        )
        static = {
            "model": engine.decoder,
            # Another seed or length compiles no second program.
            "sampling": dataclasses.replace(sampling, seed=0, max_new_tokens=1),
            "most_steps": STEPS,
        }
        rows, report = engine.call(row_programs.advance, engine.weights, rows, orders, **static)
        return rows, fetch(report)


def prompt_digest(prompt: Sequence[int]) -> np.ndarray:
    """Returns 64 bits of a digest of a prompt's tokens, uint32 [2], from which its answers' keys are made."""
    digest = hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).digest()
    return np.frombuffer(digest[:8], "<u4").astype(np.uint32)
