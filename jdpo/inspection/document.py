"""Reports on what a run would train on as one JSON document; docs/data.md lists its keys.

Rows are read and ordered by the functions that a run itself uses. Terminal and page show only what the document holds.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial

from jdpo._version import __version__
from jdpo.config import DatasetConfig, PreferenceSettings, TrainConfig, without_queries
from jdpo.data.batching.loader import RowPlan
from jdpo.data.batching.mixing import check_data_settings
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.schemas import formats
from jdpo.data.sources import open_source
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.inspection.data_faults import findings_of
from jdpo.inspection.token_display import view_row
from jdpo.models.families import read_model_config
from jdpo.models.weights.hub_models import has_weights
from jdpo.reports.data_summary.part_report import part_report
from jdpo.reports.data_summary.raw_text import TextFacts, text_facts
from jdpo.reports.data_summary.row_statistics import Json, RowFacts, row_facts, step_costs
from jdpo.reports.data_summary.run_data import leakage, made_safe
from jdpo.reports.progress import RowCounter
from jdpo.training.setup.model_sources import Sources, check_positions, find_sources
from jdpo.training.setup.row_order import num_steps_of, plan_rows, preparation_of, sides_of
from jdpo.training.setup.untrained import find_untrained, refuse_added_tokens

DOCUMENT_VERSION = 1
"""Raise this when a key changes its meaning or is removed."""

MOST_STEPS = 2000
"""The cost of padding and packing is counted over at most this many steps of the first epoch."""

TOKENS_PER_DEVICE = 16384
"""The length of a packed row in the prediction if the config does not set max_tokens_per_device."""


def inspect_run(
    config: TrainConfig,
    *,
    chosen_by: str,
    log: Callable[[str], None],
    num_rows: int = 0,
    tokenizer_name: str | None = None,
) -> Json:
    """Prepares the rows of a run, through the same cache as training, and returns the whole report on them.

    Reads the tokenizer, config.json and, if present, the embedding of the model; uses no accelerator and does not write
    to output_dir.

    Args:
      chosen_by: why the config is that of `jdpo dpo` or `jdpo sft`, in words.
      log: receives progress messages.
      num_rows: number of rows to show token by token, in the order of the steps.
      tokenizer_name: name of the tokenizer if the config names a folder of that alone; None: it names a model.

    Raises:
      ValueError: settings contradict each other, there is no tokenizer, or rows cannot be read.
    """
    pairs = isinstance(config, PreferenceSettings)
    # As in training, before anything is read, so that both refuse the same configs.
    check_data_settings(config, pairs=pairs)
    sources = find_sources(config, weights=False)
    template, kwargs = config.chat_template, config.chat_template_kwargs
    tokenizer = load_tokenizer(sources.tokenizer_folder, chat_template=template, chat_template_kwargs=kwargs)
    read = preparation_of(config, pairs=pairs)
    measure = partial(row_facts, tokenizer=tokenizer, max_length=config.max_length)
    training, evaluation = sides_of(config)
    data = read(training[0], tokenizer, part=training[1]).load(RowCounter(log))
    texts = [_text_facts(config, dataset, tokenizer, log) for dataset in training[0]]
    facts, model = measure(data), _model(config, None if tokenizer_name else sources, tokenizer, data)
    # Nothing is logged: the document describes the epoch.
    plan = plan_rows(config, data, lambda line: None, global_batch_size=config.global_batch_size, seed=config.seed)
    # Lazily: only as many steps are planned as rows are shown.
    order = itertools.chain.from_iterable(plan.step(step).tolist() for step in range(plan.steps_per_epoch))
    names = ("max_length", "max_prompt_length", "global_batch_size", "packing", "seed")
    settings = {name: getattr(config, name) for name in names}
    document: Json = {
        "jdpo": __version__,
        "version": DOCUMENT_VERSION,
        "command": "dpo" if pairs else "sft",
        "command_chosen_by": chosen_by,
        "config": {"model_name_or_path": tokenizer_name or without_queries(config.model_name_or_path), **settings},
        "model": model,
        "train": part_report(data, facts, texts, model["max_positions"]),
        "eval": None,
        "leakage": None,
        "steps": _steps(config, data, facts, plan),
        "rows": [view_row(data[index], index, tokenizer) for index in itertools.islice(order, num_rows)],
    }
    if evaluation is not None:
        held_out = read(evaluation[0], tokenizer, part=evaluation[1]).load(RowCounter(log))
        # With eval_fraction both parts come from the same files, whose texts are checked once.
        texts = [_text_facts(config, one, tokenizer, log) for one in evaluation[0] if not config.eval_fraction]
        document["eval"] = part_report(held_out, measure(held_out), texts, model["max_positions"])
        document["leakage"] = leakage(data, held_out)
    document["findings"] = findings_of(document)
    # Last, so that the findings, which quote the data, are made safe as well.
    clean: Json = made_safe(document)
    return clean


def _text_facts(
    config: TrainConfig, dataset: DatasetConfig, tokenizer: Tokenizer, log: Callable[[str], None]
) -> TextFacts:
    supervised = not isinstance(config, PreferenceSettings)
    read: Callable[..., Sequence[object]] = formats.completion_rows if supervised else formats.preference_rows
    every_turn = not supervised and config.loss_on == "assistant_turns"
    reading = formats.reading_of(dataset, every_turn=every_turn)
    return text_facts(
        open_source(dataset).rows(),
        partial(read, reading=reading),  # type: ignore[arg-type]
        partial(formats.schema_name, reading=reading, supervised=supervised),
        tokenizer.special_text,
        RowCounter(log, doing="looking at texts"),
    )


def _model(config: TrainConfig, sources: Sources | None, tokenizer: Tokenizer, data: PreparedData) -> Json:
    """Describes the model, whose `sources` are None where the tokenizer alone is known."""
    found = problem = untrained = None
    # Adapters leave the embedding as it is, so nothing is started there.
    adapted = bool(config.lora) or (sources is not None and sources.adapter_folder is not None)
    try:
        if sources is not None:
            found = read_model_config(sources.model_folder)
            check_positions(found, max_length=config.max_length, name=config.model_name_or_path)
        if adapted:
            refuse_added_tokens(tokenizer)
        if sources is not None and found is not None and has_weights(sources.model_folder):
            with contextlib.suppress(ValueError):  # weights that cannot be read are for the run to report
                tokens = find_untrained(sources.model_folder, found, tokenizer, data)
                untrained = [{"id": t.id, "token": t.token, "rows": t.num_rows, "first": t.first} for t in tokens]
    except ValueError as error:
        problem = str(error)
    return {
        "max_positions": found and found.max_positions,
        "vocab_size": found and found.vocab_size,
        "problem": problem,
        "tokenizer_size": tokenizer.size,
        "added_tokens": tokenizer.added_tokens,
        "untrained_tokens": untrained,
        "starts_untrained_tokens": config.init_untrained_tokens and not adapted and problem is None,
        "bos": None if tokenizer.bos_token_id is None else str(tokenizer.hf.bos_token),
        "end_tokens": [str(tokenizer.hf.convert_ids_to_tokens(index)) for index in tokenizer.end_token_ids],
        "has_chat_template": tokenizer.has_chat_template,
        "chat_template_kwargs": tokenizer.probe.renderer.kwargs,
        "notes": tokenizer.notes,
        "warnings": tokenizer.warnings,
    }


def _steps(config: TrainConfig, data: PreparedData, facts: RowFacts, plan: RowPlan) -> Json:
    costs = step_costs(
        data.sizes(),
        facts.sequence_tokens,
        [plan.step(step) for step in range(min(plan.steps_per_epoch, MOST_STEPS))],
        # An axis of -1 takes the devices that are left; their number is not known here, so it counts as one.
        num_shards=max(config.mesh.data, config.mesh.slices or 1)
        * max(config.mesh.fsdp, 1)
        * max(config.mesh.expert, 1),
        max_tokens_per_device=config.max_tokens_per_device or TOKENS_PER_DEVICE,
        micro_batch_size=config.micro_batch_size,
    )
    tokens = costs["sequence_tokens"] / costs["steps"]
    return {
        "epoch": plan.mixture.describe(data.names),
        "per_epoch": plan.steps_per_epoch,
        "of_run": config.max_steps or num_steps_of(config.num_train_epochs, plan.steps_per_epoch),
        "rows_per_step": config.global_batch_size,
        "tokens_per_step": tokens,
        "tokens_per_epoch": tokens * plan.steps_per_epoch,
        "costs": costs,
    }
