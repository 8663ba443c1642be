"""The folders that a run's weights and tokenizer come from: found by name, without jax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from jdpo.config import ModelSettings, public_text, refuse_passwords
from jdpo.models.lora.adapter_config import CONFIG_NAME, base_of, is_adapter_folder
from jdpo.models.model_config import ModelConfig
from jdpo.models.weights import mxfp4
from jdpo.models.weights.folder_names import carried
from jdpo.models.weights.hub_models import resolve_folder
from jdpo.models.weights.safetensors_folder import TensorEntry, in_mxfp4
from jdpo.safe_text import terminal
from jdpo.words import figure, memory


class Sources(NamedTuple):
    """The folders that a run's weights and tokenizer come from.

    Attributes:
      name: of the model, or of the base of an adapter; without the query of an address, as exported files name it.
      revision: its hub revision, where one is asked for.
      model_folder: its folder.
      adapter_folder: an adapter to continue from, or None.
      tokenizer_folder: the adapter's folder if it has a tokenizer, else the model's.
    """

    name: str
    revision: str | None
    model_folder: Path
    adapter_folder: Path | None
    tokenizer_folder: Path


def find_sources(settings: ModelSettings, *, weights: bool = True) -> Sources:
    """Finds the model that `model_name_or_path` names, and the adapter there or in `lora.adapter`.

    Args:
      weights: False: those of the model need not exist and are not downloaded; those of an adapter are, since they
        determine its rank.

    Raises:
      ValueError: nothing is there, two adapters are named, or an adapter names a base by an address with a password.
    """
    name, revision = settings.model_name_or_path, settings.model_revision
    folder = resolve_folder(name, revision, weights=weights)
    if not weights and is_adapter_folder(folder):
        folder = resolve_folder(
            name, revision
        )  # its files tell an adapter from a model that has the config of one next to it
    adapter = None
    if settings.lora and settings.lora.adapter is not None:
        if is_adapter_folder(folder):
            raise ValueError(
                f"model_name_or_path {name} is an adapter, and lora.adapter names another, {settings.lora.adapter}: "
                "give the base model as model_name_or_path"
            )
        adapter = resolve_folder(settings.lora.adapter)
        if not is_adapter_folder(adapter):
            raise ValueError(
                f"lora.adapter {settings.lora.adapter} is not a PEFT adapter folder: it has no {CONFIG_NAME}"
            )
    elif is_adapter_folder(folder):
        if settings.lora is False:
            raise ValueError(
                f"lora is false, and model_name_or_path {name} is an adapter, from which training can only continue "
                "with lora: leave lora out, or merge the adapter first (`jdpo export --merge`) and train the merged "
                "model"
            )
        # The adapter says which base it belongs to, and at which revision.
        adapter = folder
        name, revision = base_of(adapter)
        refuse_passwords(name, f"base_model_name_or_path in {adapter / CONFIG_NAME}")
        try:
            folder = resolve_folder(name, revision, weights=weights)
        except ValueError as error:
            raise ValueError(
                f"{adapter / CONFIG_NAME} names {name!r} as its base: {error}. Or give the base as model_name_or_path "
                "and the adapter as lora.adapter"
            ) from error
    if adapter is not None and is_adapter_folder(folder):
        raise ValueError(
            f"{adapter}: its base {name} is an adapter as well; merge that one into its own base first (`jdpo export "
            "--merge`, or PEFT's merge_and_unload), and give the merged model as model_name_or_path with lora.adapter"
        )
    # Tokens that were added for the adapter are only in its own tokenizer.
    has_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer_folder = adapter if adapter is not None and has_tokenizer else folder
    return Sources(public_text(name), revision, folder, adapter, tokenizer_folder)


def notes_on_weights(folder: Path, entries: Mapping[str, TensorEntry], config: ModelConfig) -> Iterator[str]:
    """Yields what a user should know about the tensors of a model folder."""
    if in_mxfp4(entries):
        yield mxfp4.note(folder)
    if others := carried(entries, config):
        size = memory(sum(entry.num_bytes for entry in others.values()))
        yield (
            f"note: {folder} has {figure(len(others), 'tensor')} ({size}) outside of the text model that is trained, "
            f"such as {terminal(next(iter(others)))}; an export of the whole model has them as they are"
        )


def check_positions(source_config: ModelConfig, *, max_length: int, name: str) -> None:
    """Refuses sequences longer than a model with a fixed number of positions can take.

    Args:
      source_config: the model's config.json.
      max_length: maximum tokens of a sequence.
      name: of the model, for the message.

    Raises:
      ValueError: naming both lengths.
    """
    most = source_config.max_positions
    if source_config.positions_end and max_length > most:
        why = (
            "a learned vector for each" if source_config.learned_positions else "longrope's factors for short sequences"
        )
        raise ValueError(
            f"max_length {max_length}: {name} has {most} positions ({why}) and cannot go "
            f"beyond; set max_length to {most} or less"
        )
