"""Sites of adapters: the projections of a model's layers, by the names that Hugging Face gives their modules."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Sequence

from jdpo.models.lora.sites import (
    EXPERT_AXIS,
    KERNEL,
    ROUTER,
    Module,
    Path,
    Site,
    get_at,
    has_all_experts,
    last_name,
)
from jdpo.models.transformer import Transformer, logical_axes
from jdpo.models.weights.hf_names import Piece, hf_tensors, layout_of, leaves
from jdpo.models.weights.strided_views import StridedView
from jdpo.safe_text import terminal
from jdpo.words import listed

Targets = str | Sequence[str]

ALL_LINEAR = "all-linear"

_MOST_NAMED = 8


def find_sites(model: Transformer) -> tuple[Site, ...]:
    """Returns every projection of the layers that can be adapted, in the order of the forward pass."""
    found: dict[str, Path] = {}
    axes = logical_axes(model)
    sites = []
    for path, (shape, pieces) in leaves(model.config).items():
        # Embedding, head, norms, biases and routers stay frozen.
        if path[0] not in ("stack", "rest") or path[-1] != KERNEL or path[-2] == ROUTER:
            continue
        first, names = pieces[0], get_at(axes, path)
        # The axis of experts is in the tensor itself if it has the maps of all of them.
        num_experts = first.view.shape[0] if names[len(first.at)] == EXPERT_AXIS else 0
        maps = [_one_map(piece) for piece in pieces] if num_experts else pieces
        num_lead, (num_inputs, fan_in_first) = len(first.at) + bool(num_experts), _inputs_of(maps[0])
        end = num_lead + num_inputs
        sites.append(
            Site(
                path=path[:-1],
                # The first projection of a fused module; the A of its adapter serves all of them.
                leader=found.setdefault(first.hf_name, path[:-1]),
                lead=shape[:num_lead],
                inputs=shape[num_lead:end],
                outputs=shape[end:],
                lead_axes=tuple(names[:num_lead]),
                input_axes=tuple(names[num_lead:end]),
                output_axes=tuple(names[end:]),
                modules=tuple(_module_of(piece, num_inputs, fan_in_first, num_experts) for piece in maps),
                # PEFT knows the layout of a parameter by itself.
                fan_in_first=fan_in_first and not num_experts,
            )
        )
    return tuple(sites)


def _one_map(piece: Piece) -> Piece:
    """Returns the map of the first expert, as if it had a tensor of its own."""
    (_, *inner), (_, *strides) = piece.view.shape, piece.view.strides
    return piece._replace(hf_shape=piece.hf_shape[1:], view=StridedView(piece.view.start, tuple(inner), tuple(strides)))


def _inputs_of(piece: Piece) -> tuple[int, bool]:
    """Returns the number of input axes of a kernel, and True if Hugging Face's weight is [in, out]."""
    num_rows, num_columns = piece.hf_shape
    fan_in_first = piece.view.strides[-1] < num_columns  # the last axis is an output
    num_all = num_rows if fan_in_first else num_columns
    # Found by counting, not by strides: the stride of an axis of size one, such as a single head, is ambiguous.
    products = itertools.accumulate(piece.view.shape, operator.mul)
    num_inputs = next((count for count, product in enumerate(products, start=1) if product == num_all), None)
    assert num_inputs is not None, piece
    return num_inputs, fan_in_first


def _module_of(piece: Piece, num_inputs: int, fan_in_first: bool, num_experts: int) -> Module:
    num_rows, num_columns = piece.hf_shape
    # An output is a row of [out, in], so that numbers of elements become numbers of rows.
    start, unit, num_outputs = piece.view.start // num_columns, num_columns, num_rows
    if fan_in_first:
        # Here an output is a column of [in, out].
        start, unit, num_outputs = piece.view.start % num_columns, 1, num_columns
    strides = tuple(stride // unit for stride in piece.view.strides[num_inputs:])
    name = piece.hf_name.removesuffix(".weight")
    key = _parameter_key(name) if num_experts else name
    return Module(piece.at, name, start, strides, num_outputs, key, num_experts)


def _parameter_key(name: str) -> str:
    """Returns the name of an adapted parameter of experts in PEFT's files, which is that of a wrapper.

    PEFT wraps the module of experts once for each of its parameters, first for gate and up, then for down, and names a
    wrapper by what it wraps.
    """
    module, parameter = name.rsplit(".", 1)
    return module if parameter == "down_proj" else f"{module}.base_layer"


def frozen_modules(model: Transformer, sites: Sequence[Site]) -> tuple[str, ...]:
    """Returns the modules with weights that are not sites: embedding, head (also a tied one), norms and routers.

    Args:
      sites: all sites of the model.
    """
    known = {module.name for site in sites for module in site.modules}
    names = dict.fromkeys([*hf_tensors(model.config), layout_of(model.config).head.hf_name])
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return tuple(name for name in modules if name not in known)


def choose_sites(sites: Sequence[Site], targets: Targets, frozen: Sequence[str] = ()) -> tuple[Site, ...]:
    """Returns the sites that PEFT's `target_modules` selects.

    Args:
      targets: "all-linear", a regular expression for whole module names, or a list of names or of their last parts.
      frozen: names of modules that a regular expression must not match, see `frozen_modules`.

    Raises:
      ValueError: no module has a name, a module cannot be adapted, or only some layers of a stack are selected.
    """
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return tuple(sites)
    names = [module.name for site in sites for module in site.modules]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules {targets!r} is not a regular expression: {error}") from None
        # PEFT matches an expression against whole names, but entries of a list against their ends.
        chosen = {name for name in names if pattern.fullmatch(name)}
        if beyond := [name for name in frozen if pattern.fullmatch(name)]:
            raise ValueError(f"target_modules {targets!r} also matches {_listed(beyond)}{_known(names)}")
    else:
        chosen = set()
        for target in targets:
            found = {name for name in names if name == target or name.endswith(f".{target}")}
            if not found:
                raise ValueError(f"target_modules: no module is called {target!r}{_known(names)}")
            chosen |= found
    if not chosen:
        raise ValueError(f"target_modules: no module matches {targets!r}{_known(names)}")
    found_sites = whole_sites(sites, chosen, "target_modules")
    _require_whole_experts(sites, found_sites)
    return found_sites


def _require_whole_experts(sites: Sequence[Site], chosen: Sequence[Site]) -> None:
    """Refuses adapters of some maps of the experts: PEFT keeps those of all maps as one."""
    of_experts = dict.fromkeys(last_name(site) for site in sites if EXPERT_AXIS in site.lead_axes)
    adapted = {last_name(site) for site in chosen if EXPERT_AXIS in site.lead_axes}
    left_out = [name for name in of_experts if name not in adapted]
    if adapted and left_out:
        raise ValueError(
            f"target_modules selects {', '.join(sorted(adapted))} of the experts, but not {', '.join(left_out)}; PEFT "
            "can load adapters of all maps of an expert or of none, so name all of them or none"
        )


def require_loadable(sites: Sequence[Site], chosen: Sequence[Site]) -> None:
    """Refuses adapters that PEFT would silently not load.

    In a model with experts, PEFT treats every module with the name of an expert's map as one, even a dense map.

    Raises:
      ValueError: such a dense map is adapted.
    """
    of_experts = {last_name(site) for site in sites if EXPERT_AXIS in site.lead_axes and not has_all_experts(site)}
    lost = [site for site in chosen if EXPERT_AXIS not in site.lead_axes and last_name(site) in of_experts]
    if lost:
        names = _listed([module.name for site in lost for module in site.modules])
        raise ValueError(
            f"lora: PEFT would not load the adapters of {names}: it mistakes these dense maps for maps of experts. "
            "Export the merged model instead (lora.merge: true), or do not adapt them, "
            r"as with target_modules '.*\.(self_attn|mlp\.experts)\..*'"
        )


def whole_sites(sites: Sequence[Site], modules: Iterable[str], asked_by: str) -> tuple[Site, ...]:
    """Returns the sites whose modules are all in `modules`.

    Args:
      asked_by: the setting or folder that the modules come from, for messages.

    Raises:
      ValueError: only some modules of a site are in `modules`.
    """
    chosen, found = set(modules), []
    for site in sites:
        names = [module.name for module in site.modules]
        left_out = [name for name in names if name not in chosen]
        if not left_out:
            found.append(site)
        elif len(left_out) < len(names):
            raise ValueError(
                f"{asked_by}: {last_name(site)} is adapted in some layers but not in {_listed(left_out)}, which jdpo "
                "computes as one stack; adapt it in every layer or in none"
            )
    return tuple(found)


def _known(names: Sequence[str]) -> str:
    last = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return (
        f"; the modules that can be adapted are {', '.join(last)} (all of them: {ALL_LINEAR}), such as {names[0]}. "
        "Embedding, head and norms remain frozen"
    )


def _listed(names: Sequence[str]) -> str:
    return listed([terminal(name) for name in names], _MOST_NAMED)
