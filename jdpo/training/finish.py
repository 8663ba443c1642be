"""The end of a run: which step's weights go out, and the folder that people take away."""

from __future__ import annotations

from typing import Any

from jdpo._version import __version__
from jdpo.checkpoint.hf_export import export_model
from jdpo.checkpoint.manager import CheckpointManager
from jdpo.config import to_dict, to_yaml
from jdpo.processes import agree_on, barrier, is_first
from jdpo.reports.model_card import model_card
from jdpo.reports.plots import write_plots
from jdpo.reports.writers import read_metrics
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup import Setup

Params = Any


def step_to_export(setup: Setup, manager: CheckpointManager) -> int:
    """The best step where the config asks for it and one was evaluated, else the last."""
    if not setup.config.load_best_model_at_end:
        return setup.num_steps
    best = agree_on(manager.best_step() if is_first() else None)
    return setup.num_steps if best is None else best


def finish_run(setup: Setup, directory: RunDirectory, params: Params, exported: int) -> None:
    """Exports the weights of a step, draws the plots and says that the run is complete."""
    config = setup.config
    lines = read_metrics(directory.metrics)
    results = _results(lines, exported)
    export_model(
        params,
        setup.model.config,
        directory.model,
        source_folder=setup.model_folder,
        tokenizer=setup.tokenizer.hf,
        end_token_ids=setup.tokenizer.end_token_ids,
        export_dtype=config.export_dtype,
        max_shard_size=config.max_shard_size,
        model_card=model_card(
            command=setup.task.command,
            config=to_dict(config),
            results=results,
            rows=setup.train_data.summary(),
            version=__version__,
            config_yaml=to_yaml(config),
        ),
    )
    if is_first():
        write_plots(lines, directory.plots, title=f"jdpo {setup.task.command}: {config.model_name_or_path}")
    barrier("exported")
    directory.finish({**results, "step": setup.num_steps, "exported_step": exported})


def _results(lines: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The values of the last training and evaluation lines up to a step."""
    results: dict[str, Any] = {}
    for line in lines:
        if line["step"] <= step:
            results.update(line)
    return results
