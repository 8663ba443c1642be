"""What a plan knows about a run: lengths of rows, the step that needs most, the number of steps, the reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from jdpo.config import CONFIGS, ReferenceSettings, TrainConfig, load_config
from jdpo.planning.plan_command.given_lengths import check_lengths, read_lengths
from jdpo.planning.plan_command.row_lengths import MOST_ROWS, RowLengths, alike, listed_rows
from jdpo.planning.plan_command.run_length import RunLength, run_length
from jdpo.training.setup.tasks import task_for


def config_of(*words: str, command: str = "dpo") -> TrainConfig:
    keys = ["model_name_or_path=x", "datasets=x", "output_dir=x", "global_batch_size=4", *words]
    return load_config(CONFIGS[command], None, keys)


def length_of(config: TrainConfig, rows: RowLengths, num_rows: int | None) -> RunLength:
    reference = config if isinstance(config, ReferenceSettings) else None
    return run_length(config, reference, task_for(config), rows, num_rows=num_rows)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("prompt,chosen,rejected\n1,2,3\n4,5\n", "line 3: expected 3 numbers"),
        ("prompt,chosen,rejected\n1,2,x\n", "line 2"),
        ("1,2,3\n4,5,6\n", "expected a header"),
        ("prompt,chosen,rejected\n", "at least one row"),
        ("", "at least one row"),
    ],
)
def test_a_wrong_line_of_lengths_is_named(tmp_path: Path, text: str, where: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=where):
        read_lengths(str(file))


def test_lengths_that_no_run_has_are_refused() -> None:
    with pytest.raises(ValueError, match="--task"):
        check_lengths([(512,)], pairs=True, max_length=1024)
    with pytest.raises(ValueError, match="each at least 1"):
        check_lengths([(512, 0, 3)], pairs=True, max_length=1024)
    with pytest.raises(ValueError, match="row 2: a sequence of 1025 tokens is longer than max_length 1024"):
        check_lengths([(1, 2, 3), (512, 2, 513)], pairs=True, max_length=1024)
    check_lengths([(512, 2, 512)], pairs=True, max_length=1024)
    check_lengths([(1024,)], pairs=False, max_length=1024)


def test_of_many_rows_a_sample_with_the_longest_is_planned() -> None:
    lengths = [(number % 7 + 1, 2, 3) for number in range(MOST_ROWS + 10)]
    lengths[1234] = (90, 2, 3)
    rows = listed_rows(lengths, source="rows.csv")
    sample = rows.sample(seed=0)
    assert len(sample) == MOST_ROWS
    assert (90, 2, 3) in sample
    assert sample == rows.sample(seed=0)
    assert listed_rows(lengths[:5], source="rows.csv").sample(seed=0) == lengths[:5]
    assert alike((512, 300, 300), source="--lengths").sample(seed=0) == [(512, 300, 300)]


@pytest.mark.parametrize(
    ("words", "num_rows", "steps"),
    [
        ((), None, None),
        ((), 9, 3),
        (("num_train_epochs=2",), 9, 6),
        (("max_steps=7",), None, 7),
        (("max_steps=7",), 9, 7),
    ],
)
def test_the_number_of_steps(words: tuple[str, ...], num_rows: int | None, steps: int | None) -> None:
    found = length_of(config_of(*words), alike((1, 2, 3), source="x"), num_rows)
    assert found.num_steps == steps
    assert ("--num_rows" in found.why) == (steps is None)


def test_rows_of_a_file_are_counted() -> None:
    rows = listed_rows([(1, 2, 3)] * 5, source="rows.csv")
    assert length_of(config_of(), rows, None).num_steps == 2
    assert length_of(config_of(), rows, 40).num_steps == 10


@pytest.mark.parametrize(
    ("words", "mode", "reference_steps"),
    [
        ((), "live", 0),
        (("num_train_epochs=2",), "cached", 2),
        (("reference=cached",), "cached", 2),
        (("reference=live", "num_train_epochs=2"), "live", 0),
        (("loss_type=orpo",), "none", 0),
        (("max_steps=3",), "cached", 2),
    ],
)
def test_the_reference_is_that_of_the_run(words: tuple[str, ...], mode: str, reference_steps: float) -> None:
    length = length_of(config_of(*words), alike((1, 2, 3), source="x"), 8)
    assert (length.reference, length.reference_steps) == (mode, reference_steps)


def test_a_supervised_run_has_no_reference() -> None:
    length = length_of(config_of(command="sft"), alike((100,), source="x"), 8)
    assert (length.reference, length.num_steps, length.why) == ("none", 2, "1 epoch of 8 rows")


def test_a_reference_over_rows_that_nobody_counted_is_mentioned() -> None:
    words = ("reference=cached", "max_steps=3")
    length = length_of(config_of(*words), alike((1, 2, 3), source="x"), None)
    assert length.reference_steps == 0
    assert "leaves out the reference" in length.notes[0]
