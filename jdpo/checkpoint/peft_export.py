"""Exports adapters as a PEFT adapter folder that peft, vLLM and others load directly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdpo.checkpoint.output_folders import write_folder
from jdpo.checkpoint.tokenizer_export import write_tokenizer
from jdpo.json_files import write_json
from jdpo.models.lora.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from jdpo.models.lora.adapters import Adapters, Lora
from jdpo.models.lora.peft_folder import peft_config, peft_tensors
from jdpo.models.lora.sites import Site


def export_adapter(
    adapters: Adapters,
    lora: Lora,
    out: Path,
    *,
    sites: Sequence[Site],
    base_name: str,
    base_revision: str | None,
    is_part: bool = False,
    tokenizer: Any,
    tokenizer_folder: Path | None = None,
    model_card: str | None = None,
    kept: Sequence[Path] = (),
) -> None:
    """Writes `out`: adapter_config.json, adapter_model.safetensors, the tokenizer, README.md.

    The folder appears as a whole or not at all; an older adapter there is replaced. Every process must call this: all
    gather the adapters, which are small, and the first writes.

    Args:
      adapters: the trained tree.
      out: the folder to write.
      sites: all sites of the model.
      base_name: path or hub id at which a loader finds the base model.
      base_revision: hub revision of the base model, if it has one.
      is_part: True if the base has other parts, see `peft_config`.
      tokenizer: a transformers PreTrainedTokenizerBase with its chat_template set.
      tokenizer_folder: the folder that the tokenizer was loaded from, see `write_tokenizer`.
      model_card: the text of README.md; None writes no README.md.
      kept: folders that `out` must not touch: the base, an adapter that training continued from, checkpoints.

    Raises:
      ValueError: `out` is not an export of jdpo or touches a folder in `kept`, or a tensor contains NaN or Inf.
    """
    gathered = jax.tree.map(_on_host, adapters)

    def write(staging: Path) -> None:
        from safetensors.numpy import save

        tensors = peft_tensors(lora, gathered)
        for name, values in tensors.items():
            if not np.isfinite(values.astype(np.float32)).all():
                raise ValueError(f"tensor {name} holds NaN or Inf: this adapter is not exported")
        (staging / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        write_json(staging / CONFIG_NAME, peft_config(lora, sites, base_name, base_revision, is_part=is_part))
        write_tokenizer(staging, tokenizer, tokenizer_folder)
        if model_card is not None:
            (staging / "README.md").write_text(model_card, encoding="utf-8")

    write_folder(out, by_all=lambda staging: None, by_first=write, kept=kept)


def _on_host(leaf: jax.Array) -> Any:
    """Returns the whole array on the host of every process."""
    if leaf.is_fully_addressable:
        return jax.device_get(leaf)
    from jax.experimental import multihost_utils

    # `tiled` joins the shards to the array's own shape, without a new axis of processes.
    return multihost_utils.process_allgather(leaf, tiled=True)
