"""What counts as worse than an earlier measurement."""

from __future__ import annotations

from typing import Any

import pytest

from jdpo.planning.regressions import regressions

MEASURED: dict[str, Any] = {
    "model": "Llama-3.1-8B",
    "command": "dpo",
    "layers": 2,
    "lora_rank": None,
    "target": "v5e-8",
    "devices": 8,
    "peak_bytes": 10 * 2**30,
    "wire_bytes": 2**30,
    "executed_flops": {"bfloat16": 1e12},
    "kernels": {"splash_mha_fwd_residuals": 2, "AllocateBuffer": 3},
    "collectives": [{"kind": "all-gather", "wire_bytes": 2**30, "origin": "MLP up, forward"}],
}


def test_the_same_measurement_is_no_worse_than_itself() -> None:
    assert regressions(MEASURED, MEASURED) == []


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"kernels": {"AllocateBuffer": 3}}, "splash_mha_fwd_residuals"),
        ({"executed_flops": {"bfloat16": 1e12, "float32": 1e10}}, "float32"),
        ({"peak_bytes": 10.6 * 2**30}, "peak memory"),
        ({"wire_bytes": 1.06 * 2**30}, "on the wire"),
        (
            {
                "collectives": [
                    *MEASURED["collectives"],
                    {"kind": "all-to-all", "wire_bytes": 2**20, "origin": "embedding, forward"},
                ]
            },
            "all-to-all",
        ),
    ],
)
def test_each_regression_is_named(changed: dict[str, Any], key: str) -> None:
    (line,) = regressions(MEASURED, MEASURED | changed)
    assert key in line
    assert regressions(MEASURED | changed, MEASURED) == []


def test_small_changes_and_other_settings_are_no_regressions() -> None:
    now = MEASURED | {"peak_bytes": 10.4 * 2**30, "kernels": {"splash_mha_fwd_residuals": 4}, "remat": "dots"}
    assert regressions(MEASURED, now) == []


def test_measurements_of_other_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="layers 2 and 4"):
        regressions(MEASURED, MEASURED | {"layers": 4})
    with pytest.raises(ValueError, match="rows 32 and 64"):
        regressions(MEASURED | {"rows": 32}, MEASURED | {"rows": 64})
