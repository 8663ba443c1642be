"""The parts of the device check, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Result = dict[str, Any]


class Part(NamedTuple):
    """A part.

    Attributes:
      name: also that of its file of results.
      title: for progress lines and the summary.
      seconds: how long it should take at least on an accelerator; it is not started with less time left.
      headline: takes its result, returns the line that is printed when it is done.
      optional: False if the exit code depends on it.
    """

    name: str
    title: str
    seconds: float
    headline: Callable[[Result], str]
    optional: bool = False

    def least_seconds(self, *, tiny: bool) -> float:
        """Returns the seconds of the budget with which the part may start."""
        return 1.0 if tiny else self.seconds


def _of_machine(result: Result) -> str:
    return f"{result['num_devices']} x {result['device_kind']}, matrix product {result['matmul_tflops']:.3g} TFLOP/s"


def _of_parity(result: Result) -> str:
    return f"losses equal within {result['float32']['loss']:.1e}, log-probs within {result['float32']['logps']:.1e}"


def _of_resume(result: Result) -> str:
    return f"{result['num_steps']} steps, resumed after {result['stopped_at']}: bitwise equal"


def _of_speed(result: Result) -> str:
    return "; ".join(speed_line(case) for case in result["cases"])


def speed_line(case: Result) -> str:
    """Returns the step time and the MFU of one table of rows."""
    if "error" in case:
        return f"{case['rows']}: failed"
    share = f", MFU {case['mfu']:.1%}" if case.get("mfu") is not None else ""
    return f"{case['rows']}: {case['step_seconds']['median']:.3g} s per step{share}"


def _of_compare(result: Result) -> str:
    return f"{len(result['operations'])} operations and {len(result['cases'])} policies"


PARTS = (
    Part("machine", "the device and its rates", 10, _of_machine),
    Part("parity", "training on the device and on the CPU, in float32", 40, _of_parity),
    Part("resume", "a stopped and resumed run, bitwise", 40, _of_resume),
    Part("full", "full fine-tuning", 60, _of_speed),
    Part("lora", "LoRA", 60, _of_speed),
    Part("compare", "remat policies, chunks of the head, attention kernels", 60, _of_compare, optional=True),
)
