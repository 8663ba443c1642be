"""The figures that decide whether the loop stops after a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from jdpo.iteration.loop_settings import LoopSettings
from jdpo.json_files import read_json
from jdpo.words import percent

Why = Literal["no_pairs", "not_better", "max_kl", "rounds"]

NOT_BETTER = 0.5
"""A model that wins half of the comparisons with the model before is no better."""


class Interval(NamedTuple):
    """A figure with its 95 % interval; the ends are None if there are too few prompts for one."""

    value: float
    low: float | None
    high: float | None


class Compared(NamedTuple):
    """The model of a round against the model before.

    Attributes:
      win_rate: share of the held-out comparisons that it wins, ties as half.
      kl: KL divergence from the model before, in nats per answer.
    """

    win_rate: Interval
    kl: float

    def to_json(self) -> dict[str, Any]:
        """Returns it as round.json has it."""
        return {"win_rate": self.win_rate._asdict(), "kl": self.kl}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Compared:
        """Reads what `to_json` returned."""
        return cls(Interval(**found["win_rate"]), found["kl"])


class Stop(NamedTuple):
    """Why a loop stops.

    Attributes:
      why: a word for scripts.
      text: a sentence without its full stop.
      keeps: whether the model of the last round is the result; if not, the model before is.
    """

    why: Why
    text: str
    keeps: bool


def read_compared(folder: Path) -> Compared:
    """Reads the figures of a comparison from compare.json.

    Raises:
      ValueError: a figure is missing.
    """
    path = folder / "compare.json"
    figures = read_json(path)["comparisons"][0]["figures"]

    def after(name: str) -> dict[str, Any]:
        if name not in figures:
            raise ValueError(f"{path}: there is no figure {name}, by which the loop decides whether to continue")
        found: dict[str, Any] = figures[name]["all"]["after"]
        return found

    won = after("win_rate")
    return Compared(Interval(won["value"], won["low"], won["high"]), after("kl")["value"])


def why_stop(compared: Compared | None, number: int, loop: LoopSettings) -> Stop | None:
    """Returns why the loop stops after a round, or None if the next round starts.

    Args:
      compared: None: the round made no pairs.
      number: of the round, from 0.
    """
    if compared is None:
        return Stop("no_pairs", f"round {number} made no pairs ({_REPORT})", keeps=False)
    won, kl = compared
    if won.high is not None and won.high <= NOT_BETTER:
        return Stop(
            "not_better",
            f"round {number} won {shown(won)} of the comparisons with the model before, so it is no better",
            keeps=False,
        )
    if loop.max_kl is not None and kl > loop.max_kl:
        text = f"round {number} moved the model by {kl:.3g} nats per answer, more than max_kl {loop.max_kl:g}"
        return Stop("max_kl", text, keeps=False)
    if number + 1 == loop.rounds:
        return Stop(
            "rounds", "the only round is done" if loop.rounds == 1 else f"all {loop.rounds} rounds are done", keeps=True
        )
    return None


_REPORT = "pairs.report.json says why"


def shown(interval: Interval) -> str:
    """Returns a share with its interval in words.

    >>> shown(Interval(0.5, 0.4, 0.6)), shown(Interval(0.5, None, None))
    ('50 % (95 % interval 40 to 60 %)', '50 %')
    """
    value, low, high = interval
    ends = "" if low is None or high is None else f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    return f"{percent(value)}{ends}"
