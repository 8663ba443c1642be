"""The options that the tests try with each loss, derived from the declarations, so that a new loss is tried at once."""

from __future__ import annotations

from typing import Any

from jdpo.loss_specs import F_DIVERGENCES, LOSSES, OPTIONS

NEEDED: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 1e-3}}
"""Options that a loss cannot be without."""

REFERENCE_FREE = tuple(name for name, spec in LOSSES.items() if "reference" not in spec.needs)


def another_value(name: str) -> Any:
    """Returns an allowed value of an option that is not its default."""
    option = OPTIONS[name]
    if isinstance(option.default, bool):
        return True
    if name == "f_divergence_type":
        return "forward_kl"
    value = next(value for value in (0.7, 0.2) if value != option.default and option.allows(value))
    return value


TRIED_ELSEWHERE = ("ld_alpha", "f_alpha_divergence_coef")
"""Numbers that need tokens, or that only one divergence reads."""


def _cases() -> list[tuple[str, dict[str, Any]]]:
    cases: list[tuple[str, dict[str, Any]]] = [(name, NEEDED.get(name, {})) for name in LOSSES]
    for name, spec in LOSSES.items():
        needed = NEEDED.get(name, {})
        for option in spec.options:
            if option in OPTIONS and OPTIONS[option].is_number and option not in TRIED_ELSEWHERE:
                cases.append((name, needed | {option: another_value(option)}))
        if "f_divergence_type" in spec.options:
            cases += [(name, needed | {"f_divergence_type": divergence}) for divergence in F_DIVERGENCES]
    alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.4}
    return [*cases, ("sigmoid", alpha)]


CASES = _cases()
"""Every loss at its defaults, with each of its numbers changed, and under each divergence."""
