"""Variants next to each other: chunks of the head, attention kernels, and remat policies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from speed_part import AT_ONCE, EQUAL, Case, figures_of, first_line, model_folder, told
from timing import in_turns, quartiles

from jdpo.devices import target
from jdpo.losses import linear_token_logps
from jdpo.models.attention import causal_attention, check_attention
from jdpo.models.remat import REMAT_ORDER

CHUNKS = (256, 512, 1024, 2048, 4096)
BACKENDS = ("cudnn", "splash", "blockwise", "xla")
ROUNDS = 5

SECONDS = 60.0
"""Of one policy at most, of which its steps take what compiling leaves."""

LEAST_LEFT = 45.0
"""No further variant is compiled with fewer seconds left."""

Result = dict[str, Any]
Operation = tuple[str, str, Callable[..., Any], tuple[Any, ...]]
"""What it is, the variant, the function, and its arguments."""


def run(name: str, request: Result, save: Callable[[Result], None]) -> None:
    """Measures the part."""
    ends = time.monotonic() + request["seconds"]
    least = 5.0 if request["tiny"] else LEAST_LEFT
    device = jax.devices()[0].device_kind
    result: Result = {"device_kind": device, "model": "", "operations": [], "cases": [], "checks": {}}
    for operations in (head_chunks(tiny=request["tiny"]), attention(tiny=request["tiny"])):
        if ends - time.monotonic() > least:
            result["operations"] += timed(operations)
            save(result)
    folder = model_folder("full", request)
    result["model"] = folder.name
    for remat in REMAT_ORDER:
        if ends - time.monotonic() < least:
            break
        result["cases"].append(under(remat, request, ends))
        save(result)


def timed(operations: Iterator[Operation]) -> list[Result]:
    """Times operations in turns; one that cannot be compiled is recorded with its error."""
    programs, results, found = {}, [], {}
    for what, variant, function, arguments in operations:
        try:
            program = jax.jit(function).lower(*arguments).compile()
            jax.block_until_ready(program(*arguments))
        except Exception as error:  # of any kind: other variants are still of interest
            results.append({"what": what, "variant": variant, "error": first_line(error)})
            continue
        programs[what, variant] = lambda program=program, given=arguments: jax.block_until_ready(program(*given))
        found[what, variant] = {"temporary_bytes": int(program.memory_analysis().temp_size_in_bytes)}
    for (what, variant), seconds in in_turns(programs, ROUNDS).items():
        low, median, high = quartiles(seconds)
        of_seconds = {"low": low, "median": median, "high": high}
        results.append({"what": what, "variant": variant, "seconds": of_seconds, **found[what, variant]})
        print(f"> compare: {what}, {variant}: {1000 * median:.3g} ms", flush=True)
    return results


def head_chunks(*, tiny: bool) -> Iterator[Operation]:
    """Yields log-probs of a head and their gradients, of 8B's sizes, with chunks of several sizes."""
    tokens, d_model, vocabulary = (256, 64, 512) if tiny else (16384, 4096, 128256)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, tokens, d_model), jnp.bfloat16)
    head = jax.random.normal(keys[1], (d_model, vocabulary), jnp.bfloat16) * d_model**-0.5
    targets = jax.random.randint(keys[2], (1, tokens), 0, vocabulary)
    for chunk in CHUNKS:

        def total(hidden: Any, head: Any, targets: Any, chunk: int = chunk) -> Any:
            return linear_token_logps(hidden, head, targets, chunk_size=chunk).sum()

        yield f"head of {tokens:,} tokens", f"chunks of {chunk:,}", jax.grad(total, (0, 1)), (hidden, head, targets)


def attention(*, tiny: bool) -> Iterator[Operation]:
    """Yields attention of 8B's heads and its gradients, by each backend that this device has."""
    rows, length, heads, kv_heads, width = (2, 128, 4, 2, 32) if tiny else (16, 1024, 32, 8, 128)
    keys = jax.random.split(jax.random.key(1), 3)
    operands = tuple(
        jax.random.normal(key, (rows, length, number, width), jnp.bfloat16)
        for key, number in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    )
    lengths = jnp.full(rows, length, jnp.int32)
    what = f"attention of {rows} x {length:,}"
    for backend in BACKENDS:
        try:
            check_attention(backend, dtype="bfloat16", head_dim=width, platform=target().platform)
        except ValueError:
            continue

        def total(*operands: Any, backend: str = backend) -> Any:
            return causal_attention(*operands, lengths=lengths, backend=backend).astype(jnp.float32).sum()

        yield what, backend, jax.grad(total, (0, 1, 2)), operands
    if target().platform == "tpu":
        yield what, "splash, two backward kernels", splash_gradients(length, heads, fused=False), operands
        yield what, "splash, one fused backward kernel", splash_gradients(length, heads, fused=True), operands


def splash_gradients(length: int, num_heads: int, *, fused: bool) -> Callable[..., Any]:
    """Returns the gradients of splash attention with one or two backward kernels."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = min(512, length)
    of_queries = {} if fused else {"block_q_dq": block, "block_kv_dq": block}
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=fused,
            **of_queries,
        ),
    )

    def total(*operands: Any) -> Any:
        heads_first = (jnp.swapaxes(operand, 1, 2) for operand in operands)
        return jax.vmap(kernel)(*heads_first).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))


def under(remat: str, request: Result, ends: float) -> Result:
    """Returns the figures of steps under a remat policy, or the error."""
    case = Case(EQUAL, f"remat {remat}", AT_ONCE, {"remat": remat, "max_tokens_per_device": AT_ONCE}, False)
    found = figures_of("full", case, model_folder("full", request), request, min(ends, time.monotonic() + SECONDS))
    print(f"> compare: {told(found)}", flush=True)
    # The peak of this process is that of all policies so far.
    return found | {"peak_bytes": None}
