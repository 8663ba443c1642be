"""Preparation before the first step, and the contents of a run's compiled programs."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jdpo.config import FREE_KEYS, DPOConfig, load_config
from jdpo.devices import Target, compiling_for
from jdpo.training.fit.assembly import assemble
from jdpo.training.fit.compilation import compile_for, compiler_threads, shapes_of
from jdpo.training.fit.estimates import batch_bytes
from jdpo.training.fit.fit_search import MAX_TOKENS_PER_DEVICE
from jdpo.training.fit.memory_fit import Fit, memory_limit, program_bytes
from jdpo.training.fit.preparation import (
    FITTED_KEYS,
    Preparation,
    fit_conditions,
    fit_record,
    prepare_steps,
    recalled_fit,
    remat_policies,
)
from jdpo.training.run import train
from jdpo.training.run_record import FitRecord
from jdpo.training.setup.batches import make_batches, shapes_in_order
from jdpo.training.setup.numerics import numerics
from jdpo.training.setup.run_setup import Setup, build
from jdpo.training.step import head_chunks
from tests.conftest import chat_pairs, write_jsonl
from tests.run_stops import EachStep

Words = Callable[..., list[str]]


def prepare(
    words: list[str], *, limit: int | None = None, recalled: Fit | None = None
) -> tuple[Setup, Preparation, list[str]]:
    config, lines = load_config(DPOConfig, None, ["compute_dtype=float32", *words]), list[str]()
    with numerics(config), compiler_threads() as pool:
        setup = build(config, lines.append)
        assembly = assemble(setup, reference="live", remat="none")
        assemblies = {remat: assembly.with_remat(remat) for remat in remat_policies(setup)}
        limit = memory_limit() if limit is None else limit
        return setup, prepare_steps(setup, assemblies, None, pool, lines.append, limit=limit, recalled=recalled), lines


def test_with_enough_memory_all_rows_are_in_one_micro_batch_under_the_fastest_policy(run_words: Words) -> None:
    setup, prepared, lines = prepare(run_words(remat="auto"))
    assert prepared.fit.remat == prepared.assembly.model.remat == "attention"
    slots = [setup.train_data.sizes().slots[setup.row_plan.step(step)] for step in range(setup.num_steps)]
    assert max(map(np.max, slots)) <= prepared.fit.max_tokens_per_device
    assert all(batch.tokens.shape[0] == 1 for batch in prepared.batches.shapes())
    assert prepared.batches.tokens_per_device <= prepared.fit.max_tokens_per_device
    assert len(prepared.programs) == 1, "the program that was measured is kept"
    (step_line,) = [line for line in lines if line.startswith("step: ")]
    assert re.match(
        r"step: at most [\d,]+ tokens per device at once, remat attention, needs [\d.]+ MiB of [\d.]+ GiB", step_line
    )


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.full)])
def test_with_little_memory_more_is_recomputed_in_smaller_micro_batches(
    run_words: Words, packing: bool, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "long.jsonl", chat_pairs(8, words=(15, 18)))
    words = run_words(
        remat="auto", packing=packing, datasets=rows, **{"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 8}
    )
    _, roomy, _ = prepare(words)
    needed = _bytes(roomy)
    _, tight, _ = prepare(words, limit=int(needed * 0.7))
    assert tight.fit.bytes_needed is not None
    assert tight.fit.bytes_needed <= needed * 0.7
    assert tight.fit.remat != "attention" or tight.batches.tokens_per_device < roomy.batches.tokens_per_device
    assert _bytes(tight) == tight.fit.bytes_needed


def test_at_most_three_programs_are_compiled_before_the_first_step(run_words: Words, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "mixed.jsonl", chat_pairs(40, words=(2, 18)))
    options = {"mesh.data": 1, "mesh.tensor": 8, "global_batch_size": 4, "num_train_epochs": 40}
    words = run_words(remat="auto", datasets=rows, **options)
    compiled: list[str] = []

    def listen(event: str, _: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and "train_step" in about["fun_name"]:
            compiled.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        setup, roomy, _ = prepare(words)
        assert len(compiled) == 1, "what fits is found by one compilation"
        assert roomy.fit.bytes_needed is not None
        compiled.clear()
        # Too little for all rows at once.
        _, tight, _ = prepare(words, limit=int(roomy.fit.bytes_needed * 0.8))
        assert len(compiled) <= 2
        # The program of the first step is the third at most: the others come after it.
        first = shapes_of(tight.batches.like(setup.row_plan.step(0)))
        assert shapes_of(shapes_in_order(tight.batches, map(setup.row_plan.step, range(3)))[0]) == first
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _bytes(prepared: Preparation, batches: Iterable[Any] | None = None) -> int:
    """Returns the memory of the largest step among all shapes or some of them."""
    lower = prepared.assembly.lower_step
    return max(program_bytes(compile_for(lower, batch)) for batch in batches or prepared.batches.shapes())


def test_the_shape_that_takes_most_memory_is_among_those_that_are_measured(run_words: Words, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "mixed.jsonl", chat_pairs(48, words=(2, 18)))
    options = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 8, "global_batch_size": 6, "datasets": rows}
    # Many epochs, as a short run has a single shape.
    _, prepared, _ = prepare(run_words(remat="full", max_tokens_per_device=128, num_train_epochs=40, **options))
    demanding = prepared.batches.demanding()
    assert 1 <= len(demanding) < len(prepared.batches.shapes())
    sizes = {shapes_of(batch): _bytes(prepared, [batch]) for batch in prepared.batches.shapes()}
    measured = [sizes[shapes_of(batch)] for batch in demanding]
    assert max(measured) == max(sizes.values())
    # The one that is compiled first is chosen by formula.
    estimated = [batch_bytes(prepared.assembly, "full", batch) for batch in demanding]
    assert measured[estimated.index(max(estimated))] >= 0.95 * max(measured)


def test_a_row_longer_than_the_budget_is_logged(run_words: Words, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "long.jsonl", chat_pairs(8, words=(15, 18)))
    _, prepared, lines = prepare(run_words(remat="full", max_tokens_per_device=64, datasets=rows))
    longest = prepared.batches.tokens_per_device
    assert longest > 64
    note = f"note: the longest of the pairs alone takes {longest} tokens per device at once, more than"
    assert any(line.startswith(note) for line in lines), lines


def test_a_batch_too_small_for_its_devices_is_logged(run_words: Words, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "mixed.jsonl", chat_pairs(48, words=(2, 18)))
    words = run_words(remat="full", max_tokens_per_device=1024, datasets=rows, global_batch_size=8)
    _, _, lines = prepare(words)
    assert any("of the slots are padding, because a device has 1 pair per step" in line for line in lines), lines


def test_with_rows_at_once_given_only_the_policy_is_chosen(run_words: Words) -> None:
    _, prepared, lines = prepare(run_words(remat="auto", micro_batch_size=1))
    assert prepared.fit.remat == "attention"
    assert prepared.fit.max_tokens_per_device == MAX_TOKENS_PER_DEVICE["cpu"], "no limit of its own"
    assert prepared.batches.tokens_per_device < 200
    (line,) = [line for line in lines if line.startswith("step: ")]
    assert re.search(r"remat attention, needs .* relative to attention: full 1\.\d\d\)", line)


def test_what_cannot_fit_is_logged(run_words: Words) -> None:
    _, prepared, lines = prepare(run_words(remat="auto"), limit=1000)
    assert prepared.fit.remat == "full"
    assert any("this may not fit: use more devices" in line for line in lines)


def test_explicit_settings_are_used_without_a_trial(run_words: Words) -> None:
    _, prepared, lines = prepare(run_words(remat="dots", max_tokens_per_device=192))
    assert prepared.fit == Fit("dots", 192)
    assert not any(line.startswith("step: ") for line in lines)
    assert prepared.batches.tokens_per_device <= 192


def test_trial_compilations_and_steps_have_the_compiler_options_of_the_config(run_words: Words, tmp_path: Path) -> None:
    # XLA writes the programs that it compiles with xla_dump_to, and no others. The other option changes nothing on a
    # CPU, except that no program of an earlier test is found in the cache.
    options = {"xla_dump_to": str(tmp_path / "dump"), "xla_gpu_all_gather_combine_threshold_bytes": time.time_ns()}
    words = run_words(remat="auto", compiler_options=json.dumps(options))
    _, prepared, _ = prepare(words)
    assert prepared.assembly.options == options
    assert len(prepared.programs) == 1, "it is the program of the trial"
    assert list(tmp_path.glob("dump/*train_step*after_optimizations.txt"))
    assert fit_conditions(prepared.assembly, "live")["compiler_options"] == options, "it is part of run.json"
    # The evaluation has the same options; it takes longer to compile than to look at.
    assert prepared.assembly.with_remat("full").options == options


def test_a_fit_is_remembered_as_long_as_nothing_it_depends_on_changes(run_words: Words) -> None:
    _, prepared, _ = prepare(run_words(remat="auto"), recalled=Fit("full", 128))
    assert prepared.fit == Fit("full", 128)
    # "none" is not tried on any platform, but an earlier version has chosen it.
    _, earlier, _ = prepare(run_words(remat="auto"), recalled=Fit("none", 128))
    assert earlier.assembly.model.remat == "none"
    now = fit_conditions(prepared.assembly, "live")
    saved = FitRecord.from_json(json.loads(json.dumps(fit_record(Fit("dots", 640, 500), now, limit=800).to_json())))
    assert recalled_fit(saved, now, limit=900) == Fit("dots", 640, 500)
    assert recalled_fit(saved, now, limit=600) == Fit("dots", 640, 500), "it still fits"
    assert recalled_fit(saved, now, limit=400) is None
    tight = fit_record(Fit("full", 64, 1000), now, limit=800)
    assert recalled_fit(tight, now, limit=800) == Fit("full", 64, 1000), "nothing smaller was found then either"
    for key, value in {"mesh": [1, 8, 1], "asked_remat": "full", "reference": "cached", "jax": "0.0"}.items():
        assert now[key] != value
        assert recalled_fit(saved, now | {key: value}, limit=900) is None
    assert recalled_fit(None, now, limit=900) is None


def test_every_key_that_may_change_and_changes_the_step_is_part_of_the_fit() -> None:
    """Checks keys that a resumed run may change: each is part of the fit, or does not affect what a step computes."""
    aside = {
        "dataset_num_proc",
        "output_dir",
        "cache_dir",
        "logging_steps",
        "report_to",
        "eval_datasets",
        "eval_on_start",
        "eval_steps",
        "save_steps",
        "push_to_hub",
        "push_public",
        "mirror",
    }
    aside |= {"save_total_limit", "metric_for_best_model", "load_best_model_at_end", "export_dtype", "max_shard_size"}
    aside |= {"profile_steps", "compilation_cache", "resume", "heartbeat_timeout_seconds"}
    aside |= {"watchdog", "maintenance_notice", "save_minutes"}
    aside |= {"run_name", "run_project", "run_group", "run_tags", "export_at_end"}
    aside |= {"sample_prompts", "sample_steps", "sample_max_new_tokens", "sample_temperature"}
    aside |= {"mesh", "reference"}  # with another setting
    assert FREE_KEYS - aside == set(FITTED_KEYS)


def test_the_run_keeps_its_fit_and_compiles_nothing_after_warm_up(run_words: Words, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "even.jsonl", chat_pairs(24, words=(5, 6)))
    config = load_config(
        DPOConfig,
        None,
        run_words(remat="auto", datasets=rows, num_train_epochs=3, profile_steps="4:5", reference="live"),
    )
    compiled = itertools.count()
    counts: list[int] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            next(compiled)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(config, callbacks=[EachStep(lambda run: counts.append(int(repr(compiled)[6:-1])))])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(counts) == 10
    assert counts[0] > 0
    assert len(set(counts[2:])) == 1, f"a step after the second compiled something: {counts}"
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert state["fit"]["remat"] == "attention"
    assert state["fit"]["max_tokens_per_device"] % 64 == 0
    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["padding"] < 1 and line["peak_memory_gib"] > 0.05 for line in lines)


def test_every_shape_of_an_epoch_of_many_lengths_is_compiled_ahead(run_words: Words, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "mixed.jsonl", chat_pairs(40, words=(2, 18)))
    options = {"mesh.data": 1, "mesh.tensor": 8, "global_batch_size": 4, "num_train_epochs": 40}
    setup, prepared, _ = prepare(run_words(datasets=rows, **options))
    known = {shapes_of(batch) for batch in prepared.batches.shapes()}
    made = {shapes_of(prepared.batches.make(setup.row_plan.step(step)).batch) for step in range(40)}
    assert 1 < len(made) <= len(known) <= 8
    assert made <= known


def test_a_run_on_tpus_has_half_as_many_shapes(run_words: Words, tmp_path: Path) -> None:
    pairs = [pair for words in range(1, 25) for pair in chat_pairs(8, words=(words, words + 1))]
    rows = write_jsonl(tmp_path / "mixed.jsonl", pairs)
    options = {"mesh.data": 1, "mesh.tensor": 8, "global_batch_size": 2, "num_train_epochs": 40, "max_length": 512}
    words = ["compute_dtype=float32", *run_words(datasets=rows, **options)]
    setup = build(load_config(DPOConfig, None, words), lambda _: None)

    def num_shapes() -> int:
        steps = map(setup.row_plan.step, range(setup.num_steps))
        return len(make_batches(setup, setup.train_data, steps, max_tokens_per_device=4096, cache=None).shapes())

    assert 4 < num_shapes() <= 8
    with compiling_for(Target("tpu")):
        assert num_shapes() == 4


def test_the_compiled_step_reuses_the_state_and_never_holds_all_logits(
    run_words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that every buffer of the old state is reused for the new one, and no array is tokens by vocabulary."""
    # A CPU keeps logits up to a size that no toy exceeds.
    monkeypatch.setattr(head_chunks, "KEPT_LOGITS", 2**10)
    rows = write_jsonl(tmp_path / "long.jsonl", chat_pairs(64, words=(15, 18)))
    setup, prepared, _ = prepare(
        run_words(datasets=rows, global_batch_size=64, **{"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 8})
    )
    batch = prepared.batches.shapes()[-1]
    program = prepared.programs.of(batch)
    leaves = jax.tree.leaves(prepared.assembly.state)
    text = program.as_text()
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text.replace("\n", " "))
    assert aliased is not None
    assert len(re.findall(r"(?:may|must)-alias", aliased.group(1))) == len(leaves)
    kept = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    assert program.memory_analysis().alias_size_in_bytes >= kept
    scored, vocabulary = batch.logp_slot.size, setup.model.config.vocab_size
    with_vocabulary = [
        math.prod(dims) // size
        for dims in (tuple(map(int, text.split(","))) for text in re.findall(r"f32\[([\d,]+)\]", text))
        for size in (vocabulary, vocabulary // 8)  # split over eight devices
        if size in dims
    ]
    assert len(with_vocabulary) > 10
    assert max(with_vocabulary) <= scored // 2, "a chunk of the tokens at a time"
    assert scored > 1024
