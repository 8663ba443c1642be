"""Sites of adapters, and trees of values by path. `jdpo.models.lora.targets` finds and chooses the sites of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Path = tuple[str, ...]

KERNEL, ROUTER = "kernel", "router"
"""A router's kernel is in float32 and is neither adapted nor quantized, so that tokens go to the same experts."""
EXPERT_AXIS = "expert"
"""Name of the leading axis of experts of a kernel."""


class Module(NamedTuple):
    """A module of Hugging Face's model, and the positions of one projection's outputs among its own.

    Attributes:
      at: the module's index along the leading axes of the kernel.
      start, strides: output (i, j, ..) of the projection is output start + i strides[0] + j strides[1] + .. of it.
      num_outputs: number of its outputs; more than the projection's if several projections share it.
      key: its name in PEFT's files.
      num_experts: number of experts whose maps are in its one tensor, which PEFT adapts as a parameter of a module; 0
        for a module of one map.
    """

    at: tuple[int, ...]
    name: str
    start: int
    strides: tuple[int, ...]
    num_outputs: int
    key: str
    num_experts: int = 0


class Site(NamedTuple):
    """A projection that can be adapted, in all its layers or in none.

    Attributes:
      path: path of the projection in the params.
      leader: path of the projection whose A it uses: its own, or that of the first one that shares its module.
      lead, inputs, outputs: the three parts of the kernel's shape.
      lead_axes, input_axes, output_axes: the kernel's logical axes.
      modules: its modules in Hugging Face's model.
      fan_in_first: True if Hugging Face keeps the weight as [in, out] (Conv1D), not [out, in].
    """

    path: Path
    leader: Path
    lead: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    lead_axes: tuple[str | None, ...]
    input_axes: tuple[str | None, ...]
    output_axes: tuple[str | None, ...]
    modules: tuple[Module, ...]
    fan_in_first: bool


def has_all_experts(site: Site) -> bool:
    """Returns True if a tensor of the site has the maps of all experts of a layer."""
    return site.modules[0].num_experts > 0


def last_name(site: Site) -> str:
    """Returns the last part of the name of a site's modules, such as q_proj."""
    return site.modules[0].name.rsplit(".", 1)[-1]


def get_at(tree: Mapping[str, Any], path: Path) -> Any:
    """Returns the value at a path of a tree."""
    value: Any = tree
    for key in path:
        value = value[key]
    return value


def tree_of(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns nested dicts made of leaves by path.

    >>> tree_of({("a", "b"): 1, ("a", "c"): 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
