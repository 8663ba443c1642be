"""The reader of optimized programs: types, loops, the work of operations, and collectives, on programs by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jdpo.planning.hlo.collectives import Collective, collectives_of, groups_of
from jdpo.planning.hlo.hlo_text import Array, Computation, Module, Op, parse
from jdpo.planning.hlo.op_costs import Cost, cost_of
from jdpo.planning.hlo.origins import origin_of
from jdpo.planning.hlo.trip_counts import trip_count


def entry_of(module: Module) -> Computation:
    return module.computations[module.entry]


def cost(text: str, name: str) -> Cost:
    module = parse(text)
    return cost_of(module, entry_of(module), entry_of(module).by_name[name])


def test_an_attribute_of_several_lines_belongs_to_its_operation() -> None:
    module = parse(
        """HloModule m
ENTRY %main (p: bf16[2,8]) -> (f32[2], bf16[2,8]) {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %k.1 = (f32[2]{0:T(128)}, bf16[2,8]{1,0}) custom-call(%p), custom_call_target="tpu_custom_call", a={k={
"block": "{384}"
}}, metadata={op_name="jit(f)/kernel"}
}
"""
    )
    root = entry_of(module).root
    assert (root.target, root.op_name) == ("tpu_custom_call", "jit(f)/kernel")
    assert root.arrays == (Array("f32", (2,)), Array("bf16", (2, 8)))
    assert entry_of(module).by_name["p"].array == Array("bf16", (2, 8), space=1)
    assert entry_of(module).by_name["p"].array.num_bytes == 32


def test_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule m")


LOOP = """
%add_two (q: s32[]) -> s32[] {
  %q = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %sum = s32[] add(%q, %two)
}
%body (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %next = s32[] fusion(%i), kind=kLoop, calls=%add_two
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}
%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}
%condition (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %lt = pred[] fusion(%i, %n), kind=kLoop, calls=%less
}
ENTRY %main (p: s32[]) -> (s32[], s32[]) {
  %p = s32[] parameter(0)
  %zero = s32[] constant(0)
  %most = s32[] constant(LIMIT)
  %limit = s32[] minimum(%p, %most)
  %start = (s32[], s32[]) tuple(%zero, %limit)
  ROOT %w = (s32[], s32[]) while(%start), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("limit", "turns"), [(12, 6), (13, 7), (0, 0)])
def test_a_loop_with_a_limit_that_data_decide_counts_with_its_bound(limit: int, turns: int) -> None:
    module = parse(LOOP.replace("LIMIT", str(limit)))
    assert trip_count(module, entry_of(module), entry_of(module).by_name["w"]) == turns


def test_a_loop_without_a_bound_is_unknown() -> None:
    module = parse(LOOP.replace("minimum(%p, %most)", "maximum(%p, %most)").replace("LIMIT", "3"))
    assert trip_count(module, entry_of(module), entry_of(module).by_name["w"]) is None


def test_the_number_of_turns_that_the_compiler_writes_down_is_taken() -> None:
    known = 'body=%body, backend_config={"known_trip_count":{"n":"32"}}'
    module = parse(LOOP.replace("body=%body", known))
    assert trip_count(module, entry_of(module), entry_of(module).by_name["w"]) == 32


def test_a_convolution_that_is_a_matrix_product_counts_without_its_padding() -> None:
    # As libtpu writes [64, 32] x [32, 8, 16] -> [64, 8, 16]: a window of 8 with 7 places of padding on each side.
    found = cost(
        """
ENTRY %main (x: bf16[64,32,1], w: f32[32,8,16]) -> bf16[64,8,16] {
  %x = bf16[64,32,1] parameter(0)
  %w = f32[32,8,16] parameter(1)
  ROOT %c = bf16[64,8,16] convolution(%x, %w), window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_i0o->b0f
}""",
        "c",
    )
    assert found.flops == {"float32": 2 * 64 * 32 * 8 * 16}
    assert found.num_bytes == 2 * 64 * 32 + 4 * 32 * 8 * 16 + 2 * 64 * 8 * 16


def test_a_matrix_product_of_cublas_is_read_from_its_settings() -> None:
    found = cost(
        """
ENTRY %main (x: bf16[4,6], w: bf16[6,5]) -> (bf16[4,5], s8[64]) {
  %x = bf16[4,6] parameter(0)
  %w = bf16[6,5] parameter(1)
  ROOT %c = (bf16[4,5], s8[64]) custom-call(%x, %w), custom_call_target="__cublas$gemm", """
        """backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}""",
        "c",
    )
    assert found.flops == {"bfloat16": 2 * 4 * 5 * 6}


def test_a_fusion_reads_the_slice_that_it_needs_and_writes_the_part_that_it_updates() -> None:
    found = cost(
        """
%fused (stack: f32[32,8], i: s32[], row: f32[1,8], other: f32[32,8]) -> (f32[32,8], f32[1,8]) {
  %stack = f32[32,8] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8] dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,8}
  %row = f32[1,8] parameter(2)
  %sum = f32[1,8] add(%slice, %row)
  %other = f32[32,8] parameter(3)
  %new = f32[32,8] dynamic-update-slice(%other, %sum, %i, %zero)
  ROOT %t = (f32[32,8], f32[1,8]) tuple(%new, %sum)
}
ENTRY %main (a: f32[32,8], i: s32[], row: f32[1,8], b: f32[32,8]) -> (f32[32,8], f32[1,8]) {
  %a = f32[32,8] parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,8]{1,0:S(1)} parameter(2)
  %b = f32[32,8] parameter(3)
  ROOT %f = (f32[32,8], f32[1,8]) fusion(%a, %i, %row, %b), kind=kLoop, calls=%fused
}""",
        "f",
    )
    # A row of the stack, the number of the row, a row of the update, and the sum; %row is next to the units of a TPU.
    assert found == Cost({}, 32 + 4 + 32 + 32)


@pytest.mark.parametrize(
    ("operation", "num_bytes"),
    [
        ("dynamic-update-slice(%x, %u, %i, %i)", 16 + 16),
        ("dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,4}", 16 + 16 + 2 * 4),
        ("add(%x, %x)", 3 * 128),
        ("bitcast(%x)", 0),
        ('custom-call(), custom_call_target="AllocateBuffer"', 0),
    ],
)
def test_bytes_of_single_operations(operation: str, num_bytes: int) -> None:
    result = "f32[1,4]" if operation.startswith("dynamic-slice") else "f32[8,4]"
    found = cost(
        f"""
ENTRY %main (x: f32[8,4], u: f32[1,4], i: s32[]) -> {result} {{
  %x = f32[8,4] parameter(0)
  %u = f32[1,4] parameter(1)
  %i = s32[] parameter(2)
  ROOT %r = {result} {operation}
}}""",
        "r",
    )
    assert found == Cost({}, num_bytes)


# --- collectives


def only(text: str, num_devices: int = 4) -> Collective:
    module = parse(text)
    (found,) = collectives_of(module, entry_of(module), num_devices)
    return found


@pytest.mark.parametrize(
    ("kind", "result", "operand", "num_bytes", "wire"),
    [
        ("all-gather", "bf16[32,8]", "bf16[8,8]", 512, 384),
        ("reduce-scatter", "bf16[8,8]", "bf16[32,8]", 512, 384),
        ("all-reduce", "f32[8]", "f32[8]", 32, 48),
        ("all-to-all", "f32[8]", "f32[8]", 32, 24),
    ],
)
def test_what_a_collective_carries(kind: str, result: str, operand: str, num_bytes: int, wire: int) -> None:
    found = only(
        f"""
ENTRY %main (x: {operand}) -> {result} {{
  %x = {operand} parameter(0)
  ROOT %c = {result} {kind}(%x), replica_groups={{{{0,1,2,3}}}}, metadata={{op_name="jit(f)/c"}}
}}"""
    )
    assert (found.kind, found.num_bytes, found.wire_bytes) == (kind, num_bytes, wire)
    assert found.start == found.done


def test_a_collective_over_one_device_is_none() -> None:
    module = parse(
        """
ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8] parameter(0)
  ROOT %c = bf16[8] all-gather(%x), replica_groups={{0},{1}}
}"""
    )
    assert collectives_of(module, entry_of(module), 2) == []


def test_an_asynchronous_gather_of_two_arrays() -> None:
    found = only(
        """
ENTRY %main (x: bf16[8], y: bf16[4]) -> (bf16[32], bf16[16]) {
  %x = bf16[8] parameter(0)
  %y = bf16[4] parameter(1)
  %s = ((bf16[8], bf16[4]), (bf16[32], bf16[16])) all-gather-start(%x, %y), replica_groups=[1,4]<=[4]
  %p = bf16[8] add(%x, %x)
  ROOT %d = (bf16[32], bf16[16]) all-gather-done(%s)
}"""
    )
    assert (found.num_bytes, found.done - found.start) == (2 * 48, 2)


TPU = """
%started (x: bf16[8]) -> (bf16[8], bf16[32], u32[]) {
  %x = bf16[8] parameter(0)
  %g = bf16[32] all-gather(%x), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %c = (bf16[8], bf16[32], u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%between (a: bf16[8,8], x: bf16[8], b: bf16[32]) -> (bf16[8,8], bf16[32]) {
  %a = bf16[8,8] parameter(0)
  %x = bf16[8] parameter(1)
  %b = bf16[32] parameter(2)
  %dot = bf16[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g = bf16[32] all-gather(%x), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %t = (bf16[8,8], bf16[32], bf16[32]) tuple(%dot, %g, %b)
}
%ended (x: bf16[8], b: bf16[32]) -> bf16[32] {
  %x = bf16[8] parameter(0)
  %b = bf16[32] parameter(1)
  %g = bf16[32] all-gather(%x), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %c = bf16[32] custom-call(%x, %b, %g), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (x: bf16[8], a: bf16[8,8]) -> bf16[32] {
  %x = bf16[8] parameter(0)
  %a = bf16[8,8] parameter(1)
  %start = (bf16[8], bf16[32], u32[]) fusion(%x), kind=kCustom, calls=%started
  %x2 = bf16[8] get-tuple-element(%start), index=0
  %b = bf16[32] get-tuple-element(%start), index=1
  %middle = (bf16[8,8], bf16[32], bf16[32]) fusion(%a, %x2, %b), kind=kOutput, calls=%between
  %b2 = bf16[32] get-tuple-element(%middle), index=1
  ROOT %done = bf16[32] fusion(%x2, %b2), kind=kCustom, calls=%ended
}
"""


def test_a_tpus_asynchronous_collective_is_one_from_its_start_to_its_done() -> None:
    module = parse(TPU)
    entry = entry_of(module)
    (found,) = collectives_of(module, entry, 4)
    assert (entry.ops[found.start].name, entry.ops[found.done].name) == ("start", "done")
    assert found.num_bytes == 64
    # What passes through the product's fusion is neither read nor written.
    assert cost_of(module, entry, entry.by_name["middle"]) == Cost({"bfloat16": 1024.0}, 2 * 128)


SPARSE_CORE = """
%gathered (y: bf16[8]) -> bf16[32] {
  %y = bf16[8] parameter(0)
  ROOT %g = bf16[32] all-gather(%y), channel_id=7, replica_groups=[1,4]<=[4]
}, execution_thread="sparsecore"

%offloaded (z: bf16[8]) -> bf16[32] {
  %z = bf16[8] parameter(0)
  ROOT %c = bf16[32] custom-call(%z), custom_call_target="offload", called_computations={%gathered}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8], a: bf16[8,8]) -> bf16[32] {
  %x = bf16[8] parameter(0)
  %a = bf16[8,8] parameter(1)
  %start = ((), (), (s32[8])) async-start(), async_execution_thread="sparsecore", calls=%offloaded
  %early = bf16[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %update = ((bf16[8]), bf16[32], (s32[8])) async-update(%start, %x)
  %p = bf16[8,8] dot(%early, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %done = bf16[32] async-done(%update)
}
"""


def test_a_collective_of_sparse_cores_runs_from_when_it_has_its_operands() -> None:
    module = parse(SPARSE_CORE)
    entry = entry_of(module)
    (found,) = collectives_of(module, entry, 4)
    assert (entry.ops[found.start].name, entry.ops[found.done].name) == ("update", "done")
    assert (found.kind, found.num_bytes, found.groups.tolist()) == ("all-gather", 64, [[0, 1, 2, 3]])


def test_a_tpus_collective_that_a_loop_carries_along_is_not_one_of_the_loops() -> None:
    # The product's fusion in the body of a loop, the start and the done outside.
    body = (
        "%body (x: bf16[8], a: bf16[8,8], b: bf16[32]) -> (bf16[8,8], bf16[32], bf16[32]) {\n"
        "  %x = bf16[8] parameter(0)\n  %a = bf16[8,8] parameter(1)\n  %b = bf16[32] parameter(2)\n"
        "  ROOT %middle = (bf16[8,8], bf16[32], bf16[32]) fusion(%a, %x, %b), kind=kOutput, calls=%between\n}\n"
    )
    module = parse(TPU.replace("ENTRY", body + "ENTRY"))
    assert collectives_of(module, module.computations["body"], 4) == []
    assert len(collectives_of(module, entry_of(module), 4)) == 1


def test_an_all_reduce_of_which_each_device_keeps_a_part_is_a_reduce_scatter() -> None:
    found = only(
        """
%scattered (x: bf16[32], i: s32[]) -> bf16[8] {
  %x = bf16[32] parameter(0)
  %i = s32[] parameter(1)
  %r = bf16[32] all-reduce(%x), channel_id=3, replica_groups=[1,4]<=[4]
  ROOT %d = bf16[8] dynamic-slice(%r, %i), dynamic_slice_sizes={8}
}
ENTRY %main (x: bf16[32], i: s32[]) -> bf16[8] {
  %x = bf16[32] parameter(0)
  %i = s32[] parameter(1)
  ROOT %all-reduce-scatter = bf16[8] fusion(%x, %i), kind=kCustom, calls=%scattered
}"""
    )
    assert (found.kind, found.wire_bytes) == ("reduce-scatter", 48)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a', 'b'}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_of_devices(text: str, groups: Any) -> None:
    assert groups_of(f"{text}, dimensions={{0}}", 4).tolist() == groups


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("state.params['embed']['embedding']", "embedding, weights"),
        (
            "jit(train_step)/jvp(T.packed)/Transformer._run/while/body/layer_0/attention/output/dot",
            "attention output, forward",
        ),
        (
            "jit(train_step)/transpose(jvp(T))/Transformer._run/while/body/checkpoint/rematted_computation/x/mlp/gate/d",
            "MLP gate, recomputed",
        ),
        ("jit(train_step)/transpose(jvp())/while/body/rcd,rcv->dv/dot_general", "head, backward"),
        ("jit(train_step)/sqrt", "update of the weights"),
        ("", ""),
    ],
)
def test_origins_in_words(name: str, origin: str) -> None:
    assert origin_of(name) == origin


def test_an_operation_without_a_name_has_that_of_what_it_reads() -> None:
    op = Op("c", "copy", (Array("f32", (1,)),), ("p",), "%p", "", True)
    named = Op("p", "add", (Array("f32", (1,)),), (), "", ', metadata={op_name="jit(f)/add"}', False)
    assert Computation("c", (named, op)).op_name(op) == "jit(f)/add"


def test_a_permutation_has_pairs_and_carries_its_array_once() -> None:
    found = only(
        """
ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8] parameter(0)
  %s = (bf16[8], bf16[8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %d = bf16[8] collective-permute-done(%s)
}"""
    )
    assert (found.kind, found.wire_bytes, len(found.groups)) == ("collective-permute", 16, 4)
    assert np.array_equal(found.groups[0], [0, 1])


ACROSS = """HloModule m, num_partitions=4
ENTRY %main (p: bf16[8,4], q: f32[2]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %q = f32[2]{0} parameter(1)
  %token = token[] after-all()
  %send.1 = (bf16[8,4]{1,0}, u32[], token[]) send(%p, %token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="sum_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.2 = (f32[2]{0}, u32[], token[]) send(%q, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="rows_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %recv.1 = (bf16[8,4]{1,0}, u32[], token[]) recv(%token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="sum_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.2 = (f32[4]{0}, u32[], token[]) recv(%token), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="rows_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %other = (f32[2]{0}, u32[], token[]) send(%q, %token), channel_id=5, is_host_transfer=true
  %done.1 = (bf16[8,4]{1,0}, token[]) recv-done(%recv.1), channel_id=3, is_host_transfer=true
  ROOT %out = bf16[8,4]{1,0} get-tuple-element(%done.1), index=0
}
"""  # noqa: E501


def test_transfers_between_slices_are_collectives_of_devices_with_one_place_in_their_slices() -> None:
    found = collectives_of(module := parse(ACROSS), entry_of(module), 8)
    assert [(each.kind, each.dtype, each.num_bytes) for each in found] == [
        ("all-reduce", "bf16", 64),
        ("all-gather", "f32", 16),
    ]
    assert all(each.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]] for each in found)
    assert [each.wire_bytes for each in found] == [64, 8]
    places = entry_of(module).position
    assert (found[0].start, found[0].done) == (places["send.1"], places["done.1"])
    assert found[1].done == places["send.2"], "what nothing waits for"
