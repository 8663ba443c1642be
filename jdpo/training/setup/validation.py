"""Settings that do not go together, refused before anything is read or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdpo.config import DPOConfig, TrainConfig, defaults_of
from jdpo.data.batching.mixing import check_data_settings, has_evaluation
from jdpo.models.attention import check_attention
from jdpo.models.model_config import ModelConfig
from jdpo.models.self_attention import AttentionSettings
from jdpo.reports.writers import check_trackers
from jdpo.sharding.placement import check_host_memory
from jdpo.training.profile import parse_steps
from jdpo.training.step.tasks import Task
from jdpo.words import figure

Mode = Literal["live", "cached", "none"]
"""Where a run's reference log-probs come from: a frozen model in the step, the cache, or nowhere."""
Asked = Literal["auto", "live", "cached", "none"]


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
    check_data_settings(config)
    if config.eval_steps is not None and not has_evaluation(config):
        raise ValueError(
            f"eval_steps {config.eval_steps} needs eval_datasets or eval_fraction: there is nothing to evaluate on"
        )
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
    if not has_evaluation(config) or config.eval_steps is None:
        raise ValueError(
            "load_best_model_at_end needs eval_datasets and eval_steps: without them no step is the best "
            "(eval_fraction may stand for eval_datasets)"
        )
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


def check_profiled(config: TrainConfig, num_steps: int) -> None:
    """Refuses a trace of steps that never come.

    Raises:
      ValueError: naming both numbers.
    """
    steps = parse_steps(config.profile_steps)
    if steps is not None and steps[0] > num_steps:
        raise ValueError(
            f"profile_steps {config.profile_steps} starts after the last step (the run has {figure(num_steps, 'step')})"
        )


def check_offload(config: TrainConfig) -> None:
    """Refuses what is to wait in the host's memory where devices do not reach it.

    Raises:
      ValueError: naming the setting and what the device has.
    """
    device = jax.local_devices()[0]
    if config.remat == "offload":
        check_host_memory(device, "remat: offload", "Set remat to full")
    if config.offload_optimizer:
        check_host_memory(
            device,
            "offload_optimizer",
            "Set it to false; optimizer.name adamw_bf16 or adafactor take less memory",
        )


def check_expert_settings(config: TrainConfig, source_config: ModelConfig, mesh: Mesh) -> None:
    """Refuses settings of experts for a model without, and an expert axis that does not divide them.

    Raises:
      ValueError: naming the key.
    """
    moe, family = source_config.moe, source_config.family
    if moe is None:
        if config.router_aux_loss_coef is not None:
            raise ValueError(
                f"router_aux_loss_coef {config.router_aux_loss_coef}: this {family} model has no router; leave it out"
            )
        if mesh.shape["expert"] > 1:
            raise ValueError(
                f"mesh.expert {mesh.shape['expert']}: this {family} model has no experts to split; use mesh.fsdp"
            )
    elif moe.num_experts % mesh.shape["expert"]:
        raise ValueError(
            f"mesh.expert {mesh.shape['expert']} does not divide the {moe.num_experts} experts of this {family} model"
        )


def check_attention_settings(config: TrainConfig, source_config: ModelConfig) -> None:
    """Refuses an attention backend, and tiles of it, that cannot run this model here.

    Raises:
      ValueError: naming the key and what the backend takes.
    """
    defaults = defaults_of(TrainConfig)
    keys = ("attention", "attention_block_q", "attention_block_kv")
    asked = {key: getattr(config, key) for key in keys if getattr(config, key) != defaults[key]}
    if asked and not config.packing:
        key, value = next(iter(asked.items()))
        raise ValueError(f"{key} {value!r} is for packed rows; set packing to true, or leave it out")
    blocks: dict[str, Any] = {"block_q": config.attention_block_q, "block_kv": config.attention_block_kv}
    dtype, head_dim, platform = jnp.dtype(config.compute_dtype), source_config.head_dim, jax.default_backend()
    for window in sorted(set(source_config.layer_windows), key=str) if asked else ():
        backend = AttentionSettings(config.attention, **blocks).resolve(dtype, source_config, config.max_length, window)
        try:
            check_attention(
                backend,
                dtype=dtype,
                head_dim=head_dim,
                softcap=source_config.attention_softcap,
                window=window,
                platform=platform,
                **blocks,
            )
        except ValueError as error:
            chosen = f" (attention: auto takes {backend} here)" if config.attention == "auto" else ""
            raise ValueError(f"{error}{chosen}") from None
