"""The rows of a run: mixed, held out, grouped; and the metrics of each dataset."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo.config import DPOConfig, SFTConfig, load_config
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.json_files import read_json, write_json
from jdpo.reports.metrics_file import read_metrics
from jdpo.reports.progress import RowCounter
from jdpo.training.logs.metrics import SHARED, DatasetShares
from jdpo.training.run import train
from jdpo.training.setup.numerics import numerics
from jdpo.training.setup.row_order import BuildStopped
from jdpo.training.setup.run_setup import Setup, build
from jdpo.training.setup.shared_rows import prepare_rows
from tests.conftest import chat_pairs, write_jsonl
from tests.golden_models import GOLDEN_MODELS

Words = Callable[..., list[str]]


@pytest.fixture
def two_sets(tmp_path: Path) -> tuple[Path, Path]:
    """Two datasets, of twelve and five pairs."""
    return (
        write_jsonl(tmp_path / "first.jsonl", chat_pairs(12, seed=1)),
        write_jsonl(tmp_path / "second.jsonl", chat_pairs(5, seed=2, words=(2, 5))),
    )


def set_up(words: list[str], cls: type[DPOConfig | SFTConfig] = DPOConfig, **options: Any) -> tuple[Setup, list[str]]:
    config, lines = load_config(cls, None, ["compute_dtype=float32", *words]), []
    with numerics(config):
        return build(config, lines.append, **options), lines


def test_an_epoch_is_planned_and_logged_by_the_weights(run_words: Words, two_sets: tuple[Path, Path]) -> None:
    first, second = two_sets
    datasets = f"[{{path: {first}, weight: 2}}, {{path: {second}, weight: 1, label: own}}]"
    setup, lines = set_up(run_words(datasets=datasets, num_train_epochs=2))
    assert "an epoch is 18 rows: all 12 of first, 6 of own (1.2 passes over 5)" in lines
    assert (setup.steps_per_epoch, setup.num_steps) == (3, 6)
    rows = np.concatenate([setup.row_plan.step(step) for step in range(3)])
    assert np.bincount(setup.train_data.dataset_of[rows]).tolist() == [12, 6]
    assert setup.inputs()["how many rows each dataset has"] == "12 5"


def test_an_epoch_of_one_dataset_is_not_logged(run_words: Words) -> None:
    setup, lines = set_up(run_words())
    assert not any("an epoch is" in line for line in lines)
    assert "how many rows each dataset has" not in setup.inputs()


def test_rows_without_scores_are_refused_before_anything_is_computed(run_words: Words) -> None:
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: margin_gamma needs .* no scores \(20 of 20 rows"):
        set_up(run_words(margin_gamma=0.5))


def test_rows_with_the_place_of_an_image_are_refused(run_words: Words, toy_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "multimodal"
    shutil.copytree(toy_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = load_tokenizer(folder, chat_template=None)
    token = tokenizer.encode(["green"])[0][0]
    config = read_json(GOLDEN_MODELS / "qwen3_vl" / "config.json") | {"image_token_id": token}
    config["text_config"]["vocab_size"] = tokenizer.size
    write_json(folder / "config.json", config)
    pairs = [{"prompt": "ok", "chosen": "ok", "rejected": "no"}] * 2
    green = {"prompt": "ok", "chosen": "ok", "rejected": "green"}
    words = run_words(model_name_or_path=folder, datasets=write_jsonl(tmp_path / "rows.jsonl", [*pairs, green]))
    text = re.escape(tokenizer.hf.convert_ids_to_tokens(token))
    with pytest.raises(ValueError, match=rf"rows.jsonl:3: the row has {text}, in whose place .* image.* \(1 of 3 rows"):
        set_up(words, weights=False)


def test_rows_are_held_out_by_their_prompt(run_words: Words) -> None:
    setup, lines = set_up(run_words(eval_fraction=0.4, eval_steps=1))
    assert setup.eval_data is not None
    assert len(setup.train_data) + len(setup.eval_data) == 20
    assert not set(setup.train_data.prompt_keys) & set(setup.eval_data.prompt_keys)
    assert setup.steps_per_epoch == -(-len(setup.train_data) // 8)
    assert any(f"  {len(setup.eval_data)} held out for evaluation" in line for line in lines)


def test_grouping_by_length_changes_only_the_order(run_words: Words, two_sets: tuple[Path, Path]) -> None:
    words = run_words(datasets=two_sets[0], global_batch_size=4, **{"mesh.data": 1, "mesh.tensor": 8})
    grouped, plain = (set_up([*words, f"group_by_length={on}"])[0] for on in ("true", "false"))
    orders = [[s.row_plan.step(step).tolist() for step in range(3)] for s in (grouped, plain)]
    assert [sorted(itertools.chain(*order)) for order in orders] == [list(range(12))] * 2
    assert orders[0] != orders[1]


def test_a_signal_ends_the_tokenizing(run_words: Words, tmp_path: Path) -> None:
    setup, _ = set_up(run_words())
    config = load_config(DPOConfig, None, run_words(max_length=50))
    with pytest.raises(BuildStopped):
        prepare_rows(config, setup.tokenizer, [].append, pairs=True, stopped=lambda: True)
    assert len(list((tmp_path / "cache" / "tokenized").iterdir())) == 2, "the rows of the first set-up alone"


def test_the_row_counter_logs_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("jdpo.reports.progress.time.monotonic", lambda: now)
    lines: list[str] = []
    counter = RowCounter(lines.append)
    counter(512)
    now = 110.0
    counter(20_480)
    counter(20_992)  # too soon
    now = 120.0
    counter(40_960, 81_920)
    assert lines == [
        "tokenizing: 20,480 rows read, 2,048 per second",
        "tokenizing: 40,960 of 81,920 rows read, 2,048 per second, 0:00:20 left",
    ]


# --- metrics of each dataset


@pytest.mark.parametrize("cls", [DPOConfig, SFTConfig])
def test_shares_are_sums_over_rows_with_their_divisors(
    run_words: Words, two_sets: tuple[Path, Path], cls: type[DPOConfig | SFTConfig]
) -> None:
    setup, _ = set_up(run_words(datasets=f"[{two_sets[0]}, {two_sets[1]}]"), cls)
    indices = np.array([0, 14, 3, 16])
    rows = {"loss": np.array([1.0, 2.0, 3.0, 4.0])}
    names = {"loss/first": (4.0, 2.0), "loss/second": (6.0, 2.0)}
    if cls is DPOConfig:
        rows |= {"rewards/margins": np.array([0.5, 0.0, 1.0, 8.0]), "logps/chosen": np.zeros(4)}
        names |= {"rewards/margins/first": (1.5, 2.0), "rewards/margins/second": (8.0, 2.0)}
    else:  # a supervised row's loss is a sum over its learnt tokens
        tokens = [int(setup.train_data[index].completion_mask[1:].sum()) for index in indices.tolist()]
        names = {"loss/first": (4.0, tokens[0] + tokens[2]), "loss/second": (6.0, tokens[1] + tokens[3])}
    assert DatasetShares(setup.train_data).of(rows, indices) == names
    of_one = DatasetShares(setup.train_data).of({"loss": rows["loss"][:1]}, indices[:1])
    assert set(of_one) == {"loss/first"}, "absent where no row of it came"


def metrics_of(words: list[str], cls: type[DPOConfig | SFTConfig]) -> list[dict[str, Any]]:
    config = load_config(cls, None, ["compute_dtype=float32", *words])
    return read_metrics(train(config).output_dir / "metrics.jsonl")


@pytest.mark.parametrize("cls", [DPOConfig, pytest.param(SFTConfig, marks=pytest.mark.full)])
def test_each_dataset_has_its_own_metrics_for_any_batches(
    run_words: Words, two_sets: tuple[Path, Path], tmp_path: Path, cls: type[DPOConfig | SFTConfig]
) -> None:
    datasets = f"[{two_sets[0]}, {two_sets[1]}]"
    shared = {"datasets": datasets, "eval_fraction": 0.3}
    packed = metrics_of(run_words(**shared, output_dir=tmp_path / "packed"), cls)
    padded = metrics_of(run_words(**shared, output_dir=tmp_path / "padded", packing="false", micro_batch_size=1), cls)
    named = {name for line in packed for name in line if name.endswith(("/first", "/second"))}
    own = [name for name in SHARED if cls is DPOConfig or name == "loss"]
    labels = ("first", "second")
    assert named == {f"{start}{name}/{label}" for start in ("", "eval_") for name in own for label in labels}
    for line, other in zip(packed, padded, strict=True):
        for name in named & line.keys():
            if line["step"] > 1 or "accuracies" not in name:  # the margins of the first step are rounding noise
                assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    if cls is SFTConfig:
        return  # its loss is a mean over tokens, which the test above covers
    held_out = next(line for line in packed if "eval_loss" in line)
    counts = set_up(run_words(**shared))[0].eval_data.num_rows_of  # type: ignore[union-attr]
    for name in own:
        parts = [held_out[f"eval_{name}/{label}"] * count for label, count in zip(labels, counts, strict=True)]
        assert sum(parts) / sum(counts) == pytest.approx(held_out[f"eval_{name}"], rel=1e-5, abs=1e-7)
