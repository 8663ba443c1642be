"""The settings of a run: frozen dataclasses, read from YAML and the command line.

Defaults live here; a YAML states only what differs from them, and the command line has the last word:

    defaults  <  CONFIG.yaml  <  --key value | --key=value | key=value | --group.key value
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

C = TypeVar("C", bound="TrainConfig")

# A folder may be called 2024: YAML reads a number, the path stays text.
_STRICT_KEYS = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


def _no_bool(value: Any) -> Any:
    """Keep `beta: true` from becoming 1.0."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _as_list(value: Any) -> Any:
    """Let one entry stand for a list of one."""
    return [value] if isinstance(value, str | Mapping | int | float) else value


def _as_dataset(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
NonNegativeFloat = Annotated[Float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[Float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]


def _key(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class DatasetConfig:
    """Where rows come from. A bare string in `datasets` is the `path`."""

    path: str = Field(description="a JSON, JSONL or Parquet file, a folder of them, or a hub name")
    split: str = _key("train", "hub split; for files a slice like train[:90%] or train[100:200]")
    name: str | None = _key(None, "hub configuration (subset) name")
    revision: str | None = _key(None, "hub revision: branch, tag or commit")


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class MeshConfig:
    """Devices along each axis of the mesh; -1 on one axis takes all that the others leave."""

    data: Int = _key(1, "replicas of the weights, each with its part of the batch")
    fsdp: Int = _key(-1, "weights and batch are both split along this axis")
    tensor: Int = _key(1, "heads, mlp and vocabulary are split along this axis")


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class OptimizerConfig:
    """The update rule. Weight decay is not applied to norm scales and biases."""

    name: Literal["adamw"] = _key("adamw", "AdamW, arXiv 1711.05101")
    b1: Decay = _key(0.9, "decay of the first moment")
    b2: Decay = _key(0.999, "decay of the second moment")
    eps: PositiveFloat = _key(1e-8, "added to the root of the second moment")
    weight_decay: NonNegativeFloat = _key(0.0, "decoupled decay, scaled by the learning rate")


Datasets = Annotated[tuple[Annotated[DatasetConfig, BeforeValidator(_as_dataset)], ...], BeforeValidator(_as_list)]


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class TrainConfig:
    """What every training command shares."""

    model_name_or_path: str = Field(description="a Hugging Face model folder, or a hub name")
    output_dir: str = Field(description="where everything that the run leaves goes")
    datasets: Datasets = Field(description="training rows: one path, or a list of {path, split, name, revision}")
    model_revision: str | None = _key(None, "hub revision of the model")
    eval_datasets: Datasets = _key((), "held-out rows, in the same form as datasets")
    chat_template: str | None = _key(
        None, "a Jinja file, or the built-in chatml, for a model without a format; new tokens are added"
    )
    max_length: PositiveInt = _key(1024, "tokens of prompt plus completion; completions are cut from the right")
    max_prompt_length: PositiveInt | None = _key(None, "longer prompts lose tokens on the left; null: never")
    cache_dir: str | None = _key(None, "tokenized rows are kept here; null: ~/.cache/jdpo")

    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = _key(
        "auto", "dtype of activations over float32 weights; auto: bfloat16 on TPU and GPU, float32 on CPU"
    )
    remat: Literal["none", "dots", "full"] = _key(
        "full", "what the backward pass recomputes: nothing, all but matmuls, or whole layers"
    )
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = _key(
        "auto", "attention backend; auto: cudnn on GPU, splash on TPU, blockwise elsewhere, where they fit the model"
    )
    mesh: MeshConfig = _key(MeshConfig(), "how the devices are laid out")

    global_batch_size: PositiveInt = _key(32, "rows an optimizer step, whatever the mesh and micro-batches")
    micro_batch_size: PositiveInt | None = _key(
        None, "most rows a device computes at once; null: as many as max_tokens_per_device hold"
    )
    packing: bool = _key(True, "rows back to back without padding, each prompt once; false: padded batches")
    max_tokens_per_device: PositiveInt | None = _key(None, "most tokens a device computes at once; null: 16384")
    num_train_epochs: PositiveFloat = _key(1.0, "passes over the rows; a fraction is allowed")
    max_steps: PositiveInt | None = _key(None, "stop after this many steps, instead of num_train_epochs")
    shuffle: bool = _key(True, "a new order each epoch; false: file order")
    seed: Seed = _key(42, "of the row order, and of new embedding rows")

    learning_rate: PositiveFloat = _key(1e-6, "peak learning rate")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = _key("linear", "shape after the warm-up")
    warmup_ratio: Fraction = _key(0.0, "share of the steps spent rising linearly from 0")
    warmup_steps: NonNegativeInt | None = _key(None, "the same in steps; it replaces warmup_ratio")
    max_grad_norm: PositiveFloat | None = _key(1.0, "clip gradients at this global norm; null: do not clip")
    optimizer: OptimizerConfig = _key(OptimizerConfig(), "the update rule")

    logging_steps: PositiveInt = _key(10, "steps between lines in metrics.jsonl")
    eval_steps: PositiveInt | None = _key(None, "steps between evaluations; null: only after the last step")
    save_steps: PositiveInt = _key(500, "steps between checkpoints; the last step is always saved")
    save_total_limit: PositiveInt = _key(2, "newest checkpoints to keep, beside the best one")
    metric_for_best_model: str = _key("eval_loss", "the eval metric that ranks checkpoints")
    load_best_model_at_end: bool = _key(False, "export the best checkpoint instead of the last step")
    export_dtype: Literal["source", "float32", "bfloat16", "float16"] = _key(
        "source", "dtype of the exported weights; source: as in the model that came in"
    )
    max_shard_size: str = _key("5GB", "largest exported weight file")
    resume: Literal["auto", "never"] = _key(
        "auto", "auto: go on from the newest checkpoint in output_dir; never: refuse a used output_dir"
    )
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_as_list)] = _key(
        (), "trackers beside metrics.jsonl"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class SFTConfig(TrainConfig):
    """Settings of `jdpo sft`."""

    learning_rate: PositiveFloat = _key(2e-5, "peak learning rate")
    loss_on: Literal["completion", "assistant_turns"] = _key(
        "completion", "tokens that are learnt: the last assistant turn, or all of them"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class DPOConfig(TrainConfig):
    """Settings of `jdpo dpo`."""

    beta: PositiveFloat = _key(0.1, "how strongly the policy is held to the reference")
    loss_type: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = _key(
        ("sigmoid",), "the preference loss, or a list of losses that are added; docs/losses.md has them all"
    )
    loss_weights: Annotated[tuple[NonNegativeFloat, ...] | None, BeforeValidator(_as_list)] = _key(
        None, "one weight a loss of the list; null: 1 each"
    )
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = _key(0.0, "share of preferences taken as flipped")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = _key(
        "reverse_kl", "divergence that holds the policy to the reference"
    )
    f_alpha_divergence_coef: FiniteFloat = _key(0.5, "alpha of alpha_divergence")
    discopop_tau: PositiveFloat = _key(0.05, "temperature of discopop")
    simpo_gamma: FiniteFloat = _key(0.5, "target margin of simpo")
    cpo_alpha: NonNegativeFloat = _key(1.0, "weight of the likelihood term of cpo")
    orpo_lambda: NonNegativeFloat = _key(0.1, "weight of the odds-ratio term of orpo")
    rpo_alpha: NonNegativeFloat | None = _key(None, "adds so much of the chosen side's token-mean NLL; null: none")
    bco_delta: FiniteFloat = _key(0.0, "mean reward that bco_pair holds rewards against")
    bco_running_delta: bool = _key(False, "bco_pair takes the mean reward of all pairs seen so far instead")
    use_weighting: bool = _key(False, "WPO: weigh pairs by how likely the policy finds them")
    ld_alpha: Fraction | None = _key(
        None, "LD-DPO: weight of tokens past the shorter completion's length; null: as the others"
    )
    reference: Literal["auto", "live", "cached", "none"] = _key(
        "auto",
        "where reference log-probs come from: a frozen model in every step, or computed once and kept; "
        "auto: kept where that pays, none where the loss has none",
    )
    reference_model: str | None = _key(None, "the frozen reference; null: the policy's own start")
    reference_revision: str | None = _key(None, "hub revision of reference_model")
    sync_ref_model: bool = _key(False, "TR-DPO: move the reference towards the policy now and then")
    ref_model_mixup_alpha: Annotated[Float, Field(gt=0, le=1)] = _key(
        0.6, "share of the policy in the moved reference; 1: the policy replaces it"
    )
    ref_model_sync_steps: PositiveInt = _key(512, "steps between two moves of the reference")


ALIASES = {
    "model": "model_name_or_path",
    "dataset": "datasets",
    "dataset_name": "datasets",
    "train_file": "datasets",
    "dataset_test_split": "eval_datasets",
    "pref_beta": "beta",
    "dpo_beta": "beta",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "global_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_checkpointing": "remat",
    "ref_model": "reference_model",
    "precompute_ref_log_probs": "reference",
    "reference_free": "loss_type",
    "nll_coef": "rpo_alpha",
    "gamma": "simpo_gamma",
    "mixup_alpha": "ref_model_mixup_alpha",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "bf16": "compute_dtype",
    "dtype": "compute_dtype",
    "torch_dtype": "compute_dtype",
    "max_seq_length": "max_length",
    "assistant_only_loss": "loss_on",
    "completion_only_loss": "loss_on",
    "logging_dir": "output_dir",
}
"""What other trainers call a key: suggested in the error, never accepted silently."""


def load_config(cls: type[C], path: Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Reads a run's settings: defaults, then the YAML file, then `key=value` overrides.

    Args:
      cls: SFTConfig or DPOConfig.
      path: a YAML file holding a mapping, or None.
      overrides: words of the command line, as `--key value`, `--key=value` or `key=value`; values are YAML.

    Returns:
      A validated, frozen config.

    Raises:
      ValueError: naming every unknown key (with the nearest one), wrong type and missing key.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        values = _read_yaml(path)
        origins = dict.fromkeys(values, f"in {path}")
    texts = _text_keys(cls)
    for key, text in parse_overrides(overrides):
        _set_nested(values, key, _parse_value(key, text, is_text=key in texts))
        origins[key.split(".")[0]] = "on the command line"
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ValueError(_explain(cls, error, origins)) from None


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, text of the value) from words of the command line.

    >>> list(parse_overrides(["--beta", "0.2", "mesh.fsdp=4", "--shuffle=false", "--load_best_model_at_end"]))
    [('beta', '0.2'), ('mesh.fsdp', '4'), ('shuffle', 'false'), ('load_best_model_at_end', 'true')]
    """
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise ValueError(
                    f"cannot read {word!r}: expected --key value, --key=value or key=value, and the config file first"
                )
            if position < len(words) and not words[position].startswith("--"):
                value = words[position]
                position += 1
            else:
                value = "true"
        yield key.replace("-", "_"), value


def _parse_value(key: str, text: str, *, is_text: bool) -> Any:
    """Reads a command-line value as YAML, but keeps text as it is: 0123 and 2024-01-01 are fine names of folders."""
    if is_text:
        return None if text == "null" else text
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the value of {key!r}, {text!r}, as YAML: quote it ({error})") from None
    return value


def _text_keys(cls: type, prefix: str = "") -> set[str]:
    """Dotted keys whose value is text."""
    hints = typing.get_type_hints(cls)
    keys: set[str] = set()
    for name, hint in hints.items():
        group = _group_class(hint)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if hint is str or (is_union and str in typing.get_args(hint)):
            keys.add(prefix + name)
        elif group is not None and dataclasses.is_dataclass(hint):
            keys |= _text_keys(group, f"{prefix}{name}.")
    return keys


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"no config file at {path}: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the config file {path}: {error}") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key written twice is a mistake; plain YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _set_nested(values: dict[str, Any], dotted: str, value: Any) -> None:
    *groups, last = dotted.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ValueError(f"cannot set {dotted!r}: {group!r} is not a group of keys but {inner!r}")
        values = inner
    values[last] = value


def _explain(cls: type, error: ValidationError, origins: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors():
        path = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
        key = ".".join(map(str, path))
        where = origins.get(str(path[0]), "in the config") if path else "in the config"
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"unknown key {key!r} {where}{_nearest(cls, path)}")
        elif problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            lines.append(f"missing key {key!r}: {_description(cls, path)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            lines.append(f"{key!r} {where} is {problem['input']!r}: {message} ({_description(cls, path)})")
    return "\n".join(lines)


def _nearest(cls: type, path: Sequence[Any]) -> str:
    known = keys_of(cls)
    dotted = ".".join(str(part) for part in path if not isinstance(part, int))
    name = str(path[-1])
    alias = ALIASES.get(name)
    if alias in known:
        return f"; here it is called {alias!r}"
    candidates = difflib.get_close_matches(dotted, known, n=1, cutoff=0.6) or difflib.get_close_matches(
        name, {key.split(".")[-1]: key for key in known}, n=1, cutoff=0.6
    )
    if candidates:
        full = next(key for key in known if candidates[0] in (key, key.split(".")[-1]))
        return f"; did you mean {full!r}?"
    return "; `--help` lists the keys"


def _description(cls: type, path: Sequence[Any]) -> str:
    return keys_of(cls).get(".".join(str(part) for part in path if not isinstance(part, int)), "see --help")


def keys_of(cls: type, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a config class with its description, groups opened."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        info: Any = field.default  # pydantic keeps the FieldInfo of `Field(...)` here
        keys[prefix + field.name] = getattr(info, "description", None) or ""
        group = _group_class(hints[field.name])
        if group is not None:
            keys |= keys_of(group, f"{prefix}{field.name}.")
    return keys


def _group_class(hint: Any) -> type | None:
    """The dataclass behind `MeshConfig` or `tuple[DatasetConfig, ...]`, or None for a plain value."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    if typing.get_origin(hint) in (tuple, Annotated, typing.Union, types.UnionType):
        return next(filter(None, map(_group_class, typing.get_args(hint))), None)
    return None


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, with every default written out."""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return values


def to_yaml(config: TrainConfig) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=110)


EXPORT_KEYS = ("export_dtype", "max_shard_size", "load_best_model_at_end", "metric_for_best_model")
"""Keys that decide what is exported: a finished run whose export was asked for otherwise exports again."""

FREE_KEYS = frozenset(
    {
        "output_dir",
        "cache_dir",
        "logging_steps",
        "report_to",
        "eval_datasets",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "metric_for_best_model",
        "load_best_model_at_end",
        "export_dtype",
        "max_shard_size",
        "mesh",
        "attention",
        "max_tokens_per_device",
        "micro_batch_size",
        "packing",
        "reference",
        "remat",
        "resume",
    }
)
"""Keys that may change when a run is resumed: they do not change what is trained."""


def differences(saved: Mapping[str, Any], current: TrainConfig) -> list[str]:
    """What keeps `current` from being the run whose `to_dict` was `saved`; empty when it is the same run."""
    now = to_dict(current)
    keys = [key for key in {**saved, **now} if key not in FREE_KEYS]
    return [f"{key}: {saved.get(key)!r} before, {now.get(key)!r} now" for key in changed_keys(saved, current, keys)]


def changed_keys(saved: Mapping[str, Any], current: TrainConfig, keys: Iterable[str]) -> list[str]:
    """Which of `keys` differ; a key that an older jdpo did not write yet had what is its default now."""
    now, defaults = to_dict(current), defaults_of(type(current))

    def differ(key: str) -> bool:
        before, after = (values.get(key, defaults.get(key)) for values in (saved, now))
        return before != after and [before] != after  # a key that takes a list took one value before

    return [key for key in keys if differ(key)]


def defaults_of(cls: type[TrainConfig]) -> dict[str, Any]:
    """Top-level keys that have a default, with it, as plain values."""
    required = ("model_name_or_path", "output_dir", "datasets")
    values = to_dict(load_config(cls, None, [f"{key}=x" for key in required]))
    return {key: value for key, value in values.items() if key not in required}
