"""The diagnosis of the folders that a run writes to. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from jdpo.doctor.finding import Finding, groups_of, named, numbers, reasons_of
from jdpo.doctor.process_facts import FolderFacts, ProcessFacts
from jdpo.words import listed, memory

SLOW_SECONDS = 5.0
LEAST_FREE = 2**30
_MOST_STORES = 4
_LOST = {
    "tmpfs": "is in memory",
    "ramfs": "is in memory",
    "overlay": "is in the writable layer of a container",
}
"""Types of file systems whose content does not survive a restart."""


def diagnose_folders(facts: Sequence[ProcessFacts]) -> list[Finding]:
    """Returns the findings about each folder that all processes have tried."""
    keys = dict.fromkeys(folder.key for each in facts for folder in each.folders)
    return [finding for key in keys for finding in _folder(key, facts)]


def _folder(key: str, facts: Sequence[ProcessFacts]) -> list[Finding]:
    tried = {each.process: folder for each in facts for folder in each.folders if folder.key == key}
    findings = [
        Finding(
            "problem",
            key,
            f"{named(processes, facts)} cannot write {tried[processes[0]].path}: {error}",
            _advice_on(key, tried[processes[0]]),
        )
        for error, processes in reasons_of({process: folder.error for process, folder in tried.items()})
    ]
    findings += [
        Finding(
            "problem",
            key,
            f"{named(processes, facts)} cannot read what another process wrote: {error}",
            "run all processes as the same user, or give the group access",
        )
        for error, processes in reasons_of({process: folder.read_error for process, folder in tried.items()})
    ]
    able = {process: folder for process, folder in tried.items() if folder.error is None and folder.read_error is None}
    if able:
        findings += _sharing(key, able, facts, quiet=bool(findings))
        findings += _space(key, able, facts)
    return findings


def _advice_on(key: str, folder: FolderFacts) -> str:
    if key == "mirror":
        return "see whether this host has the credentials and reaches the store, and how the bucket is called"
    if not folder.answers:
        return f"see whether the file system at {folder.path} is mounted and its server answers"
    if folder.error and any(text in folder.error for text in ("No space left", "quota", "File too large")):
        return "free some space there"
    return f"mount it writable there, or choose another {key}"


def _sharing(key: str, able: dict[int, FolderFacts], facts: Sequence[ProcessFacts], *, quiet: bool) -> list[Finding]:
    """Returns whether the processes that can write a folder have one storage.

    Args:
      quiet: a problem of the folder has been found, so that nothing is said if the rest is well.
    """
    place = f"{able[min(able)].path} ({able[min(able)].file_system})".replace(" ()", "")
    time = f", {max(folder.seconds for folder in able.values()):.2f} s to write and read"
    # Those that could not write have no files to be seen.
    views = groups_of({process: tuple(one for one in folder.sees if one in able) for process, folder in able.items()})
    if len(views) == 1:
        shared = ", shared by all processes" if len(facts) > 1 else ""
        return [] if quiet else [Finding("ok", key, f"{place}{shared}{time}")]
    node_local = all(set(view) == set(processes) for view, processes in views)
    if node_local and key == "cache_dir":
        # Each process has a path of its own where folders are relative, or below a home.
        where = f"{place}, " if len({folder.path for folder in able.values()}) == 1 else ""
        groups = listed([numbers(processes) for _, processes in views], _MOST_STORES)
        text = f"{where}node-local: {len(views)} stores that do not see each other ({groups}){time}"
        return [Finding("ok", key, text)]
    stores = "; ".join(
        f"{named(processes, facts)}: {_mounted(able[processes[0]])}" for _, processes in views[:_MOST_STORES]
    )
    more = f"; and {len(views) - _MOST_STORES} more" if len(views) > _MOST_STORES else ""
    text = f"not shared: {len(views)} groups of processes do not see each other's files ({stores}{more})"
    if not node_local:
        text = f"some processes do not see files that others wrote ({stores}{more})"
    advice = {
        "output_dir": "mount one shared file system on every host, at the same place",
        "mirror": "give an address that is the same place for every host",
        "cache_dir": "see whether the file system is mounted everywhere, and how long its clients keep old listings",
    }[key]
    return [Finding("problem", key, text, advice)]


def _mounted(folder: FolderFacts) -> str:
    return f"{folder.path} on {folder.file_system or 'a file system'} mounted at {folder.mount or '?'}"


def _space(key: str, able: dict[int, FolderFacts], facts: Sequence[ProcessFacts]) -> list[Finding]:
    findings = []
    slow = [process for process, folder in able.items() if folder.seconds > SLOW_SECONDS]
    if slow:
        most = max(able[process].seconds for process in slow)
        text = f"{named(slow, facts)}: {most:.0f} s to write a file of 256 KiB and to read it"
        findings.append(Finding("warning", key, text, "saving and loading will be slow: see what else uses this disk"))
    free = {process: folder.free_bytes for process, folder in able.items() if folder.free_bytes is not None}
    if free:
        findings.append(_free(key, free, facts))
    if key == "output_dir":
        for system, processes in groups_of({process: folder.file_system for process, folder in able.items()}):
            if system in _LOST:
                text = f"{named(processes, facts)}: {able[processes[0]].path} {_LOST[system]} ({system})"
                findings.append(
                    Finding("warning", key, text, "a restart of the host or the container loses it: choose a disk")
                )
    return findings


def _free(key: str, free: dict[int, int], facts: Sequence[ProcessFacts]) -> Finding:
    least = min(free, key=lambda process: free[process])
    where = "" if len(facts) == 1 else f" at least (process {least})"
    text = f"{memory(free[least])} free{where}"
    needed = facts[least].checkpoint_bytes if key == "output_dir" else None
    if needed is not None and free[least] < needed:
        text += f"; the run's checkpoints take up to {memory(needed)}"
        return Finding("warning", f"{key}: disk", text, "free some space, or lower save_total_limit")
    if free[least] < LEAST_FREE:
        return Finding("warning", f"{key}: disk", f"only {text}", "free some space")
    return Finding("ok", f"{key}: disk", text)
