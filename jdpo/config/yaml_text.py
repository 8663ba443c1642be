"""Reading YAML without its traps, and writing it so that every character is visible."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from jdpo.safe_text import escaped as escape
from jdpo.safe_text import is_unseen

MOST_VALUES = 100_000
"""Maximum number of values in a config; a value counts each time that an alias repeats it."""

MOST_CHARACTERS = 2**20
"""Maximum number of characters in a config."""

_BASE_60 = re.compile(r"[-+]?[0-9_]+(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice (plain YAML keeps the last one), and reads 10:13 as text, not as 613."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        # YAML 1.1 reads 10:13 as a number in base 60: 10 * 60 + 13.
        if kind is yaml.ScalarNode and implicit[0] and _BASE_60.fullmatch(value):
            return str(self.DEFAULT_SCALAR_TAG)
        parent: Any = super()  # has no annotations
        return str(parent.resolve(kind, value, implicit))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *name` adds the keys of another value; the keys next to it take precedence
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, name: str = "this text") -> Any:
    """Reads a YAML text, without Python objects.

    Args:
      name: what errors call the text, such as the file that it is from.

    Raises:
      yaml.YAMLError: broken YAML, a key written twice, values nested too deeply, or more than MOST_VALUES of them.
    """
    # Before parsing, whose time and memory grow with the text.
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"{len(text):,} characters, more than the {MOST_CHARACTERS:,} that a config may have")
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Merge keys are expanded while values are built, so the size is checked before that.
        if (size := _expanded_size(node, {})) > MOST_VALUES:
            raise yaml.YAMLError(
                f"it has {size:,} values once its aliases are written out, more than {MOST_VALUES:,}; write fewer "
                "aliases (*name) of values that hold aliases"
            )
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("its values are nested too deeply") from None
    except ValueError as error:  # a date or a number that does not exist
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Counts the values below a node and the node itself; an alias counts as often as it is used.

    Args:
      sizes: sizes of the nodes counted so far, by identity; None while a node is being counted.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise yaml.YAMLError("a value holds an alias of itself")
        return size
    # Marked before its children are counted, so that an alias of itself is found.
    sizes[id(node)] = None
    pairs = isinstance(node, yaml.MappingNode)
    children = [child for pair in node.value for child in pair] if pairs else node.value
    size = 1 + sum(_expanded_size(child, sizes) for child in children)
    sizes[id(node)] = size
    return size


def dump_yaml(values: Mapping[str, Any], escaped: str = "") -> str:
    """Writes values as YAML in which every character is visible: others are escaped within quotes."""

    def hides(character: str) -> bool:
        return character in escaped or is_unseen(character)

    class Dumper(yaml.SafeDumper):
        def represent_str(self, text: str) -> yaml.ScalarNode:
            # Only double-quoted text can hold escapes.
            style = '"' if any(map(hides, text)) else None
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, Dumper.represent_str)
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
    # The only control characters left are the line feeds of YAML itself; all others are within double quotes.
    return "".join(escape(one) if one != "\n" and hides(one) else one for one in text)
