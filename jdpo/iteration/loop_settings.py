"""The settings of `jdpo iterate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from jdpo.config.addresses import on_a_disk
from jdpo.config.value_types import (
    Float,
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    Text,
    key,
    required,
    settings,
)
from jdpo.scoring.scorers import By, parse_by

SCORE_NAME = "loop"
"""Name of the scores that the loop pairs by."""

Share = Annotated[Float, Field(ge=0, lt=1)]


@settings
class GenerateSettings(Settings):
    """Options of `jdpo generate`."""

    n: Annotated[Int, Field(ge=2)] = key(8, "Answers to each prompt; a pair takes two.")
    temperature: NonNegativeFloat = key(1.0, "Temperature of the draws.")
    top_p: Annotated[Float, Field(gt=0, le=1)] = key(1.0, "Draw from the most probable tokens of this total.")
    top_k: PositiveInt | None = key(None, "Draw from this many most probable tokens; null: from all.", example="50")
    max_new_tokens: PositiveInt = key(1024, "Largest number of tokens of an answer.")
    serve: Text | None = key(
        None,
        "Command that serves the model of each round; null: jdpo's own engine answers.",
        example="vllm serve {model} --port {port}",
    )


@settings
class ScoreSettings(Settings):
    """Options of `jdpo score`."""

    by: Text = required("Scorer, as for `jdpo score --by`.", example="reward:Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    rubric: Text | None = key(None, "File with the rubric of a judge.", example="rubric.md")
    judge_model: Text | None = key(None, "Model of the judge's server, if it has several.", example="Qwen/Qwen3-8B")
    api_key_env: Text | None = key(None, "Environment variable with the key of the judge's server.", example="KEY")
    comparisons: PositiveInt | None = key(None, "Most comparisons of a judge per prompt; null: 16.", example="8")


@settings
class PairSettings(Settings):
    """Options of `jdpo pair`."""

    strategy: Literal["best_worst", "best_random", "adjacent"] = key("best_worst", "Which answers are compared.")
    min_margin: NonNegativeFloat | None = key(None, "Drop pairs whose scores differ by less.", example="1")
    max_length_gap: NonNegativeInt | None = key(None, "Drop pairs whose lengths differ by more.", example="100")
    max_per_prompt: PositiveInt | None = key(None, "Most pairs of one prompt; null: as for `jdpo pair`.", example="5")
    dedupe: Annotated[Float, Field(gt=0, le=1)] | None = key(
        None, "Treat answers at least this similar as one; null: only equal ones.", example="0.8"
    )
    allow_cut_off: bool = key(False, "Also choose answers that were cut off at max_new_tokens.")


@settings
class CompareSettings(Settings):
    """Options of `jdpo compare`."""

    by: Text = required(
        "Judge of the held-out answers: any scorer of `jdpo score`.", example="judge:http://localhost:8001/v1"
    )
    rubric: Text | None = key(None, "File with the rubric of the judge.", example="rubric.md")
    judge_model: Text | None = key(None, "Model of the judge's server, if it has several.", example="Qwen/Qwen3-8B")
    api_key_env: Text | None = key(None, "Environment variable with the key of the judge's server.", example="KEY")
    n: PositiveInt = key(1, "Answers of each model to each held-out prompt.", example="2")
    temperature: NonNegativeFloat = key(1.0, "Temperature of the draws.")
    max_new_tokens: PositiveInt | None = key(
        None, "Largest number of tokens of an answer; null: as in generate.", example="512"
    )
    pairs: Text | None = key(None, "Held-out pairs, for accuracy and margins.", example="held_out.jsonl")
    facts: Text | None = key(None, "Facts that must not be forgotten.", example="facts.jsonl")


@settings
class LoopSettings(Settings):
    """The settings of `jdpo iterate`.

    Raises:
      ValueError: a judge that is also the scorer, no held-out prompts, or a key of `dpo` that the loop sets itself.
    """

    heading = "Loop"

    model_name_or_path: Text = required(
        "Model to start from: a Hugging Face model folder or hub name.", example="Qwen/Qwen2.5-0.5B-Instruct"
    )
    prompts: Text = required("Prompts in any schema that jdpo reads.", example="prompts.jsonl")
    output_dir: Annotated[Text, AfterValidator(on_a_disk)] = required("Folder for the rounds.", example="runs/loop")
    held_out_prompts: Text | None = key(
        None, "Prompts for `jdpo compare` alone; null: held_out of the prompts.", example="held_out.jsonl"
    )
    held_out: Fraction = key(0.1, "Fraction of the prompts to hold out if held_out_prompts is null.")
    rounds: PositiveInt = key(3, "Most rounds.")
    prompts_per_round: PositiveInt | None = key(
        None, "New prompts of each round; null: all prompts, in equal parts.", example="2000"
    )
    reference: Literal["previous", "initial"] = key(
        "previous", "Frozen reference of each round: the model that the round starts from, or model_name_or_path."
    )
    replay: Share = key(0.0, "Share of a round's training pairs that come from earlier rounds.", example="0.2")
    max_kl: PositiveFloat | None = key(
        None, "Stop when a round moves the model by more than this KL divergence, in nats per answer.", example="20"
    )
    same_scorer: bool = key(False, "Allow compare.by, the judge, to be score.by, which made the pairs.")
    seed: Seed = key(0, "Seed of the split into rounds, of the draws and of the replayed pairs.")
    generate: GenerateSettings = key(GenerateSettings(), "Options of `jdpo generate`.", example="{n: 8}")
    score: ScoreSettings = required("Options of `jdpo score`.", example="{by: length}")
    pair: PairSettings = key(PairSettings(), "Options of `jdpo pair`.", example="{min_margin: 1}")
    dpo: Mapping[str, Any] = key({}, "Keys of `jdpo dpo`.", example="{beta: 0.1, learning_rate: 5e-7}")
    compare: CompareSettings = required("Options of `jdpo compare`.", example='{by: "judge:http://localhost:8001/v1"}')

    @model_validator(mode="after")
    def _check(self) -> LoopSettings:
        check_judge(self)
        taken = [name for name in OWN_KEYS if name in self.dpo]
        if taken:
            raise ValueError(f"dpo: the loop sets {', '.join(taken)} itself in every round; leave it out")
        if self.held_out_prompts is None and self.held_out == 0:
            raise ValueError("held_out is 0 and held_out_prompts is null: `compare` needs prompts; set one of them")
        return self


OWN_KEYS = (
    "model_name_or_path",
    "model_revision",
    "datasets",
    "output_dir",
    "mirror",
    "export_at_end",
    "reference_model",
    "reference_revision",
)
"""Keys of `jdpo dpo` that the loop sets."""


def check_judge(loop: LoopSettings) -> None:
    """Refuses a loop that is judged by the scorer which makes its pairs.

    Raises:
      ValueError: see above, or there is no such scorer or judge.
    """
    scorer, judge = parse_by(loop.score.by), parse_by(loop.compare.by)
    # One server may have several models.
    if scorer.kind == "judge" and loop.score.judge_model != loop.compare.judge_model:
        return
    if _same(scorer, judge) and not loop.same_scorer:
        raise ValueError(
            f"compare.by is the scorer that makes the pairs ({loop.score.by}), which favours its own choices; name "
            "another judge, or set same_scorer: true"
        )


def _same(scorer: By, judge: By) -> bool:
    """Returns whether two scorers are the same one, however their paths and addresses are written."""
    if scorer.kind != judge.kind:
        return False
    if scorer.kind == "reward":
        return Path(scorer.argument).expanduser().resolve() == Path(judge.argument).expanduser().resolve()
    return scorer.argument.rstrip("/") == judge.argument.rstrip("/")
