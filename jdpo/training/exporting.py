"""A checkpoint of a run -> a Hugging Face model folder, whether the run has ended or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from jdpo._version import __version__
from jdpo.checkpoint.folders import check_out
from jdpo.checkpoint.hf_export import export_model
from jdpo.checkpoint.manager import complete_steps, fault_of, restore_params
from jdpo.config import DPOConfig, SFTConfig, TrainConfig, load_config, to_dict, to_yaml
from jdpo.data.tokenizer import load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.hub import resolve_folder
from jdpo.models.transformer import abstract_params
from jdpo.reports.model_card import model_card
from jdpo.reports.writers import read_metrics
from jdpo.training.finish import results_at
from jdpo.training.setup import make_model, numerics, resolve_dtype

CONFIGS: dict[str, type[TrainConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}


class Checkpoint(NamedTuple):
    """One step of a run.

    Attributes:
      run: the run's folder.
      step: updates made.
    """

    run: Path
    step: int

    @property
    def folder(self) -> Path:
        return self.run / "checkpoints" / str(self.step)


def find_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint that a path means.

    Args:
      path: a run's folder, or the folder of one of its steps.
      step: which one of a run; None: its newest.

    Raises:
      ValueError: neither is there, or no such step.
    """
    path = path.expanduser().absolute()
    if path.parent.name == "checkpoints" and path.name.isdigit() and (path.parents[1] / "run.json").is_file():
        if step not in (None, int(path.name)):
            raise ValueError(f"{path} is step {path.name}; leave --step out, or name the folder of the run")
        path, step = path.parents[1], int(path.name)
    if not (path / "run.json").is_file():
        raise ValueError(
            f"{path} is no checkpoint: expected the output_dir of a run, or a folder checkpoints/STEP in one"
        )
    steps = complete_steps(path / "checkpoints")
    if not steps:
        raise ValueError(f"{path} holds no whole checkpoint yet")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise ValueError(f"{path} has no whole checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return Checkpoint(path, step)


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    export_dtype: str | None = None,
    max_shard_size: str | None = None,
    say: Callable[[str], None],
) -> None:
    """Writes the model of a checkpoint as the run itself would at its end; the run's folder is only read.

    Args:
      export_dtype, max_shard_size: None: as the run's config says.
      say: takes lines for the person who asked.

    Raises:
      ValueError: a file of the checkpoint is not what was written, the model that the run started from is not there
        any more, or whatever `export_model` refuses.
    """
    check_out(out)
    if (fault := fault_of(checkpoint.folder)) is not None:
        raise ValueError(
            f"checkpoint {checkpoint.folder} is damaged: {fault}; bring the file back, or take another step"
        )
    state = json.loads((checkpoint.run / "run.json").read_text(encoding="utf-8"))
    given = {"export_dtype": export_dtype, "max_shard_size": max_shard_size}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    saved = checkpoint.run / "resolved_config.yaml"
    config = resolve_dtype(load_config(CONFIGS[state["command"]], saved, overrides))
    model_folder = resolve_folder(config.model_name_or_path, config.model_revision)
    tokenizer = load_tokenizer(model_folder, chat_template=config.chat_template)
    model = make_model(config, read_model_config(model_folder), tokenizer)
    say(f"exporting step {checkpoint.step} of {checkpoint.run} to {out}")
    with numerics(config):
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        params = restore_params(
            checkpoint.folder,
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract_params(model)
            ),
        )
        export_model(
            params,
            model.config,
            out,
            source_folder=model_folder,
            tokenizer=tokenizer.hf,
            end_token_ids=tokenizer.end_token_ids,
            export_dtype=config.export_dtype,
            max_shard_size=config.max_shard_size,
            model_card=_card(checkpoint, state, config),
        )


def _card(checkpoint: Checkpoint, state: dict[str, Any], config: TrainConfig) -> str:
    metrics = checkpoint.run / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    return model_card(
        command=state["command"],
        config=to_dict(config),
        results=results_at(lines, checkpoint.step),
        rows=state.get("rows") or "The run did not write down what its rows were.",
        version=__version__,
        config_yaml=to_yaml(config),
    )
