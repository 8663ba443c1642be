"""Reads PEFT adapter folders, and converts adapters to their layout.

A folder has adapter_config.json and adapter_model.safetensors. PEFT has lora_A [r, in] and lora_B [out, r] for each
module, whether the module keeps its weight as [out, in] or as [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange

from jdpo.models.lora.adapter_config import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from jdpo.models.lora.adapters import Adapters, Lora
from jdpo.models.lora.sites import EXPERT_AXIS, Module, Site, get_at, has_all_experts, last_name, tree_of
from jdpo.models.lora.targets import Targets, whole_sites
from jdpo.models.weights.safetensors_folder import DTYPES, TensorEntry, read_header
from jdpo.processes import run_jointly
from jdpo.safe_text import terminal
from jdpo.words import listed

PREFIX = "base_model.model."

_NAME = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<kind>[AB])\.weight")
_MOST_NAMED = 6

_READ = {"r", "lora_alpha", "use_rslora", "target_modules", "peft_type", "task_type", "init_lora_weights", "bias"}
"""Keys of adapter_config.json that are read below."""

_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "lora_dropout",  # only affects training
    "fan_in_fan_out",  # the layout of the module's weight, known from the model
    "exclude_modules",  # the adapted modules are known from the tensors
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "runtime_config",
    "loftq_config",
    "ensure_weight_tying",
}
"""Keys that do not change what an adapter computes, or only in ways that its tensors show."""

_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that do not change the base weights; PiSSA, OLoRA, LoftQ and others do."""


class PeftAdapter(NamedTuple):
    """An adapter on disk whose config and headers were checked; no tensor has been read.

    Attributes:
      targets: `target_modules` of its config, and `target_parameters`.
      all_sites: all sites of the model that it was compared with.
    """

    folder: Path
    lora: Lora
    targets: Targets
    all_sites: tuple[Site, ...]


def read_adapter(folder: Path, sites: Sequence[Site]) -> PeftAdapter:
    """Reads config and headers of an adapter and compares them with a model.

    Args:
      sites: all sites of the model, see `find_sites`.

    Raises:
      ValueError: the adapter has features that jdpo lacks or tensors that do not fit the model, or a file is damaged.
    """
    config = read_adapter_config(folder)
    _refuse_unsupported(folder, config, {"target_parameters"} if any(map(has_all_experts, sites)) else set())
    entries = _tensor_entries(folder)
    keys = {key for key, _ in entries}
    known = {module.key: module.name for site in sites for module in site.modules}
    if unknown := sorted(keys - set(known)):
        names = ", ".join(dict.fromkeys(map(last_name, sites)))
        raise ValueError(
            f"{folder}: the adapter has {_listed(unknown)}; in this model jdpo adapts only {names}. "
            "Check that the adapter belongs to this base model"
        )
    lora = Lora(
        r=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
        sites=whole_sites(sites, {known[key] for key in keys}, str(folder)),
    )
    _check_shapes(folder, entries, lora)
    targets = config.get("target_modules")
    if not isinstance(targets, str):
        targets = (*(targets or ()), *(config.get("target_parameters") or ()))
    return PeftAdapter(folder, lora, targets, tuple(sites))


def _refuse_unsupported(folder: Path, config: Mapping[str, Any], also_read: Set[str]) -> None:
    wrong = []
    for key, expected in {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none", None)}.items():
        if config.get(key) not in expected:
            wrong.append(f"{key} {config.get(key)!r}, expected {expected[0]!r}")
    if config.get("init_lora_weights", True) not in _INITS:
        wrong.append(f"init_lora_weights {config['init_lora_weights']!r}, which changes the base weights")
    wrong += [f"no {key}" for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]
    targets = config.get("target_modules")
    if not isinstance(targets, str | list | None):
        wrong.append(f"target_modules {targets!r}, expected names or one expression")
    wrong += [
        f"{terminal(key)} {value!r}"
        for key, value in config.items()
        # PEFT writes all its keys; those that are null, false or empty are not used.
        if value and key not in _READ | _WITHOUT_EFFECT | also_read
    ]
    if wrong:
        raise ValueError(
            f"{folder / CONFIG_NAME} has settings that jdpo does not support: {'; '.join(wrong)}. Merge the adapter "
            "with PEFT (merge_and_unload) and train from the merged model"
        )


def _tensor_entries(folder: Path) -> dict[tuple[str, str], TensorEntry]:
    """Returns {(key of a module, "A" or "B"): its tensor}."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}; jdpo reads only safetensors, so save the adapter as such")
    entries: dict[tuple[str, str], TensorEntry] = {}
    other = []
    for name, entry in read_header(path).items():
        match = _NAME.fullmatch(name)
        if match is None:
            other.append(name)
        else:
            entries[match["module"], match["kind"]] = entry
    if other:
        raise ValueError(
            f"{path} contains tensors other than lora_A and lora_B of projections: {_listed(other)}. Merge the adapter "
            "with PEFT (merge_and_unload) and train from the merged model"
        )
    if not entries:
        raise ValueError(f"{path} contains no tensors")
    return entries


def _check_shapes(folder: Path, entries: Mapping[tuple[str, str], TensorEntry], lora: Lora) -> None:
    problems = []
    for site in lora.sites:
        for module in site.modules:
            ranks = lora.r * max(module.num_experts, 1)
            expected = {"A": (ranks, int(np.prod(site.inputs))), "B": (module.num_outputs, ranks)}
            for kind, shape in expected.items():
                entry = entries.get((module.key, kind))
                if entry is None:
                    problems.append(f"{module.key}.lora_{kind} is missing")
                elif entry.shape != shape:
                    problems.append(f"{module.key}.lora_{kind} has shape {entry.shape}, expected {shape}")
                elif entry.dtype not in DTYPES:
                    problems.append(f"{module.key}.lora_{kind} has dtype {entry.dtype}, expected {', '.join(DTYPES)}")
    if problems:
        raise ValueError(f"{folder / WEIGHTS_NAME} does not fit the model: {_listed(list(dict.fromkeys(problems)))}")


def load_adapters(adapter: PeftAdapter, shardings: Any, dtype: Any) -> Adapters:
    """Reads an adapter into the trained tree, on its devices. Every process reads all of it, since it is small.

    Args:
      shardings: a tree of shardings with the structure of `abstract_adapters`.

    Raises:
      ValueError: a tensor contains NaN or Inf.
    """
    leaves = run_jointly(lambda: _read_leaves(adapter, dtype))
    return jax.tree.map(
        lambda values, sharding: jax.make_array_from_callback(values.shape, sharding, lambda index: values[index]),
        tree_of(leaves),
        shardings,
    )


def _read_leaves(adapter: PeftAdapter, dtype: Any) -> dict[tuple[str, ...], np.ndarray]:
    from safetensors import safe_open

    path, lora = adapter.folder / WEIGHTS_NAME, adapter.lora
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    with safe_open(path, framework="np") as file:

        def read(module: Module, kind: str) -> np.ndarray:
            name = f"{PREFIX}{module.key}.lora_{kind}.weight"
            values: np.ndarray = file.get_tensor(name)
            if not np.isfinite(values).all():
                raise ValueError(f"tensor {name} in {path} holds NaN or Inf: the adapter is damaged, take another copy")
            return values.astype(dtype)

        for site in lora.sites:
            if site.leader == site.path:
                # PEFT has one [r, in] per module; here all modules share an array, inputs first like every kernel.
                a = np.empty((*site.lead, *site.inputs, lora.r), dtype)
                for module in site.modules:
                    own = rearrange(read(module, "A"), "(e r) i -> e i r", r=lora.r)
                    a[module.at] = own.reshape(a[module.at].shape)
                leaves[*site.path, "a"] = a
            b = np.empty((*site.lead, lora.r, *site.outputs), dtype)
            for module in site.modules:
                # A fused module has one B, of which each of its projections has some rows.
                own = rearrange(read(module, "B")[_rows(module, site.outputs)], "o (r e) -> e r o", r=lora.r)
                b[module.at] = own.reshape(b[module.at].shape)
            leaves[*site.path, "b"] = b
    return leaves


def _rows(module: Module, outputs: tuple[int, ...]) -> np.ndarray:
    """Returns the indices of a projection's outputs among its module's, in the order of its flattened axes."""
    grids = np.meshgrid(*map(np.arange, outputs), indexing="ij")
    steps = (grid * stride for grid, stride in zip(grids, module.strides, strict=True))
    return np.asarray(module.start + sum(steps)).reshape(-1)


def peft_tensors(lora: Lora, adapters: Any) -> dict[str, np.ndarray]:
    """Returns every tensor of adapter_model.safetensors by name.

    Args:
      adapters: the trained tree as host arrays.
    """
    tensors: dict[str, np.ndarray] = {}
    for site in lora.sites:
        a, b = get_at(adapters, (*site.leader, "a")), get_at(adapters, (*site.path, "b"))
        for module in site.modules:
            prefix, num_maps = f"{PREFIX}{module.key}.lora_", max(module.num_experts, 1)
            own = a[module.at].reshape(num_maps, -1, lora.r)
            tensors[f"{prefix}A.weight"] = np.ascontiguousarray(rearrange(own, "e i r -> (e r) i"))
            # Projections of a fused module that are not adapted leave zeros, which change nothing.
            whole = tensors.setdefault(f"{prefix}B.weight", np.zeros((module.num_outputs, lora.r * num_maps), b.dtype))
            # Experts are the slower axis of A's ranks and the faster one of B's.
            own = b[module.at].reshape(num_maps, lora.r, -1)
            whole[_rows(module, site.outputs)] = rearrange(own, "e r o -> o (r e)")
    return tensors


def peft_config(
    lora: Lora, sites: Sequence[Site], base_name: str, revision: str | None, *, is_part: bool = False
) -> dict[str, Any]:
    """Returns the content of adapter_config.json.

    Args:
      sites: all sites of the model, so that names can be made unambiguous.
      base_name: name of the base model.
      revision: hub revision of the base model, if it has one.
      is_part: True if the base has other parts, whose modules may have the same last names.
    """
    alpha, use_rslora = lora.alpha, lora.use_rslora
    if use_rslora and any(EXPERT_AXIS in site.lead_axes for site in lora.sites):
        # PEFT fuses gate and up of an expert into one map of twice the rank, and would scale by the root of that.
        alpha, use_rslora = lora.scale * lora.r, False
    alpha = int(alpha) if float(alpha).is_integer() else alpha
    # Tensors with the maps of all experts are no modules.
    parameters = sorted({_within_layer(site) for site in lora.sites if has_all_experts(site)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "target_modules": target_expression(lora) if is_part else target_names(lora, sites),
        **({"target_parameters": parameters} if parameters else {}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(site.fan_in_first for site in lora.sites),
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def target_names(lora: Lora, sites: Sequence[Site]) -> list[str]:
    """Returns the shortest names that match only adapted modules: q_proj, or attn.c_proj if mlp.c_proj is not adapted.

    Tensors with the maps of all experts are not among them.

    Args:
      sites: all sites of the model.
    """
    sites = [site for site in sites if not has_all_experts(site)]
    left_out = [site for site in sites if site not in lora.sites]
    # PEFT adapts every module whose name ends in one of these, so none may also match a module that is left out.
    taken = {last_name(site) for site in left_out}
    adapted = [site for site in lora.sites if not has_all_experts(site)]
    return sorted({last_name(site) if last_name(site) not in taken else _within_layer(site) for site in adapted})


def target_expression(lora: Lora) -> str:
    """Returns an expression that matches the whole names of the adapted modules, and no others."""
    # The numbers of layers and experts, all of which are adapted, become one place.
    adapted = [module.name for site in lora.sites if not has_all_experts(site) for module in site.modules]
    names = {re.sub(r"\.\d+\.", ".#.", name) for name in adapted}
    return "|".join(re.escape(name).replace(r"\#", r"\d+") for name in sorted(names))


def _within_layer(site: Site) -> str:
    """Returns the part of a module's name that follows the number of its layer."""
    return re.split(r"\.\d+\.", site.modules[0].name, maxsplit=1)[-1]


def _listed(names: Iterable[str]) -> str:
    return listed([terminal(name) for name in names], _MOST_NAMED)
