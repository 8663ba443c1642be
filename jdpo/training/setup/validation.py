"""Checks that settings fit each other, before anything is read or trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdpo.config import LoggingSettings, MemorySettings, ModelSettings, ReferenceSettings, defaults_of
from jdpo.devices import target
from jdpo.models.attention import check_attention
from jdpo.models.model_config import ModelConfig
from jdpo.models.self_attention import AttentionSettings
from jdpo.reports.trackers.tracker_registry import check_trackers
from jdpo.sharding.placement import check_host_memory
from jdpo.training.setup.tasks import Task
from jdpo.words import figure

Mode = Literal["live", "cached", "none"]
"""The source of the reference's log-probs: a frozen model in the step, the cache, or none."""
Asked = Literal["auto", "live", "cached", "none"]


def check_revisions(model: ModelSettings, reference: ReferenceSettings | None) -> None:
    """Refuses hub revisions of local folders, and a revision of a reference model that is not named.

    Raises:
      ValueError: naming the key.
    """
    revisions = [(model.model_name_or_path, model.model_revision, "model_revision")]
    if reference is not None:
        if reference.reference_revision is not None and reference.reference_model is None:
            raise ValueError("reference_revision needs reference_model: without it the reference is the policy's start")
        revisions.append((reference.reference_model or "", reference.reference_revision, "reference_revision"))
    for name, revision, key in revisions:
        if revision is not None and Path(name).expanduser().is_dir():
            raise ValueError(f"{key} {revision!r} is for hub names; {name} is a local folder, which has no revisions")


def check_logging(logging: LoggingSettings, task: Task, *, evaluates: bool) -> None:
    """Refuses settings that would be ignored, and those under which there is no best checkpoint to keep or export.

    Args:
      evaluates: True if there are evaluation rows.

    Raises:
      ValueError: naming the setting and what it needs.
    """
    if logging.eval_steps is not None and not evaluates:
        raise ValueError(
            f"eval_steps {logging.eval_steps} needs eval_datasets or eval_fraction: there is nothing to evaluate on"
        )
    _check_run_names(logging)
    check_trackers(logging.report_to)
    # Called for its error alone.
    profiled_steps(logging.profile_steps)
    known = [f"eval_{name}" for name in task.metrics]
    if logging.metric_for_best_model not in known:
        raise ValueError(
            f"unknown metric_for_best_model {logging.metric_for_best_model!r}; "
            f"`jdpo {task.command}` has {', '.join(known)}"
        )
    if not logging.load_best_model_at_end:
        return
    if not evaluates or logging.eval_steps is None:
        raise ValueError(
            "load_best_model_at_end needs eval_datasets and eval_steps: without them no step is the best "
            "(or eval_fraction instead of eval_datasets)"
        )
    # A checkpoint without an evaluation could be the best one, and nobody would know.
    if logging.save_steps % logging.eval_steps:
        raise ValueError(
            f"load_best_model_at_end needs an evaluation at every checkpoint: save_steps {logging.save_steps} is not a "
            f"multiple of eval_steps {logging.eval_steps}"
        )


def _check_run_names(logging: LoggingSettings) -> None:
    if logging.report_to:
        return
    for key in ("run_name", "run_project", "run_group", "run_tags"):
        if value := getattr(logging, key):
            raise ValueError(f"{key} {value!r} has no effect: report_to names no tracker")


def check_reference(reference: ReferenceSettings, *, loss_type: Sequence[str], needs_reference: bool) -> None:
    """Refuses reference settings that the loss does not use, or that contradict each other.

    Args:
      loss_type: the losses, for the message.
      needs_reference: True if one of them compares with a reference.

    Raises:
      ValueError: naming the setting.
    """
    losses = " + ".join(loss_type)
    if not needs_reference and reference.reference_model is not None:
        raise ValueError(
            f"reference_model {reference.reference_model} has no effect: loss_type {losses} uses no reference"
        )
    # Called for its errors alone: the mode is chosen later.
    fixed_mode(reference.reference, needs_reference=needs_reference, sync_ref_model=reference.sync_ref_model)
    if reference.sync_ref_model and not needs_reference:
        raise ValueError(f"sync_ref_model has no effect: loss_type {losses} uses no reference")
    if not reference.sync_ref_model:
        defaults = defaults_of(ReferenceSettings)
        # Keys without effect are refused, so that nobody relies on them.
        for key in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if (value := getattr(reference, key)) != defaults[key]:
                raise ValueError(f"{key} {value} needs sync_ref_model: true; without it the reference does not move")


def fixed_mode(asked: Asked, *, needs_reference: bool, sync_ref_model: bool) -> Mode | None:
    """Returns the mode if it does not depend on what is cached, else None.

    Raises:
      ValueError: `asked` does not fit the loss or the other settings.
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


def profiled_steps(profile_steps: str | None) -> tuple[int, int] | None:
    """Returns the first and the last step that `profile_steps` asks to trace.

    Raises:
      ValueError: it is not of the form FIRST:LAST.

    >>> profiled_steps("10:13")
    (10, 13)
    """
    if profile_steps is None:
        return None
    first, colon, last = profile_steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"profile_steps: expected FIRST:LAST, steps counted from 1, such as 10:13; found {profile_steps!r}"
        )
    return int(first), int(last)


def check_profiled(profile_steps: str | None, num_steps: int) -> None:
    """Refuses a profile of steps after the end of the run.

    Raises:
      ValueError: naming both numbers.
    """
    steps = profiled_steps(profile_steps)
    if steps is not None and steps[0] > num_steps:
        raise ValueError(
            f"profile_steps {profile_steps} starts after the last step (the run has {figure(num_steps, 'step')})"
        )


def check_offload(*, remat: str, offload_optimizer: bool) -> None:
    """Refuses offloading to host memory that the devices cannot access.

    Raises:
      ValueError: naming the setting and what the device has.
    """
    device = jax.local_devices()[0]
    if remat == "offload":
        check_host_memory(device, "remat: offload", "Set remat to full")
    if offload_optimizer:
        check_host_memory(
            device,
            "offload_optimizer",
            "Set it to false; optimizer.name adamw_bf16 or adafactor take less memory",
        )


def check_expert_settings(router_aux_loss_coef: float | None, source_config: ModelConfig, mesh: Mesh) -> None:
    """Refuses settings for experts if the model has none, and an expert axis that does not divide their number.

    Raises:
      ValueError: naming the key.
    """
    moe, family = source_config.moe, source_config.family
    if moe is None:
        if router_aux_loss_coef is not None:
            raise ValueError(
                f"router_aux_loss_coef {router_aux_loss_coef}: this {family} model has no router; leave it out"
            )
        if mesh.shape["expert"] > 1:
            raise ValueError(
                f"mesh.expert {mesh.shape['expert']}: this {family} model has no experts to split; use mesh.fsdp"
            )
    # Experts are whole: an axis that does not divide them would split one.
    elif moe.num_experts % mesh.shape["expert"]:
        raise ValueError(
            f"mesh.expert {mesh.shape['expert']} does not divide the {moe.num_experts} experts of this {family} model"
        )


def check_attention_settings(memory: MemorySettings, source_config: ModelConfig, *, max_length: int) -> None:
    """Refuses an attention backend, and tile sizes, that cannot run this model on this platform.

    Raises:
      ValueError: naming the key and what the backend takes.
    """
    defaults = defaults_of(MemorySettings)
    keys = ("attention", "attention_block_q", "attention_block_kv")
    # Only keys that were set: left alone, they choose a backend that runs.
    asked = {key: getattr(memory, key) for key in keys if getattr(memory, key) != defaults[key]}
    if asked and not memory.packing:
        key, value = next(iter(asked.items()))
        raise ValueError(f"{key} {value!r} is for packed rows; set packing to true, or leave it out")
    blocks: dict[str, Any] = {"block_q": memory.attention_block_q, "block_kv": memory.attention_block_kv}
    dtype, head_dim, platform = jnp.dtype(memory.compute_dtype), source_config.head_dim, target().platform
    # Every kind of layer must run: Gemma has some with a sliding window and some without.
    for window in sorted(set(source_config.layer_windows), key=str) if asked else ():
        backend = AttentionSettings(memory.attention, **blocks).resolve(dtype, source_config, max_length, window)
        try:
            check_attention(
                backend,
                dtype=dtype,
                head_dim=head_dim,
                softcap=source_config.attention_softcap,
                window=window,
                sinks=source_config.attention_sinks,
                platform=platform,
                **blocks,
            )
        except ValueError as error:
            chosen = f" (attention: auto takes {backend} here)" if memory.attention == "auto" else ""
            raise ValueError(f"{error}{chosen}") from None
