"""A projection that an adapter may sit at, and trees of values by path.

Which projections a model has, and which of them are adapted, is in `jdpo.models.lora.targets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Path = tuple[str, ...]

KERNEL, ROUTER = "kernel", "router"
"""A router's kernel decides where tokens go, in float32: it is neither adapted nor quantized."""
EXPERT_AXIS = "expert"
"""The leading axis of a kernel that counts experts."""


class Module(NamedTuple):
    """A module of Hugging Face's model, and where the outputs of one projection stand among its own.

    Attributes:
      at: its index along the leading axes of the kernel.
      start, strides: output (i, j, ..) of the projection is number start + i strides[0] + j strides[1] + .. there.
      num_outputs: all that it has; more than the projection's where several share it.
    """

    at: tuple[int, ...]
    name: str
    start: int
    strides: tuple[int, ...]
    num_outputs: int


class Site(NamedTuple):
    """A projection that may be adapted; all its layers are, or none.

    Attributes:
      path: of the projection in the params.
      leader: whose A it takes: itself, or the first of those that share a module of Hugging Face.
      lead, inputs, outputs: the kernel's shape, cut in three.
      lead_axes, input_axes, output_axes: its logical axes.
      modules: its modules in Hugging Face's model.
      fan_in_first: whether Hugging Face keeps the weight [in, out] (Conv1D) and not [out, in].
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


def last_name(site: Site) -> str:
    """What people call a site's modules, such as q_proj."""
    return site.modules[0].name.rsplit(".", 1)[-1]


def get_at(tree: Mapping[str, Any], path: Path) -> Any:
    """What stands at a path of a tree."""
    value: Any = tree
    for key in path:
        value = value[key]
    return value


def tree_of(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested dicts of leaves by path.

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
