"""Adapters next to a frozen base, where a run does not train all weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdpo.config import LORA_DEFAULTS, LoraConfig, ReferenceSettings
from jdpo.data.tokens.tokenizer import Tokenizer
from jdpo.models.lora.adapters import Lora, abstract_adapters, adapter_axes, num_adapter_params
from jdpo.models.lora.base_weights import Base, BaseDtype, abstract_base, base_axes
from jdpo.models.lora.peft_folder import PeftAdapter, read_adapter
from jdpo.models.lora.sites import Site, last_name
from jdpo.models.lora.targets import Targets, choose_sites, find_sites, frozen_modules, require_loadable
from jdpo.models.transformer import Transformer
from jdpo.sharding.rules import param_shardings
from jdpo.training.setup.untrained import refuse_added_tokens

Params = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Adapters next to a frozen base.

    Attributes:
      lora: which projections are adapted, and how.
      targets: `target_modules`, as the user or the adapter to continue from gave it.
      sites: all projections that could be adapted.
      base_dtype: dtypes of the base.
      folder: the adapter that training continues from; None for new adapters.
    """

    lora: Lora
    targets: Targets
    sites: tuple[Site, ...]
    base_dtype: BaseDtype
    folder: Path | None

    def abstract_base(self, model: Transformer) -> Base:
        """Returns shapes and dtypes of the base."""
        return abstract_base(model, self.sites, self.base_dtype)

    def base_shardings(self, model: Transformer, mesh: Mesh) -> Base:
        """Returns a sharding for every leaf of the base."""
        axes, shapes = base_axes(model, self.sites, self.base_dtype), self.abstract_base(model)
        return Base(*(param_shardings(a, s, mesh) for a, s in zip(axes, shapes, strict=True)))

    def abstract_adapters(self, model: Transformer) -> Params:
        """Returns shapes and dtypes of the adapters."""
        return abstract_adapters(self.lora, model.param_dtype)

    def adapter_axes(self) -> Params:
        """Returns the logical axes of the adapters."""
        return adapter_axes(self.lora)

    def describe(self, num_frozen: int) -> list[str]:
        """Describes what is trained, in lines that are logged before a run starts."""
        lora, num_trained = self.lora, num_adapter_params(self.lora)
        names = dict.fromkeys(last_name(site) for site in lora.sites)
        share = 100 * num_trained / (num_trained + num_frozen)
        return [
            f"lora: {num_trained:,} trained parameters ({share:.2f} %) next to {num_frozen:,} frozen ones in "
            f"{self.base_dtype.name}; r {lora.r}, scale {lora.scale:g}, on {', '.join(names)}",
        ]


def check_adaptation(adaptation: Adaptation, tokenizer: Tokenizer, reference: ReferenceSettings | None) -> None:
    """Refuses settings that adapters do not support.

    Args:
      reference: None for a run without a reference.

    Raises:
      ValueError: naming the key and what to do.
    """
    # Adapters leave embedding and head as they are.
    refuse_added_tokens(tokenizer)
    if reference is None or not reference.sync_ref_model:
        return
    if reference.ref_model_mixup_alpha != 1:
        raise ValueError(
            f"ref_model_mixup_alpha {reference.ref_model_mixup_alpha} with lora: a mix of two adapters is not an "
            f"adapter of rank {adaptation.lora.r}. Set it to 1 (the reference takes the policy's adapters every "
            "ref_model_sync_steps), or train all weights"
        )
    if reference.reference_model is not None:
        raise ValueError(
            f"sync_ref_model with lora moves the reference's adapters, and reference_model {reference.reference_model} "
            "has none; leave it out"
        )


def adaptation_of(
    lora_config: LoraConfig | Literal[False] | None, model: Transformer, adapter_folder: Path | None
) -> Adaptation | None:
    """Returns the adapters to train, or None for full fine-tuning.

    Args:
      lora_config: the key `lora`.
      adapter_folder: of an adapter to continue from, or None.

    Raises:
      ValueError: names that no module has, an adapter that jdpo cannot continue from, or keys that contradict it.
    """
    # If the model is an adapter, lora is meant even where the key is left out.
    if not lora_config and adapter_folder is None:
        return None
    asked = lora_config or LoraConfig()
    sites = find_sites(model)
    frozen = frozen_modules(model, sites)
    found = None if adapter_folder is None else read_adapter(adapter_folder, sites)
    if found is not None:
        refuse_other_shape(asked, found, frozen)
        # Its shape is given by its files; keys may only repeat it.
        lora, targets = found.lora, found.targets
    else:
        given = {key: getattr(asked, key) for key in LORA_DEFAULTS}
        values = {key: LORA_DEFAULTS[key] if value is None else value for key, value in given.items()}
        targets = values.pop("target_modules")
        lora = Lora(**values, sites=choose_sites(sites, targets, frozen))
    # Merged into the base, adapters need no module that PEFT can load.
    if not asked.merge:
        require_loadable(sites, lora.sites)
    return Adaptation(
        lora=lora,
        targets=targets,
        sites=sites,
        base_dtype=_base_dtype(asked, model),
        folder=adapter_folder,
    )


def refuse_other_shape(asked: LoraConfig, found: PeftAdapter, frozen: Sequence[str]) -> None:
    """Refuses keys of `lora` that ask for another shape than the adapter to continue from has.

    Args:
      frozen: see `choose_sites`.

    Raises:
      ValueError: naming all of these keys.
    """
    theirs = {"r": found.lora.r, "alpha": found.lora.alpha, "use_rslora": found.lora.use_rslora}
    unlike = [
        f"{key} {value} asked for, {theirs[key]} there"
        for key in theirs
        if (value := getattr(asked, key)) is not None and value != theirs[key]
    ]
    targets = asked.target_modules
    if targets is not None and choose_sites(found.all_sites, targets, frozen) != found.lora.sites:
        unlike.append(f"target_modules {targets} asked for, {found.targets} there")
    if unlike:
        raise ValueError(
            f"lora: the adapter {found.folder} has another shape: {'; '.join(unlike)}. Leave these keys out to "
            "continue with the adapter's own; or merge it (`jdpo export --merge`) and start from the merged model"
        )


def _base_dtype(asked: LoraConfig, model: Transformer) -> BaseDtype:
    compute = jnp.dtype(model.compute_dtype)
    if asked.base_dtype == "int8":
        return BaseDtype(compute, int8=True)
    return BaseDtype(compute if asked.base_dtype == "auto" else jnp.dtype(asked.base_dtype))


def num_params(tree: Any) -> int:
    """Counts the parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
