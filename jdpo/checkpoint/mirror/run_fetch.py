"""Fetches a run from its mirror: the files that say which run it is; `checkpoint_fetch` fetches its checkpoint.

There are two parts because the run's inputs are compared in between: checkpoints are large, and of no use for a run
that is refused. The folder `.mirror/fetching` exists until both parts are there. A start that finds it begins with the
first part again, so a kill at any moment leaves a folder from which the next start continues.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jdpo.checkpoint.mirror.contents import (
    EXPORT,
    EXPORT_MANIFEST,
    IDENTITY,
    OF_STEPS,
    is_record,
    manifest_in,
    steps_in,
)
from jdpo.checkpoint.mirror.object_store import ObjectStore, StoreError
from jdpo.checkpoint.mirror.share_upload import AT_ONCE, Backoff
from jdpo.checkpoint.mirror.upload_notes import NOTES
from jdpo.checkpoint.steps import digest_of
from jdpo.config import OutputSettings, differences
from jdpo.durable import sync_path, write_durably
from jdpo.safe_text import terminal
from jdpo.words import listed

T = TypeVar("T")
_ATTEMPTS = 3
log = logging.getLogger(__name__)


class RunInMirror:
    """The run that a mirror holds.

    Attributes:
      names: {name: bytes} of all objects.
      record: content of run.json.
      settings: content of resolved_config.yaml.
    """

    def __init__(self, store: ObjectStore) -> None:
        """
        Raises:
          StoreError: the mirror cannot be read.
          ValueError: the mirror holds objects that are not of a run of jdpo.
        """
        self.store = store
        self.names = store.sizes()
        config, record = (store.read(name) if name in self.names else None for name in IDENTITY)
        self.record: Mapping[str, Any] = {}
        self.settings: Mapping[str, Any] = {}
        if config is not None and record is not None:
            try:
                self.settings, self.record = yaml.safe_load(config), json.loads(record)
                if not (isinstance(self.settings, dict) and isinstance(self.record, dict)):
                    raise ValueError("no keys in it")
            except (ValueError, yaml.YAMLError) as error:
                raise ValueError(f"mirror {store.address}: {' or '.join(IDENTITY)} is damaged: {error}") from None
        # `jdpo doctor`, and other tools that try whether they can write, leave hidden objects.
        elif foreign := [name for name in self.names if name not in IDENTITY and not name.startswith(".")]:
            raise ValueError(
                f"mirror {store.address} holds {listed(foreign, 3)}, and is not that of a run; choose another one"
            )

    @property
    def steps(self) -> list[int]:
        """The steps of its complete checkpoints."""
        return steps_in(self.names, with_manifest=True)

    @property
    def has_begun(self) -> bool:
        """True if there is something to continue; a start that failed leaves a mirror without."""
        return bool(self.record) and (bool(self.steps) or EXPORT_MANIFEST in self.names)

    def check_owner(self, run: Path, config: OutputSettings, command: str, inputs: Mapping[str, str]) -> None:
        """Refuses a mirror of another run.

        Args:
          run: the folder of the run that starts.
          config, command, inputs: of that run; the inputs are empty if they are not known yet.

        Raises:
          ValueError: naming what differs.
        """
        advice = "choose another mirror, or delete this one if it is no longer needed"
        if config.resume == "never":
            raise ValueError(f"mirror {self.store.address} holds a run already, and resume is 'never'; {advice}")
        found = []
        if (other := self.record.get("command")) != command:
            found.append(f"command: jdpo {other} in the mirror, jdpo {command} now")
        else:
            found += differences(self.settings, config)
        theirs = self.record.get("inputs", {})
        found += [
            f"{name}: {theirs[name][:12]} in the mirror, {digest[:12]} in {run}"
            for name, digest in inputs.items()
            if theirs.get(name, digest) != digest
        ]
        if found:
            raise ValueError(
                f"mirror {self.store.address} holds a different run, so this one can neither continue it nor write "
                "there:\n  " + "\n  ".join(found) + f"\nUndo these, or {advice}"
            )


def fetch_run(run: Path, config: OutputSettings, command: str, inputs: Mapping[str, str] | None) -> bool:
    """Compares a run with its mirror and, if the run's folder is free, fetches the records of the mirror's run.

    A finished run is fetched with its exported model, and needs nothing else. To be called by the first process, which
    has locked the folder.

    Args:
      config, command: of the run that starts.
      inputs: digests that the run in the folder has recorded; None if the folder is free.

    Returns:
      True if the folder now holds the run of the mirror.

    Raises:
      ValueError: the mirror holds another run, or its package is not installed.
      StoreError: the mirror cannot be read.
    """
    assert config.mirror is not None
    url = config.mirror
    found = with_retries(lambda: RunInMirror(ObjectStore(url)))
    if not found.has_begun:
        return False
    marker = run / NOTES / "fetching"
    is_free = inputs is None or marker.exists()
    found.check_owner(run, config, command, {} if is_free else inputs or {})
    if not is_free:
        return False
    marker.mkdir(parents=True, exist_ok=True)
    is_complete = bool(found.record.get("finished")) and _fetch_export(found, run, marker / EXPORT)
    # Metrics come with the checkpoint that they belong to.
    records = [name for name in found.names if is_record(name) and (is_complete or name not in OF_STEPS)]
    for name in sorted(records, key=lambda name: (name in IDENTITY, IDENTITY[:1] != (name,), name)):
        fetch_file(found.store, name, run / name)
    if is_complete:
        shutil.rmtree(marker)
    return True


def fetch_file(store: ObjectStore, name: str, path: Path) -> None:
    """Downloads a record of the run, in place of the file on the disk."""
    content = with_retries(lambda: store.read(name))
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content)


def fetch_files(
    found: RunInMirror, folder: str, names: Iterable[str], files: Mapping[str, Any], to: Path
) -> str | None:
    """Downloads files of a folder whose manifest has their digests. Returns what is wrong with them, or None.

    Args:
      folder: in the store.
      names: of the files to download, relative to it.
      files: name of each file -> bytes and digest.
      to: the local folder.

    Raises:
      StoreError: the store cannot be read.
    """

    def fetch(name: str) -> str | None:
        path = to / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            return f"{terminal(name)} is not in its folder"
        target = f"{folder}/{name}"
        if target not in found.names:
            return f"{terminal(name)} is missing"
        with_retries(lambda: found.store.download(target, path))
        if digest_of(path) != files[name]:
            return f"{terminal(name)} has changed since it was written"
        sync_path(path)
        return None

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mirror-download") as pool:
        return next((fault for fault in pool.map(fetch, names) if fault is not None), None)


def _fetch_export(found: RunInMirror, run: Path, staging: Path) -> bool:
    """Fetches the exported model of a finished run; returns False if it is missing or damaged."""
    manifest = manifest_in(found.store.read(EXPORT_MANIFEST))
    if manifest is None:
        return False
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if (fault := fetch_files(found, EXPORT, manifest["files"], manifest["files"], staging)) is not None:
        log.warning("the exported model in the mirror %s is not used: %s", found.store.address, fault)
        return False
    shutil.rmtree(run / EXPORT, ignore_errors=True)  # of a start that was killed here
    staging.rename(run / EXPORT)
    sync_path(run)
    return True


def with_retries(work: Callable[[], T]) -> T:
    """Calls `work` several times if need be, as a store may be out of reach for a moment.

    Raises:
      StoreError: the last attempt failed; the message says what to do.
    """
    backoff = Backoff()
    while True:
        try:
            return work()
        except StoreError as error:
            backoff.failures += 1
            if backoff.failures >= _ATTEMPTS:
                advice = "check the address, the rights in the bucket and the network, or leave the key `mirror` out"
                raise StoreError(f"the mirror cannot be used: {error}; {advice}") from error
            time.sleep(backoff.seconds())
