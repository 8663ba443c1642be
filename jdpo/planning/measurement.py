"""The costs of a compiled step as one JSON object."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jdpo.planning.attention_kernels import AttentionWork, attention_work
from jdpo.planning.compiled_step import CompiledStep, compiling_on
from jdpo.planning.hlo.hlo_text import Module, Op, parse
from jdpo.planning.hlo.origins import origin_of
from jdpo.planning.links import Place, link_seconds, links_of, places_of
from jdpo.planning.roofline import Communication, Executed, Roofline, Speeds

LARGE_BYTES = 16 * 2**20
"""Copies, transposes and scatters of at least this many bytes are listed."""

MOST_LISTED = 20


def measure(step: CompiledStep) -> dict[str, Any]:
    """Returns the memory, FLOPs, collectives, kernels and estimated time of a compiled step.

    All figures are of one device and one step, except `logical_flops`, which is of one step on all devices. See
    `jdpo.planning.roofline` for what `time_ms` and `mfu_bound` are.
    """
    machine, planned = step.machine, step.planned
    with compiling_on(machine):
        flops = planned.assembly.flops(planned.batch)
        attention = attention_work(planned)
    chip = machine.chip
    places = places_of(machine, step.devices)
    roofline = roofline_of(step, attention)
    module = roofline.module
    seconds = roofline.seconds()
    executed, communications = list(roofline.executed()), list(roofline.communications())
    ideal = flops.logical / machine.num_devices / (chip.tera_flops["bfloat16"] * 1e12)
    memory = step.memory
    return {
        **program_of(step),
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "share_of_memory": round(memory.peak_memory_in_bytes / chip.hbm_bytes, 4),
        "logical_flops": flops.logical,
        "executed_flops": _executed_flops(executed),
        "memory_traffic_bytes": round(sum(each.times * each.cost.num_bytes for each in executed)),
        "wire_bytes": round(sum(each.times * each.collective.wire_bytes for each in communications)),
        "collectives": _collectives(communications, places),
        "kernels": _kernels(executed),
        "attention": attention.backend,
        "large_moves": _moves(module, executed),
        "slowest": _slowest(executed),
        "loops_counted_once": roofline.loops_counted_once,
        "time_ms": {"total": _ms(seconds.total)}
        | {
            field.name: _ms(getattr(seconds, field.name))
            for field in dataclasses.fields(seconds)
            if field.name != "flops"
        },
        "mfu_bound": round(ideal / seconds.total, 4),
        "seconds_to_lower": round(step.seconds_to_lower, 1),
        "seconds_to_compile": round(step.seconds_to_compile, 1),
    }


def roofline_of(step: CompiledStep, attention: AttentionWork) -> Roofline:
    """Returns the estimated times of a step on its machine, by the figures of its chips."""
    machine, chip = step.machine, step.machine.chip
    links, places = links_of(machine), places_of(machine, step.devices)
    return Roofline(
        parse(step.text),
        speeds=Speeds({dtype: tera * 1e12 for dtype, tera in chip.tera_flops.items()}, chip.hbm_bandwidth),
        num_devices=machine.num_devices,
        link_seconds=lambda collective: link_seconds(collective, places, links),
        attention=attention,
    )


def program_of(step: CompiledStep) -> dict[str, Any]:
    """Returns what identifies a program: its model, settings and machine."""
    planned, machine = step.planned, step.machine
    setup = planned.assembly.setup
    config = setup.config
    return {
        "model": config.model_name_or_path.rstrip("/").split("/")[-1],
        "command": setup.task.command,
        "layers": planned.source_config.num_layers,
        "lora_rank": setup.adaptation.lora.r if setup.adaptation else None,
        "optimizer": config.optimizer.name,
        "target": machine.name,
        "devices": machine.num_devices,
        "mesh": dict(setup.mesh.shape),
        "remat": planned.remat,
        "rows": config.global_batch_size,
        "tokens_per_device": planned.tokens_per_device,
        "micro_batches": int(planned.batch.tokens.shape[0]),
        # Another checkout, which `benchmarks/aot.py --code` measures, may have none.
        "compiler_options": dict(getattr(planned.assembly, "options", {})),
    }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _add(row: dict[str, float], **amounts: float) -> None:
    for name, amount in amounts.items():
        row[name] = row.get(name, 0) + amount


def _executed_flops(executed: Iterable[Executed]) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in executed:
        _add(total, **{dtype: each.times * flops for dtype, flops in each.cost.flops.items()})
    return total


def _kernels(executed: Iterable[Executed]) -> dict[str, int]:
    """Returns how often each custom call runs; a kernel written in Pallas by its own name."""
    counts: Counter[str] = Counter()
    for each in executed:
        target = each.op.target
        if target is not None:
            # The name of a Pallas kernel is that of its operation, which is numbered.
            name = re.sub(r"(\.\d+)+$", "", each.op.name) if target == "tpu_custom_call" else target
            counts[name] += each.times
    return dict(counts)


def _collectives(communications: Iterable[Communication], places: Sequence[Place]) -> list[dict[str, Any]]:
    """Returns the collectives, those of one kind, dtype and origin together, the most bytes first."""
    rows: defaultdict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for each in communications:
        found = each.collective
        crosses = any(len({places[int(device)].slice_index for device in group}) > 1 for group in found.groups)
        _add(
            rows[found.kind, found.dtype, origin_of(found.op_name), each.hidden, crosses],
            count=each.times,
            bytes=round(each.times * found.num_bytes),
            wire_bytes=round(each.times * found.wire_bytes),
            ms=each.times * each.seconds * 1e3,
        )
    keys = ("kind", "dtype", "origin", "compute_meanwhile", "across_slices")
    return _listed(keys, rows, by="wire_bytes")


def _moves(module: Module, executed: Iterable[Executed]) -> list[dict[str, Any]]:
    """Returns the large copies, transposes and scatters, the most bytes first."""
    rows: defaultdict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for each in executed:
        kind = _moved(module, each.op)
        if kind and each.cost.num_bytes >= LARGE_BYTES:
            array = each.op.arrays[0]
            shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
            _add(
                rows[kind, shape, origin_of(each.op_name)],
                count=each.times,
                bytes=round(each.times * each.cost.num_bytes),
            )
    return _listed(("kind", "array", "origin"), rows, by="bytes")[:MOST_LISTED]


def _moved(module: Module, op: Op) -> str | None:
    """Returns "copy", "transpose" or "scatter" for an operation that does nothing else, or a fusion around it."""
    kinds = ("scatter", "transpose", "copy")
    if op.opcode != "fusion":
        return op.opcode if op.opcode in kinds else None
    callee = module.called(op)[0]
    inner = {each.opcode for each in callee.ops}
    if "scatter" in inner:
        return "scatter"
    root = callee.root
    while root.opcode == "bitcast":
        root = callee.by_name[root.operands[0]]
    # GPU programs name a fusion after the transpose that decides how it is computed.
    named = next((kind for kind in kinds if kind in op.name), None)
    return root.opcode if root.opcode in kinds else named if named in inner else None


def _slowest(executed: Iterable[Executed]) -> list[dict[str, Any]]:
    """Returns where the time of operations goes, by origin."""
    rows: defaultdict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for each in executed:
        if each.seconds:
            _add(
                rows[origin_of(each.op_name) or each.op.opcode, bool(each.cost.flops)],
                ms=each.times * each.seconds * 1e3,
                gflops=each.times * sum(each.cost.flops.values()) / 1e9,
                mib=each.times * each.cost.num_bytes / 2**20,
            )
    return _listed(("origin", "matrix_products"), rows, by="ms")[:MOST_LISTED]


def _listed(
    keys: Sequence[str], rows: Mapping[tuple[Any, ...], Mapping[str, float]], *, by: str
) -> list[dict[str, Any]]:
    """Returns rows with their keys, the largest first; equal ones in an order that does not depend on the program's."""
    order = sorted(rows, key=lambda key: (-rows[key][by], *map(str, key)))
    return [
        dict(zip(keys, key, strict=True)) | {name: round(amount, 3) for name, amount in rows[key].items()}
        for key in order
    ]
