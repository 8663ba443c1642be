"""The results of the device check as files: one JSON file per part, and summary.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from machine import machine_line
from part_table import Part, Result

from jdpo.durable import write_durably
from jdpo.words import memory, percent


def failures(parts: Sequence[Part], results: Mapping[str, Result]) -> list[str]:
    """Returns the names of the parts that failed, were not started or missed a check; optional ones only if checked."""
    failed = []
    for part in parts:
        result = results[part.name]
        missed = not all(result.get("checks", {}).values())
        if missed or (result["status"] != "done" and not part.optional):
            failed.append(part.name)
    return failed


def write_summary(out: Path, parts: Sequence[Part], results: Mapping[str, Result], *, command: str) -> None:
    """Writes the results so far: a killed check keeps those of the parts before."""
    out.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        write_durably(out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_durably(out / "summary.md", summary(parts, results, command=command))


def summary(parts: Sequence[Part], results: Mapping[str, Result], *, command: str) -> str:
    """Returns the results as Markdown."""
    machine = results.get("machine", {})
    lines = [
        f"# Device check: {machine.get('num_devices', '?')} x {machine.get('device_kind', 'unknown device')}",
        "",
        f"`python scripts/device_check {command}`".replace(" `", "`") + f", {machine_line()}.",
        "",
        "| part | outcome | checks |",
        "|---|---|---|",
    ]
    for part in parts:
        result = results.get(part.name)
        if result is None:
            lines.append(f"| {part.name} | not started | |")
            continue
        told = part.headline(result) if result["status"] == "done" else f"{result['status']}: {result['reason']}"
        checks = ", ".join(f"{name}: {'passed' if ok else 'FAILED'}" for name, ok in result.get("checks", {}).items())
        lines.append(f"| {part.name} | {told.replace('|', '/')} | {checks} |")
    for name in ("full", "lora", "compare"):
        cases = results.get(name, {}).get("cases", [])
        if cases:
            lines += ["", f"## {name}: {results[name].get('model', '')}", "", *_cases(cases)]
            lines += ["", "Peak: of the process so far, as the device counts it; reckoned: of the largest program."]
    operations = results.get("compare", {}).get("operations", [])
    if operations:
        lines += ["", "## compare: operations with their gradients", "", *_operations(operations)]
    return "\n".join(lines) + "\n"


def _cases(cases: Sequence[Result]) -> list[str]:
    lines = [
        "| rows | variant | pairs per step | step, s (quartiles) | tokens/s | MFU | executed | padding "
        "| tokens at once | remat | peak | reckoned | attention |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---|",
    ]
    for case in cases:
        if "error" in case:
            lines.append(f"| {case['rows']} | {case['variant']} | failed: {case['error'].replace('|', '/')} |")
            continue
        seconds = case["step_seconds"]
        shares = [percent(case[key]) if case.get(key) is not None else "" for key in ("mfu", "mfu_executed", "padding")]
        quartiles = f"{seconds['median']:.3g} ({seconds['low']:.3g} to {seconds['high']:.3g})"
        sizes = [memory(case[key]) if case.get(key) else "" for key in ("peak_bytes", "reckoned_bytes")]
        lines.append(
            f"| {case['rows']} | {case['variant']} | {case['global_batch_size']} | {quartiles} "
            f"| {case['tokens_per_second']:,.0f} | {' | '.join(shares)} "
            f"| {case['max_tokens_per_device']:,} | {case['remat']} | {' | '.join(sizes)} "
            f"| {', '.join(case['attention'])} |"
        )
    return lines


def _operations(operations: Sequence[Result]) -> list[str]:
    lines = ["| operation | variant | ms (quartiles) | temporary memory |", "|---|---|---:|---:|"]
    for found in operations:
        if "error" in found:
            lines.append(f"| {found['what']} | {found['variant']} | failed: {found['error'].replace('|', '/')} | |")
            continue
        low, median, high = (1000 * found["seconds"][key] for key in ("low", "median", "high"))
        spread = f"{median:.3g} ({low:.3g} to {high:.3g})"
        lines.append(f"| {found['what']} | {found['variant']} | {spread} | {memory(found['temporary_bytes'])} |")
    return lines
