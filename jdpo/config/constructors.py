"""Constructors of settings: what Python code gives them is explained as `load_config` explains a file's keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from jdpo.config.explaining import explain_call
from jdpo.config.value_types import Settings, fields_of


def explain_faults_of(cls: type[Settings]) -> None:
    """Makes the constructor of a class raise a ValueError that explains every fault.

    `load_config` validates without calling it, and explains where in a file or on the command line a key is from.
    """
    changed: Any = cls
    # The classes are complete when this is called: explanations need the keys of all of them.
    changed.__init__ = _explaining(cls, changed.__init__)


def _explaining(cls: type[Settings], construct: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(construct)
    def __init__(self: Settings, *values: Any, **keys: Any) -> None:
        if values:
            first = next(iter(fields_of(cls)))
            raise ValueError(f"{cls.__name__} takes its keys by name, such as {cls.__name__}({first}=...)")
        try:
            construct(self, **keys)
        except ValidationError as error:
            raise ValueError(explain_call(cls, error.errors(include_url=False))) from None

    return __init__
