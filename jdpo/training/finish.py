"""The end of a run: the weights of one step are exported, and the run is marked finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jdpo._version import __version__
from jdpo.checkpoint.export_plan import export_dtypes
from jdpo.checkpoint.hf_export import export_model
from jdpo.checkpoint.hub_push import push_folder
from jdpo.checkpoint.manager import CheckpointManager
from jdpo.checkpoint.peft_export import export_adapter
from jdpo.config import ReferenceSettings, to_public_dict, to_public_yaml, without_queries
from jdpo.data.sources import is_on_hub
from jdpo.models.lora.base_weights import Base
from jdpo.models.lora.merge import merge
from jdpo.models.weights.hf_names import layout_of
from jdpo.processes import agree_on, is_first, run_jointly
from jdpo.reports.cards.model_card import CODE_ENDS, CardFacts, model_card
from jdpo.reports.findings import Finding, Status, finding_lines
from jdpo.reports.metrics_file import read_metrics
from jdpo.reports.plots import write_plots
from jdpo.training.logs.facts_of_run import assess
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup.model_setup import ModelSetup
from jdpo.training.setup.run_setup import Setup
from jdpo.words import figure

Params = Any


class Outcome(NamedTuple):
    """The part of a run that its model card describes.

    Attributes:
      command: sft or dpo.
      rows: summary of the training rows.
      results: last values of all metrics.
      sentences: the verdict.
      findings: what its figures show.
      data: content of data.json.
    """

    command: str
    rows: str = ""
    results: Mapping[str, Any] = {}
    sentences: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    data: Mapping[str, Any] | None = None


def step_to_export(setup: Setup, manager: CheckpointManager) -> int:
    """Returns the best step if the config asks for it and there is one, else the last."""
    if not setup.config.load_best_model_at_end:
        return setup.num_steps
    # Agreed on, since every process must restore the same checkpoint.
    best = agree_on(manager.best_step)
    return setup.num_steps if best is None else best


def finish_run(
    setup: Setup,
    directory: RunDirectory,
    params: Params,
    base: Base | None,
    exported: int,
    log: Callable[[str], None],
) -> None:
    """Exports the weights of a step, draws the plots, uploads the model if asked to, and marks the run finished."""
    config = setup.config
    lines = read_metrics(directory.metrics)
    outcome = outcome_at(exported, lines, directory.path, setup.task.command, setup.train_data.summary(), "finished")
    if not config.export_at_end:
        directory.finish({**outcome.results, "step": setup.num_steps})
        return
    log(f"exporting the model of step {exported} to {directory.model}")
    export_trained(setup, params, base, directory.model, outcome, kept=[directory.checkpoints])

    def draw() -> None:
        write_plots(
            lines, directory.plots, title=f"jdpo {setup.task.command}: {without_queries(config.model_name_or_path)}"
        )

    # After the model, which matters most if a disk is full.
    run_jointly(draw, on_first=True)
    run_jointly(lambda: _push(setup, directory, exported, log), on_first=True)
    # Last, so that a run that was killed before is exported again.
    directory.finish({**outcome.results, "step": setup.num_steps, "exported_step": exported})


def outcome_at(
    step: int, lines: list[dict[str, Any]], run: Path, command: str, rows: str, status: Status | None = None
) -> Outcome:
    """Returns what came of a run up to one of its steps.

    Args:
      lines: of its metrics.jsonl.
      run: its folder.
      status: None: as its files have it, which do not call a run finished before its model is exported.
    """
    bare = Outcome(command, rows, results_at(lines, step))
    if not is_first():  # which alone writes the card, and may be the only one that sees the folder
        return bare
    until = [line for line in lines if line["step"] <= step]
    try:
        last = max((line["step"] for line in lines), default=0)
        facts, findings, sentences = assess(run, status, step=last, lines=until, exported_step=step)
    except ValueError:  # of an older version or another program
        return bare
    sentences = [f"This is the model after {step:,} of {figure(facts.num_steps, 'step')}.", *sentences[1:]]
    return bare._replace(sentences=sentences, findings=findings, data=facts.data)


def log_findings(directory: RunDirectory, status: Status, step: int, log: Callable[[str], None]) -> None:
    """Logs what came of a run that has ended, and what its figures show, in a few lines."""
    if not is_first() or step == 0:
        return
    try:
        _, findings, sentences = assess(directory.path, status, step=step, lines=read_metrics(directory.metrics))
    except ValueError as error:  # a file that someone changed meanwhile: no reason to fail
        log(f"note: no verdict on this run: {error}")
        return
    # How far the run came is told by the lines around these, and what to think of it by the findings.
    _, *reached, judgement = sentences
    if all(finding.level == "note" for finding in findings):
        reached.append(judgement)
    log("\n".join([*reached, *finding_lines(findings)]))


def _push(setup: Setup, directory: RunDirectory, exported: int, log: Callable[[str], None]) -> None:
    config = setup.config
    if config.push_to_hub is not None:
        message = f"Step {exported} of jdpo {setup.task.command}"
        log(f"pushed to {push_folder(directory.model, config.push_to_hub, public=config.push_public, message=message)}")


def export_trained(
    setup: ModelSetup,
    params: Params,
    base: Base | None,
    out: Path,
    outcome: Outcome,
    *,
    merge_adapters: bool | None = None,
    kept: Sequence[Path] = (),
) -> None:
    """Writes what was trained to `out`: a model, or adapters.

    Args:
      params: all weights, or adapters.
      base: the weights under adapters, which are freed as the adapters are merged into them; None where they are not.
      outcome: of the run, for README.md.
      merge_adapters: True exports the base with the adapters added, False the adapters alone; None: see `lora.merge`.
      kept: folders that `out` must not touch, in addition to `source_folders`.
    """
    config, adaptation = setup.config, setup.adaptation
    if merge_adapters is None:
        merge_adapters = setup.exports_merged
    alone = adaptation is not None and not merge_adapters
    card = model_card(
        CardFacts(
            command=outcome.command,
            config=to_public_dict(config),
            config_yaml=to_public_yaml(config, escaped=CODE_ENDS),
            version=__version__,
            base=setup.model_name,
            is_adapter=alone,
            dequantized=setup.dequantized,
            has_chat_template=setup.tokenizer.has_chat_template,
            rows=outcome.rows,
            data=outcome.data,
            hub_datasets=[one.path for one in config.datasets if is_on_hub(one.path)],
            results=outcome.results,
            verdict=outcome.sentences,
            findings=outcome.findings,
        )
    )
    if adaptation is not None and alone:
        export_adapter(
            params,
            adaptation.lora,
            out,
            sites=adaptation.sites,
            base_name=setup.base_to_find,
            base_revision=setup.sources.revision,
            is_part=layout_of(setup.model.config).is_part,
            tokenizer=setup.tokenizer.hf,
            tokenizer_folder=setup.sources.tokenizer_folder,
            model_card=card,
            kept=(*source_folders(setup), *kept),
        )
        return
    if adaptation is not None:
        assert base is not None
        params = merged_params(setup, params, base)
    export_model(
        params,
        setup.model.config,
        out,
        source_folder=setup.model_folder,
        tokenizer=setup.tokenizer.hf,
        tokenizer_folder=setup.sources.tokenizer_folder,
        end_token_ids=setup.tokenizer.end_token_ids,
        export_dtype=config.export_dtype,
        max_shard_size=config.max_shard_size,
        model_card=card,
        kept=(*source_folders(setup), *kept),
    )


def source_folders(setup: ModelSetup) -> list[Path]:
    """Returns the folders of the models that a run reads, which an export must not touch."""
    folders = [setup.model_folder, setup.sources.tokenizer_folder, setup.sources.adapter_folder]
    if isinstance(setup.config, ReferenceSettings) and setup.config.reference_model is not None:
        folders.append(Path(setup.config.reference_model).expanduser())  # or a hub name
    return [folder for folder in folders if folder is not None and folder.is_dir()]


def merged_params(setup: ModelSetup, adapters: Params, base: Base) -> Params:
    """Adds the adapters to the kernels of the base, as the model computes with them; the base is freed.

    The result is in float32; it is in bfloat16 if base and export are, so that it takes no more memory than the base.
    """
    adaptation, export_dtype = setup.adaptation, setup.config.export_dtype
    assert adaptation is not None
    # Products of adapters are added in float32: bfloat16 would round away most of a small update.
    rest = adaptation.base_dtype.rest
    dtype = jnp.promote_types(rest, jnp.float32)
    if rest == jnp.bfloat16:
        exported = export_dtypes(setup.model.config, setup.model_folder, export_dtype)
        dtype = rest if set(exported) == {rest} else dtype
    lora, sites, shardings = adaptation.lora, adaptation.sites, setup.whole_shardings
    return merge(lora, base, adapters, sites=sites, dtype=dtype, shardings=shardings, gives_up=True)


def results_at(lines: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """Returns the values of the last training and evaluation lines up to a step."""
    results: dict[str, Any] = {}
    for line in lines:
        # An evaluation before the first step is no result of training.
        if 0 < line["step"] <= step:
            results.update(line)
    return results
