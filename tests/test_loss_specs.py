"""Losses and options are declared once: functions, config keys, checks and help follow the declarations."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from jdpo.config import DPOConfig, defaults_of, keys_of, load_config
from jdpo.loss_specs import (
    BATCH_OPTIONS,
    FOR_EVERY_LOSS,
    FOR_THE_WHOLE_LIST,
    INDIFFERENT_LOSSES,
    LOSSES,
    OPTIONS,
    SHARED_OPTIONS,
)
from jdpo.losses.catalogue import FUNCTIONS
from jdpo.losses.settings import check_number

RANGED = [name for name, option in OPTIONS.items() if option.is_number]


def dpo(*words: str) -> DPOConfig:
    return load_config(DPOConfig, None, ["model_name_or_path=m", "datasets=d", "output_dir=o", *words])


def test_every_declared_loss_has_a_function_and_no_function_is_undeclared() -> None:
    assert FUNCTIONS.keys() == LOSSES.keys()


def test_losses_name_declared_options_and_every_option_has_a_loss() -> None:
    known = OPTIONS.keys() | BATCH_OPTIONS.keys()
    honoured = {name for spec in LOSSES.values() for name in spec.options}
    assert honoured | FOR_EVERY_LOSS == known | {"loss_weights"}
    assert {name for group in SHARED_OPTIONS for name in group} | FOR_THE_WHOLE_LIST <= honoured
    assert LOSSES.keys() >= INDIFFERENT_LOSSES


def test_config_keys_have_the_declared_defaults_and_descriptions() -> None:
    defaults, texts = defaults_of(DPOConfig), keys_of(DPOConfig)
    for name, option in OPTIONS.items():
        assert (defaults[name], texts[name]) == (option.default, option.description)


@pytest.mark.parametrize("name", RANGED)
def test_config_and_library_refuse_the_same_numbers(name: str) -> None:
    option = OPTIONS[name]
    limits = [*option.bounds.values(), 0.0, 1.0]
    near = [limit + step for limit in limits for step in (-1e-6, 1e-6)]
    for number in {math.nan, math.inf, -math.inf, *limits, *near}:
        word = f"{name}={ {math.inf: '.inf', -math.inf: '-.inf'}.get(number, '.nan' if number != number else number) }"
        if option.allows(number):
            assert getattr(dpo(word), name) == check_number(name, number) == number
            continue
        with pytest.raises(ValueError, match=rf"'{name}' on the command line is "):
            dpo(word)
        with pytest.raises(ValueError, match=f"{name} must be "):
            check_number(name, number)


@pytest.mark.parametrize("value", ["true", "x", "[0.1]"])
@pytest.mark.parametrize("name", ["beta", "ld_alpha"])
def test_what_is_not_a_number_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' on the command line is "):
        dpo(f"{name}={value}")


@pytest.mark.parametrize("weights", ["[1, -1]", "[1, .nan]", "[true]", "x"])
def test_weights_of_a_list_are_checked_one_by_one(weights: str) -> None:
    assert dpo("loss_weights=2").loss_weights == (2.0,)
    with pytest.raises(ValueError, match=r"'loss_weights(\.\d)?' on the command line is "):
        dpo(f"loss_weights={weights}")


def modules_after(code: str) -> set[str]:
    """Returns the top-level modules that a fresh interpreter has loaded after running code."""
    code += "\nimport sys; print(); print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.smoke
def test_the_declarations_import_only_the_standard_library() -> None:
    before: Any = modules_after("")
    assert modules_after("import jdpo.loss_specs") - before - sys.stdlib_module_names == {"jdpo"}


@pytest.mark.smoke
def test_help_and_config_do_not_import_jax() -> None:
    help_of_dpo = "from jdpo.cli.main import main; assert main(['dpo', '--help']) == 0"
    assert not {"jax"} & modules_after(f"import jdpo.config\n{help_of_dpo}")
