"""Batches of a step's rows, padded and packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo.config import DPOConfig, SFTConfig, load_config
from jdpo.data.batching.packing_plan import item_sizes
from jdpo.data.batching.packing_shapes import PackedShape
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.training.fit.compilation import shapes_of
from jdpo.training.setup.batches import (
    BatchLayout,
    PackedBatches,
    PaddedBatches,
    batch_layout,
    demanding_shapes,
)
from jdpo.training.setup.row_order import check_scores, preparation_of
from jdpo.training.setup.tasks import Task, task_for
from tests.conftest import write_jsonl

Words = Callable[..., list[str]]
MAX_TOKENS = 16384


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3, 5, 7, 64])
def test_layout_holds_every_row_and_respects_its_bounds(micro_batch_size: int | None, num_shards: int) -> None:
    layout = batch_layout(
        64, micro_batch_size=micro_batch_size, max_tokens=MAX_TOKENS, num_shards=num_shards, row_tokens=2048
    )
    most = micro_batch_size or MAX_TOKENS // 2048
    assert layout.num_slots >= 64
    assert layout.rows_per_micro % num_shards == 0
    assert layout.rows_per_micro // num_shards <= most
    assert layout.num_micro == -(-64 // (most * num_shards)), "as few as the bound allows"
    assert layout.num_slots - 64 < layout.num_micro * num_shards, "as little padding as equal micro-batches allow"


def test_a_row_longer_than_the_budget_still_gets_a_micro_batch() -> None:
    layout = batch_layout(8, micro_batch_size=None, max_tokens=MAX_TOKENS, num_shards=4, row_tokens=10 * MAX_TOKENS)
    assert layout == BatchLayout(num_micro=2, rows_per_micro=4)


def prepared(config: DPOConfig | SFTConfig) -> tuple[Task, PreparedData]:
    task = task_for(config)
    tokenizer = load_tokenizer(Path(config.model_name_or_path), chat_template=None)
    return task, preparation_of(config, pairs=isinstance(config, DPOConfig))(config.datasets, tokenizer).load()


def padded(task: Task, data: PreparedData, steps: list[np.ndarray], *, rows: int) -> PaddedBatches:
    """Returns micro-batches of `rows` rows."""
    return PaddedBatches(
        task,
        data,
        steps,
        global_batch_size=max(map(len, steps)),
        num_shards=1,
        max_tokens_per_device=MAX_TOKENS,
        micro_batch_size=rows,
        max_length=64,
        pad_token_id=0,
    )


def test_batch_of_pairs(run_words: Words) -> None:
    task, data = prepared(load_config(DPOConfig, None, run_words()))
    indices = np.array([3, 17, 5])
    batch, (_, at_rows, num_tokens, real_slots, num_slots) = padded(task, data, [indices], rows=2).make(indices)
    np.testing.assert_array_equal(at_rows, [0, 1, 2])
    rows = [data[int(index)] for index in indices]
    assert batch.tokens.shape[:3] == (2, 2, 2)
    assert batch.tokens.shape[3] >= max(data.lengths[indices])
    np.testing.assert_array_equal(batch.weights, [[1, 1], [1, 0]])
    for slot, row in enumerate(rows):
        at = divmod(slot, 2)
        for side, completion in enumerate((row.chosen_ids, row.rejected_ids)):
            attended = batch.tokens[at][side][batch.attention_mask[at][side]]
            np.testing.assert_array_equal(attended, [*row.prompt_ids, *completion])
            np.testing.assert_array_equal(batch.tokens[at][side][batch.completion_mask[at][side]], completion)
    assert num_tokens == sum(2 * len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in rows)
    assert num_tokens == real_slots == batch.attention_mask.reshape(4, -1)[:3].sum()
    assert num_slots == batch.tokens.size


def test_batch_of_completions(run_words: Words) -> None:
    task, data = prepared(load_config(SFTConfig, None, run_words()))
    batch, (_, _, num_tokens, *_) = padded(task, data, [np.array([0, 1])], rows=2).make(np.array([0, 1]))
    assert batch.tokens.shape[:2] == (1, 2)
    for slot in (0, 1):
        row = data[slot]
        np.testing.assert_array_equal(batch.tokens[0, slot, : len(row.tokens)], row.tokens)
        np.testing.assert_array_equal(batch.completion_mask[0, slot, : len(row.tokens)], row.completion_mask)
    assert num_tokens == len(data[0].tokens) + len(data[1].tokens)


def test_sizes_of_supervised_rows(run_words: Words) -> None:
    _, data = prepared(load_config(SFTConfig, None, run_words()))
    for found, wanted in zip(data.sizes(), item_sizes([data[index] for index in range(len(data))]), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_step_decides_the_padded_length_and_few_lengths_occur(run_words: Words) -> None:
    task, data = prepared(load_config(DPOConfig, None, run_words()))
    lengths = set()
    for index in range(len(data)):
        batches = padded(task, data, [np.array([index])], rows=1)
        lengths.add(batches.make(np.array([index])).batch.tokens.shape[-1])
    assert lengths <= {32, 48, 64}


def test_packed_batches_record_where_each_row_is(run_words: Words) -> None:
    task, data = prepared(load_config(DPOConfig, None, run_words()))
    steps = [np.array([9, 3, 17, 5]), np.array([1, 2])]
    batches = PackedBatches(task, data, steps, num_shards=2, max_tokens_per_device=128)
    sizes, expected = data.sizes(), item_sizes([data[index] for index in range(len(data))])
    for found, wanted in zip(sizes, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    for indices in steps:
        batch, (_, at, num_tokens, real_slots, num_slots) = batches.make(indices)
        assert real_slots == (batch.readers < batch.gather[0, 0].size).any(2).sum()
        assert num_slots == batch.tokens.size
        np.testing.assert_array_equal(batch.pair_row.reshape(-1)[at], indices)
        np.testing.assert_array_equal(batch.pair_weight.reshape(-1)[at], 1)
        assert batch.pair_weight.sum() == len(indices)
        assert num_tokens == sum(task.count_tokens(data[int(index)]) for index in indices)
        assert batch.tokens.shape[1] == 2
    assert len({batches.make(indices).batch.tokens.shape for indices in steps}) <= len(batches.plan.shapes)


def test_demanding_shapes_are_those_that_no_other_exceeds_in_every_size() -> None:
    most_slots = PackedShape(1, 1, 4, 512, 8, 1, 64, 192)
    most_places = PackedShape(1, 1, 4, 448, 8, 1, 128, 192)
    summed = PackedShape(2, 1, 4, 256, 8, 1, 64, 64)
    smaller = [
        PackedShape(1, 1, 4, 384, 8, 1, 64, 192),
        summed._replace(num_slots=192),
        most_places._replace(num_scored=64),
    ]
    found = demanding_shapes([*smaller, most_slots, most_places, summed])
    assert sorted(found) == sorted([most_slots, most_places, summed])
    assert demanding_shapes([summed, summed._replace(num_micro=5)]) == [summed._replace(num_micro=5)]


@pytest.mark.parametrize("packing", [True, False])
def test_the_shapes_are_known_before_any_batch_is_made(run_words: Words, packing: bool) -> None:
    task, data = prepared(load_config(DPOConfig, None, run_words()))
    steps = [np.arange(start, start + 4) for start in range(0, 16, 4)]
    if packing:
        batches: Any = PackedBatches(task, data, steps, num_shards=2, max_tokens_per_device=128)
    else:
        batches = padded(task, data, steps, rows=2)
    known = {shapes_of(batch) for batch in batches.shapes()}
    made = {shapes_of(batches.make(indices).batch) for indices in steps}
    assert made == {shapes_of(batches.like(indices)) for indices in steps} <= known
    widest = max(batches.make(indices).batch.tokens[0].size for indices in steps)
    assert batches.tokens_per_device == widest // (2 if packing else 1)
    assert batches.shapes()[-1].tokens[0].size == widest, "the largest comes last"


def scored_rows(tmp_path: Path, *scores: tuple[float, float] | None) -> Path:
    """Writes pairs with these scores of (chosen, rejected); None: no scores."""
    rows: list[dict[str, Any]] = []
    for index, of_pair in enumerate(scores):
        row: dict[str, Any] = {"prompt": f"river {index}", "chosen": "green paper", "rejected": "slow market"}
        if of_pair is not None:
            row |= dict(zip(("score_chosen", "score_rejected"), of_pair, strict=True))
        rows.append(row)
    write_jsonl(tmp_path / "scored.jsonl", rows)
    return tmp_path / "scored.jsonl"


def test_score_margins_are_those_of_the_file(run_words: Words, tmp_path: Path) -> None:
    path = scored_rows(tmp_path, (4, 1.5), (1, 0.5))
    _, data = prepared(load_config(DPOConfig, None, run_words(datasets=path)))
    check_scores(data)
    np.testing.assert_array_equal(data.margins, np.float32([2.5, 0.5]))


@pytest.mark.parametrize(
    ("second", "found"), [(None, "no scores"), ((1, 1), "difference of 0"), ((1, 3), "difference of -2")], ids=str
)
def test_a_row_whose_scores_cannot_be_used_is_named(run_words: Words, tmp_path: Path, second: Any, found: str) -> None:
    path = scored_rows(tmp_path, (4, 1), second, (3, 1))
    _, data = prepared(load_config(DPOConfig, None, run_words(datasets=path)))
    with pytest.raises(ValueError, match=rf"scored.jsonl:2: .* {found} \(1 of 3 rows"):
        check_scores(data)


def test_options_a_loss_cannot_honour_are_refused(run_words: Words) -> None:
    config = load_config(DPOConfig, None, run_words(loss_type="ipo", label_smoothing=0.1))
    with pytest.raises(ValueError, match="loss_type 'ipo' cannot honour label_smoothing"):
        task_for(config)
