"""The model of a run, with its tokenizer, mesh and adapters: everything that is needed to load and to export it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jdpo.config import TrainConfig
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.models.families import read_model_config
from jdpo.models.model_config import ModelConfig
from jdpo.models.transformer import Transformer, abstract_params, logical_axes
from jdpo.models.weights.hub_models import has_weights
from jdpo.models.weights.safetensors_folder import in_mxfp4, tensor_entries
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import param_shardings
from jdpo.training.setup.adaptation import Adaptation, adaptation_of
from jdpo.training.setup.folder_digests import folder_digest
from jdpo.training.setup.model_sources import Sources, check_positions, find_sources
from jdpo.training.setup.validation import check_attention_settings
from jdpo.training.step.optimizer import param_dtype_of

Params = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSetup:
    """The model of a run and its mesh: everything that is needed to load and to export it."""

    config: TrainConfig
    mesh: Mesh
    sources: Sources
    tokenizer: Tokenizer
    source_config: ModelConfig  # as in the model folder
    model: Transformer  # with the vocabulary that the tokenizer needs
    adaptation: Adaptation | None  # None where all weights are trained
    dequantized: bool  # the model folder has weights in MXFP4, which are read as bfloat16

    @property
    def model_folder(self) -> Path:
        """The folder of the model that training starts from; with adapters, of the base under them."""
        return self.sources.model_folder

    @property
    def trained(self) -> Params:
        """Shape and dtype of everything that is trained."""
        return abstract_params(self.model) if self.adaptation is None else self.adaptation.abstract_adapters(self.model)

    @property
    def trained_axes(self) -> Params:
        """Logical axes of everything that is trained."""
        return logical_axes(self.model) if self.adaptation is None else self.adaptation.adapter_axes()

    @property
    def shardings(self) -> Params:
        """A sharding for everything that is trained."""
        return param_shardings(self.trained_axes, self.trained, self.mesh)

    @property
    def whole_shardings(self) -> Params:
        """A sharding for every weight of the model, trained or not."""
        return param_shardings(logical_axes(self.model), abstract_params(self.model), self.mesh)

    @property
    def exports_merged(self) -> bool:
        """True if adapters are added to their base for the export, and not exported alone."""
        return self.adaptation is not None and bool(self.config.lora and self.config.lora.merge)

    @property
    def model_name(self) -> str:
        """The name of the model in the config, or of the base in the config of the adapter that it names."""
        return self.sources.name

    @property
    def base_to_find(self) -> str:
        """The name of the model for users who load an adapter elsewhere; a local folder is an absolute path."""
        folder = Path(self.model_name).expanduser()
        return str(folder.resolve()) if folder.is_dir() else self.model_name

    def base_identity(self) -> dict[str, str] | None:
        """Returns what identifies the base of adapters, for checkpoints; None where all weights are trained."""
        if self.adaptation is None:
            return None
        digest = folder_digest(self.model_folder)
        return {"model": self.model_name, "digest": digest, "dtype": self.adaptation.base_dtype.name}


def build_model(config: TrainConfig, *, weights: bool = True, mesh: Mesh | None = None) -> ModelSetup:
    """Reads model config and tokenizer, and lays out the mesh; reads neither rows nor weights.

    Args:
      config: with compute_dtype resolved.
      weights: as for `build`.
      mesh: used in place of the config's.

    Raises:
      ValueError: bad input.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    sources = find_sources(config, weights=weights)
    source_config = read_model_config(sources.model_folder)
    tokenizer = load_tokenizer(
        sources.tokenizer_folder,
        chat_template=config.chat_template,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    model = make_model(config, source_config, tokenizer)
    return ModelSetup(
        config=config,
        mesh=mesh,
        sources=sources,
        tokenizer=tokenizer,
        source_config=source_config,
        model=model,
        adaptation=adaptation_of(config.lora, model, sources.adapter_folder),
        # Now, since the export of an adapter must not need the folder of its base.
        dequantized=has_weights(sources.model_folder) and in_mxfp4(tensor_entries(sources.model_folder)),
    )


def make_model(config: TrainConfig, source_config: ModelConfig, tokenizer: Tokenizer) -> Transformer:
    """Makes the model, with an embedding for every token of the tokenizer.

    Raises:
      ValueError: the tokenizer has more tokens than the embedding, and none of them was added by jdpo.
    """
    vocab_size = source_config.vocab_size
    if tokenizer.size > vocab_size:
        # Rows are added only for tokens that this run adds; more tokens mean that the tokenizer is of another model.
        if not tokenizer.added_tokens or tokenizer.size - len(tokenizer.added_tokens) > vocab_size:
            raise ValueError(
                f"the tokenizer of {config.model_name_or_path} has {tokenizer.size} tokens, but the model's embedding "
                f"has {vocab_size} rows; use the tokenizer that belongs to the model"
            )
        vocab_size = tokenizer.size
    compute_dtype = jnp.dtype(config.compute_dtype)
    # Before rows are tokenized, which may take long.
    check_positions(source_config, max_length=config.max_length, name=config.model_name_or_path)
    check_attention_settings(config, source_config, max_length=config.max_length)
    return Transformer(
        dataclasses.replace(source_config, vocab_size=vocab_size),
        compute_dtype=compute_dtype,
        param_dtype=param_dtype_of(config.compute_dtype, config.optimizer.name),
        # auto is settled once the step's shapes are known
        remat="none" if config.remat == "auto" else config.remat,
        attention=config.attention,
        attention_block_q=config.attention_block_q,
        attention_block_kv=config.attention_block_kv,
    )
