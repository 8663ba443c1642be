"""Compares what a compiled step costs with an earlier measurement of the same program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jdpo.words import memory, percent

ALLOWED_GROWTH = 0.05
"""Memory and bytes on the wire may grow by this share."""

_SAME = ("model", "command", "layers", "lora_rank", "target", "devices", "lengths", "rows")
"""What two measurements must share to be comparable; everything else may be what changed."""

_WIDE = ("float32", "float64")


def regressions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a line for everything that is worse than before; none where nothing is.

    Worse are a kernel that is missing, matrix products in float32 that were not there, a new kind of collective, and
    more than 5 % more peak memory or bytes on the wire.

    Args:
      before, now: from `jdpo.planning.measurement.measure`.

    Raises:
      ValueError: the two are not of one program.
    """
    unlike = [f"{key} {before.get(key)} and {now.get(key)}" for key in _SAME if before.get(key) != now.get(key)]
    if unlike:
        raise ValueError(f"the measurements are of different programs: {', '.join(unlike)}")
    found = [
        f"kernel missing: {name} ran {count} times per step before"
        for name, count in before["kernels"].items()
        if name in _kernels_of_attention(before) and name not in now["kernels"]
    ]
    found += [_wide_products(before, now, dtype) for dtype in _WIDE]
    kinds = {row["kind"] for row in before["collectives"]}
    for kind in sorted({row["kind"] for row in now["collectives"]} - kinds):
        rows = [row for row in now["collectives"] if row["kind"] == kind]
        size = memory(sum(row["wire_bytes"] for row in rows))
        found.append(f"new kind of collective: {kind}, {size} on the wire ({rows[0]['origin'] or 'origin unknown'})")
    found += [
        _growth(before, now, "peak_bytes", "peak memory"),
        _growth(before, now, "wire_bytes", "bytes on the wire"),
    ]
    return [line for line in found if line]


def _kernels_of_attention(measured: Mapping[str, Any]) -> list[str]:
    """Returns the names of kernels that are attention; other custom calls come and go with the compiler."""
    return [name for name in measured["kernels"] if name.startswith(("splash", "__cudnn$"))]


def _wide_products(before: Mapping[str, Any], now: Mapping[str, Any], dtype: str) -> str:
    had, has = (measured["executed_flops"].get(dtype, 0) for measured in (before, now))
    if has <= had * (1 + ALLOWED_GROWTH):
        return ""
    share = percent(has / sum(now["executed_flops"].values()))
    return f"{dtype} matrix products: {share} of the FLOPs, {has:.3g} (before: {had:.3g})"


def _growth(before: Mapping[str, Any], now: Mapping[str, Any], key: str, name: str) -> str:
    if now[key] <= before[key] * (1 + ALLOWED_GROWTH):
        return ""
    return f"{name}: {memory(now[key])}, before {memory(before[key])} (more than {percent(ALLOWED_GROWTH)} more)"
