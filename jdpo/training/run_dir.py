"""The folder of a run: its files, which run it belongs to, and whether that is finished.

resolved_config.yaml   every key, defaults included, without queries of addresses; `jdpo dpo` with it repeats the run
train_dataset.*, eval_dataset.*   rows that Python code gave, see `RunRows`
run.json               the command, digests of the inputs, and whether the run is finished; see `RunRecord`
metrics.jsonl          one JSON object per logged step
samples.jsonl          answers to sample_prompts, one JSON object each
checkpoints/<step>/    what a resumed run starts from
model/                 the trained Hugging Face model
data.json              what the rows are like; see `jdpo.reports.data_summary.run_data`
report.html            all of this as one page, written every few minutes while the run trains
plots/                 PNGs
trackers/              what each tracker was sent, see `SentSteps`
.mirror/               what the mirror has, see `jdpo.checkpoint.mirror.upload_notes`
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import yaml

from jdpo.checkpoint.mirror.run_fetch import fetch_run
from jdpo.checkpoint.steps import MANIFEST, damaged_folders, fault_of, step_folders, step_of
from jdpo.config import (
    EXPORT_KEYS,
    OutputSettings,
    ReferenceSettings,
    changed_keys,
    differences,
    public_text,
    refuse_passwords,
    to_dict,
    to_public_yaml,
)
from jdpo.durable import keep_old, write_durably
from jdpo.file_locks import lock_file
from jdpo.processes import any_process, gathered, is_first, run_jointly, sharers_of, text_of_first
from jdpo.training.run_record import RunRecord

REPORT = "report.html"

PATIENCE = 1.0
"""Seconds until a locked folder is refused: `jdpo report` looks at the lock for an instant."""

LENGTH_KEYS = {"max_steps", "num_train_epochs"}
USED_BY_A_RUN = ("metrics.jsonl", "checkpoints", "model", "run.json", "resolved_config.yaml")


def check_output_dir(settings: Mapping[str, Any]) -> None:
    """Refuses an `output_dir` that no run can write into, before anything is written.

    Args:
      settings: the whole config as plain values.

    Raises:
      ValueError: it is a file, or a folder that the run reads a model from.
    """
    path = Path(settings["output_dir"])
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir {path} is a file; choose a folder")
    for key in ("model_name_or_path", "reference_model"):
        name = settings.get(key)  # sft has no reference_model
        model = None if name is None else Path(name).expanduser()
        if model is not None and path.exists() and model.exists() and path.samefile(model):
            raise ValueError(f"output_dir {path} is the folder of {key}; choose another folder")


class RunDirectory:
    """Owns output_dir. Only the first process writes."""

    def __init__(self, config: OutputSettings, command: str, *, only_read: bool = False) -> None:
        """Opens a new folder, or the folder of the same run.

        Args:
          config: the run's settings.
          command: "sft" or "dpo".
          only_read: True: nothing is locked, created or written, as for a dry run.

        Raises:
          ValueError: the folder cannot be written, or holds another run; every difference is named.
        """
        self.path = Path(config.output_dir)
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.plots = self.path / "plots"
        self.report = self.path / REPORT
        self._exports = config.export_at_end
        self._run_file = self.path / "run.json"
        self._config_file = self.path / "resolved_config.yaml"
        self._lock: IO[str] | None = None
        self.mirror_state: Callable[[], Mapping[str, Any]] = dict  # for run.json, see `RunRecord.mirror`
        # Before the config is written, which others may read.
        refuse_passwords(to_dict(config))
        run_jointly(lambda: check_output_dir(to_dict(config)), on_first=True)
        self._of_first: RunRecord | None = None  # what the first process has in run.json, on the others
        if not only_read:
            run_jointly(self._take_lock, on_first=True)
        try:
            self._check_alike(config, only_read=only_read)
            starts_over = config.resume == "never" and run_jointly(self._is_lost, on_first=True)
            # Decided on the first process, as only its file system counts.
            self._starts_over = any_process(bool(starts_over))
            fetches = config.mirror is not None and not only_read
            self._is_fetched = fetches and any_process(
                bool(run_jointly(lambda: fetch_run(self.path, config, command, self._inputs_there()), on_first=True))
            )
            # What the others see on a network file system may be a minute old, so they are told by the first one.
            found = run_jointly(lambda: self._read_owner(config, command), on_first=True)
            flags = gathered(np.array(found or (False, False, False)))[0].tolist()
            self.is_new, self._exports_again, self._has_model = flags
            if not only_read:
                run_jointly(lambda: self._write_owner(config, command), on_first=True)
            text = text_of_first(self.record.text() if is_first() and self._run_file.exists() else "")
            self._of_first = RunRecord.parse(text) if text and not is_first() else None
        except BaseException:
            self.close()
            raise

    def _check_alike(self, config: OutputSettings, *, only_read: bool) -> None:
        """Refuses processes that make different runs, or that do not share the folder.

        Raises:
          ValueError: the settings differ between processes, or what one writes is not seen by all.
        """
        first = yaml.safe_load(text_of_first(to_public_yaml(config)))
        run_jointly(lambda: _refuse_differences(differences(first, config)))
        sharers = range(jax.process_count()) if only_read else sharers_of(self.path)
        if any_process(len(sharers) < jax.process_count()):
            raise ValueError(
                f"output_dir {self.path} is not one folder for all processes of the run: process {jax.process_index()} "
                f"shares it with {len(sharers) - 1} of {jax.process_count() - 1} others; mount one shared file system "
                "on every host, at the same place (`jdpo doctor` shows who sees what)"
            )

    def _read_owner(self, config: OutputSettings, command: str) -> tuple[bool, bool, bool]:
        """Returns whether the run is new, whether its model is to be exported again, and whether there is one."""
        is_new = not self._check_owner(config, command)
        exports_again = not is_new and bool(changed_keys(self._saved_config(), config, EXPORT_KEYS))
        return is_new, exports_again, self.model.exists()

    def _write_owner(self, config: OutputSettings, command: str) -> None:
        try:
            # The lines of the lost run would be mixed with those of the new one.
            for lines in (self.metrics, self.samples) if self._starts_over else ():
                if os.path.lexists(lines):
                    keep_old(lines, "before")
            # Before run.json: after a kill in between, a folder without run.json counts as free.
            write_durably(self._config_file, to_public_yaml(config))
            new = RunRecord.of_new_run(command)
            if self.is_new:
                new.write(self._run_file)
            else:
                record = self.record
                now = dataclasses.replace(record, started_in=new.started_in, ended=None, end_reason=None)
                if now != record:
                    now.write(self._run_file)
        except OSError as error:
            raise ValueError(
                f"cannot write to output_dir {self.path}: {error}; choose a folder on a writable disk with free space"
            ) from None

    def _take_lock(self) -> None:
        """Locks the folder, so that a second start of the same command, such as a requeued job, is refused."""
        path = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = lock_file(path, patience=PATIENCE)
        except OSError as error:
            raise ValueError(
                f"cannot write to output_dir {self.path}: {error}; choose a folder on a writable disk with free space"
            ) from None
        if lock is None:
            owner = path.read_text(encoding="utf-8").strip() or "another process"
            raise ValueError(
                f"output_dir {self.path} is in use by {owner}; wait until it ends, or choose another output_dir"
            )
        # The text is for messages alone: the lock is that of the open file, which ends with the process.
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Notes how this start ends if nothing has noted it, such as for bad rows, and unlocks the folder."""
        if is_first():
            with contextlib.suppress(OSError, ValueError):  # which would hide what ends the run
                # A finished run stays one, also if a later call is refused.
                if not self.record.finished and self.record.ended is None:
                    self.end(error)
        self.close()

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def has_metrics(self) -> bool:
        """Returns True if an earlier start of this run has logged steps."""
        return not self.is_new and self.metrics.exists() and self.metrics.stat().st_size > 0

    def _check_owner(self, config: OutputSettings, command: str) -> bool:
        """Returns True if the folder holds this run, False if it is free; refuses another run."""
        used = [name for name in USED_BY_A_RUN if (self.path / name).exists()]
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ValueError(f"{self.checkpoints} is a file, and not the folder of a run's checkpoints; move it away")
        if not self._is_fetched and (not used or self._never_began() or self._starts_over):
            return False
        advice = "choose another output_dir, or delete this one if it is no longer needed"
        if config.resume == "never":
            raise ValueError(f"output_dir {self.path} holds a run already, and resume is 'never'; {advice}")
        if not (self._run_file.exists() and self._config_file.exists()):
            raise ValueError(f"output_dir {self.path} holds {', '.join(used)} of something else; {advice}")
        if (found := self.record.command) != command:
            raise ValueError(f"output_dir {self.path} holds a run of `jdpo {found}`, not of `jdpo {command}`; {advice}")
        changed = differences(self._saved_config(), config)
        # Before the general refusal, since here there is a better advice than to undo the change.
        if changed and self.record.finished and {line.partition(":")[0] for line in changed} <= LENGTH_KEYS:
            raise ValueError(self._how_to_train_on(config, changed))
        if changed:
            raise ValueError(
                f"output_dir {self.path} holds a different run, so this one cannot resume it:\n  "
                + "\n  ".join(changed)
                + f"\nUndo these, or {advice}"
            )
        return True

    def _how_to_train_on(self, config: OutputSettings, changed: Sequence[str]) -> str:
        """The error for a finished run whose number of steps was changed."""
        words = f"--model_name_or_path {self.model} --output_dir NEW_FOLDER"
        saved = self._saved_config()
        if has_reference := isinstance(config, ReferenceSettings):
            words += f" --reference_model {saved['reference_model'] or saved['model_name_or_path']}"
        return (
            f"the run in {self.path} is finished, and its learning rate has followed its schedule to the end, so it "
            f"cannot be made longer or shorter ({', '.join(changed)}). For a run of another length, choose another "
            f"output_dir. To train this model further, start a new run from it: `{words}`"
            f"{' (which keeps the reference)' if has_reference else ''}"
        )

    def _never_began(self) -> bool:
        """True if a start was refused or killed before it trained: the folder is then free, for a corrected config."""
        trained = self.metrics.exists() and self.metrics.stat().st_size > 0
        saved = self.checkpoints.exists() and any(self.checkpoints.iterdir())
        ours = not self._run_file.exists() or bool(self.record.jdpo)
        return ours and not (trained or saved or self.model.exists())

    def _inputs_there(self) -> Mapping[str, str] | None:
        """Returns the inputs that a run in the folder has recorded; None if the folder is free."""
        used = any((self.path / name).exists() for name in USED_BY_A_RUN)
        if not used or self._never_began():
            return None
        return self.record.inputs if self._run_file.exists() else {}  # what is no run is refused later

    def _is_lost(self) -> bool:
        """True if the folder has checkpoints, all of them damaged, and no model: there is nothing to resume."""
        folder = self.checkpoints
        saved = [step for step in step_folders(folder) if (folder / str(step) / MANIFEST).exists()]
        if self.model.exists() or not (saved or damaged_folders(folder)):
            return False
        # A checkpoint in a folder of another step's name can be renamed, and one without a fault can be resumed.
        return not any(step_of(folder / str(s)) not in (None, s) or fault_of(folder / str(s)) is None for s in saved)

    @property
    def record(self) -> RunRecord:
        """The content of run.json: read again each time on the first process, and what that has told the others."""
        if self._of_first is not None:
            return self._of_first
        try:
            return RunRecord.read(self._run_file)
        except ValueError as error:
            raise ValueError(f"{error}; bring it back, or choose another output_dir") from None

    def update(self, **changes: Any) -> None:
        """Changes fields of run.json. Every process must call this, with the same values."""
        new = dataclasses.replace(self.record, **changes)
        if self._of_first is not None:
            self._of_first = new
        elif new != self.record:
            new.write(self._run_file)

    def give_up(self, names: Sequence[str]) -> None:
        """Keeps the names of damaged checkpoints that were given up. To be called by the first process alone."""
        if names:
            dataclasses.replace(self.record, given_up=tuple(names)).write(self._run_file)

    def _saved_config(self) -> dict[str, Any]:
        path = self._config_file
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is damaged ({error}); bring it back, or choose another output_dir") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path} is damaged (no keys in it); bring it back, or choose another output_dir")
        return value

    @property
    def finished(self) -> bool:
        """True if the run is complete, and its model is exported as the config asks."""
        if self.is_new or not self.record.finished:
            return False
        if not self._exports:
            return not self._is_fetched  # what it leaves are its checkpoints, which are fetched later
        # The others know from the first process what was there at the start.
        has_model = self.model.exists() if is_first() else self._has_model
        return has_model and not self._exports_again

    @property
    def outcome(self) -> str:
        """The results of a finished run, in words."""
        if self._exports:
            return f"model in {self.model}"
        return f"checkpoints in {self.checkpoints} (export_at_end is false)"

    def check_inputs(self, inputs: Mapping[str, str], files: Mapping[str, str]) -> None:
        """Records digests of the inputs of a run; refuses changed inputs when it is resumed.

        Args:
          inputs: name of an input, as messages call it -> digest of its content.
          files: name of a file that rows were read from -> digest of its content. Files may change as long as the rows
            do not, and are named if these do.

        Raises:
          ValueError: naming each input that is not what the run started with.
        """
        run_jointly(lambda: self.compare_inputs(inputs, files))
        if is_first():
            record = self.record
            dataclasses.replace(record, inputs={**record.inputs, **inputs}, files=dict(files)).write(self._run_file)

    def compare_inputs(self, inputs: Mapping[str, str], files: Mapping[str, str]) -> None:
        """Refuses inputs that differ from those that the run started with; see `check_inputs`. Writes nothing."""
        saved, files_then = self.record.inputs, self.record.files
        changed = [name for name, digest in inputs.items() if name in saved and saved[name] != digest]
        changed_files = [name for name, digest in files.items() if files_then.get(name, digest) != digest]
        changed_files += [f"{name} (no longer read)" for name in files_then if name not in files]
        changed_files += [f"{name} (new)" for name in files if files_then and name not in files_then]
        if changed:
            raise ValueError(
                f"cannot resume the run in {self.path}: since it started, the content of {' and of '.join(changed)} "
                "has changed; bring the old content back, or choose another output_dir. Digests: "
                + ", ".join(f"{name} {saved[name][:12]} then, {inputs[name][:12]} now" for name in changed)
                + (f". Files that changed: {', '.join(changed_files)}" if changed_files else "")
            )

    def keep(self, **measured: Any) -> None:
        """Keeps measurements. Unlike in `update`, processes need not wait for each other, as a run may be failing."""
        if is_first():
            record = self.record
            mirror = self.mirror_state() or record.mirror
            dataclasses.replace(record, mirror=mirror, **measured).write(self._run_file)

    def end(self, error: BaseException | None) -> None:
        """Notes that this start fails, or ends before the run is finished. To be called by the first process alone.

        Args:
          error: what ends it; Ctrl-C and the like are stops, and no failures.
        """
        record = self.record
        if isinstance(error, Exception):
            record = dataclasses.replace(
                record, ended="failed", end_reason=public_text(f"{type(error).__name__}: {error}")
            )
        elif not record.finished:
            record = dataclasses.replace(record, ended="stopped", end_reason=None)
        record.write(self._run_file)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Marks the run as complete; the last thing a run writes. Every process must call this."""
        self.update(finished=True, results=dict(results))


def _refuse_differences(changed: Sequence[str]) -> None:
    if changed:
        raise ValueError(
            "the processes of this run have different settings (first process 0, then this one):\n  "
            + "\n  ".join(changed)
            + "\nStart the same command on every host"
        )
