"""From a config to everything that a run works with: model, tokenizer, mesh and rows, all checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jdpo.checkpoint.hf_export import parse_size, read_generation_config
from jdpo.checkpoint.hub_push import check_push
from jdpo.config import (
    MemorySettings,
    ReferenceSettings,
    TrainConfig,
)
from jdpo.data.batching.loader import RowPlan
from jdpo.data.batching.mixing import check_data_settings, has_evaluation
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.models.families import image_tokens, read_model_config
from jdpo.models.lora.adapter_config import is_adapter_folder
from jdpo.models.transformer import abstract_params
from jdpo.models.weights.embedding_rows import StartedRows
from jdpo.models.weights.hub_models import has_weights, resolve_folder
from jdpo.models.weights.loading import check_tensors
from jdpo.models.weights.safetensors_folder import tensor_entries
from jdpo.processes import PROGRESS, run_jointly
from jdpo.sharding.mesh import check_batch_size
from jdpo.sharding.rules import undivided_dims
from jdpo.sharding.slices import slice_sizes
from jdpo.training.setup.adaptation import check_adaptation, num_params
from jdpo.training.setup.folder_digests import adapter_digest, folder_digest
from jdpo.training.setup.model_setup import ModelSetup, build_model
from jdpo.training.setup.model_sources import notes_on_weights
from jdpo.training.setup.row_order import Log, check_images, check_scores, num_steps_of, plan_rows
from jdpo.training.setup.sample_prompts import SamplePrompt, read_sample_prompts
from jdpo.training.setup.shared_rows import prepare_rows
from jdpo.training.setup.tasks import Task, task_for
from jdpo.training.setup.untrained import start_tokens
from jdpo.training.setup.validation import (
    check_expert_settings,
    check_logging,
    check_offload,
    check_profiled,
    check_reference,
    check_revisions,
)
from jdpo.training.step.optimizer import learning_rate_schedule
from jdpo.words import figure

Params = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(ModelSetup):
    """Everything that a run works with; nothing in it changes while the run trains."""

    task: Task
    reference_folder: Path | None  # of a reference with weights of its own
    reference_adapter: Path | None  # of a reference that is an adapter on the policy's base
    train_data: PreparedData
    eval_data: PreparedData | None
    started: StartedRows | None  # embedding rows that do not start as in the model folder
    reference_started: StartedRows | None  # embedding rows that are not as in reference_folder
    row_plan: RowPlan  # of train_data
    num_steps: int
    steps_per_epoch: int
    sample_prompts: tuple[SamplePrompt, ...]  # that the run answers while it trains

    @property
    def reference_is_start(self) -> bool:
        """True if the reference, where there is one, is the policy as training starts from it."""
        started_from = None if self.adaptation is None else self.adaptation.folder
        return self.reference_folder is None and self.reference_adapter == started_from

    @property
    def sizes(self) -> dict[str, int | None]:
        """The fields of `RunRecord` that tell how large the run is."""
        held_out = None if self.eval_data is None else len(self.eval_data)
        return {"num_steps": self.num_steps, "num_rows": len(self.train_data), "num_eval_rows": held_out}

    def logs_after(self, step: int) -> bool:
        """Returns True if the averages since the last log are written after this step."""
        # Step 1 alone: its values are those of the weights that training starts from, which a mean would hide.
        return step == 1 or step % self.config.logging_steps == 0 or step == self.num_steps

    def inputs(self) -> dict[str, str]:
        """Returns digests of everything that a run depends on except its config, to recognise it when it is resumed."""
        digests = {
            f"the model {self.model_name}": folder_digest(self.model_folder),
            "the tokenizer or its chat template": self.tokenizer.digest,
            "the training rows": self.train_data.digest,
        }
        if self.eval_data is not None:  # metrics of two sets would be mixed in one column
            digests["the evaluation rows"] = self.eval_data.digest
        if len(self.train_data.names) > 1:
            # The same rows, cut differently into datasets, would have other shares of an epoch.
            digests["how many rows each dataset has"] = " ".join(map(str, self.train_data.num_rows_of))
        if self.adaptation is not None and self.adaptation.folder is not None:
            digests["the adapter"] = adapter_digest(self.adaptation.folder)
        if self.reference_folder is not None:
            digests["the reference model"] = folder_digest(self.reference_folder)
        return digests


def build(config: TrainConfig, log: Log, *, weights: bool = True, stopped: Callable[[], bool] = lambda: False) -> Setup:
    """Reads model config, tokenizer and rows, and lays out mesh and steps. Of the weights only headers are read.

    Every process must call this. Each reads the files of its own host; an error on one process ends all of them.

    Args:
      config: with compute_dtype resolved.
      log: takes lines for the user.
      weights: False: the weights need not exist, and are not downloaded.
      stopped: returns True if a signal asks to stop; called while rows are tokenized.

    Raises:
      ValueError: bad input, before anything is trained.
      BuildStopped: `stopped` returned True.
    """
    PROGRESS.enter("data")  # also of commands that have no clock
    # Settings first, which cost nothing; then the hub; then files.
    task = run_jointly(lambda: _checked_task(config))
    if config.push_to_hub is not None:  # now, not at the export after hours of training
        repository = config.push_to_hub
        run_jointly(lambda: check_push(repository), on_first=True)

    opened = run_jointly(lambda: _open(config, log, weights=weights))
    tokenizer = opened.model_setup.tokenizer
    data = prepare_rows(config, tokenizer, log, pairs=task.loss is not None, stopped=stopped)
    return run_jointly(lambda: _lay_out(config, task, opened, *data, log))


def _checked_task(config: TrainConfig) -> Task:
    task = task_for(config)
    reference = config if isinstance(config, ReferenceSettings) else None
    check_revisions(config, reference)
    if reference is not None and task.loss is not None:
        check_reference(reference, loss_type=task.loss.loss_types, needs_reference=task.uses_reference)
    check_data_settings(config, pairs=task.loss is not None)
    check_logging(config, task, evaluates=has_evaluation(config))
    check_offload(remat=config.remat, offload_optimizer=config.offload_optimizer)
    parse_size(config.max_shard_size)
    if config.push_public and config.push_to_hub is None:
        raise ValueError("push_public makes the repository of push_to_hub public; give both, or neither")
    if not config.export_at_end and (config.load_best_model_at_end or config.push_to_hub is not None):
        key = "push_to_hub" if config.push_to_hub is not None else "load_best_model_at_end"
        raise ValueError(f"{key} needs the export that export_at_end false leaves out; drop one or the other")
    return task


class _Opened(NamedTuple):
    """The parts of a run that are read before its rows."""

    model_setup: ModelSetup
    reference_folder: Path | None
    reference_adapter: Path | None
    sample_prompts: tuple[SamplePrompt, ...]


def _open(config: TrainConfig, log: Log, *, weights: bool) -> _Opened:
    """The part of `build` that each process does by itself before the rows; nothing here waits for the others."""
    model_setup = build_model(config, weights=weights)
    check_batch_size(config.global_batch_size, model_setup.mesh)
    if model_setup.adaptation is not None:
        check_adaptation(
            model_setup.adaptation, model_setup.tokenizer, config if isinstance(config, ReferenceSettings) else None
        )
    model_folder, source_config, tokenizer = model_setup.model_folder, model_setup.source_config, model_setup.tokenizer
    read_generation_config(model_folder)  # now, not at the export after hours of training
    check_expert_settings(config.router_aux_loss_coef, source_config, model_setup.mesh)
    reference_folder, reference_adapter = _reference_of(config, model_setup, weights=weights)
    # A set, since both may be one folder.
    for folder in {model_folder, reference_folder or model_folder}:
        if weights or has_weights(folder):
            entries = tensor_entries(folder)
            check_tensors(folder, entries, source_config)  # headers only, before rows are tokenized
            for note in notes_on_weights(folder, entries, source_config):
                log(note)
        else:
            log(f"note: no weights in {folder}: it was not checked that they fit config.json")
    positions = source_config.max_positions
    sample_prompts = read_sample_prompts(config, tokenizer, log, max_positions=positions)
    return _Opened(model_setup, reference_folder, reference_adapter, sample_prompts)


def _lay_out(
    config: TrainConfig,
    task: Task,
    opened: _Opened,
    train_data: PreparedData,
    eval_data: PreparedData | None,
    log: Log,
) -> Setup:
    """The part of `build` after the rows are known; nothing here waits for the others."""
    model_setup, reference_folder, reference_adapter, sample_prompts = opened
    images = image_tokens(model_setup.model_folder)
    for data in (train_data, eval_data):
        if data is not None:
            check_images(data, images, model_setup.tokenizer)
    if task.reads_scores:  # now, not after hours of computing the reference's log-probs
        for data in (train_data, eval_data):
            if data is not None:
                check_scores(data)
    started, reference_started = _started(model_setup, reference_folder, train_data, log)
    # The steps follow from the number of rows that are kept, which is only known now.
    row_plan = plan_rows(config, train_data, log, global_batch_size=config.global_batch_size, seed=config.seed)
    setup = Setup(
        **vars(model_setup),
        task=task,
        reference_folder=reference_folder,
        reference_adapter=reference_adapter,
        train_data=train_data,
        eval_data=eval_data,
        started=started,
        reference_started=reference_started,
        row_plan=row_plan,
        num_steps=config.max_steps or num_steps_of(config.num_train_epochs, row_plan.steps_per_epoch),
        steps_per_epoch=row_plan.steps_per_epoch,
        sample_prompts=sample_prompts,
    )
    learning_rate_schedule(config, setup.num_steps)  # a warm-up longer than the run is refused here
    check_profiled(config.profile_steps, setup.num_steps)
    log(describe(setup))
    return setup


def _started(
    model_setup: ModelSetup, reference_folder: Path | None, data: PreparedData, log: Log
) -> tuple[StartedRows | None, StartedRows | None]:
    """Returns `started` and `reference_started` of a Setup, and logs which rows start how; skips absent weights."""
    found: list[StartedRows | None] = []
    for folder, whose in ((model_setup.model_folder, "the "), (reference_folder, "the reference model's ")):
        if folder is None or not has_weights(folder):
            found.append(None)
            continue
        tokenizer = model_setup.tokenizer
        if folder is reference_folder and (folder / "tokenizer.json").exists():
            # Its own tokens stay as they are; what the template adds to it may have been trained there.
            tokenizer = load_tokenizer(folder, chat_template=model_setup.config.chat_template)
        start = start_tokens(
            model_setup.config,
            tokenizer,
            folder,
            model_setup.source_config,
            model_setup.model.config.vocab_size,
            data,
            seed=model_setup.config.seed,
            # Only the policy's embedding would have to be trained: with a reference, untrained tokens are no error.
            adapted=model_setup.adaptation is not None and folder is model_setup.model_folder,
            whose=whose,
        )
        for line in start.lines:
            log(line)
        found.append(start.rows)
    return found[0], found[1]


def _reference_of(config: TrainConfig, model_setup: ModelSetup, *, weights: bool) -> tuple[Path | None, Path | None]:
    """Returns `reference_folder` and `reference_adapter` of a Setup."""
    sources = model_setup.sources
    if not isinstance(config, ReferenceSettings) or config.reference_model is None:
        return None, sources.adapter_folder
    folder = resolve_folder(config.reference_model, config.reference_revision, weights=weights)
    # Compared as folders: a hub name and its snapshot are one model.
    if folder.resolve() == sources.model_folder.resolve():
        return None, None  # the policy's own start, or the base of the adapter that it starts from
    if sources.adapter_folder is not None and folder.resolve() == sources.adapter_folder.resolve():
        return None, sources.adapter_folder
    if is_adapter_folder(folder):
        raise ValueError(
            f"reference_model {config.reference_model} is an adapter other than the one that training starts from, and "
            "only that one can be the reference without its base. Merge it (`jdpo export --merge`, or PEFT's "
            "merge_and_unload) and give the merged model"
        )
    _check_reference(config.reference_model, folder, model_setup)
    return folder, None


def _check_reference(name: str, folder: Path, model_setup: ModelSetup) -> None:
    """Refuses a reference of another shape or vocabulary than the policy's.

    Args:
      name: of the reference, for the message.
      folder: of the reference.
    """
    policy, policy_name = model_setup.source_config, model_setup.config.model_name_or_path
    if (found := read_model_config(folder)) != policy:
        names = [field.name for field in dataclasses.fields(policy)]
        if found.num_layers != policy.num_layers:
            names.remove("layers")  # which would repeat it layer by layer
        fields = {field: (getattr(found, field), getattr(policy, field)) for field in names}
        unlike = [f"{field} ({theirs} and {ours})" for field, (theirs, ours) in fields.items() if theirs != ours]
        raise ValueError(
            f"reference_model {name} must have the shape of {policy_name}; they differ in {', '.join(unlike)}"
        )
    if (folder / "tokenizer.json").exists():  # a reference may come without one; then there is nothing to compare
        theirs = load_tokenizer(folder, chat_template=model_setup.config.chat_template)
        if theirs.hf.get_vocab() != model_setup.tokenizer.hf.get_vocab():
            raise ValueError(
                f"reference_model {name} has another vocabulary than {policy_name}: "
                "the same ids mean other tokens there, so their log-probs cannot be compared"
            )


def describe(setup: Setup) -> str:
    """Describes the run in a few lines, which are logged before it starts."""
    config, task = setup.config, setup.task
    num_whole = num_params(abstract_params(setup.model))
    mesh = " x ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
    slices = config.mesh.slices or len(slice_sizes(list(setup.mesh.devices.flat)))
    in_slices = f", in {slices} slices" if slices > 1 else ""
    lines = [
        f"model: {setup.source_config.family}, {num_whole:,} parameters, {config.compute_dtype} compute",
        f"mesh: {mesh} over {figure(setup.mesh.size, f'{jax.default_backend()} device')}{in_slices}",
        f"run: {figure(setup.num_steps, 'step')} of {figure(config.global_batch_size, task.unit.removesuffix('s'))}, "
        f"{_cut(config)}; {figure(setup.steps_per_epoch, 'step')} per epoch",
    ]
    if setup.adaptation is not None:
        lines += setup.adaptation.describe(num_whole)
    lines += setup.tokenizer.notes
    positions = setup.source_config.max_positions
    if positions is not None and config.max_length > positions:
        lines.append(f"note: max_length {config.max_length} is beyond the {positions} positions the model was made for")
    whole = undivided_dims(setup.trained_axes, setup.trained, setup.mesh)
    if whole:
        lines.append(f"kept whole on each device, as the mesh does not divide them: {'; '.join(whole)}")
    return "\n".join(lines)


def _cut(config: MemorySettings) -> str:
    """Describes how the rows of a step are batched."""
    how = "packed" if config.packing else "padded"
    if config.micro_batch_size is not None:
        return f"{how}, at most {config.micro_batch_size} per device at once"
    if config.max_tokens_per_device is not None:
        return f"{how}, at most {config.max_tokens_per_device} tokens per device at once"
    return how
