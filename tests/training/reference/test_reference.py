"""Deciding where the reference's log-probs come from, and computing cached ones."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.cli.commands.runs import reference as command
from jdpo.config import DPOConfig, load_config
from jdpo.data.batching.loader import bucket_length, collate_pairs
from jdpo.data.reference_cache import scores as reference_cache
from jdpo.data.reference_cache.scores import reference_logps_of
from jdpo.losses.pair_logps import pair_token_logps
from jdpo.models.transformer import make_apply_fn
from jdpo.sharding.placement import fetch
from jdpo.training.reference import cache_building as reference_build
from jdpo.training.reference.cache_entries import find_rows
from jdpo.training.reference.reference_source import Reference, compute_reference, settle_reference
from jdpo.training.setup.numerics import numerics, resolve_dtype
from jdpo.training.setup.row_order import BuildStopped
from jdpo.training.setup.run_setup import Setup, build
from jdpo.training.setup.validation import fixed_mode
from jdpo.training.setup.weight_placement import load_reference
from jdpo.types import completions_of

Words = Callable[..., list[str]]
NUM_ROWS, NUM_EVAL = 20, 6
WORDS = ("river", "mountain", "paper", "winter", "green", "seven", "slow", "market")


def write_pairs(path: Path, num_rows: int, *, seed: int = 0, most_words: int = 5) -> Path:
    """Writes conversational pairs; up to 5 words per turn are at most 32 tokens, so that one shape is compiled."""
    rng = np.random.default_rng(seed)

    def turn(role: str, tail: str = "") -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(rng.choice(WORDS, int(rng.integers(2, most_words)))) + tail}]

    rows = [
        {"prompt": turn("user"), "chosen": turn("assistant", " yes"), "rejected": turn("assistant", " no")}
        for _ in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Place:
    """A folder with everything that a run needs and its cache."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.cache = folder, model, folder / "cache" / "reference"
        self.pairs, self.held_out = folder / "pairs.jsonl", folder / "held_out.jsonl"

    def config(self, **overrides: Any) -> DPOConfig:
        values = {
            "model_name_or_path": self.model,
            "datasets": self.pairs,
            "eval_datasets": self.held_out,
            "output_dir": self.folder / "run",
            "cache_dir": self.folder / "cache",
            "max_length": 64,
            "global_batch_size": 8,
            "mesh.data": 2,
            "mesh.fsdp": 4,
        } | overrides
        words = [f"{key}={value}" for key, value in values.items() if value is not None]
        config = resolve_dtype(load_config(DPOConfig, None, words))
        assert isinstance(config, DPOConfig)
        return config

    def settle(
        self,
        asked: Any = "auto",
        *,
        options: dict[str, Any] | None = None,
        on_line: Callable[[str], None] = lambda line: None,
        **overrides: Any,
    ) -> Settled:
        config = self.config(**overrides)
        lines: list[str] = []

        def log(line: str) -> None:
            lines.append(line)
            on_line(line)

        with numerics(config):
            setup = build(config, lambda line: None)
            found = settle_reference(setup, asked=asked, log=log, **({"needs_reference": True} | (options or {})))
        return Settled(found, lines, setup)

    def compute(self, **overrides: Any) -> tuple[Reference, list[str]]:
        lines: list[str] = []
        return compute_reference(self.config(**overrides), lines.append), lines

    def files(self) -> dict[str, tuple[int, int, bytes]]:
        """Returns inode, time of change and content of every shard and of its JSON."""
        found = {}
        for path in self.cache.glob("*/0*"):
            stat = path.stat()
            found[f"{path.parent.name}/{path.name}"] = (stat.st_ino, stat.st_mtime_ns, path.read_bytes())
        return found


class Settled:
    def __init__(self, reference: Reference, lines: list[str], setup: Setup) -> None:
        self.reference, self.lines, self.setup = reference, lines, setup


@pytest.fixture
def shards_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "SHARD_ROWS", 8)


def new_place(folder: Path, model: Path) -> Place:
    place = Place(folder, model)
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(place.pairs, NUM_ROWS)
    write_pairs(place.held_out, NUM_EVAL, seed=1)
    return place


@pytest.fixture
def place(tmp_path: Path, toy_model: Path) -> Place:
    return new_place(tmp_path / "new", toy_model)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> tuple[Place, Reference, list[str]]:
    """A cache of 20 training and 6 evaluation rows in shards of 8, as `jdpo reference` leaves it."""
    place = new_place(tmp_path_factory.mktemp("computed"), toy_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_cache, "SHARD_ROWS", 8)
        return place, *place.compute()


@pytest.fixture
def built(computed: tuple[Place, Reference, list[str]], shards_of_eight: None, tmp_path: Path) -> Iterator[Place]:
    """A copy of that cache for one test, next to the same rows."""
    place, before = computed[0], computed[0].files()
    copy = Place(place.folder, place.model)
    shutil.copytree(place.folder / "cache", tmp_path / "cache")
    copy.cache = tmp_path / "cache" / "reference"
    original = copy.config
    copy.config = lambda **overrides: original(**{"cache_dir": tmp_path / "cache"} | overrides)  # type: ignore[method-assign]
    yield copy
    assert place.files() == before


# --- what is computed


def plain_logps(setup: Setup) -> np.ndarray:
    """Computes log-probs [rows, 2, t] with the function of a live reference, all rows at once and unsharded."""
    data = setup.train_data
    batch = collate_pairs([data[i] for i in range(NUM_ROWS)], num_slots=NUM_ROWS, length=64, pad_token_id=0)
    params = fetch(jax.device_put(load_reference(setup, None), jax.devices()[0]))
    apply_fn = make_apply_fn(setup.model)
    logps: np.ndarray = np.asarray(jax.jit(lambda p, b: pair_token_logps(p, b, apply_fn=apply_fn))(params, batch))
    return logps


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-12)])
def test_cached_values_are_those_of_the_live_function(
    place: Place, shards_of_eight: None, dtype: str, tolerance: float
) -> None:
    write_pairs(place.pairs, NUM_ROWS, most_words=14)
    settled = place.settle(num_train_epochs=2, compute_dtype=dtype, eval_datasets=None)
    buckets = {bucket_length(int(length), 64) for length in settled.setup.train_data.lengths}
    assert len(buckets) > 1, "several shapes"
    assert settled.reference.mode == "cached"
    assert (settled.reference.num_found, settled.reference.num_computed) == (0, NUM_ROWS)
    cache = settled.reference.train
    assert cache is not None
    data, order = settled.setup.train_data, np.random.default_rng(0).permutation(NUM_ROWS)
    found = reference_logps_of(cache, [data[int(i)] for i in order], order, num_slots=NUM_ROWS, length=64)
    assert found.dtype == dtype
    with numerics(settled.setup.config):
        expected = plain_logps(settled.setup)[order]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert (expected != 0).sum() == sum(len(data[i].chosen_ids) + len(data[i].rejected_ids) for i in range(NUM_ROWS))


def test_cached_values_of_sides_of_several_turns_are_those_of_their_learnt_tokens(
    place: Place, shards_of_eight: None
) -> None:
    write_pairs(place.pairs, NUM_ROWS)
    rows = [json.loads(line) for line in place.pairs.read_text(encoding="utf-8").splitlines()]
    for row in rows[::2]:
        row["chosen"] += [{"role": "user", "content": "paper"}, {"role": "assistant", "content": "slow river"}]
    place.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settled = place.settle(
        num_train_epochs=2, compute_dtype="float64", eval_datasets=None, loss_on="assistant_turns", max_length=64
    )
    cache, data = settled.reference.train, settled.setup.train_data
    assert cache is not None
    found = reference_logps_of(
        cache, [data[i] for i in range(NUM_ROWS)], np.arange(NUM_ROWS), num_slots=NUM_ROWS, length=64
    )
    with numerics(settled.setup.config):
        expected = plain_logps(settled.setup)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    masks = [mask for i in range(NUM_ROWS) for _, mask in completions_of(data[i])]
    assert (found != 0).sum() == sum(mask.sum() for mask in masks)
    assert sum((~mask).sum() for mask in masks) >= NUM_ROWS // 2  # the users' turns in between


def test_command_computes_once_and_reports_it(computed: tuple[Place, Reference, list[str]], built: Place) -> None:
    place, reference, lines = computed
    assert (reference.num_found, reference.num_computed) == (0, NUM_ROWS + NUM_EVAL)
    assert any("20 of 20 training rows to compute (shards: 0 found, 3 missing)" in line for line in lines)
    assert "reference: 20 of 20 training rows computed" in lines
    assert lines[-1].startswith("reference: cached, 0 rows found, 26 computed")
    assert not (place.folder / "run").exists()
    before = built.files()
    reference, lines = built.compute()
    assert (reference.num_found, reference.num_computed) == (26, 0)
    assert lines[-1].startswith("reference: cached, 26 rows found, 0 computed")
    assert built.files() == before


def test_only_missing_shards_are_computed_and_they_come_out_the_same(built: Place) -> None:
    before = built.files()
    (lost,) = [name for name in before if name.endswith("00001.json")]
    (built.cache / lost).unlink()
    half = built.cache / lost.replace("00001.json", "00002.safetensors.host-1.tmp")
    half.write_bytes(b"half")
    os.utime(half, (0, 0))  # of another host, which may still be writing it unless it is old
    settled = built.settle()
    assert settled.reference.num_computed == 8
    assert settled.reference.num_found == NUM_ROWS + NUM_EVAL - 8
    assert "only 12 of 20 training rows are in the cache" in settled.lines[0]
    after = built.files()
    rewritten = {name for name in before if after[name][:2] != before[name][:2]}
    assert rewritten == {lost, lost.replace("json", "safetensors")}
    assert {name: file[2] for name, file in after.items()} == {name: file[2] for name, file in before.items()}
    assert not half.exists()


def test_a_stop_keeps_whole_shards(place: Place, shards_of_eight: None) -> None:
    calls = itertools.count()
    stopping = {"stopped": lambda: next(calls) >= 2}
    with pytest.raises(BuildStopped):
        place.settle(options=stopping, num_train_epochs=2, eval_datasets=None)
    kept = place.files()
    assert sorted(name.split("/")[1].partition(".")[0] for name in kept) == ["00000"] * 2 + ["00001"] * 2
    settled = place.settle(num_train_epochs=2, eval_datasets=None)
    assert (settled.reference.num_found, settled.reference.num_computed) == (16, 4)
    assert {name: place.files()[name] for name in kept} == kept


def test_a_log_prob_that_is_not_finite_names_its_row(place: Place, toy_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(toy_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][...] = 3e38  # large but finite, unlike the logits
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"the chosen completion of pairs\.jsonl:\d+ is nan"):
        place.settle(num_train_epochs=2, reference_model=broken)
    assert not place.files()


def test_a_cache_that_cannot_be_written_is_an_error_that_says_where(place: Place) -> None:
    place.cache.parent.mkdir()
    place.cache.write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot keep the reference's log-probs in .*set cache_dir"):
        place.settle(num_train_epochs=2)


def test_a_second_run_waits_for_the_first_and_takes_what_it_computed(
    built: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_build, "LOCK_POLL_SECONDS", 0.05)
    voucher = next(path for path in built.cache.glob("*/00001.json"))
    hidden = voucher.rename(voucher.with_suffix(".hidden"))
    rows = find_rows(built.settle("live").setup)[0]
    lock = rows.folder.try_lock()
    assert lock is not None

    def first_run_ends(line: str) -> None:
        if "waiting" in line:
            hidden.rename(voucher)
            lock.close()

    settled = built.settle(on_line=first_run_ends)
    assert f"reference: waiting for another run that computes {rows.folder.path}" in settled.lines
    assert (settled.reference.num_found, settled.reference.num_computed) == (NUM_ROWS + NUM_EVAL, 0)


# --- hits


@pytest.mark.parametrize("asked", ["auto", "cached"])
def test_settings_that_a_cache_does_not_depend_on(built: Place, asked: str) -> None:
    before = built.files()
    settled = built.settle(
        asked,
        beta=0.5,
        learning_rate=1e-3,
        seed=7,
        shuffle="false",
        num_train_epochs=3,
        global_batch_size=16,
        micro_batch_size=1,
        output_dir=built.folder / "other",
        **{"mesh.data": 4, "mesh.fsdp": 2},
    )
    reference = settled.reference
    assert reference.mode == "cached"
    assert (reference.num_found, reference.num_computed) == (26, 0)
    assert reference.train is not None
    assert reference.eval is not None
    assert (len(reference.train), len(reference.eval)) == (NUM_ROWS, NUM_EVAL)
    assert len(settled.lines) == 1
    assert settled.lines[0].startswith("reference: cached, 26 rows found, 0 computed")
    assert built.files() == before


def test_other_evaluation_rows_are_all_that_is_computed(built: Place, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other.jsonl", 3, seed=5)
    with pytest.raises(ValueError, match=r"reference is 'cached', but the evaluation rows are not in the cache \(chan"):
        built.settle("cached", eval_datasets=other)
    settled = built.settle(eval_datasets=other)
    assert (settled.reference.num_found, settled.reference.num_computed) == (NUM_ROWS, 3)


def test_the_same_rows_for_training_and_evaluation_are_computed_once(place: Place) -> None:
    settled = place.settle(eval_datasets=place.pairs, num_train_epochs=2)
    assert (settled.reference.num_found, settled.reference.num_computed) == (NUM_ROWS, NUM_ROWS)


# --- misses


def shift_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def other_weights(place: Place, tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / place.model.name
    shutil.copytree(place.model, folder)
    shift_weights(folder)
    return {"model_name_or_path": folder}


def other_rows(place: Place, tmp_path: Path) -> dict[str, Any]:
    del tmp_path
    write_pairs(place.pairs, NUM_ROWS, seed=3)
    return {}


def other_template(place: Place, tmp_path: Path) -> dict[str, Any]:
    del place
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}")
    return {"chat_template": path}


MISSES: dict[str, tuple[Callable[[Place, Path], dict[str, Any]], str]] = {
    "max_length": (lambda *_: {"max_length": 20}, "max_length: 64 then, 20 now"),
    "max_prompt_length": (lambda *_: {"max_prompt_length": 6}, "max_prompt_length: null then, 6 now"),
    "compute_dtype": (lambda *_: {"compute_dtype": "bfloat16"}, "compute_dtype: float32 then, bfloat16 now"),
    "weights": (other_weights, r"the reference model: .* then, .*toy now"),
    "rows": (other_rows, r"the rows of .*pairs\.jsonl \(train\)\)"),
    "split": (lambda *_: {"datasets": "[{path: PAIRS, split: 'train[:16]'}]"}, r"the data: .* then, .*train\[:16\]"),
    "template": (other_template, "chat_template: null then, .*template.jinja now"),
}


@pytest.mark.parametrize("name", MISSES)
def test_a_miss_names_what_changed(built: Place, tmp_path: Path, name: str) -> None:
    change, expected = MISSES[name]
    rows = built.pairs.read_bytes()
    try:
        overrides = {
            key: str(value).replace("PAIRS", str(built.pairs)) for key, value in change(built, tmp_path).items()
        }
        with pytest.raises(ValueError, match=rf"training rows are not in the cache \(changed.*{expected}") as refusal:
            built.settle("cached", **overrides)
        assert "`jdpo reference CONFIG`" in str(refusal.value)
        settled = built.settle("auto", **overrides)
    finally:
        built.pairs.write_bytes(rows)
    assert settled.reference == Reference(mode="live")
    (line,) = settled.lines
    explained = str(refusal.value).partition("but ")[2].partition("; `jdpo reference")[0]
    assert line.startswith("reference: live, as one pass over the rows does not pay")
    assert line.endswith(f"; {explained}")


def test_weights_changed_in_place_are_named(built: Place, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(built.model, model)
    shift_weights(model)
    built.compute(model_name_or_path=model)
    shift_weights(model)
    with pytest.raises(ValueError, match=rf"the weights of the reference model {model}\)"):
        built.settle("cached", model_name_or_path=model)


def test_an_empty_cache_has_nothing_to_compare_with(place: Place) -> None:
    with pytest.raises(ValueError, match="but the training rows are not in the cache and the evaluation rows are not"):
        place.settle("cached")


@pytest.mark.parametrize("grown", [False, True])
def test_the_seed_matters_where_it_makes_embedding_rows(place: Place, tmp_path: Path, grown: bool) -> None:
    template = tmp_path / "template.jinja"
    marker = "<|turn_start|>" if grown else "<|im_start|>"
    template.write_text("{% for m in messages %}" + marker + "{{ m['content'] }}<|im_end|>{% endfor %}")
    keys = []
    for seed in (1, 2):
        setup = place.settle("live", chat_template=template, seed=seed).setup
        assert (setup.model.config.vocab_size > setup.source_config.vocab_size) is grown
        keys.append([rows.folder.key for rows in find_rows(setup)])
    assert (keys[0] != keys[1]) is grown


def test_the_key_follows_the_model_that_is_the_reference(built: Place, tmp_path: Path) -> None:
    other = other_weights(built, tmp_path)["model_name_or_path"]
    assert built.settle("cached", model_name_or_path=other, reference_model=built.model).reference.num_found == 26
    with pytest.raises(ValueError, match=r"the reference model: .*toy then"):
        built.settle("cached", reference_model=other)


# --- damage


@pytest.mark.parametrize("by", ["command", "auto"])
@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_flipped_byte_is_refused_or_computed_again(built: Place, ending: str, by: str) -> None:
    before = built.files()
    name = next(name for name in sorted(before) if name.endswith(f"00002.{ending}"))
    content = bytearray(before[name][2])
    content[len(content) // 2] ^= 1
    (built.cache / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: .*00002\.safetensors"):
        built.settle("cached")
    if by == "command":
        reference, lines = built.compute()
    else:
        settled = built.settle("auto")
        reference, lines = settled.reference, settled.lines
        assert "reference: its cached log-probs are damaged and computed again: " in lines[0]
        assert "00002.safetensors" in lines[0]
    assert reference.num_computed == 4
    assert any("(shards: 2 found, 1 damaged, 0 missing)" in line for line in lines)
    assert {name: file[2] for name, file in built.files().items()} == {name: file[2] for name, file in before.items()}
    assert built.settle("cached").reference.num_found == 26


@pytest.mark.parametrize("by", ["command", "auto"])
def test_a_damaged_key_file_is_refused_or_written_again(built: Place, by: str) -> None:
    path = next(built.cache.glob("*/key.json"))
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"max_length": 64', b'"max_length": 65'))
    with pytest.raises(ValueError, match=r"damaged: .*key\.json"):
        built.settle("cached")
    if by == "command":
        assert built.compute()[0].num_computed == 0
    else:
        settled = built.settle("auto")
        assert "key.json is not as it was written" in settled.lines[0]
        assert settled.reference.num_computed == 0
    assert json.loads(path.read_bytes()) == json.loads(content)


# --- which mode


def test_auto_stays_live_until_another_run_asks_for_the_same_rows(place: Place) -> None:
    for _ in range(2):  # the same run again, as after an interruption
        settled = place.settle()
        assert settled.reference == Reference(mode="live")
        assert settled.lines == ["reference: live, as one pass over the rows does not pay for a cache"]
    assert not place.files()
    settled = place.settle(output_dir=place.folder / "second", beta=0.3)
    assert settled.reference.num_computed == 26
    assert "as another run asked for the same ones" in settled.lines[0]


def test_a_resumed_run_keeps_the_mode_that_auto_chose(built: Place, place: Place) -> None:
    assert built.settle(options={"began_as": "live"}).reference == Reference(mode="live")
    assert built.settle("cached", options={"began_as": "live"}).reference.mode == "cached"
    settled = place.settle(options={"began_as": "cached"})
    assert (settled.reference.mode, settled.reference.num_computed) == ("cached", 26)


@pytest.mark.parametrize(
    ("asked", "options", "mode"),
    [
        ("live", {}, "live"),
        ("auto", {"sync_ref_model": True}, "live"),
        ("live", {"sync_ref_model": True}, "live"),
        ("auto", {"needs_reference": False}, "none"),
        ("none", {"needs_reference": False}, "none"),
        ("auto", {}, None),
        ("cached", {}, None),
    ],
)
def test_modes_that_no_cache_decides(asked: Any, options: dict[str, bool], mode: str | None) -> None:
    assert fixed_mode(asked, **({"needs_reference": True, "sync_ref_model": False} | options)) == mode


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ("none", {}, "reference is 'none', but the loss compares"),
        ("live", {"needs_reference": False}, "reference is 'live', but the loss has no reference"),
        ("cached", {"needs_reference": False}, "reference is 'cached', but the loss has no reference"),
        ("cached", {"sync_ref_model": True}, "sync_ref_model moves the reference"),
    ],
)
def test_impossible_modes_are_refused(asked: Any, options: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_mode(asked, **({"needs_reference": True, "sync_ref_model": False} | options))


def test_fixed_modes_read_no_cache_and_log_one_line(place: Place) -> None:
    assert place.settle("live").lines == ["reference: live, as asked for"]
    settled = place.settle(options={"needs_reference": False})
    assert settled.reference == Reference(mode="none")
    assert settled.lines == ["reference: none, the loss has none"]
    assert place.settle(options={"sync_ref_model": True}).lines == ["reference: live, as it moves in training"]
    assert not place.cache.exists()


# --- the command


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"loss_type": "simpo"}, "loss_type simpo has no reference"),
        ({"sync_ref_model": "true"}, "sync_ref_model moves"),
    ],
)
def test_command_refuses_losses_without_a_cache(place: Place, setting: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place.compute(**setting)
    assert not (place.folder / "cache").exists()


def test_command_line(run_words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main("reference", ["--help"]) == 0
    assert "usage: jdpo reference" in capsys.readouterr().out
    config = tmp_path / "config.yaml"
    config.write_text(f"max_length: 48\ncache_dir: {tmp_path / 'there'}\n")
    words = [word for word in run_words() if not word.startswith(("max_length", "cache_dir"))]
    assert command.main("reference", [str(config), *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("reference: cached, 0 rows found, 20 computed, in ")
    assert len(list((tmp_path / "there" / "reference").glob("*/00000.json"))) == 1
    assert not (tmp_path / "run").exists()
