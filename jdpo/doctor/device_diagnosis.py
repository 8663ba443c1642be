"""The diagnosis of the devices: kinds, numbers, mesh, and the psum over all. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jdpo.doctor.finding import Finding, groups_of, in_words, named, reasons_of
from jdpo.doctor.process_facts import DeviceFacts, ProcessFacts
from jdpo.words import figure


def diagnose_devices(facts: Sequence[ProcessFacts]) -> list[Finding]:
    """Returns the findings about the devices of all processes."""
    seen = {each.process: each.devices for each in facts if each.devices is not None}
    if not seen:
        return [Finding("skipped", "devices", "not looked for, since XLA would end the process")]
    if any(devices.error for devices in seen.values()):
        return _not_found(seen, facts)
    findings = _found(seen, facts)
    findings += _mesh(seen, facts)
    return findings + _sums(seen, facts)


def _not_found(seen: dict[int, DeviceFacts], facts: Sequence[ProcessFacts]) -> list[Finding]:
    # Of a cluster all processes look for devices together: those that only waited are not the cause.
    causes = {process: devices for process, devices in seen.items() if devices.error and not devices.waited}
    return [
        Finding(
            "problem",
            "devices",
            f"{named(processes, facts)}: JAX finds no devices: {error}",
            "see whether another process holds the devices, and whether the driver and JAX's plugin fit each other",
        )
        for error, processes in reasons_of({process: each.error for process, each in (causes or seen).items()})
    ]


def _found(seen: dict[int, DeviceFacts], facts: Sequence[ProcessFacts]) -> list[Finding]:
    findings = []
    for unused, processes in groups_of({process: devices.unused for process, devices in seen.items()}):
        if unused:
            text = f"{named(processes, facts)}: JAX uses the CPU, but the host has {unused}"
            findings.append(Finding("problem", "devices", text, "or set JAX_PLATFORMS=cpu to train on the CPU"))
    kinds = groups_of({process: _words(devices.kinds) for process, devices in seen.items()})
    if len(kinds) > 1:
        findings.append(
            Finding(
                "problem",
                "devices",
                in_words("the share of a process", kinds, facts),
                "look for a device that is missing or in use there; a run needs devices of one kind",
            )
        )
    if not findings:
        first = seen[min(seen)]
        each = f", {figure(len(first.kinds), 'device')} for each process" if len(facts) > 1 else ""
        findings.append(Finding("ok", "devices", f"{first.num_all} x {first.kinds[0]} ({first.platform}){each}"))
    return findings


def _words(kinds: Sequence[str]) -> str:
    return " and ".join(f"{count} x {kind}" for kind, count in Counter(kinds).items())


def _mesh(seen: dict[int, DeviceFacts], facts: Sequence[ProcessFacts]) -> list[Finding]:
    findings = [
        Finding("problem", "mesh", error)
        for error, _ in reasons_of({process: devices.mesh_error for process, devices in seen.items()})
    ]
    if not findings and (mesh := seen[min(seen)].mesh):
        findings.append(Finding("ok", "mesh", mesh))
    return findings


def _sums(seen: dict[int, DeviceFacts], facts: Sequence[ProcessFacts]) -> list[Finding]:
    num_all = seen[min(seen)].num_all
    expected = num_all * (num_all + 1) / 2
    findings = [
        Finding(
            "problem",
            "psum",
            f"{named(processes, facts)}: the sum over {figure(num_all, 'device')} failed: {error}",
            "processes reach process 0 but perhaps not each other: see the firewall and, for GPUs, "
            "NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO",
        )
        for error, processes in reasons_of({process: devices.sum_error for process, devices in seen.items()})
    ]
    wrong = {
        process: sums
        for process, devices in seen.items()
        if (sums := tuple(value for value in devices.sums if value != expected))
    }
    for sums, processes in groups_of(wrong):
        findings.append(
            Finding(
                "problem",
                "psum",
                f"{named(processes, facts)}: the sum over {figure(num_all, 'device')} is {sums[0]:,.0f} instead of "
                f"{expected:,.0f}",
                "a device or a link between devices computes wrongly: take its host out of the cluster",
            )
        )
    if not findings and all(devices.sums for devices in seen.values()):
        slowest = max(devices.sum_seconds for devices in seen.values())
        text = f"over {figure(num_all, 'device')}: {expected:,.0f} as expected, in {1000 * slowest:.1f} ms"
        findings.append(Finding("ok", "psum", text))
    return findings
