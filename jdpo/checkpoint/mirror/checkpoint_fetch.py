"""Fetches the newest checkpoint of a mirror into the run's folder, if it is newer than those there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jdpo.checkpoint.mirror.contents import CHECKPOINTS, OF_STEPS, manifest_in, manifest_of, share_of, step_folder
from jdpo.checkpoint.mirror.run_fetch import RunInMirror, fetch_file, fetch_files, with_retries
from jdpo.checkpoint.mirror.upload_notes import NOTES
from jdpo.checkpoint.steps import MANIFEST, best_of, clear_way, complete_steps
from jdpo.durable import sync_path, write_durably
from jdpo.processes import any_process, is_first, run_jointly
from jdpo.words import memory


def fetch_newest(
    found: RunInMirror,
    run: Path,
    newest: int | None,
    last_step: int,
    best_metric: str | None,
    log: Callable[[str], None],
) -> int | None:
    """Fetches the newest checkpoint whose files agree with its manifest, if it is later than `newest`.

    Every process must call this, and downloads its share of the files to the folder that all of them share.

    Args:
      found: the run in the mirror.
      run: the folder of the run.
      newest: the newest complete step in it, or None.
      last_step: the run's last step.
      best_metric: the metric that ranks checkpoints, if the best one is exported at the end and so has to be there; or
        None.
      log: takes lines for the user.

    Returns:
      the newest step in the folder.

    Raises:
      ValueError: the mirror has a later step than the run.
      OSError: no checkpoint of the mirror agrees with its manifest, and there is none in the folder; or the store
        cannot be read.
    """
    steps = [step for step in reversed(found.steps) if newest is None or step > newest]
    if steps and steps[0] > last_step:
        raise ValueError(
            f"mirror {found.store.address} holds a checkpoint of step {steps[0]}, but this run ends at step "
            f"{last_step}: it belongs to another run; choose another mirror"
        )
    for step in steps:
        if (staged := _stage(found, run, step, log)) is None:
            continue
        if best_metric is not None:
            _fetch_best(found, run, step, best_metric, log)
        run_jointly(lambda: _place(found, run, step, staged), on_first=True)  # noqa: B023
        return step
    if steps and newest is None:
        raise OSError(
            f"no checkpoint in the mirror {found.store.address} agrees with its manifest, so the run cannot continue. "
            "Repair one, or choose another mirror to start again at step 0"
        )
    return newest


def _marker(run: Path) -> Path:
    return run / NOTES / "fetching"


def _stage(found: RunInMirror, run: Path, step: int, log: Callable[[str], None]) -> Path | None:
    """Downloads a step to a folder for it, or returns None, and logs why, if a file is not the one that was saved."""
    folder, staging = step_folder(step), _marker(run) / str(step)

    def clear() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def fetch() -> str | None:
        manifest = manifest_in(with_retries(lambda: found.store.read(manifest_of(folder))))
        if manifest is None or manifest.get("step") != step:
            return f"{MANIFEST} cannot be read, or is that of another step"
        files: Mapping[str, Any] = manifest["files"]
        share = share_of({name: file[0] for name, file in files.items()}, jax.process_index(), jax.process_count())
        if (fault := fetch_files(found, folder, share, files, staging)) is None and is_first():
            write_durably(staging / MANIFEST, json.dumps(manifest, indent=1))
        return fault

    run_jointly(clear, on_first=True)
    size = sum(size for name, size in found.names.items() if name.startswith(f"{folder}/"))
    log(f"fetching the checkpoint of step {step} ({memory(size)}) from the mirror {found.store.address}")
    fault = run_jointly(fetch)
    if any_process(fault is not None):
        why = fault or "a file in the share of another process has changed"
        log(f"warning: the checkpoint of step {step} in the mirror {found.store.address} is damaged ({why}): not used")
        return None
    return staging


def _place(found: RunInMirror, run: Path, step: int, staging: Path) -> None:
    # Metrics without their checkpoint are cut; a checkpoint without its metrics would lose them.
    for name in OF_STEPS:
        fetch_file(found.store, name, run / name)
    _publish(run, step, staging)
    shutil.rmtree(_marker(run))


def _publish(run: Path, step: int, staging: Path) -> None:
    target = run / step_folder(step)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_way(target)
    for path in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        sync_path(path)
    staging.rename(target)
    sync_path(target.parent)


def _fetch_best(found: RunInMirror, run: Path, newest: int, metric: str, log: Callable[[str], None]) -> None:
    """Fetches the best checkpoints up to a step, too; on each set of evaluation rows there is a best one."""

    def best() -> list[int]:
        manifests = {}
        for step in (step for step in found.steps if step <= newest):
            manifest = manifest_in(with_retries(lambda: found.store.read(manifest_of(step_folder(step)))))  # noqa: B023
            manifests[step] = manifest or {}
        names = {str(each.get("metric_name")) for each in manifests.values()}
        names = {name for name in names if name.startswith(f"{metric} on ")}
        ranked = {best_of(manifests, name, greater_is_better=not metric.endswith("loss")) for name in sorted(names)}
        return sorted(step for step in ranked if step not in (None, newest))

    there = set(complete_steps(run / CHECKPOINTS))
    for step in run_jointly(best):
        if step not in there and (staged := _stage(found, run, step, log)) is not None:
            run_jointly(lambda: _publish(run, step, staged), on_first=True)  # noqa: B023
