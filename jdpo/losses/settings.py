"""Checks losses and options against each other, once, and carries them through jit.

Names are static and numbers may be traced, so that a sweep over beta compiles once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from jdpo.loss_specs import (
    BATCH_OPTIONS,
    F_DIVERGENCES,
    FOR_EVERY_LOSS,
    FOR_THE_WHOLE_LIST,
    INDIFFERENT_LOSSES,
    LOSS_WEIGHT,
    LOSSES,
    OPTIONS,
    READ_SCORES,
    LossSpec,
    Option,
)
from jdpo.losses.argument_checks import unknown_name

Number = Any
"""A Python number, or a scalar array, traced or not."""

OPTION_NAMES = ("loss_type", "loss_weights", *OPTIONS, *BATCH_OPTIONS)
"""Everything that a loss takes by name."""

DEFAULTS: dict[str, float] = {
    name: option.default
    for name, option in OPTIONS.items()
    if name != "beta" and option.is_number and option.default is not None
}
"""The numbers that a loss function may read, each with the value that it has if none is given."""

_FLAGS = tuple(name for name, option in OPTIONS.items() if isinstance(option.default, bool))


# Numbers are leaves, so that jit traces them; names and switches are static, since they choose what is computed.
@partial(
    jax.tree_util.register_dataclass,
    data_fields=("beta", "weights", "numbers"),
    meta_fields=("loss_types", "f_divergence_type", "use_weighting", "bco_running_delta"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """A weighted sum of losses and their options; a pytree whose leaves are its numbers.

    Attributes:
      loss_types: names in `LOSSES`.
      weights: one number per loss.
      beta: above 0.
      numbers: the numeric options that were given; the others have their defaults.
      f_divergence_type: one of `F_DIVERGENCES`.
      use_weighting: WPO, arXiv 2406.11827.
      bco_running_delta: the delta of bco_pair is a running mean.
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
        """The declaration of each loss."""
        return [LOSSES[name] for name in self.loss_types]

    @property
    def needs_reference(self) -> bool:
        """True if a loss reads reference log-probs."""
        return any("reference" in spec.needs for spec in self.specs)

    @property
    def needs_global_batch(self) -> bool:
        """True if the loss of a pair depends on the other pairs of the global batch."""
        return any("global batch" in spec.needs for spec in self.specs)

    @property
    def has_state(self) -> bool:
        """True if a loss can carry a running state from step to step."""
        return any("state" in spec.needs for spec in self.specs)

    @property
    def mean_rewards(self) -> bool:
        """True if rewards without a reference are means over tokens, not sums."""
        return any(spec.mean_rewards for spec in self.specs)

    @property
    def token_mean(self) -> bool:
        """True if a loss divides by the number of chosen tokens of the global batch."""
        return "rpo_alpha" in self.numbers or any("token count" in spec.needs for spec in self.specs)

    @property
    def needs_lengths(self) -> bool:
        """True if a loss reads completion lengths."""
        return any("lengths" in spec.needs for spec in self.specs)

    @property
    def needs_scores(self) -> bool:
        """True if an option reads the scores of the two answers."""
        return not READ_SCORES.isdisjoint(self.numbers)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms of the sum: the losses, and `rpo` for the term that rpo_alpha adds."""
        return self.loss_types + (("rpo",) if "rpo_alpha" in self.numbers else ())

    @property
    def ld_alpha(self) -> Number | None:
        """Weight of the tokens past the shorter completion's length, or None if all tokens count fully."""
        return self.numbers.get("ld_alpha")


def loss_settings(
    loss_type: str | Sequence[str] = "sigmoid", *, beta: Number = 0.1, **options: Any
) -> tuple[LossSettings, dict[str, Any]]:
    """Checks losses and options against each other.

    Args:
      loss_type: a name in `LOSSES`, or several.
      beta: above 0.
      **options: names in `OPTIONS` and `BATCH_OPTIONS`; an option at its default asks for nothing.

    Returns:
      The settings, and the options that belong to a batch, as far as they were given.

    Raises:
      ValueError: an unknown name (the message has the nearest one), a value out of its range, or an option that the
        losses cannot honour (the message lists those that can).
    """
    if not isinstance(loss_type, str | Sequence):
        raise ValueError(f"loss_type must be a name or a list of names, found {loss_type!r}")
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    _check_names(names)
    unknown = [name for name in options if name not in OPTION_NAMES]
    if unknown:
        raise unknown_name("option", unknown[0], OPTION_NAMES, "The options are")
    # A run always passes every option, so a value at its default must not count as given.
    given = {name: value for name, value in options.items() if not _asks_for_nothing(name, value)}
    _check_honoured(names, given)
    numbers = {
        name: check_number(name, value) for name, value in given.items() if name in OPTIONS and OPTIONS[name].is_number
    }
    beta = check_number("beta", beta)
    _check_values(names, given)
    settings = LossSettings(
        loss_types=names,
        weights=_weights(names, given.get("loss_weights")),
        beta=beta,
        numbers=numbers,
        f_divergence_type=given.get("f_divergence_type", OPTIONS["f_divergence_type"].default),
        use_weighting=given.get("use_weighting", False),
        bco_running_delta=given.get("bco_running_delta", False),
    )
    return settings, {name: given[name] for name in BATCH_OPTIONS if name in given}


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
    default = OPTIONS[name].default if name in OPTIONS else None
    if isinstance(default, str | bool):
        return bool(value == default)
    number = concrete(value)  # None for a traced number, which may have any value and so counts as given
    return default is not None and number is not None and number == default


def _check_honoured(names: tuple[str, ...], given: dict[str, Any]) -> None:
    for option in given.keys() - FOR_EVERY_LOSS:
        # In a list, one loss with its own option is enough; an option of the objective must fit all of them.
        refusing = [name for name in names if option not in LOSSES[name].options]
        must_all = option in FOR_THE_WHOLE_LIST
        if len(refusing) == len(names) or (must_all and not INDIFFERENT_LOSSES.issuperset(refusing)):
            able = [name for name, spec in LOSSES.items() if option in spec.options]
            raise ValueError(
                f"loss_type {' and '.join(map(repr, refusing))} cannot honour {option}={given[option]!r}; "
                f"these can: {', '.join(able)}"
            )


def _check_values(names: tuple[str, ...], given: dict[str, Any]) -> None:
    """Checks options that are not numbers, and options that depend on each other."""
    for name in _FLAGS:
        if not isinstance(given.get(name, False), bool):
            raise ValueError(f"{name} must be True or False, found {given[name]!r}")
    if given.get("f_divergence_type", OPTIONS["f_divergence_type"].default) not in F_DIVERGENCES:
        raise unknown_name("f_divergence_type", given["f_divergence_type"], F_DIVERGENCES, "The divergences are")
    if "f_alpha_divergence_coef" in given and given.get("f_divergence_type") != "alpha_divergence":
        raise ValueError("f_alpha_divergence_coef is read only by f_divergence_type 'alpha_divergence'")
    if "exo_pair" in names and "label_smoothing" not in given:
        raise ValueError("loss_type 'exo_pair' needs label_smoothing > 0 (its paper uses 1e-3): log e is -inf at e = 0")
    if "bco_delta" in given and "bco_running_delta" in given:
        raise ValueError("bco_delta fixes what bco_running_delta learns: give one of them")


def check_number(name: str, value: Any, option: Option | None = None) -> Number:
    """Checks one number against the range of its option, by default that of the name.

    Returns:
      A Python float, or an array of shape () as it came, traced or not. A traced number has no value to check.

    Raises:
      ValueError: it is not a number, or out of its range.
    """
    # bool is a subclass of int, and NumPy scalars and JAX arrays are no int or float.
    is_number = hasattr(value, "dtype") or isinstance(value, int | float)
    if not is_number or isinstance(value, bool) or getattr(value, "shape", ()) != ():
        raise ValueError(f"{name} must be one number, found {value!r}")
    number = concrete(value)
    if number is None:
        return value
    option = option or OPTIONS[name]
    if not option.allows(number):
        raise ValueError(f"{name} must be {option.range}, found {value}")
    # An array keeps its dtype; as a Python number it would be weakly typed.
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
            f"loss_weights must have one number per loss: {len(names)} ({', '.join(names)}), found {len(weights)}"
        )
    return tuple(check_number("loss_weights", weight, LOSS_WEIGHT) for weight in weights)


def concrete(value: Any) -> float | None:
    """Returns the value of a number, or None if it is traced or not a single number."""
    if isinstance(value, jax.core.Tracer) or getattr(value, "shape", ()) != ():
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
