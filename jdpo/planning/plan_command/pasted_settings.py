"""The settings that a plan has chosen, as YAML to paste into a config."""

from __future__ import annotations

from typing import Any

from jdpo.config import OptimizerConfig, to_dict
from jdpo.config.key_specs import as_yaml
from jdpo.planning.target_plan import TargetPlan


def pasted_settings(plan: TargetPlan, optimizer: OptimizerConfig, rows_per_device: int | None) -> str:
    """Returns mesh, max_tokens_per_device, remat and optimizer of a plan as YAML, one line per key.

    Args:
      optimizer: that of the config.
      rows_per_device: `micro_batch_size` of the config.
    """
    values: dict[str, Any] = {"mesh": dict(plan.mesh)}
    # A config with rows per device has no need for tokens per device, and refuses both.
    if rows_per_device is None:
        values["max_tokens_per_device"] = plan.max_tokens_per_device
    values |= {"remat": plan.remat, "optimizer": _optimizer(optimizer, plan.optimizer)}
    return "\n".join(f"{key}: {as_yaml(value)}" for key, value in values.items())


def _optimizer(asked: OptimizerConfig, name: str) -> str | dict[str, Any]:
    """Returns the optimizer with what the config changes of it; another one than asked for by its name alone."""
    if name != asked.name:
        return name
    usual = to_dict(OptimizerConfig())
    changed = {key: value for key, value in to_dict(asked).items() if key != "name" and value != usual[key]}
    return {"name": name, **changed} if changed else name
