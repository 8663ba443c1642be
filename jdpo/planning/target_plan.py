"""The plan of a run for one target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryByKind:
    """Bytes of a device's memory at the peak of a step, by what they are for.

    Attributes:
      weights: of the trained weights, and of a frozen base under adapters.
      gradients: of the trained weights, and their sum over micro-batches.
      moments: the optimizer's state.
      reference: a live reference's weights.
      activations: what the forward pass keeps for the backward pass, and the layers at work.
      head: the LM head at work: its gathered weights and a chunk of logits.
      other: batches, random keys, code, and what is attributed to none of the above.
    """

    weights: int
    gradients: int
    moments: int
    reference: int
    activations: int
    head: int
    other: int

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """The plan of a run on a machine.

    Figures are of one device and one step unless they say otherwise.

    Attributes:
      target: the machine's name, such as v5e-64.
      device_kind: `jax.Device.device_kind` of its devices.
      num_devices: JAX devices of all hosts.
      num_hosts: machines that a process of the run is started on.
      num_slices: TPU slices, or nodes of GPUs.
      fits: True if the step was compiled, or estimated where `how` says so, within the memory that a run may use.
      missing_bytes: what a device lacks for the smallest step that was tried; 0 if it fits.
      how: "compiled", or "estimated" by formulas where the compiler is not installed.
      error: the compiler's own text where it refused the last step that was tried; None otherwise.
      mesh: axis -> size.
      max_tokens_per_device: slots of a device's part of a micro-batch, at most.
      remat: what the backward pass recomputes.
      optimizer: its name in the config.
      pairs_per_micro_batch: rows of all devices together in one micro-batch, on average.
      micro_batches: per step.
      memory: at the peak of a step; estimated where nothing compiled.
      hbm_bytes: memory of a device that programs can use.
      limit_bytes: the part of it that a run lets a step take.
      wire_inside_bytes: bytes that a device sends within its slice or node; None where nothing compiled.
      wire_across_bytes: bytes that a device sends between slices or nodes; None where nothing compiled.
      padding: slots that are computed per token of the rows, at least 1.
      step_seconds: the range of a step's time; None where it does not fit.
      rests_on: one sentence on where the two ends of the range come from.
      tokens_per_step: tokens of all rows of a step, a pair's prompt counted once.
      mfu: the model's FLOPs per second as a share of the peak, from slow to fast; None where it does not fit.
      num_compilations: programs that were compiled for this plan.
      from_cache: True if the plan was made earlier.
      suggestions: sentences on what to change.
    """

    target: str
    device_kind: str
    num_devices: int
    num_hosts: int
    num_slices: int
    fits: bool
    missing_bytes: int
    how: Literal["compiled", "estimated"]
    error: str | None
    mesh: Mapping[str, int]
    max_tokens_per_device: int
    remat: str
    optimizer: str
    pairs_per_micro_batch: float
    micro_batches: int
    memory: MemoryByKind
    hbm_bytes: int
    limit_bytes: int
    wire_inside_bytes: int | None
    wire_across_bytes: int | None
    padding: float
    step_seconds: tuple[float, float] | None
    rests_on: str
    tokens_per_step: int
    mfu: tuple[float, float] | None
    num_compilations: int
    from_cache: bool
    suggestions: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Bytes of a device's memory that the step needs: the sum of all kinds."""
        return self.memory.total

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON holds it, with `peak_bytes`."""
        found = dataclasses.asdict(self)
        return found | {"mesh": dict(self.mesh), "peak_bytes": self.peak_bytes}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> TargetPlan:
        """Returns the plan of `as_dict`, also after JSON.

        Raises:
          KeyError, TypeError, ValueError: it is not one of this version.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: found[name] for name in names}
        for name in ("step_seconds", "mfu"):
            if given[name] is not None:
                low, high = given[name]
                given[name] = float(low), float(high)
        return cls(**given | {"memory": MemoryByKind(**given["memory"]), "suggestions": tuple(given["suggestions"])})
