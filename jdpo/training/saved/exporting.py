"""Exports a checkpoint of a run as a Hugging Face model folder, whether the run has ended or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from jdpo.checkpoint.hf_export import parse_size
from jdpo.checkpoint.output_folders import check_out
from jdpo.models.lora.targets import require_loadable
from jdpo.models.weights import mxfp4
from jdpo.reports.metrics_file import read_metrics
from jdpo.training.finish import export_trained, outcome_at, source_folders
from jdpo.training.saved.saved_runs import Checkpoint, opened, restore_trained
from jdpo.training.setup.weight_placement import load_base


def export_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    export_dtype: str | None = None,
    max_shard_size: str | None = None,
    merge_adapters: bool | None = None,
    log: Callable[[str], None],
) -> None:
    """Writes the model, or the adapters, of a checkpoint as the run itself would at its end; the run is only read.

    Args:
      export_dtype, max_shard_size: None: as the run's config says.
      merge_adapters: see `export_trained`.
      log: takes lines for the user.

    Raises:
      ValueError: a file of the checkpoint is damaged, the model that the run started from is gone, or the export is
        refused.
    """
    # Before anything is read: a wrong `out` should cost no minutes.
    check_out(out, [checkpoint.run / "checkpoints"])
    out = out.expanduser().absolute()
    given = {"export_dtype": export_dtype, "max_shard_size": max_shard_size}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    metrics = checkpoint.run / "metrics.jsonl"
    with opened(checkpoint, overrides) as (record, setup):
        parse_size(setup.config.max_shard_size)
        merging = setup.exports_merged if merge_adapters is None else merge_adapters
        if setup.adaptation is None:
            _refuse_merging(checkpoint, merge_adapters)
        elif not merging:
            _refuse_layout(given)
            require_loadable(setup.adaptation.sites, setup.adaptation.lora.sites)
        # Again, now that the model's folders are known.
        check_out(out, source_folders(setup))
        log(f"exporting step {checkpoint.step} of {checkpoint.run} to {out}")
        if (merging or setup.adaptation is None) and setup.dequantized:
            log(mxfp4.note(setup.model_folder))
        lines = read_metrics(metrics)
        if not any(line["step"] <= checkpoint.step for line in lines):
            log(f"note: {metrics} has no line up to step {checkpoint.step}, so the model card has no results")
        export_trained(
            setup,
            restore_trained(checkpoint, setup),
            load_base(setup) if merging else None,
            out,
            outcome_at(
                checkpoint.step,
                lines,
                checkpoint.run,
                record.command,
                record.rows or "The run did not record its rows.",
            ),
            merge_adapters=merging,
            kept=[checkpoint.run / "checkpoints"],
        )


def _refuse_merging(checkpoint: Checkpoint, asked: bool | None) -> None:
    if asked is not None:
        flag = "--merge" if asked else "--no-merge"
        raise ValueError(f"{flag}: {checkpoint.folder} holds all weights, not adapters")


def _refuse_layout(given: Mapping[str, str | None]) -> None:
    flags = [f"--{key.removeprefix('export_')}" for key, value in given.items() if value is not None]
    if flags:
        raise ValueError(
            f"no effect of {' and '.join(flags)}: adapters alone are exported as they were trained, in one file; "
            "leave it out, or give --merge"
        )
