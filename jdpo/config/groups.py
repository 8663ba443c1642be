"""The groups of settings that functions read: model, data, loss and reference, optimization, memory, logging, output.

A run's config has the keys of all its groups next to each other, so a function that takes `data: DataSettings` takes
the config as it is, and a type checker proves that it reads no other key. See docs/decisions/0011-settings-groups.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from jdpo.config.addresses import as_mirror, local_folder, on_a_disk
from jdpo.config.nested import Datasets, Lora, Mesh, MeshConfig, Optimizer, OptimizerConfig, Watchdog, WatchdogConfig
from jdpo.config.value_types import (
    Float,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    Text,
    as_list,
    key,
    no_bool,
    path_as_text,
    required,
    settings,
)
from jdpo.loss_specs import LOSSES, OPTIONS, LossOptions
from jdpo.words import nearest

LOSS_SYNONYMS = {"dpo": "sigmoid"}
"""Other names of losses; `load_config` replaces them and logs a line."""


def _known_loss(name: str) -> str:
    if name not in LOSSES:
        near = nearest(name, [*LOSSES, *LOSS_SYNONYMS], cutoff=0.5)
        same = f" (another name of {LOSS_SYNONYMS[near]})" if near in LOSS_SYNONYMS else ""
        hint = f"; did you mean {near!r}{same}?" if near else "."
        if name in LOSS_SYNONYMS:
            hint = f"; here it is {LOSS_SYNONYMS[name]!r}."  # Python code gives the usual names
        if "," in name:
            hint = f"; write several losses as a list, [{', '.join(part.strip() for part in name.split(','))}]."
        text = f"unknown loss_type {name!r}{hint} The losses are: {', '.join(LOSSES)}"
        raise PydanticCustomError("unknown_loss", "{text}", {"text": text})
    return name


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""The trackers that jdpo has; other packages may add some, which are known where they are installed."""


def _tracker(name: str) -> str:
    if name.lower() in ("none", "all"):  # of other trainers; they would be names of trackers of other packages here
        raise PydanticCustomError("no_tracker", "expected names of trackers")
    return name


if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from jdpo.config.value_types import Converted

    PathText = Converted[str | os.PathLike[str], str]
    LocalFolder = PathText
    LossNames = Converted[str | Sequence[str], tuple[str, ...]]
    LossWeights = Converted[float | Sequence[float] | None, tuple[float, ...] | None]
    Trackers = Converted[str | Sequence[str], tuple[str, ...]]
    Tags = Converted[str | Sequence[str], tuple[str, ...]]
    SamplePrompts = Converted[str | Sequence[str] | None, str | tuple[str, ...] | None]
else:
    PathText = Annotated[Text, BeforeValidator(path_as_text)]
    LocalFolder = Annotated[PathText, AfterValidator(local_folder)]
    LossNames = Annotated[tuple[Annotated[str, AfterValidator(_known_loss)], ...], BeforeValidator(as_list)]
    LossWeights = Annotated[tuple[NonNegativeFloat, ...] | None, BeforeValidator(as_list)]
    Trackers = Annotated[tuple[Annotated[Text, AfterValidator(_tracker)], ...], BeforeValidator(as_list)]
    Tags = Annotated[tuple[Text, ...], BeforeValidator(as_list)]
    SamplePrompts = Annotated[Text | tuple[Text, ...], Field(union_mode="left_to_right")] | None


@settings
class ModelSettings(Settings):
    """The model, its chat template, and which of its weights are trained."""

    heading = "Model"

    model_name_or_path: PathText = required(
        "Model to train: a Hugging Face model folder or hub name, or a PEFT adapter to continue from.",
        example="Qwen/Qwen2.5-0.5B-Instruct",
    )
    model_revision: Text | None = key(None, "Hub revision of the model: a branch, tag or commit.", example="main")
    chat_template: Text | None = key(
        None,
        "Chat template for a model without one: a Jinja file, or the built-in chatml. Tokens that it needs are added "
        "to the vocabulary.",
        example="chatml",
    )
    chat_template_kwargs: dict[str, Any] | None = key(
        None, "Variables for the chat template; those of a row take precedence.", example="{enable_thinking: false}"
    )
    init_untrained_tokens: bool = key(
        False,
        "Start tokens that the training rows contain but the model has never trained (the embedding is zero, or below "
        "1 % of the median norm) at the mean of the trained embeddings. Tokens that chat_template adds always start "
        "there.",
    )
    router_aux_loss_coef: NonNegativeFloat | None = key(
        None,
        "Weight of the router's load-balancing loss, for models with experts; null: the value in config.json.",
        example="0.001",
    )
    lora: Lora = key(
        None,
        "Train LoRA adapters next to frozen weights: true (all lora.* keys at their defaults), false (full "
        "fine-tuning) or a group of keys. Default: full fine-tuning, unless model_name_or_path is a PEFT adapter; then "
        "training continues from it.",
        example="{r: 8, alpha: 16}",
    )


@settings
class DataSettings(Settings):
    """The rows, how they become tokens, and their order."""

    heading = "Data"

    datasets: Datasets = key(
        (),
        "Training rows: a file, folder, URL or hub name, or a list of {path: ..., split: ..., ...}.",
        example="[pairs.jsonl, {path: org/name, split: train}]",
        required_by_commands=True,  # `jdpo.train` takes the rows themselves, too
    )
    eval_datasets: Datasets = key((), "Evaluation rows, given like datasets.", example="held_out.jsonl")
    eval_fraction: Fraction = key(
        0.0,
        "Fraction of the prompts to hold out for evaluation, chosen by hash; an alternative to eval_datasets.",
        example="0.05",
    )
    max_length: PositiveInt = key(1024, "Maximum tokens of prompt plus completion; completions are cut on the right.")
    max_prompt_length: PositiveInt | None = key(
        None, "Maximum tokens of the prompt, which is cut on the left; null: prompts are not cut.", example="512"
    )
    loss_on: Literal["completion", "assistant_turns"] = key(
        "completion",
        "Turns to train on: the last assistant turn, or every assistant turn of the completion (in pairs: after the "
        "turns that both sides share).",
    )
    num_examples: PositiveInt | None = key(
        None,
        "Rows per epoch when datasets are weighted; null: enough for one pass over the largest dataset.",
        example="20000",
    )
    shuffle: bool = key(True, "Shuffle the rows again in every epoch; false: the order of the files.")
    group_by_length: bool = key(
        False, "Put rows of similar length into the same step; the order is then random only across 16-step groups."
    )
    dataset_num_proc: PositiveInt | None = key(
        None, "Processes that tokenize; null: one for a few thousand rows, one per core for more.", example="8"
    )
    cache_dir: Annotated[Text, AfterValidator(on_a_disk)] | None = key(
        None, "Folder for tokenized rows, reference log-probs and compiled programs; null: ~/.cache/jdpo."
    )


@settings
class LossSumSettings(Settings):
    """The preference losses that are added up."""

    heading = "Loss and reference"

    loss_type: LossNames = key(
        ("sigmoid",),
        "Preference loss, or a list of losses to add up; docs/losses.md describes each.",
        example="[sigmoid, sft]",
        choices=tuple(LOSSES),
    )
    loss_weights: LossWeights = key(None, "Weight of each loss in the list; null: 1 for each.", example="[1, 0.2]")


@settings
class PreferenceSettings(LossOptions, LossSumSettings):
    """The preference loss and its options, whose keys are the fields of `jdpo.loss_specs.LossOptions`."""

    # Python's bool is an int, so `beta: true` would pass as 1.
    @field_validator(*(name for name, option in OPTIONS.items() if option.is_number), mode="before")
    @classmethod
    def _refuse_true_and_false(cls, value: Any) -> Any:
        return no_bool(value)


@settings
class ReferenceSettings(Settings):
    """The source of reference log-probs, and how the reference moves."""

    heading = "Loss and reference"

    reference: Literal["auto", "live", "cached", "none"] = key(
        "auto",
        "Source of the reference log-probs. live: a frozen model in every step; cached: computed once and stored; "
        "auto: cached if that saves time, none if the loss needs no reference.",
    )
    reference_model: Text | None = key(
        None, "Frozen reference model; null: the model that training starts from.", example="runs/sft/model"
    )
    reference_revision: Text | None = key(None, "Hub revision of reference_model.", example="main")
    sync_ref_model: bool = key(False, "Move the reference towards the policy every ref_model_sync_steps (TR-DPO).")
    ref_model_mixup_alpha: Annotated[Float, Field(gt=0, le=1)] = key(
        0.6, "Share of the policy in the moved reference; 1: the policy replaces the reference."
    )
    ref_model_sync_steps: PositiveInt = key(512, "Steps between two moves of the reference.")


@settings
class OptimizationSettings(Settings):
    """Batch size, number of steps, learning rate and optimizer."""

    heading = "Optimization"

    global_batch_size: PositiveInt = key(32, "Rows per optimizer step, over all devices and micro-batches.")
    num_train_epochs: PositiveFloat = key(1.0, "Passes over the training rows; may be a fraction.", example="0.5")
    max_steps: PositiveInt | None = key(
        None, "Number of optimizer steps; null: as num_train_epochs requires.", example="1000"
    )
    learning_rate: PositiveFloat = key(1e-6, "Peak learning rate.", example="5e-7")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = key(
        "linear", "Schedule after the warm-up; linear and cosine fall to 0."
    )
    warmup_ratio: Fraction = key(0.0, "Fraction of the steps in which the learning rate rises from 0.", example="0.1")
    warmup_steps: NonNegativeInt | None = key(
        None, "Steps in which the learning rate rises from 0; null: as warmup_ratio says.", example="150"
    )
    max_grad_norm: PositiveFloat | None = key(1.0, "Maximum global norm of the gradients; null: no clipping.")
    optimizer: Optimizer = key(OptimizerConfig(), "Optimizer: its name, or a group of keys.", example="lion")
    offload_optimizer: bool = key(
        False, "Keep the optimizer state in host memory between steps, where the platform can; slower."
    )
    seed: Seed = key(42, "Seed of the row order, of new embeddings and of stochastic rounding.")


@settings
class MemorySettings(Settings):
    """Number formats, micro-batches, what the backward pass recomputes, and the mesh of devices."""

    heading = "Memory and mesh"

    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = key(
        "auto",
        "Dtype of the activations. auto: bfloat16 on TPU and GPU, float32 on CPU. Weights are float32, except with "
        "optimizer adamw_bf16.",
    )
    packing: bool = key(True, "Pack rows without padding, each prompt once; false: padded batches.")
    micro_batch_size: PositiveInt | None = key(
        None, "Maximum rows per device at a time; null: as max_tokens_per_device allows.", example="4"
    )
    max_tokens_per_device: PositiveInt | None = key(
        None,
        "Maximum tokens per device at a time; null: as many as fit into memory and still add speed.",
        example="16384",
    )
    remat: Literal["auto", "none", "dots", "attention", "full", "offload"] = key(
        "auto",
        "What the backward pass recomputes: nothing (none), all except matrix products (dots), all except attention "
        "(attention), whole layers (full), or whole layers with their inputs in host memory (offload). auto: of dots, "
        "attention and full, the fastest by estimate that fits.",
    )
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = key(
        "auto", "Attention backend. auto: cudnn on GPU, splash on TPU, else (or if unsupported) blockwise."
    )
    attention_block_q: PositiveInt | None = key(
        None,
        "Queries per tile of splash (a multiple of 128) or blockwise (of 16) attention; null: chosen by length.",
        example="512",
    )
    attention_block_kv: PositiveInt | None = key(
        None, "Keys per tile; for blockwise the same as attention_block_q; null: chosen by length.", example="512"
    )
    mesh: Mesh = key(
        MeshConfig(),
        "Devices along each mesh axis; their product is the number of devices, and one axis may be -1 (all the rest).",
        example="{fsdp: 4, tensor: 2}",
    )
    compiler_options: dict[Text, bool | int | float | Text | None] | None = key(
        None,
        "Options of XLA for the step, added to those of jdpo for the kind of devices (docs/devices.md); a null as a "
        "value leaves an option at the compiler's default.",
        example="{xla_tpu_scoped_vmem_limit_kib: 65536}",
    )
    compilation_cache: bool = key(True, "Keep compiled programs in cache_dir, so that later starts are faster.")


@settings
class LoggingSettings(Settings):
    """The steps at which a run logs, evaluates and saves, and the checkpoints it keeps."""

    heading = "Logging and saving"

    logging_steps: PositiveInt = key(
        10, "Steps between two lines of metrics.jsonl; step 1 has a line of its own, the values of the start."
    )
    eval_steps: PositiveInt | None = key(
        None, "Steps between two evaluations; null: only after the last step.", example="100"
    )
    eval_on_start: bool = key(
        True, "Evaluate before the first step, too, so that held-out curves begin at the start; false: not."
    )
    save_steps: PositiveInt = key(500, "Steps between two checkpoints; the last step is always saved.")
    save_minutes: PositiveFloat | None = key(
        None,
        "Minutes since the last checkpoint after which another one is saved, in addition to save_steps; null: only "
        "save_steps counts.",
        example="30",
    )
    save_total_limit: PositiveInt = key(2, "Newest checkpoints to keep, in addition to the best one.")
    metric_for_best_model: Text = key(
        "eval_loss", "Evaluation metric that ranks checkpoints.", example="eval_rewards/accuracies"
    )
    load_best_model_at_end: bool = key(False, "Export the best checkpoint instead of the last step.")
    report_to: Trackers = key(
        (),
        "Trackers to log to in addition to metrics.jsonl: these, and those that other packages add.",
        example="[wandb, tensorboard]",
        choices=TRACKERS,
    )
    run_name: Text | None = key(
        None, "Name of the run in trackers; null: the name of the output_dir.", example="first-try"
    )
    run_project: Text | None = key(
        None,
        "Project of the run in trackers, or experiment of MLflow; null: what WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME "
        "says, else jdpo.",
        example="my-project",
    )
    run_group: Text | None = key(None, "Group of the run in trackers, such as runs of one sweep.", example="sweep-1")
    run_tags: Tags = key((), "Tags of the run in trackers.", example="[baseline, small]")
    profile_steps: Text | None = key(
        None, "Record a profiler trace of steps FIRST:LAST in output_dir/profile; null: none.", example="10:13"
    )


@settings
class SampleSettings(Settings):
    """The answers that a run samples from the model while it trains, for people to read."""

    heading = "Sampled answers"

    sample_prompts: SamplePrompts = key(
        None,
        "Prompts that the model answers before the first step, every sample_steps and after the last step: a file, "
        "folder or hub name with rows in any format, or a list of messages of a user. The answers are in samples.jsonl "
        "and go to the trackers; training does not change. null: none.",
        example="prompts.jsonl",
    )
    sample_steps: PositiveInt | None = key(
        None, "Steps between two samplings; null: only before the first and after the last step.", example="100"
    )
    sample_max_new_tokens: PositiveInt = key(128, "Maximum tokens of a sampled answer.")
    sample_temperature: NonNegativeFloat = key(
        1.0, "Temperature of the sampled answers; 0: always the most probable token. The seed is `seed` each time."
    )


@settings
class OutputSettings(Settings):
    """The folder of a run, how it restarts, and what it exports."""

    heading = "Output"

    output_dir: LocalFolder = required(
        "Folder for everything that the run writes: a local one or, with several hosts, one that all of them share.",
        example="runs/first",
    )
    mirror: Annotated[Text, AfterValidator(as_mirror)] | None = key(
        None,
        "Folder in an object store (s3://bucket/folder or gs://bucket/folder) that gets a copy of every checkpoint, of "
        "the run's records and of the exported model, while the run goes on. A start with an empty output_dir "
        "continues from it. null: none.",
        example="s3://bucket/runs/first",
    )
    resume: Literal["auto", "never"] = key(
        "auto",
        "What to do if output_dir holds a run. auto: continue from its newest intact checkpoint; never: refuse to "
        "start, unless all its checkpoints are damaged, and then start again at step 0.",
    )
    export_at_end: bool = key(
        True,
        "Export the model to output_dir/model and draw plots when the run ends. false: leave checkpoints alone, as for "
        "the runs of a sweep; the same command with true, or `jdpo export`, exports later.",
    )
    export_dtype: Literal["source", "float32", "bfloat16", "float16"] = key(
        "source", "Dtype of the exported weights. source: that of the model that training starts from."
    )
    max_shard_size: Text = key("5GB", "Maximum size of one exported weight file.")
    push_to_hub: Text | None = key(
        None, "Upload the exported model to this private model repository on the Hugging Face Hub.", example="me/model"
    )
    push_public: bool = key(False, "Make the repository of push_to_hub public.")
    heartbeat_timeout_seconds: Annotated[Float, Field(ge=5, le=86400)] = key(
        30.0, "Seconds without a heartbeat after which a process counts as dead and all others exit with code 75."
    )
    watchdog: Watchdog = key(
        WatchdogConfig(),
        "Deadlines after which a process that is alive but stuck exits with code 124.",
        example="{enabled: false}",
    )
    maintenance_notice: bool = key(
        True,
        "On Google Cloud, stop as after SIGTERM when the metadata server announces that this machine is preempted or "
        "terminated for maintenance.",
    )
