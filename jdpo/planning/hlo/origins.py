"""Says in words which part of a step an operation of its program belongs to."""

from __future__ import annotations

import re

_WRAPPERS = re.compile(
    r"jit\(.*|jvp\(.*|transpose\(.*|vmap\(.*|while|body|cond|closed_call|stack|checkpoint|rematted_computation"
    r"|shard_map|custom_\w+_call|pallas_call|remat|core_call|Transformer\..*|layer_\d+|layer_\d+\..*|\d+|attention_\w+"
)
"""Parts of names that JAX's transformations and the model's structure add."""

_PARTS = (
    ("final_norm", "final norm"),
    ("embed", "embedding"),
    ("attention._project/query", "attention query"),
    ("attention._project/key", "attention key"),
    ("attention._project/value", "attention value"),
    ("attention/output", "attention output"),
    ("attention._attend", "attention"),
    ("delta._over", "delta rule"),
    ("/delta/", "DeltaNet"),
    ("attention_norm", "attention norm"),
    ("mlp_norm", "MLP norm"),
    ("mlp/gate", "MLP gate"),
    ("mlp/up", "MLP up"),
    ("mlp/down", "MLP down"),
    ("experts", "experts"),
    ("/mlp", "MLP"),
    ("rope", "rotary position embedding"),
    ("/attention", "attention"),
    ("lm_head", "head"),
    ("head_kernel", "head"),
)


def origin_of(op_name: str) -> str:
    """Returns the part of the model and the pass that an operation's `op_name` tells; "" where it is empty.

    >>> origin_of("jit(train_step)/jvp(Transformer.packed)/Transformer._run/while/body/layer_0._mlp/mlp/up/dot_general")
    'MLP up, forward'
    >>> origin_of("jit(train_step)/transpose(jvp())/shard_map/while/body/dv,rv->rd/dot_general")
    'head, backward'
    >>> origin_of("jit(train_step)/jvp(Transformer.packed)/layer_0/delta/delta._over_rows/shard_map/while/body/sub")
    'delta rule, forward'
    >>> origin_of("jit(train_step)/mul")
    'update of the weights'
    """
    if not op_name:
        return ""
    # Several names are joined where operations were merged; the first is that of the result.
    name = op_name.split(";")[0]
    part = next((words for key, words in _PARTS if key in name), None)
    if "jvp" not in name:
        # Outside of the differentiated function: what the optimizer does, unless the name is that of an argument.
        return f"{part}, weights" if part else "update of the weights"
    if part is None:
        # The loss and the head are the only computations outside of the model's named parts.
        part = "head" if "shard_map" in name or ("/while/" in name and "Transformer" not in name) else _rest(name)
    return f"{part}, {_pass_of(name)}"


def _pass_of(name: str) -> str:
    if "rematted_computation" in name:
        return "recomputed"
    return "backward" if "transpose(" in name else "forward"


def _rest(name: str) -> str:
    """Returns what is left of a name without the parts that JAX's transformations add."""
    words = [word for word in name.split("/") if not _WRAPPERS.fullmatch(word)]
    return "layers" if "Transformer._run" in name and len(words) <= 1 else "/".join(words[-2:]) or "step"
