"""`jdpo.load`: opens a model folder, an adapter, a run or a checkpoint of one, to ask it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdpo.checkpoint.steps import MANIFEST
from jdpo.config import MeshConfig, ModelSettings
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.file_digests import file_digest
from jdpo.generation.loaded_model import LoadedModel
from jdpo.json_files import read_json
from jdpo.models.families import read_model_config
from jdpo.models.lora.adapters import weights_of
from jdpo.models.lora.peft_folder import load_adapters, read_adapter
from jdpo.models.transformer import Params, Transformer, Weights, abstract_params, logical_axes
from jdpo.models.weights.loading import load_params
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import param_shardings
from jdpo.training.run_record import RunRecord
from jdpo.training.saved.saved_runs import Checkpoint, find_checkpoint, opened, restore_trained
from jdpo.training.setup.adaptation import adaptation_of
from jdpo.training.setup.folder_digests import adapter_digest, folder_digest
from jdpo.training.setup.model_sources import Sources, find_sources
from jdpo.training.setup.weight_placement import load_base, load_base_folder, whole_weights

Dtype = Literal["auto", "float32", "bfloat16"]


def load(
    model: str | Path,
    *,
    dtype: Dtype = "auto",
    mesh: MeshConfig | Mesh | None = None,
    revision: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Opens a model to ask it: its answers, and the log-probabilities of answers and tokens.

    Args:
      model: a Hugging Face model folder or hub name; a PEFT adapter, which is not merged into its base; the output_dir
        of a run: the exported model of a finished run, otherwise the newest checkpoint; or `checkpoints/STEP` of a run.
      dtype: of weights and computation; "auto": float32 on CPU, bfloat16 on TPU and GPU.
      mesh: the devices that share weights and work: sizes of the axes, which take all devices, or a mesh. Default: the
        first device.
      revision: branch, tag or commit of a hub repository.
      chat_template: for a model without one: a Jinja file, or "chatml". A checkpoint has its run's own.
      chat_template_kwargs: variables for every use of the chat template.

    Raises:
      ValueError: there is no such model, or it cannot be read; the message says what to do.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise ValueError(f"model: expected a model folder, a hub name or a run, found {model!r}")
    # One device by default: a small model is faster on it than split over eight.
    devices = mesh if isinstance(mesh, Mesh) else make_mesh(mesh or MeshConfig(), None if mesh else jax.devices()[:1])
    run = _run_of(str(model))
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype: expected auto, float32 or bfloat16, found {dtype!r}")
    name = dtype if dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if isinstance(run, Checkpoint):
        if revision or chat_template or chat_template_kwargs:
            raise ValueError(
                f"{model} is a checkpoint of a run, whose config names revision and chat template; leave "
                "revision, chat_template and chat_template_kwargs out"
            )
        return _load_checkpoint(run, name, devices)
    settings = ModelSettings(
        model_name_or_path=str(run or model),
        model_revision=revision,
        chat_template=chat_template,
        chat_template_kwargs=dict(chat_template_kwargs) if chat_template_kwargs else None,
    )
    return _load_folder(settings, str(model), name, devices)


def check_model(model: str | Path) -> None:
    """Finds a model as `load` does, without reading its weights, so that a wrong name does not cost hours of work.

    Raises:
      ValueError: there is no such model, or jdpo does not support it.
    """
    run = _run_of(str(model))
    if not isinstance(run, Checkpoint):
        sources = find_sources(ModelSettings(model_name_or_path=str(run or model)))
        read_model_config(sources.model_folder)


def _run_of(model: str) -> Checkpoint | Path | None:
    """Returns the checkpoint, or the exported model, of a run; None if it is no run."""
    path = Path(model).expanduser()
    is_step = path.parent.name == "checkpoints" and path.name.isdigit() and (path.parents[1] / "run.json").is_file()
    if is_step:
        return find_checkpoint(path)
    if not (path / "run.json").is_file():
        return None
    exported = path / "model"
    # The export of a finished run may be of the best step, which its config asks for.
    if RunRecord.read(path / "run.json").finished and exported.is_dir():
        return exported
    return find_checkpoint(path)


# --- model folders and adapters


def _load_folder(settings: ModelSettings, name: str, dtype: str, mesh: Mesh) -> LoadedModel:
    sources = find_sources(settings)
    config = read_model_config(sources.model_folder)
    tokenizer = load_tokenizer(
        sources.tokenizer_folder,
        chat_template=settings.chat_template,
        chat_template_kwargs=settings.chat_template_kwargs,
    )
    if tokenizer.size > config.vocab_size:
        added = f", {len(tokenizer.added_tokens)} of them for chat_template" if tokenizer.added_tokens else ""
        raise ValueError(
            f"the tokenizer of {name} has {tokenizer.size} tokens{added}, but the model's embedding has "
            f"{config.vocab_size} rows; use the tokenizer that belongs to the model"
        )
    model = Transformer(config, compute_dtype=jnp.dtype(dtype))
    params, digest = _load_weights(sources, model, mesh)
    return LoadedModel(
        model=model,
        params=params,
        tokenizer=tokenizer,
        mesh=mesh,
        name=name,
        digest=digest,
        end_token_ids=_end_token_ids(tokenizer, sources.model_folder),
    )


def _load_weights(sources: Sources, model: Transformer, mesh: Mesh) -> tuple[Params | Weights, str]:
    """Returns the weights in the compute dtype, adapters unmerged and in float32, and their digest."""
    digest = folder_digest(sources.model_folder)
    adaptation = adaptation_of(None, model, sources.adapter_folder)
    if adaptation is None or sources.adapter_folder is None:
        shardings = param_shardings(logical_axes(model), abstract_params(model), mesh)
        return load_params(sources.model_folder, model, shardings, dtype=model.compute_dtype), digest
    # Adapters stay in float32 next to a base in the compute dtype, as in training.
    base = load_base_folder(sources.model_folder, adaptation, model, mesh)
    shardings = param_shardings(adaptation.adapter_axes(), adaptation.abstract_adapters(model), mesh)
    adapters = load_adapters(read_adapter(sources.adapter_folder, adaptation.sites), shardings, model.param_dtype)
    return weights_of(adaptation.lora, base, adapters), _joined(digest, adapter_digest(sources.adapter_folder))


# --- checkpoints


def _load_checkpoint(checkpoint: Checkpoint, dtype: str, mesh: Mesh) -> LoadedModel:
    with opened(checkpoint, [f"compute_dtype={dtype}"], mesh=mesh) as (_, setup):
        digest = file_digest(checkpoint.folder / MANIFEST)
        params: Params | Weights
        if setup.adaptation is None:
            # Training keeps float32 copies of the weights, which a model that computes in bfloat16 does not need.
            params = restore_trained(checkpoint, setup, setup.model.compute_dtype)
        else:
            params = whole_weights(setup, restore_trained(checkpoint, setup), load_base(setup))
            digest = _joined(folder_digest(setup.model_folder), digest)
        return LoadedModel(
            model=setup.model,
            params=params,
            tokenizer=setup.tokenizer,
            mesh=mesh,
            name=f"{checkpoint.run} (step {checkpoint.step})",
            digest=digest,
            end_token_ids=_end_token_ids(setup.tokenizer, setup.model_folder),
        )


# ---


def _end_token_ids(tokenizer: Tokenizer, folder: Path) -> tuple[int, ...]:
    """Returns the tokens that end an answer: those of the tokenizer, and those of generation_config.json."""
    ids: Any = None
    with contextlib.suppress(FileNotFoundError):
        ids = read_json(folder / "generation_config.json").get("eos_token_id")
    own = ids if isinstance(ids, list) else [ids]
    return tuple(dict.fromkeys([*tokenizer.end_token_ids, *(one for one in own if isinstance(one, int))]))


def _joined(*digests: str) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
