"""The cases of the speed benchmark: shape, lengths, pairs per step, and the required ratios."""

from __future__ import annotations

import dataclasses

from speed_model import LLAMA_1_5B, LLAMA_8B, LLAMA_22M, ModelShape, tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A case: a model's shape, a table of lengths, pairs per step, and the ratios that jdpo must reach.

    Attributes:
      table: the name of a table of lengths.
      trl_micro_batches: pairs that TRL may compute at once; the fastest is taken. None: all of a step, as TRL has it
        where nobody says otherwise.
      more_trl: whether TRL is also run one pair at a time, and with gradient checkpointing.
      jdpo: further settings of jdpo, key=value.
      bars: least ratio of the other's median step time to jdpo's, by trainer; empty: the ratios are only reported.
      tolerance: how far loss and log-probs may differ, relatively.
      later_tolerance: of the loss after the first step, where bfloat16 lets runs diverge; log-probs are then
        only reported. None: all steps are held to `tolerance`.
      trainers: those that take part.
      references: live, cached or both.
      rounds: rounds at most.
    """

    name: str
    shape: ModelShape
    table: str
    batch: int
    max_length: int
    device: str = "cpu"
    trl_micro_batches: tuple[int, ...] | None = None
    more_trl: bool = True
    jdpo: tuple[str, ...] = ()
    bars: tuple[tuple[str, float], ...] = ()
    tolerance: float = 1e-3
    later_tolerance: float | None = None
    trainers: tuple[str, ...] = ("jdpo", "trl", "tunix")
    references: tuple[str, ...] = ("live", "cached")
    rounds: int = 99


SMALL_HEAD = dataclasses.replace(LLAMA_22M, vocab_size=4096)
CPU_CASES = {
    "long": Case(
        name="long pairs, V = 32000",
        shape=LLAMA_22M,
        table="long_pairs",
        batch=4,
        max_length=1024,
        bars=(("trl", 4.0), ("tunix", 3.0)),
    ),
    "hh": Case(
        name="HH, V = 32000",
        shape=LLAMA_22M,
        table="hh",
        batch=8,
        max_length=512,
        bars=(("trl", 6.0),),
        trainers=("jdpo", "trl"),
    ),
    "long-4096": Case(
        name="long pairs, V = 4096",
        shape=SMALL_HEAD,
        table="long_pairs",
        batch=4,
        max_length=1024,
        more_trl=False,
        trainers=("jdpo", "trl"),
        references=("live",),
        rounds=1,
    ),
    "hh-4096": Case(
        name="HH, V = 4096",
        shape=SMALL_HEAD,
        table="hh",
        batch=8,
        max_length=512,
        more_trl=False,
        trainers=("jdpo", "trl"),
        references=("live",),
        rounds=1,
    ),
}
GPU_CASES = {
    "1.5b": Case(
        name="HH, 1.5 B (Qwen2.5's sizes), full",
        shape=LLAMA_1_5B,
        table="hh",
        batch=64,
        max_length=512,
        device="gpu",
        trl_micro_batches=(4, 8, 16),
        bars=(("trl", 3.0),),
        tolerance=1e-2,  # bfloat16
        later_tolerance=3e-2,
    ),
    "8b": Case(
        name="HH, 8 B (Llama 3.1's shape), full, all in bfloat16",
        shape=LLAMA_8B,
        table="hh",
        batch=64,
        max_length=512,
        device="gpu",
        trl_micro_batches=(4, 8, 16),
        jdpo=("optimizer.name=adamw_bf16",),
        bars=(("trl", 3.0),),
        tolerance=1e-2,
        later_tolerance=3e-2,
    ),
}


def toy(case: Case) -> Case:
    """Returns a case at toy size on the CPU, with the gate but without bars."""
    return dataclasses.replace(
        case,
        name=f"{case.name}, at toy size",
        shape=dataclasses.replace(tiny(case.shape), dtype="float32"),
        batch=2,
        max_length=256,
        device="cpu",
        trl_micro_batches=(1, 2) if case.trl_micro_batches else None,
        bars=(),
        tolerance=1e-3,
        later_tolerance=None,
    )
