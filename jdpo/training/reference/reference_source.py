"""The source of the reference's log-probs: a frozen model next to the policy, a cache, or none."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from jdpo.config import ReferenceSettings, TrainConfig
from jdpo.data.reference_cache.cache_key import changes, most_similar_entry
from jdpo.data.reference_cache.scores import ReferenceCache
from jdpo.devices import leave_out_missing_tpus
from jdpo.processes import PROGRESS, any_process, is_first, seen_soon
from jdpo.training.reference.cache_building import build_cache
from jdpo.training.reference.cache_entries import RowSet, entry_of, find_rows
from jdpo.training.reference.packed_scoring import PackedScorer, packed_logps
from jdpo.training.setup.numerics import jax_settings, resolve_dtype
from jdpo.training.setup.row_order import BuildStopped
from jdpo.training.setup.run_setup import Log, Setup, build
from jdpo.training.setup.tasks import task_for
from jdpo.training.setup.validation import Asked, Mode, fixed_mode
from jdpo.training.setup.weight_placement import load_reference_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """The source of a run's reference log-probs.

    Attributes:
      mode: a frozen model in the step, the cache, or no reference at all.
      train: the log-probs of the training rows where the mode is cached.
      eval: those of the evaluation rows, where there are any.
      num_found: rows, training and evaluation, that the cache held.
      num_computed: rows that this run computed for it.
    """

    mode: Mode
    train: ReferenceCache | None = None
    eval: ReferenceCache | None = None
    num_found: int = 0
    num_computed: int = 0


def settle_reference(
    setup: Setup,
    *,
    asked: Asked,
    needs_reference: bool,
    sync_ref_model: bool = False,
    began_as: Mode | None = None,
    stopped: Callable[[], bool] | None = None,
    log: Log,
) -> Reference:
    """Decides where the reference's log-probs come from, computes those to be cached, and logs it in one line.

    A damaged cache is computed again if `asked` is auto, and refused if it is cached.

    Every process must call this, inside `numerics`, before other weights are loaded: the reference's weights are in
    memory only while something is computed.

    Args:
      asked: `reference` of the config.
      needs_reference: True if the loss has a reference.
      sync_ref_model: True if the reference moves in training, which a cache cannot follow.
      began_as: the mode of an earlier start of the same run: auto keeps it, so that a resumed run is the uninterrupted
        one, bitwise.
      stopped: returns True if a signal asks to stop; called between batches.
      log: takes lines for the user.

    Raises:
      ValueError: `asked` is not possible; says why, and what to do.
      FloatingPointError: a log-prob of the reference is not finite; the row is named.
      BuildStopped: `stopped` returned True.
    """
    # Many configs leave no choice; the cache is then not even looked at.
    mode = fixed_mode(asked, needs_reference=needs_reference, sync_ref_model=sync_ref_model)
    if mode is None and asked == "auto" and began_as == "live":
        log("reference: live, as this run began")
        return Reference(mode="live")
    if mode is not None:
        why = "the loss has none" if mode == "none" else "as it moves in training" if sync_ref_model else "as asked for"
        log(f"reference: {mode}, {why}")
        return Reference(mode=mode)
    sets = find_rows(setup)
    # All processes take the same branch, as each computes a part of every shard.
    if any_process(any(rows.shards.damaged_files for rows in sets)):
        if asked == "cached":
            for rows in sets:
                rows.folder.refuse_damaged(rows.shards)
            raise ValueError("the reference's cached log-probs are damaged on another host; its message names the file")
        named = [rows.folder.damage(rows.shards) for rows in sets if rows.shards.damaged_files]
        what = "; ".join(named) or "a file on another host is not as it was written"
        log(f"reference: its cached log-probs are damaged and computed again: {what}")
        return _build(setup, sets, log, repair=True, stopped=stopped)
    # Everything is cached on every host: nothing to load or compute.
    if not any_process(not all(rows.complete for rows in sets)):
        _restore_entries(setup, sets)
        return _cached(sets, [0] * len(sets), log)
    if asked == "cached":
        raise ValueError(
            f"reference is 'cached', but {explain_miss(setup, sets)}; `jdpo reference CONFIG` computes what is "
            "missing, or set reference to auto or live"
        )
    # A user who never cached anything similar does not need to know what is missing.
    news = f"; {explain_miss(setup, sets)}" if _kept_before(setup, sets) else ""
    reason = "as this run began" if began_as == "cached" else _why_it_pays(setup, sets[0])
    if reason is None:
        if is_first():
            with contextlib.suppress(OSError):  # a hint to later runs, nothing more
                sets[0].folder.ask(_run_name(setup))
        log(f"reference: live, as one pass over the rows does not pay for a cache{news}")
        return Reference(mode="live")
    log(f"reference: computing its log-probs once, {reason}{news}")
    return _build(setup, sets, log, repair=False, stopped=stopped)


def compute_reference(config: TrainConfig, log: Log, *, stopped: Callable[[], bool] | None = None) -> Reference:
    """Runs `jdpo reference`: computes everything that is missing or damaged in a config's cache.

    Args:
      config: the settings of the `jdpo dpo` run.
      stopped: returns True if a signal asks to stop, the same on every process; called between batches.

    Raises:
      BuildStopped: `stopped` returned True; what was computed is kept.
      ValueError: bad input, or a reference that cannot be cached.
      FloatingPointError: as in `settle_reference`.
    """
    loss = task_for(config).loss
    assert loss is not None, type(config)
    assert isinstance(config, ReferenceSettings), type(config)
    if not loss.needs_reference:
        raise ValueError(f"loss_type {' + '.join(loss.loss_types)} has no reference: there is nothing to compute")
    if config.sync_ref_model:
        raise ValueError("sync_ref_model moves the reference in training: its log-probs cannot be computed beforehand")
    leave_out_missing_tpus()
    resolved = resolve_dtype(config)
    with jax_settings(resolved, resolved.cache_dir):
        setup = build(resolved, log)
        PROGRESS.enter("reference")
        if stopped is not None and stopped():  # before any weight is loaded
            raise BuildStopped
        return _build(setup, find_rows(setup), log, repair=True, stopped=stopped)


def _why_it_pays(setup: Setup, rows: RowSet) -> str | None:
    """Returns why auto computes a cache, None where it does not; the same on every process."""
    rows_per_epoch = setup.row_plan.mixture.num_examples
    # A second pass over the rows would compute the same log-probs again.
    if setup.num_steps * rows_per_epoch > setup.steps_per_epoch * len(setup.train_data):
        return "as the run passes over the rows more than once"
    if any_process(bool(rows.shards.whole.any())):
        return "as part of them are cached already"
    if any_process(bool(set(rows.folder.asked_by()) - {_run_name(setup)})):
        return "as another run asked for the same ones"
    return None


def _run_name(setup: Setup) -> str:
    return str(Path(setup.config.output_dir).resolve())


def _kept_before(setup: Setup, sets: Sequence[RowSet]) -> bool:
    """Returns whether the cache holds some of these log-probs, or those of a run that was much like this one."""
    return any(
        rows.shards.whole.any() or most_similar_entry(rows.folder.path.parent, entry_of(setup, rows)) is not None
        for rows in sets
    )


def explain_miss(setup: Setup, sets: Sequence[RowSet]) -> str:
    """Describes which rows are not wholly cached, and what has changed since the most similar entry was computed."""
    missed = []
    for rows in sets:
        role, folder, whole = rows.role, rows.folder, rows.shards.whole
        if whole.all():
            continue
        if whole.any():
            missed.append(f"only {folder.count_rows(whole)} of {folder.num_rows} {role} rows are in the cache")
            continue
        now = entry_of(setup, rows)
        then = most_similar_entry(folder.path.parent, now)
        changed = f" (changed since the last: {'; '.join(changes(then, now))})" if then is not None else ""
        missed.append(f"the {role} rows are not in the cache{changed}")
    return " and ".join(missed) or "the cache of another host is incomplete"


# --- computing


def _build(
    setup: Setup, sets: Sequence[RowSet], log: Log, *, repair: bool, stopped: Callable[[], bool] | None
) -> Reference:
    def check_stopped() -> None:
        if stopped is not None and stopped():
            raise BuildStopped

    scorer = PackedScorer(
        packed_logps(setup.model, setup.mesh),
        setup.mesh,
        lambda: load_reference_weights(setup),
        model=setup.model,
        max_tokens_per_device=setup.config.max_tokens_per_device,
        micro_batch_size=setup.config.micro_batch_size,
        check_stopped=check_stopped,
    )
    computed = [
        build_cache(setup, rows, scorer, log=log, repair=repair) if any_process(not rows.complete) else 0
        for rows in sets
    ]
    _restore_entries(setup, sets)
    return _cached(sets, computed, log)


def _restore_entries(setup: Setup, sets: Sequence[RowSet]) -> None:
    """Puts back a lost key.json, from which later misses tell what has changed; the shards do not need it."""
    for rows in sets:
        if is_first() and not rows.folder.has_entry():
            with contextlib.suppress(OSError):
                rows.folder.write_entry(entry_of(setup, rows))


def _cached(sets: Sequence[RowSet], computed: Sequence[int], log: Log) -> Reference:
    caches = {
        # Examined again where something was missing or damaged: this run, or one it waited for, has written it.
        rows.role: rows.folder.open(rows.shards if rows.complete else seen_soon(rows.examine_whole, rows.folder.path))
        for rows in sets
    }
    num_computed = sum(computed)
    num_found = sum(map(len, caches.values())) - num_computed
    where = " and ".join(dict.fromkeys(str(cache.path) for cache in caches.values()))
    log(f"reference: cached, {num_found} rows found, {num_computed} computed, in {where}")
    return Reference(
        mode="cached",
        train=caches["training"],
        eval=caches.get("evaluation"),
        num_found=num_found,
        num_computed=num_computed,
    )
