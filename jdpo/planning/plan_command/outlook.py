"""The outlook of a run on a machine: the plan of a step, the time of all steps, and the cost."""

from __future__ import annotations

import dataclasses

from jdpo.planning.machines import Machine
from jdpo.planning.plan_command.run_length import RunLength
from jdpo.planning.target_plan import TargetPlan

Range = tuple[float, float]

REFERENCE_SHARE: Range = (1 / 4, 1 / 3)
"""Time of the reference's forward pass over that of a training step: of three such amounts of FLOPs, and a fourth where
all layers are computed again."""

REFERENCE_SHARE_OF_ADAPTERS: Range = (1 / 4, 1 / 2)
"""This share for adapters, whose backward pass leaves out the gradients of the base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlook:
    """The plan, time and cost of a run on a machine.

    Attributes:
      plan: of a step; None where planning failed.
      failure: why it failed; None where it did not.
      training_seconds: of all steps; None where one or the other is not known.
      reference_seconds: of the reference's log-probs, computed once; None in these cases, too, or without such a pass.
      price_per_hour: of the whole machine; None where the user gives none.
    """

    machine: Machine
    plan: TargetPlan | None
    failure: str | None
    training_seconds: Range | None = None
    reference_seconds: Range | None = None
    price_per_hour: float | None = None

    @property
    def fits(self) -> bool:
        """True if the run fits."""
        return self.plan is not None and self.plan.fits

    @property
    def run_seconds(self) -> Range | None:
        """The reference's log-probs and all steps; without start-up, evaluation and saving."""
        if self.training_seconds is None or self.reference_seconds is None:
            return self.training_seconds
        (low, high), (more_low, more_high) = self.training_seconds, self.reference_seconds
        return low + more_low, high + more_high

    @property
    def cost(self) -> Range | None:
        """The price of the machine for the time of the run."""
        if self.run_seconds is None or self.price_per_hour is None:
            return None
        low, high = (seconds / 3600 * self.price_per_hour for seconds in self.run_seconds)
        return low, high


def outlook(
    machine: Machine,
    plan: TargetPlan,
    run: RunLength,
    *,
    adapters: bool = False,
    price_per_hour: float | None = None,
) -> Outlook:
    """Returns the outlook of a run on a machine.

    Args:
      adapters: True if adapters alone are trained.
      price_per_hour: of the whole machine.
    """
    training = reference = None
    if plan.step_seconds is not None and run.num_steps is not None:
        low, high = plan.step_seconds
        training = low * run.num_steps, high * run.num_steps
        if run.reference_steps:
            least, most = REFERENCE_SHARE_OF_ADAPTERS if adapters else REFERENCE_SHARE
            reference = low * least * run.reference_steps, high * most * run.reference_steps
    return Outlook(
        machine=machine,
        plan=plan,
        failure=None,
        training_seconds=training,
        reference_seconds=reference,
        price_per_hour=price_per_hour,
    )
