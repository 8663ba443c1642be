"""Which losses, with which weights and options: checked once, then carried through jit.

Names are static, numbers may be traced, so that a sweep over beta compiles once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax

from jdpo.losses.argument_checks import unknown_name
from jdpo.losses.catalogue import LOSSES, LossSpec
from jdpo.losses.divergences import F_DIVERGENCES

Number = Any
"""A Python number, or a scalar array, traced or not."""

DEFAULTS: dict[str, float] = {
    "label_smoothing": 0.0,
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "orpo_lambda": 0.1,
    "bco_delta": 0.0,
}
"""Options that are numbers, with the value they have where none is given."""

OFF: dict[str, Any] = {
    "loss_weights": None,
    "f_divergence_type": "reverse_kl",
    "rpo_alpha": None,
    "ld_alpha": None,
    "num_chosen_tokens": None,
    "pair_weights": None,
    "use_weighting": False,
    "bco_running_delta": False,
}
"""The other options, with the value that asks for nothing."""

OPTIONS = ("loss_type", "beta", *DEFAULTS, *OFF)
"""All that a loss is asked for by name."""

_NUMBERS_OR_NONE = ("rpo_alpha", "ld_alpha")

FOR_ALL = frozenset({"loss_weights", "rpo_alpha", "num_chosen_tokens"})
"""Options that every loss honours."""

FOR_EACH = frozenset({"f_divergence_type", "ld_alpha", "use_weighting", "pair_weights"})
"""Options that speak of the whole objective: in a list of losses, each must honour them. Of the rest, one."""

BYSTANDERS = frozenset({"sft"})
"""Losses that may stand in a list beside others that honour an option of the pair, without being touched by it."""

_RANGES: dict[str, tuple[float, float, str]] = {
    "label_smoothing": (0.0, 0.5, "in [0, 0.5)"),
    "discopop_tau": (math.ulp(0.0), math.inf, "positive"),
    "cpo_alpha": (0.0, math.inf, "at least 0"),
    "orpo_lambda": (0.0, math.inf, "at least 0"),
    "rpo_alpha": (0.0, math.inf, "at least 0"),
    "ld_alpha": (0.0, 1.0 + 1e-9, "in [0, 1]"),
    "simpo_gamma": (-math.inf, math.inf, "a number"),
    "f_alpha_divergence_coef": (-math.inf, math.inf, "a number"),
    "bco_delta": (-math.inf, math.inf, "a number"),
    "beta": (math.ulp(0.0), math.inf, "positive"),
}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("beta", "weights", "numbers"),
    meta_fields=("loss_types", "f_divergence_type", "use_weighting", "bco_running_delta"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """A weighted sum of losses; a pytree whose leaves are its numbers.

    Attributes:
      loss_types: names in LOSSES.
      weights: one number a loss.
      beta: > 0.
      numbers: options that were given and are numbers; the others have their defaults.
      f_divergence_type: one of F_DIVERGENCES.
      use_weighting: WPO, arXiv 2406.11827.
      bco_running_delta: bco_pair's delta is a running mean.
    """

    loss_types: tuple[str, ...]
    weights: tuple[Number, ...]
    beta: Number
    numbers: dict[str, Number]
    f_divergence_type: str
    use_weighting: bool
    bco_running_delta: bool

    @property
    def specs(self) -> list[LossSpec]:
        return [LOSSES[name] for name in self.loss_types]

    @property
    def needs_reference(self) -> bool:
        return any(spec.needs_reference for spec in self.specs)

    @property
    def needs_global_batch(self) -> bool:
        return any(spec.needs_global_batch for spec in self.specs)

    @property
    def has_state(self) -> bool:
        return any(spec.needs_state for spec in self.specs)

    @property
    def mean_rewards(self) -> bool:
        return any(spec.mean_rewards for spec in self.specs)

    @property
    def token_mean(self) -> bool:
        """Whether the number of chosen tokens of the global batch is read."""
        return "rpo_alpha" in self.numbers or any(spec.needs_token_count for spec in self.specs)

    @property
    def needs_lengths(self) -> bool:
        return any(spec.needs_lengths for spec in self.specs)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of what is summed."""
        return self.loss_types + (("rpo",) if "rpo_alpha" in self.numbers else ())

    @property
    def ld_alpha(self) -> Number | None:
        return self.numbers.get("ld_alpha")


def loss_settings(
    loss_type: str | Sequence[str] = "sigmoid", *, beta: Number = 0.1, **options: Any
) -> tuple[LossSettings, dict[str, Any]]:
    """Checks losses and options against each other.

    Args:
      loss_type: a name in LOSSES, or several.
      beta: > 0.
      **options: by the names in DEFAULTS and OFF; one at its default asks for nothing.

    Returns:
      the settings, and those options that belong to a batch: num_chosen_tokens and pair_weights, where given.

    Raises:
      ValueError: an unknown name (with the nearest), a value out of its range, or an option that the losses cannot
        honour (those that can are listed).
    """
    if not isinstance(loss_type, str | Sequence):
        raise ValueError(f"loss_type must be a name or a list of names, found {loss_type!r}")
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    _check_names(names)
    unknown = [name for name in options if name not in DEFAULTS and name not in OFF]
    if unknown:
        raise unknown_name("option", unknown[0], OPTIONS, "The options are")
    given = {name: value for name, value in options.items() if not _asks_for_nothing(name, value)}
    _check_honoured(names, given)
    numbers = {
        name: check_number(name, value) for name, value in given.items() if name in DEFAULTS or name in _NUMBERS_OR_NONE
    }
    beta = check_number("beta", beta)
    for name in ("use_weighting", "bco_running_delta"):
        if not isinstance(given.get(name, False), bool):
            raise ValueError(f"{name} must be True or False, found {given[name]!r}")
    if given.get("f_divergence_type", "reverse_kl") not in F_DIVERGENCES:
        raise unknown_name("f_divergence_type", given["f_divergence_type"], F_DIVERGENCES, "The divergences are")
    if "f_alpha_divergence_coef" in given and given.get("f_divergence_type") != "alpha_divergence":
        raise ValueError("f_alpha_divergence_coef is read by f_divergence_type 'alpha_divergence' alone")
    if "exo_pair" in names and "label_smoothing" not in given:
        raise ValueError("loss_type 'exo_pair' needs label_smoothing > 0 (its paper uses 1e-3): log e is -inf at e = 0")
    if "bco_delta" in given and "bco_running_delta" in given:
        raise ValueError("bco_delta fixes what bco_running_delta learns: give one of them")
    settings = LossSettings(
        loss_types=names,
        weights=_weights(names, given.get("loss_weights")),
        beta=beta,
        numbers=numbers,
        f_divergence_type=given.get("f_divergence_type", "reverse_kl"),
        use_weighting=given.get("use_weighting", False),
        bco_running_delta=given.get("bco_running_delta", False),
    )
    return settings, {name: given[name] for name in ("num_chosen_tokens", "pair_weights") if name in given}


def _check_names(names: tuple[str, ...]) -> None:
    if not names:
        raise ValueError(f"loss_type is empty; the losses are: {', '.join(LOSSES)}")
    for name in names:
        if name not in LOSSES:
            raise unknown_name("loss_type", name, LOSSES, "The losses are")
    if len(set(names)) < len(names):
        raise ValueError(f"loss_type names a loss twice: {', '.join(names)}; give it one weight instead")


def _asks_for_nothing(name: str, value: Any) -> bool:
    if value is None:
        return True
    default = DEFAULTS.get(name, OFF.get(name))
    if isinstance(default, str | bool):
        return bool(value == default)
    number = concrete(value)
    return default is not None and number is not None and number == default


def _check_honoured(names: tuple[str, ...], given: dict[str, Any]) -> None:
    for option in given.keys() - FOR_ALL:
        refusing = [name for name in names if option not in LOSSES[name].options]
        if len(refusing) == len(names) or (option in FOR_EACH and not BYSTANDERS.issuperset(refusing)):
            able = [name for name, spec in LOSSES.items() if option in spec.options]
            raise ValueError(
                f"loss_type {' and '.join(map(repr, refusing))} cannot honour {option}={given[option]!r}; "
                f"these can: {', '.join(able)}"
            )


def check_number(name: str, value: Any) -> Number:
    """One number in its range: a Python float, or an array of shape () as it came, traced or not.

    Raises:
      ValueError: it is none, or out of its range.
    """
    is_number = hasattr(value, "dtype") or isinstance(value, int | float)
    if not is_number or isinstance(value, bool) or getattr(value, "shape", ()) != ():
        raise ValueError(f"{name} must be one number, found {value!r}")
    number = concrete(value)
    if number is None:
        return value
    low, high, words = _RANGES.get(name, (0.0, math.inf, "at least 0"))
    if not low <= number < high or math.isinf(number):
        raise ValueError(f"{name} must be {words}, found {value}")
    return value if isinstance(value, jax.Array) else number


def _weights(names: tuple[str, ...], weights: Any) -> tuple[Number, ...]:
    if weights is None:
        return (1.0,) * len(names)
    try:
        weights = tuple(weights)
    except TypeError:
        raise ValueError(f"loss_weights must be a list of numbers, found {weights!r}") from None
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights must have one number a loss: {len(names)} ({', '.join(names)}), found {len(weights)}"
        )
    return tuple(check_number("loss_weights", weight) for weight in weights)


def concrete(value: Any) -> float | None:
    """The value of a number, or None where it is traced or no single number."""
    if isinstance(value, jax.core.Tracer) or getattr(value, "shape", ()) != ():
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def each(settings: LossSettings) -> Iterator[tuple[str, LossSpec, Number]]:
    """Name, catalogue entry and weight of each loss."""
    yield from zip(settings.loss_types, settings.specs, settings.weights, strict=True)
