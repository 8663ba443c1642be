"""From a config to everything that a run works with, checked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdpo.checkpoint.hf_export import parse_size
from jdpo.config import DPOConfig, TrainConfig, defaults_of
from jdpo.data.loader import num_steps_per_epoch
from jdpo.data.prepare import PreparedData, cache_folder
from jdpo.data.tokenizer import Tokenizer, load_tokenizer
from jdpo.models.attention import check_attention
from jdpo.models.blocks import AttentionSettings
from jdpo.models.families import ModelConfig, read_model_config
from jdpo.models.hf_weights import check_tensors, load_params, resize_embeddings
from jdpo.models.hub import resolve_folder
from jdpo.models.remat import check_remat
from jdpo.models.safetensors_folder import tensor_entries
from jdpo.models.transformer import Transformer, abstract_params, logical_axes
from jdpo.reports.writers import check_trackers
from jdpo.sharding.mesh import check_batch_size, make_mesh
from jdpo.sharding.rules import param_shardings, undivided_dims
from jdpo.training.optimizer import learning_rate_schedule, param_dtype_of
from jdpo.training.profile import parse_steps
from jdpo.training.tasks import Task, task_for

Params = Any
Say = Callable[[str], None]
ROW_COUNTER_SECONDS = 10.0

Mode = Literal["live", "cached", "none"]
"""Where a run's reference log-probs come from: a frozen model in the step, the cache, or nowhere."""
Asked = Literal["auto", "live", "cached", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run works with; nothing in it changes while the run goes on."""

    config: TrainConfig
    task: Task
    mesh: Mesh
    model_folder: Path
    reference_folder: Path | None  # None where the reference is the policy's own start, or there is none
    tokenizer: Tokenizer
    source_config: ModelConfig  # as in the model folder
    model: Transformer  # with the vocabulary that the tokenizer needs
    train_data: PreparedData
    eval_data: PreparedData | None
    num_steps: int
    steps_per_epoch: int

    @property
    def shardings(self) -> Params:
        """A sharding for every weight."""
        return param_shardings(logical_axes(self.model), abstract_params(self.model), self.mesh)

    def inputs(self) -> dict[str, str]:
        """Digests of what decides a run beside its config, for recognising it on resume."""
        digests = {
            f"the model {self.config.model_name_or_path}": folder_digest(self.model_folder),
            "the tokenizer or its chat template": self.tokenizer.digest,
            "the training rows": self.train_data.digest,
        }
        if self.reference_folder is not None:
            digests["the reference model"] = folder_digest(self.reference_folder)
        return digests


def resolve_dtype(config: TrainConfig) -> TrainConfig:
    """Replaces compute_dtype auto by bfloat16 on TPU and GPU, float32 on CPU."""
    if config.compute_dtype != "auto":
        return config
    dtype: Any = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(config, compute_dtype=dtype)


def program_folder(config: TrainConfig) -> Path | None:
    """Where compiled programs are kept, None where they are not."""
    return cache_folder(config.cache_dir) / "programs" if config.compilation_cache else None


@contextlib.contextmanager
def numerics(config: TrainConfig) -> Iterator[None]:
    """Makes jax mean what compute_dtype says while a run goes on, and puts back what was set before."""
    x64, precision = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    try:
        # Settings of the whole process, not jax's thread-local contexts: orbax works in threads of its own.
        if config.compute_dtype == "float32":  # without this, TPUs multiply float32 in bfloat16 and GPUs in TF32
            jax.config.update("jax_default_matmul_precision", "float32")
        if config.compute_dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
        jax.config.update("jax_enable_x64", x64)


def build(config: TrainConfig, say: Say) -> Setup:
    """Reads model config, tokenizer and rows, and lays out mesh and batches. Weights are not touched.

    Args:
      config: with compute_dtype resolved.
      say: takes lines for the person who started the run.

    Raises:
      ValueError: anything that does not fit, before anything is trained.
    """
    task = task_for(config)
    check_settings(config, task)
    parse_size(config.max_shard_size)  # now, not at the export after hours of training
    mesh = make_mesh(config.mesh)
    check_batch_size(config.global_batch_size, mesh)
    model_folder = resolve_folder(config.model_name_or_path, config.model_revision)
    source_config = read_model_config(model_folder)
    tokenizer = load_tokenizer(model_folder, chat_template=config.chat_template)
    model = make_model(config, source_config, tokenizer)
    reference_folder = _reference_folder(config, model_folder, source_config, tokenizer)
    for folder in {model_folder, reference_folder or model_folder}:
        check_tensors(folder, tensor_entries(folder), source_config)  # headers only, before rows are tokenized
    train_data = task.prepare(config.datasets, tokenizer, progress=_row_counter(say))
    say(f"{train_data.summary()}\n  {train_data.cache_note}")
    eval_data = None
    if config.eval_datasets:
        eval_data = task.prepare(config.eval_datasets, tokenizer, progress=_row_counter(say))
        say(f"evaluation {eval_data.summary()}\n  {eval_data.cache_note}")
    steps_per_epoch = num_steps_per_epoch(len(train_data), config.global_batch_size)
    setup = Setup(
        config=config,
        task=task,
        mesh=mesh,
        model_folder=model_folder,
        reference_folder=reference_folder,
        tokenizer=tokenizer,
        source_config=source_config,
        model=model,
        train_data=train_data,
        eval_data=eval_data,
        num_steps=config.max_steps or num_steps_of(config.num_train_epochs, steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
    )
    learning_rate_schedule(config, setup.num_steps)  # a warm-up longer than the run is refused here
    say(describe(setup))
    return setup


def _row_counter(say: Say) -> Callable[[int], None]:
    """Says every so often how many rows were read, while a large set is tokenized."""
    due = time.monotonic() + ROW_COUNTER_SECONDS

    def progress(num_rows: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + ROW_COUNTER_SECONDS
            say(f"tokenizing: {num_rows:,} rows read")

    return progress


def num_steps_of(num_epochs: float, steps_per_epoch: int) -> int:
    """Steps of a number of epochs, rounded up, but not by what floats add to a product.

    >>> num_steps_of(1.1, 50), num_steps_of(0.5, 3)
    (55, 2)
    """
    return math.ceil(round(num_epochs * steps_per_epoch, 6))


def check_settings(config: TrainConfig, task: Task) -> None:
    """Refuses settings that would be ignored, and those under which there is no best checkpoint to keep or export.

    Raises:
      ValueError: naming the setting and what it needs.
    """
    pairs = [(config.model_name_or_path, config.model_revision, "model_revision")]
    if isinstance(config, DPOConfig):
        if config.reference_revision is not None and config.reference_model is None:
            raise ValueError("reference_revision needs reference_model: without it the reference is the policy's start")
        pairs.append((config.reference_model or "", config.reference_revision, "reference_revision"))
        _check_reference_settings(config, task)
    for name, revision, key in pairs:
        if revision is not None and Path(name).expanduser().is_dir():
            raise ValueError(f"{key} {revision!r} is for hub names; {name} is a local folder, which has no revisions")
    if config.eval_steps is not None and not config.eval_datasets:
        raise ValueError(f"eval_steps {config.eval_steps} needs eval_datasets: there is nothing to evaluate on")
    check_trackers(config.report_to)
    parse_steps(config.profile_steps)
    known = [f"eval_{name}" for name in task.metrics]
    if config.metric_for_best_model not in known:
        raise ValueError(
            f"unknown metric_for_best_model {config.metric_for_best_model!r}; "
            f"`jdpo {task.command}` has {', '.join(known)}"
        )
    if not config.load_best_model_at_end:
        return
    if not config.eval_datasets or config.eval_steps is None:
        raise ValueError("load_best_model_at_end needs eval_datasets and eval_steps: without them no step is the best")
    if config.save_steps % config.eval_steps:
        raise ValueError(
            f"load_best_model_at_end needs an evaluation at every checkpoint: save_steps {config.save_steps} is not a "
            f"multiple of eval_steps {config.eval_steps}"
        )


def _check_reference_settings(config: DPOConfig, task: Task) -> None:
    if not task.uses_reference and config.reference_model is not None:
        raise ValueError(
            f"reference_model {config.reference_model} would not be read: loss_type "
            f"{' + '.join(config.loss_type)} has no reference"
        )
    fixed_mode(config.reference, needs_reference=task.uses_reference, sync_ref_model=config.sync_ref_model)
    if config.sync_ref_model and not task.uses_reference:
        raise ValueError(f"sync_ref_model: loss_type {' + '.join(config.loss_type)} has no reference that could move")
    if not config.sync_ref_model:
        defaults = defaults_of(DPOConfig)
        for key in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if getattr(config, key) != defaults[key]:
                raise ValueError(f"{key} {getattr(config, key)} needs sync_ref_model: true; without it nothing moves")


def fixed_mode(asked: Asked, *, needs_reference: bool, sync_ref_model: bool) -> Mode | None:
    """The mode where it does not depend on what the cache holds, else None.

    Raises:
      ValueError: what is asked for does not fit the loss or the other settings.
    """
    if not needs_reference:
        if asked in ("live", "cached"):
            raise ValueError(f"reference is {asked!r}, but the loss has no reference; set reference to auto or none")
        return "none"
    if asked == "none":
        raise ValueError("reference is 'none', but the loss compares with a reference; set it to auto, live or cached")
    if sync_ref_model and asked == "cached":
        raise ValueError(
            "sync_ref_model moves the reference in training, so its log-probs cannot be cached; set reference to live"
        )
    return "live" if sync_ref_model or asked == "live" else None


def make_model(config: TrainConfig, source_config: ModelConfig, tokenizer: Tokenizer) -> Transformer:
    """The model with room for every token.

    Raises:
      ValueError: the tokenizer has more tokens than the embedding, and none of them was added by jdpo.
    """
    vocab_size = source_config.vocab_size
    if tokenizer.size > vocab_size:
        if not tokenizer.added_tokens or tokenizer.size - len(tokenizer.added_tokens) > vocab_size:
            raise ValueError(
                f"the tokenizer of {config.model_name_or_path} has {tokenizer.size} tokens, but the model's embedding "
                f"has {vocab_size} rows; use the tokenizer that belongs to the model"
            )
        vocab_size = tokenizer.size
    compute_dtype = jnp.dtype(config.compute_dtype)
    _check_attention_settings(config, source_config)
    remat = "none" if config.remat == "auto" else config.remat  # auto is settled once the step's shapes are known
    check_remat(remat, jax.devices()[0])
    return Transformer(
        dataclasses.replace(source_config, vocab_size=vocab_size),
        compute_dtype=compute_dtype,
        param_dtype=param_dtype_of(config),
        remat=remat,
        attention=config.attention,
        attention_block_q=config.attention_block_q,
        attention_block_kv=config.attention_block_kv,
    )


def _check_attention_settings(config: TrainConfig, source_config: ModelConfig) -> None:
    defaults = defaults_of(TrainConfig)
    keys = ("attention", "attention_block_q", "attention_block_kv")
    asked = {key: getattr(config, key) for key in keys if getattr(config, key) != defaults[key]}
    if asked and not config.packing:
        key, value = next(iter(asked.items()))
        raise ValueError(f"{key} {value!r} is for packed rows; set packing to true, or leave it out")
    blocks = {"block_q": config.attention_block_q, "block_kv": config.attention_block_kv}
    dtype, head_dim, platform = jnp.dtype(config.compute_dtype), source_config.head_dim, jax.default_backend()
    for window in sorted(set(source_config.layer_windows), key=str) if asked else ():
        backend = AttentionSettings(config.attention, **blocks).resolve(dtype, head_dim, config.max_length, window)
        try:
            check_attention(backend, dtype=dtype, head_dim=head_dim, window=window, platform=platform, **blocks)
        except ValueError as error:
            chosen = f" (attention: auto takes {backend} here)" if config.attention == "auto" else ""
            raise ValueError(f"{error}{chosen}") from None


def _reference_folder(
    config: TrainConfig, model_folder: Path, policy: ModelConfig, tokenizer: Tokenizer
) -> Path | None:
    if not isinstance(config, DPOConfig) or config.reference_model is None:
        return None
    folder = resolve_folder(config.reference_model, config.reference_revision)
    if folder.resolve() == model_folder.resolve():
        return None  # named, and still the policy's own start
    if (found := read_model_config(folder)) != policy:
        names = [field.name for field in dataclasses.fields(policy)]
        fields = {name: (getattr(found, name), getattr(policy, name)) for name in names}
        unlike = [f"{name} ({theirs} and {ours})" for name, (theirs, ours) in fields.items() if theirs != ours]
        raise ValueError(
            f"reference_model {config.reference_model} must have the shape of {config.model_name_or_path}; "
            f"they differ in {', '.join(unlike)}"
        )
    if (folder / "tokenizer.json").exists():  # a reference may come without one; then there is nothing to compare
        theirs = load_tokenizer(folder, chat_template=config.chat_template)
        if theirs.hf.get_vocab() != tokenizer.hf.get_vocab():
            raise ValueError(
                f"reference_model {config.reference_model} has another vocabulary than {config.model_name_or_path}: "
                "the same ids mean other tokens there, so their log-probs cannot be compared"
            )
    return folder


def load_start(setup: Setup) -> Params:
    """The policy's start on the mesh, in the master dtype, the vocabulary grown where tokens were added."""
    return _load_grown(setup, setup.model_folder)


def _load_grown(setup: Setup, folder: Path) -> Params:
    source_model = setup.model.clone(config=setup.source_config)
    axes, shapes = logical_axes(source_model), abstract_params(source_model)
    params = load_params(folder, source_model, param_shardings(axes, shapes, setup.mesh), dtype=setup.model.param_dtype)
    if setup.model.config.vocab_size == setup.source_config.vocab_size:
        return params
    key = jax.random.key(setup.config.seed)
    grown, model = resize_embeddings(params, source_model, setup.model.config.vocab_size, key)
    assert model == setup.model, (model, setup.model)
    return jax.device_put(grown, setup.shardings)


def load_reference(setup: Setup, start: Params | None, *, moves: bool = False) -> Params:
    """The reference, in the compute dtype: the model casts weights to it at use, so nothing is lost.

    Args:
      start: the policy's start where it is at hand, so that it is not read twice; it is copied, never aliased.
      moves: a reference that moves in small steps keeps the master dtype, in which they are not rounded away.
    """
    if setup.reference_folder is not None:
        start = _load_grown(setup, setup.reference_folder)
    elif start is None:
        start = load_start(setup)
    dtype = setup.model.param_dtype if moves else setup.model.compute_dtype
    copy = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: jnp.copy(leaf).astype(dtype), tree), out_shardings=setup.shardings
    )
    return copy(start)


def describe(setup: Setup) -> str:
    """The run in a few lines, said before it starts."""
    config, task = setup.config, setup.task
    shapes = abstract_params(setup.model)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    mesh = " x ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
    lines = [
        f"model: {setup.source_config.family}, {num_params:,} parameters, {config.compute_dtype} compute",
        f"mesh: {mesh} over {setup.mesh.size} {jax.default_backend()} device(s)",
        f"run: {setup.num_steps} steps of {config.global_batch_size} {task.unit}, "
        f"{_cut(config)}; {setup.steps_per_epoch} steps an epoch",
    ]
    lines += setup.tokenizer.notes
    positions = setup.source_config.max_positions
    if positions is not None and config.max_length > positions:
        lines.append(f"note: max_length {config.max_length} is beyond the {positions} positions the model was made for")
    whole = undivided_dims(logical_axes(setup.model), shapes, setup.mesh)
    if whole:
        lines.append(f"kept whole on each device, as the mesh does not divide them: {'; '.join(whole)}")
    return "\n".join(lines)


def _cut(config: TrainConfig) -> str:
    """How a step's rows lie in batches, as far as the config says."""
    how = "packed" if config.packing else "padded"
    if config.micro_batch_size is not None:
        return f"{how}, at most {config.micro_batch_size} a device at once"
    if config.max_tokens_per_device is not None:
        return f"{how}, at most {config.max_tokens_per_device} tokens a device at once"
    return how


def folder_digest(folder: Path) -> str:
    """Digest of a model folder's config and weights: names and contents of its JSON and safetensors files."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return _files_digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=8)
def _files_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The digest of files as they were at a size and a time: a run asks more than once, and reading takes long."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
