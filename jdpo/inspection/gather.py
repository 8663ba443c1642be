"""What `jdpo inspect` reports on, gathered by the functions that a run itself reads and orders its rows with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from jdpo.config import DatasetConfig, PreferenceSettings, TrainConfig
from jdpo.data.batching.mixing import check_data_settings
from jdpo.data.prepared.prepare import PreparedData
from jdpo.data.schemas import formats
from jdpo.data.sources import open_source
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.inspection.material import Material, ModelFacts, Part
from jdpo.inspection.raw_text import TextFacts, text_facts
from jdpo.models.families import read_model_config
from jdpo.models.weights.hub_models import has_weights
from jdpo.reports.progress import RowCounter
from jdpo.training.setup.model_sources import Sources, check_positions, find_sources
from jdpo.training.setup.row_order import Say, num_steps_of, plan_rows, preparation_of, sides_of
from jdpo.training.setup.untrained import find_untrained, refuse_added_tokens

MOST_STEPS = 2000
"""Steps whose costs are counted: an epoch's, or the first of it."""


def gather(config: TrainConfig, *, chosen_by: str, say: Say) -> Material:
    """Prepares the rows of a run, through the same cache as training, and reads their texts.

    Of the model only tokenizer and config.json are read; no accelerator is touched and output_dir is not written.

    Args:
      chosen_by: how it was found which command's run it is, in words.
      say: takes lines for the person who waits.

    Raises:
      ValueError: settings that do not go together, no tokenizer, or rows that cannot be read.
    """
    pairs = isinstance(config, PreferenceSettings)
    check_data_settings(config, pairs=pairs)
    sources = find_sources(config, weights=False)
    tokenizer = load_tokenizer(
        sources.tokenizer_folder,
        chat_template=config.chat_template,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    read = preparation_of(config, pairs=pairs)

    def part_of(datasets: Sequence[DatasetConfig], part: object, *, with_texts: bool = True) -> Part:
        data = read(datasets, tokenizer, part=part, progress=RowCounter(say))
        return Part(data, _texts(config, datasets, tokenizer, say) if with_texts else ())

    training, evaluation = sides_of(config)
    train = part_of(*training)
    # The training rows' files hold the rows of both sides of a split.
    held_out = evaluation and part_of(*evaluation, with_texts=not config.eval_fraction)
    plan = plan_rows(
        config, train.data, lambda line: None, global_batch_size=config.global_batch_size, seed=config.seed
    )
    return Material(
        config=config,
        command="dpo" if pairs else "sft",
        chosen_by=chosen_by,
        tokenizer=tokenizer,
        model=_model_facts(config, sources, tokenizer, train.data),
        train=train,
        eval=held_out,
        steps=[plan.step(step) for step in range(min(plan.steps_per_epoch, MOST_STEPS))],
        epoch=plan.mixture.describe(train.data.names),
        steps_per_epoch=plan.steps_per_epoch,
        num_steps=config.max_steps or num_steps_of(config.num_train_epochs, plan.steps_per_epoch),
    )


def _texts(
    config: TrainConfig, datasets: Sequence[DatasetConfig], tokenizer: Tokenizer, say: Say
) -> tuple[TextFacts, ...]:
    supervised = not isinstance(config, PreferenceSettings)
    read: Callable[..., Sequence[object]] = formats.completion_rows if supervised else formats.preference_rows
    every_turn = not supervised and config.loss_on == "assistant_turns"
    found = []
    for dataset in datasets:
        reading = formats.reading_of(dataset, every_turn=every_turn)
        found.append(
            text_facts(
                open_source(dataset).rows(),
                partial(read, reading=reading),  # type: ignore[arg-type]
                partial(formats.schema_name, reading=reading, supervised=supervised),
                tokenizer.special_text,
                RowCounter(say, doing="looking at texts"),
            )
        )
    return tuple(found)


def _model_facts(config: TrainConfig, sources: Sources, tokenizer: Tokenizer, data: PreparedData) -> ModelFacts:
    folder = sources.model_folder
    try:
        found = read_model_config(folder)
    except ValueError as error:
        return ModelFacts(None, None, str(error))
    adapted = bool(config.lora) or sources.adapter_folder is not None
    try:
        check_positions(found, max_length=config.max_length, name=config.model_name_or_path)
        if adapted:
            refuse_added_tokens(tokenizer)
    except ValueError as error:
        return ModelFacts(found.max_positions, found.vocab_size, str(error))
    untrained = None
    if has_weights(folder):
        with contextlib.suppress(ValueError):  # weights that cannot be read are for the run to report
            untrained = find_untrained(folder, found, tokenizer, data)
    starts = config.init_untrained_tokens and not adapted
    return ModelFacts(found.max_positions, found.vocab_size, None, untrained, starts)
