"""The projections of a model's layers that adapters may sit at, by the names that Hugging Face gives their modules."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Sequence

from jdpo.models.lora.sites import EXPERT_AXIS, KERNEL, ROUTER, Module, Path, Site, get_at, last_name
from jdpo.models.transformer import Transformer, logical_axes
from jdpo.models.weights.hf_names import Piece, hf_tensors, layout_of, leaves
from jdpo.safe_text import terminal
from jdpo.words import listed

Targets = str | Sequence[str]

ALL_LINEAR = "all-linear"

_MOST_NAMED = 8


def find_sites(model: Transformer) -> tuple[Site, ...]:
    """Every projection of the layers that an adapter may sit at, in the order of the forward pass."""
    found: dict[str, Path] = {}
    axes = logical_axes(model)
    sites = []
    for path, (shape, pieces) in leaves(model.config).items():
        if path[0] not in ("stack", "rest") or path[-1] != KERNEL or path[-2] == ROUTER:
            continue
        first, names = pieces[0], get_at(axes, path)
        num_lead, (num_inputs, fan_in_first) = len(first.at), _inputs_of(first)
        behind = num_lead + num_inputs
        sites.append(
            Site(
                path=path[:-1],
                leader=found.setdefault(first.hf_name, path[:-1]),
                lead=shape[:num_lead],
                inputs=shape[num_lead:behind],
                outputs=shape[behind:],
                lead_axes=tuple(names[:num_lead]),
                input_axes=tuple(names[num_lead:behind]),
                output_axes=tuple(names[behind:]),
                modules=tuple(_module_of(piece, num_inputs, fan_in_first) for piece in pieces),
                fan_in_first=fan_in_first,
            )
        )
    return tuple(sites)


def _inputs_of(piece: Piece) -> tuple[int, bool]:
    """How many axes of a kernel are inputs, and whether Hugging Face has them in front."""
    num_rows, num_columns = piece.hf_shape
    fan_in_first = piece.view.strides[-1] < num_columns  # the last axis is an output
    num_all = num_rows if fan_in_first else num_columns
    # Counted, not told by strides: those of an axis of one, such as a single head, may be either's.
    products = itertools.accumulate(piece.view.shape, operator.mul)
    num_inputs = next((count for count, product in enumerate(products, start=1) if product == num_all), None)
    assert num_inputs is not None, piece
    return num_inputs, fan_in_first


def _module_of(piece: Piece, num_inputs: int, fan_in_first: bool) -> Module:
    num_rows, num_columns = piece.hf_shape
    start, unit, num_outputs = piece.view.start // num_columns, num_columns, num_rows
    if fan_in_first:
        start, unit, num_outputs = piece.view.start % num_columns, 1, num_columns
    strides = tuple(stride // unit for stride in piece.view.strides[num_inputs:])
    return Module(piece.at, piece.hf_name.removesuffix(".weight"), start, strides, num_outputs)


def frozen_modules(model: Transformer, sites: Sequence[Site]) -> tuple[str, ...]:
    """The modules with weights that are no sites: embedding, head (tied as well), norms and routers.

    Args:
      sites: all of the model's.
    """
    known = {module.name for site in sites for module in site.modules}
    names = dict.fromkeys([*hf_tensors(model.config), layout_of(model.config).head.hf_name])
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return tuple(name for name in modules if name not in known)


def choose_sites(sites: Sequence[Site], targets: Targets, frozen: Sequence[str] = ()) -> tuple[Site, ...]:
    """The sites that PEFT's `target_modules` means.

    Args:
      targets: "all-linear", a regular expression for whole module names, or a list of names or of their last parts.
      frozen: names of modules that a regular expression must not match, see `frozen_modules`.

    Raises:
      ValueError: a name that no module has, a module that cannot be adapted, or only some of a stack's layers.
    """
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return tuple(sites)
    names = [module.name for site in sites for module in site.modules]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules {targets!r} is not a regular expression: {error}") from None
        chosen = {name for name in names if pattern.fullmatch(name)}
        if beyond := [name for name in frozen if pattern.fullmatch(name)]:
            raise ValueError(f"target_modules {targets!r} matches {_listed(beyond)} too{_known(names)}")
    else:
        chosen = set()
        for target in targets:
            found = {name for name in names if name == target or name.endswith(f".{target}")}
            if not found:
                raise ValueError(f"target_modules: no module is called {target!r}{_known(names)}")
            chosen |= found
    if not chosen:
        raise ValueError(f"target_modules: no module is called as {targets!r} asks{_known(names)}")
    found_sites = whole_sites(sites, chosen, "target_modules")
    _require_whole_experts(sites, found_sites)
    return found_sites


def _require_whole_experts(sites: Sequence[Site], chosen: Sequence[Site]) -> None:
    """PEFT keeps the adapters of all maps of the experts as one, so that it has all of them or none."""
    of_experts = dict.fromkeys(last_name(site) for site in sites if EXPERT_AXIS in site.lead_axes)
    adapted = {last_name(site) for site in chosen if EXPERT_AXIS in site.lead_axes}
    left_out = [name for name in of_experts if name not in adapted]
    if adapted and left_out:
        raise ValueError(
            f"target_modules: of the experts {', '.join(sorted(adapted))} would be adapted, {', '.join(left_out)} not; "
            "PEFT can load adapters of all maps of an expert, or of none. Name all of them, or none"
        )


def require_loadable(sites: Sequence[Site], chosen: Sequence[Site]) -> None:
    """Refuses adapters that PEFT would lose.

    In a model with experts it takes every module that is called as a map of an expert for one, and says nothing where
    it is another.

    Raises:
      ValueError: such modules are adapted; what to do is said.
    """
    of_experts = {last_name(site) for site in sites if EXPERT_AXIS in site.lead_axes}
    lost = [site for site in chosen if EXPERT_AXIS not in site.lead_axes and last_name(site) in of_experts]
    if lost:
        names = _listed([module.name for site in lost for module in site.modules])
        raise ValueError(
            f"lora: PEFT would load an exported adapter without its part for {names}: it takes these dense maps for "
            "experts'. Export the merged model instead (lora.merge: true), or leave them out, "
            r"as with target_modules '.*\.(self_attn|mlp\.experts)\..*'"
        )


def whole_sites(sites: Sequence[Site], modules: Iterable[str], asked_by: str) -> tuple[Site, ...]:
    """The sites whose modules are all among `modules`.

    Raises:
      ValueError: a site has some of its modules there and others not.
    """
    chosen, found = set(modules), []
    for site in sites:
        names = [module.name for module in site.modules]
        left_out = [name for name in names if name not in chosen]
        if not left_out:
            found.append(site)
        elif len(left_out) < len(names):
            raise ValueError(
                f"{asked_by}: {last_name(site)} is adapted in some of the layers that jdpo computes as "
                f"one, and not in all: {_listed(left_out)} is left out; adapt it in every layer, or in none"
            )
    return tuple(found)


def _known(names: Sequence[str]) -> str:
    last = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return (
        f"; the modules that can be adapted are {', '.join(last)} (all of them: {ALL_LINEAR}), such as {names[0]}. "
        "Embedding, head and norms stay frozen"
    )


def _listed(names: Sequence[str]) -> str:
    return listed([terminal(name) for name in names], _MOST_NAMED)
