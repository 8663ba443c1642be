"""A user's prices of machines, from a YAML file; jdpo ships none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jdpo.config import load_yaml
from jdpo.planning.machines import Machine, machine_of, versions
from jdpo.words import did_you_mean

PER_CHIP, PER_TARGET = "per_chip_hour", "per_target_hour"

EXAMPLE = "currency: EUR\nper_chip_hour: {v5e: 1.00, h100: 4.00}\nper_target_hour: {v6e-16: 30.00}"
"""Invented numbers, which show the form of the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices per hour.

    Attributes:
      path: of the file.
      currency: as the user writes it; may be empty.
      per_chip: chip (v5e) or target (v5e-64) -> price of one chip for an hour.
      per_target: target -> price of the whole of it for an hour.
    """

    path: Path
    currency: str
    per_chip: Mapping[str, float]
    per_target: Mapping[str, float]

    def per_hour(self, machine: Machine) -> float | None:
        """Returns the price of a whole machine for an hour, by its most specific entry; None if it has none."""
        # An entry for one slice prices several of them, too: 2xv5e-16 by v5e-16.
        one = machine.name.split("x", 1)[1] if machine.slices > 1 and not machine.is_gpu else machine.name
        if machine.name in self.per_target:
            return self.per_target[machine.name]
        if one in self.per_target:
            return self.per_target[one] * machine.slices
        for name in (machine.name, one, machine.version):
            if name in self.per_chip:
                return self.per_chip[name] * machine.chips
        return None


def read_prices(path: Path) -> Prices:
    """Reads a file of prices.

    Raises:
      ValueError: it cannot be read, or has a key, a name or a value that is not as expected; says where.
    """
    text, values = _read(path)
    places = _Lines(path, text)
    if not isinstance(values, dict) or not {PER_CHIP, PER_TARGET} & {*values}:
        found = f"the keys {', '.join(map(str, values))}" if isinstance(values, dict) else f"{values!r}"
        raise ValueError(
            f"{path}: expected {PER_CHIP} or {PER_TARGET}, found {found if values else 'nothing'}; an example with "
            f"invented numbers:\n\n{EXAMPLE}"
        )
    for key in values:
        if key not in ("currency", PER_CHIP, PER_TARGET):
            hint = did_you_mean(str(key), ("currency", PER_CHIP, PER_TARGET))
            where = places.of(key)
            expected = hint or f"expected currency, {PER_CHIP} and {PER_TARGET}"
            raise ValueError(f"{where}: unknown key {key!r}; {expected}")
    currency = values.get("currency", "")
    if not isinstance(currency, str):
        raise ValueError(f"{places.of('currency')}: currency: expected a text such as EUR, found {currency!r}")
    return Prices(
        path=path,
        currency=currency.strip(),
        per_chip=_section(values, PER_CHIP, places),
        per_target=_section(values, PER_TARGET, places),
    )


def _read(path: Path) -> tuple[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, load_yaml(text, name=str(path))
    except FileNotFoundError:
        raise ValueError(f"no file of prices at {path}") from None
    except IsADirectoryError:
        raise ValueError(f"expected a YAML file of prices, found the folder {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prices in {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def _section(values: Mapping[Any, Any], section: str, places: _Lines) -> dict[str, float]:
    found = values.get(section)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(
            f"{places.of(section)}: {section}: expected names with prices, such as {{v5e: 1.00}}, found {found!r}"
        )
    prices = {}
    for name, price in found.items():
        where = f"{places.of(section, name)}: {section}.{name}"
        _check_name(str(name), section, where)
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
            raise ValueError(f"{where}: expected a price such as 1.20, a number without its currency, found {price!r}")
        prices[str(name)] = float(price)
    return prices


def _check_name(name: str, section: str, where: str) -> None:
    if section == PER_CHIP and name in versions():
        return
    try:
        machine_of(name)
    except ValueError as error:
        more = f"; chips are {', '.join(versions())}" if section == PER_CHIP else ""
        if name in versions():
            more = f"; the price of one chip belongs under {PER_CHIP}"
        raise ValueError(f"{where}: {error}{more}") from None


class _Lines:
    """The places of the keys of a YAML mapping."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._root = path, yaml.compose(text, Loader=yaml.SafeLoader)

    def of(self, *keys: Any) -> str:
        """Returns the file and the line of a key, or of a key in a section."""
        node, line = self._root, None
        for key in keys:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            found = next(((at, value) for at, value in pairs if at.value == str(key)), None)
            if found is None:
                break
            at, node = found
            line = at.start_mark.line + 1
        return str(self._path) if line is None else f"{self._path}, line {line}"
