"""The diagnosis: from the facts of all processes to one line per subject. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jdpo.doctor.device_diagnosis import diagnose_devices
from jdpo.doctor.finding import (
    ABSENT,
    MOST_NAMED,
    Finding,
    Level,
    differences,
    groups_of,
    groups_of_each,
    in_words,
    named,
    reasons_of,
)
from jdpo.doctor.folder_diagnosis import diagnose_folders
from jdpo.doctor.process_facts import ProcessFacts
from jdpo.words import figure, listed, memory

CLOCK_WARNING, CLOCK_PROBLEM = 1.0, 60.0
"""Seconds. From about a second on, the logs of hosts cannot be put in order; stores and tokens refuse clocks that are
minutes off."""
LEAST_MEMORY = 2 * 2**30


def diagnose(facts: Sequence[ProcessFacts]) -> list[Finding]:
    """Compares the facts of all processes.

    Args:
      facts: of every process, in their order.

    Returns:
      the findings, in the order of the page.
    """
    findings: list[Finding] = []
    parts: tuple[Callable[[Sequence[ProcessFacts]], list[Finding]], ...] = (
        _cluster,
        _environment,
        diagnose_devices,
        diagnose_folders,
        _code,
        _versions,
        _config,
        _files,
        _clock,
        _memory,
    )
    for part in parts:
        findings += part(facts)
    return findings


# --- the cluster


def _cluster(facts: Sequence[ProcessFacts]) -> list[Finding]:
    if len(facts) == 1:
        by = facts[0].found_by
        text = f"{by} describes a single process" if by else "nothing describes a cluster: a single process"
        return [Finding("ok", "processes", f"{text} on {facts[0].host}")]
    hosts = len({each.host for each in facts})
    text = f"{len(facts)} on {figure(hosts, 'host')}"
    sources = groups_of({each.process: each.found_by for each in facts})
    if len(sources) > 1:
        return [
            Finding(
                "warning",
                "processes",
                f"{text}; not all were found in the same way: {in_words('the cluster', sources, facts)}",
                "start all processes with one launcher, in the same environment",
            )
        ]
    return [Finding("ok", "processes", f"{text}, found by {sources[0][0]}")]


_ONLY_A_WARNING = ("NCCL_", "HF_", "XLA_PYTHON_CLIENT_", "XLA_CLIENT_MEM", "JAX_COMPILATION_CACHE_DIR")


def _environment(facts: Sequence[ProcessFacts]) -> list[Finding]:
    findings = []
    for error, processes in reasons_of({each.process: each.flag_error for each in facts}):
        advice = "correct or remove it, as XLA ends the process"
        if "xla_tpu" in error or "megascale" in error:
            advice = "flags of libtpu belong into LIBTPU_INIT_ARGS"
        findings.append(Finding("problem", "XLA_FLAGS", f"{error} on {named(processes, facts)}", advice))
    for name, groups in differences({each.process: each.environment for each in facts}, "not set").items():
        level: Level = "warning" if name.startswith(_ONLY_A_WARNING) else "problem"
        findings.append(
            Finding(level, "environment", in_words(name, groups, facts), "set it alike for every process, or nowhere")
        )
    if not findings:
        names = list(facts[0].environment)
        text = f"{listed(names, 6)} {'is' if len(names) == 1 else 'are'} set" if names else "no variable of XLA is set"
        findings.append(Finding("ok", "environment", text + _everywhere(facts)))
    return findings


def _everywhere(facts: Sequence[ProcessFacts]) -> str:
    return ", alike everywhere" if len(facts) > 1 else ""


# --- code, config and data


def _code(facts: Sequence[ProcessFacts]) -> list[Finding]:
    (usual, _), *others = groups_of({each.process: tuple(each.code.items()) for each in facts})
    findings = []
    for code, processes in others:
        unlike = sorted({name for name, _ in set(code) ^ set(usual)})
        findings.append(
            Finding(
                "problem",
                "code",
                f"{named(processes, facts)}: {facts[processes[0]].code_place} is another jdpo than elsewhere, "
                f"different in {listed(unlike, MOST_NAMED)}",
                "install the same jdpo on every host",
            )
        )
    if not findings:
        text = f"jdpo {facts[0].versions.get('jdpo', '')}, {figure(len(usual), 'file')}".replace(" ,", ",")
        findings.append(Finding("ok", "code", text + _everywhere(facts)))
    return findings


def _versions(facts: Sequence[ProcessFacts]) -> list[Finding]:
    unlike = differences({each.process: each.versions for each in facts}, "not installed")
    if unlike:
        return [
            Finding("problem", "versions", in_words(name, groups, facts), f"install one version of {name} everywhere")
            for name, groups in unlike.items()
        ]
    known = (name for name in facts[0].versions if name != "jdpo")
    text = ", ".join(f"{name} {facts[0].versions[name]}" for name in known)
    return [Finding("ok", "versions", text + _everywhere(facts))]


def _config(facts: Sequence[ProcessFacts]) -> list[Finding]:
    findings = [
        Finding("problem", "config", f"{named(processes, facts)}: {error}", "every process has to read the same config")
        for error, processes in reasons_of({each.process: each.config_error for each in facts})
    ]
    tables = {each.process: each.config for each in facts if each.config is not None}
    if not tables:
        return findings or [Finding("skipped", "config", "none was given, so output_dir, model and data are unknown")]
    for name, groups in differences(tables, "not set").items():
        findings.append(
            Finding("problem", "config", in_words(name, groups, facts), "start every process with the same command")
        )
    if not findings:
        findings.append(
            Finding("ok", "config", f"{figure(len(next(iter(tables.values()))), 'key')}{_everywhere(facts)}")
        )
    return findings


def _files(facts: Sequence[ProcessFacts]) -> list[Finding]:
    findings = [
        Finding("problem", "data and model", f"{named(processes, facts)}: {error}")
        for error, processes in groups_of_each({each.process: each.file_errors for each in facts})
    ]
    findings += [
        Finding("warning", "data and model", f"{named(processes, facts)}: not compared: {what}")
        for what, processes in groups_of_each({each.process: each.slow_files for each in facts})
    ]
    readable = {each.process: each.files for each in facts if not each.file_errors and each.files}
    slow = tuple(what.partition(": ")[0] for each in facts for what in each.slow_files)
    unlike = [(name, groups) for name, groups in differences(readable).items() if not name.startswith(slow)]
    findings += [
        Finding("problem", "data and model", f"{name}: {_unlike(groups, facts)}", "copy the same files to every host")
        for name, groups in unlike[:MOST_NAMED]
    ]
    if (rest := len(unlike) - MOST_NAMED) > 0:
        findings.append(Finding("problem", "data and model", f"{figure(rest, 'more file')} differ"))
    if not findings and readable:
        count = len(next(iter(readable.values())))
        findings.append(Finding("ok", "data and model", f"{figure(count, 'file')}{_everywhere(facts)}"))
    return findings


def _unlike(groups: Sequence[tuple[str, list[int]]], facts: Sequence[ProcessFacts]) -> str:
    """Returns which processes have another content of a file than most, or not the file."""
    if groups[0][0] == ABSENT:
        return f"only {named(groups[1][1], facts)} has it"
    return "; ".join(
        f"{named(processes, facts)} {'lacks it' if digest == ABSENT else 'has another content'}"
        for digest, processes in groups[1:]
    )


# --- clocks and memory


def _clock(facts: Sequence[ProcessFacts]) -> list[Finding]:
    if len(facts) == 1:
        return []
    # Only what the round trip cannot explain counts.
    certain = {each.process: max(0.0, abs(each.clock_offset) - each.clock_error) for each in facts}
    late = [process for process, seconds in certain.items() if seconds > CLOCK_WARNING]
    if not late:
        most = max(abs(each.clock_offset) for each in facts)
        error = max(each.clock_error for each in facts)
        return [Finding("ok", "clocks", f"at most {most:.3f} s from that of process 0 (measured to {error:.3f} s)")]
    worst = max(late, key=lambda process: certain[process])
    level: Level = "problem" if certain[worst] > CLOCK_PROBLEM else "warning"
    offset = facts[worst].clock_offset
    return [
        Finding(
            level,
            "clocks",
            f"{named(late, facts)}: up to {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} process 0 "
            f"(process {worst})",
            "synchronize the clocks, for example with chrony",
        )
    ]


def _memory(facts: Sequence[ProcessFacts]) -> list[Finding]:
    least = min(facts, key=lambda each: each.memory_free)
    where = "" if len(facts) == 1 else f" at least (process {least.process})"
    text = f"{memory(least.memory_free)} of {memory(least.memory_size)} free{where}"
    if least.memory_free < LEAST_MEMORY:
        return [Finding("warning", "host memory", f"only {text}", "end what else runs on the host")]
    return [Finding("ok", "host memory", text)]
