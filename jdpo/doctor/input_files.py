"""The files that a run reads, with digests: those of its datasets, and of its model except the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from jdpo.config import DatasetConfig, ReferenceSettings, TrainConfig, public_text
from jdpo.data.sources import open_source
from jdpo.file_digests import file_digest
from jdpo.models.weights.hub_models import SAFETENSORS_GLOB, has_weights, resolve_folder
from jdpo.training.setup.model_sources import find_sources
from jdpo.words import figure

_MODEL_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab*")
FULL_STATE = 6
"""A checkpoint of full fine-tuning takes at most this many times the weights of a bfloat16 model: float32 weights and
two moments of each."""


def data_files(config: TrainConfig) -> Iterator[tuple[str, Callable[[], dict[str, str]]]]:
    """Yields the name of each dataset with a function that returns {file: digest}.

    The functions raise a ValueError if the data cannot be read, and take as long as reading all of it.
    """
    for dataset in (*config.datasets, *config.eval_datasets):
        yield public_text(dataset.path), partial(_digests_of, dataset)
    prompts = config.sample_prompts
    if isinstance(prompts, str):
        yield public_text(prompts), partial(_digests_of, DatasetConfig(path=prompts))


def _digests_of(dataset: DatasetConfig) -> dict[str, str]:
    return open_source(dataset).file_digests()


def model_files(config: TrainConfig) -> dict[str, str]:
    """Returns {file: digest} of the model's config and tokenizer, and {file: size} of its weights.

    Raises:
      ValueError: there is no such model, or a folder of this machine has no weights.
    """
    sources = find_sources(config, weights=False)
    # Those of a model of the hub are downloaded by the run.
    if Path(config.model_name_or_path).expanduser().is_dir() and not has_weights(sources.model_folder):
        raise ValueError(f"model {sources.model_folder} has no {SAFETENSORS_GLOB}: copy the weights there, too")
    folders = {config.model_name_or_path: sources.model_folder}
    if sources.adapter_folder is not None:
        folders["adapter"] = sources.adapter_folder
    if isinstance(config, ReferenceSettings) and config.reference_model is not None:
        folders[config.reference_model] = resolve_folder(
            config.reference_model, config.reference_revision, weights=False
        )
    found = {
        f"{public_text(name)}: {file}": content
        for name, folder in folders.items()
        for file, content in _files_of(folder).items()
    }
    if config.chat_template is not None and Path(config.chat_template).expanduser().is_file():
        found["chat_template"] = file_digest(Path(config.chat_template).expanduser())
    return found


def _files_of(folder: Path) -> dict[str, str]:
    names = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    found = {path.name: file_digest(path) for path in names}
    # Weights take minutes to read; a copy that is cut short has another size.
    for path in sorted(folder.glob(SAFETENSORS_GLOB)):
        found[path.name] = figure(path.stat().st_size, "byte")
    return found


def checkpoint_bytes(config: TrainConfig) -> int | None:
    """Returns an upper bound of what the checkpoints of full fine-tuning take in output_dir; None if it is unknown."""
    if config.lora:
        return None  # adapters are small
    sources = find_sources(config, weights=False)
    if sources.adapter_folder is not None or not has_weights(sources.model_folder):
        return None
    weights = sum(path.stat().st_size for path in sources.model_folder.glob(SAFETENSORS_GLOB))
    # The newest ones and the best one.
    return FULL_STATE * weights * (config.save_total_limit + 1)
