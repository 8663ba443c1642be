"""Files of prices: which entry counts for a machine, and where a wrong one is."""

from __future__ import annotations

from pathlib import Path

import pytest

from jdpo.planning.machines import machine_of
from jdpo.planning.plan_command.prices import EXAMPLE, Prices, read_prices


def prices_of(tmp_path: Path, text: str) -> Prices:
    file = tmp_path / "prices.yaml"
    file.write_text(text, encoding="utf-8")
    return read_prices(file)


@pytest.mark.parametrize(
    ("name", "price"),
    [
        ("v5e-16", 16.0),
        ("v5e-64", 64 * 0.5),  # a target's own price of a chip comes before that of the chip
        ("2xv5e-64", 2 * 64 * 0.5),
        ("v6e-16", 30.0),
        ("2xv6e-16", 60.0),
        ("tpu7x-8", 4 * 10.0),  # per chip, of which one is two devices
        ("h100x8", 32.0),
        ("h100x16", 16 * 4.0),
        ("v5p-8", None),
    ],
)
def test_the_most_specific_entry_counts(tmp_path: Path, name: str, price: float | None) -> None:
    prices = prices_of(
        tmp_path,
        "currency: EUR\nper_chip_hour: {v5e: 1, v5e-64: 0.5, tpu7x: 10, h100: 4}\n"
        "per_target_hour: {v6e-16: 30, h100x8: 32}\n",
    )
    assert prices.currency == "EUR"
    assert prices.per_hour(machine_of(name)) == price


def test_the_example_is_a_file_of_prices(tmp_path: Path) -> None:
    assert prices_of(tmp_path, EXAMPLE).per_hour(machine_of("h100x8")) == 32.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "per_chip_hour:\n  v5e: 1\n  v5ee: 2\n",
            r"line 3: per_chip_hour\.v5ee: .*did you mean v5e-1\?.*chips are v5e",
        ),
        ("per_target_hour:\n  v5litepod-16: 2\n", r"line 2: .*did you mean v5e-16\?"),
        ("per_target_hour: {v5e: 2}\n", "price of one chip belongs under per_chip_hour"),
        ("per_chip_hour:\n  v5e: 1.20 EUR\n", "line 2: .*without its currency, found '1.20 EUR'"),
        ("per_chip_hour: {v5e: -1}\n", "expected a price"),
        ("per_chip_hour: {v5e: true}\n", "expected a price"),
        ("per_chip_hour: {v5e: .inf}\n", "expected a price"),
        ("per_chip_hour: 3\n", "expected names with prices"),
        ("per_chip_hours: {v5e: 1}\nper_target_hour: {}\n", "line 1: unknown key 'per_chip_hours'; did you mean"),
        ("currency: 3\nper_chip_hour: {v5e: 1}\n", "line 1: currency"),
        ("v5e: 1.0\n", "expected per_chip_hour or per_target_hour"),
        ("per_chip_hour: {v5e: 1, v5e: 2}\n", "written twice"),
        ("per_chip_hour: [", "is not YAML"),
        ("", "expected per_chip_hour"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        prices_of(tmp_path, text)
    assert "prices.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file of prices at .*nothing\.yaml"):
        read_prices(tmp_path / "nothing.yaml")
