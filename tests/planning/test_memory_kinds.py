"""The memory at the peak of a step by kind: of a small program by hand, and of a compiled one."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import pytest

from jdpo.config import CONFIGS, TrainConfig, load_config
from jdpo.planning.compiled_step import compile_with_dump
from jdpo.planning.hlo.hlo_text import Array
from jdpo.planning.planner.memory_kinds import compiled_memory, estimated_memory, kind_of
from jdpo.planning.planner.peak_values import Value, values_at_peak
from jdpo.planning.planner.planned_run import planned_run
from jdpo.planning.target_plan import MemoryByKind
from jdpo.training.fit.estimates import estimate_step, local_bytes
from jdpo.training.fit.memory_fit import program_bytes

PROGRAM = """HloModule step, is_scheduled=true

%body (p: (f32[4,8], bf16[32])) -> (f32[4,8], bf16[32]) {
  %p = (f32[4,8]{1,0}, bf16[32]{0}) parameter(0)
  ROOT %t = (f32[4,8]{1,0}, bf16[32]{0}) tuple(%p)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0), metadata={op_name="state.params[\\'kernel\\']"}
  %copy.1 = bf16[8,4]{1,0} convert(%a), metadata={op_name="state.params[\\'kernel\\']"}
  ROOT %add.1 = f32[8,4]{1,0} add(%a, %a), metadata={op_name="jit(train_step)/while/body/add"}
}
"""

NEEDED = """HloLiveRange (max 9):
  BufferLiveRange:
    a{}:0-9
    p{0}:2-3
    late{0}:7-8
    add.1{}:4-9
    copy.1{}:1-5
    elsewhere{}:4-5
    early{}:1-3
  Live ranges at 3 (peak):
"""

BUFFERS = """BufferAssignment:
allocation 0: size 128, parameter 0, shape |f32[8,4]| at ShapeIndex {}:
 value: <1 a @0> (size=128,offset=0): f32[8,4]{1,0}
allocation 1: size 400, color 1, preallocated-temp:
 value: <2 early @1> (size=400,offset=0): f32[100]{0:S(1)}
allocation 2: size 336, preallocated-temp:
 value: <3 p{0} @0> (size=128,offset=0): f32[4,8]{1,0}
 value: <4 late{0} @0> (size=128,offset=0): f32[4,8]{1,0}
 value: <5 add.1 @0> (size=128,offset=128): f32[8,4]{1,0}
 value: <6 copy.1 @0> (size=64,offset=256): bf16[8,4]{1,0}
 value: <7 elsewhere @0> (size=8,offset=320): s32[2]{0}
 value: <8 early @0> (size=16,offset=320): s32[4]{0}
"""

FORWARD = "jit(train_step)/jvp(Transformer.packed)/Transformer._run/while/body/mlp/up/dot_general"
BACKWARD = "jit(train_step)/transpose(jvp(Transformer.packed))/Transformer._run/while/body/mlp/up/dot_general"


def test_values_at_the_peak_have_the_types_and_places_of_the_program() -> None:
    found = {value.num_bytes: value for value in values_at_peak(PROGRAM, NEEDED, BUFFERS) if value.num_bytes < 128}
    both = [value for value in values_at_peak(PROGRAM, NEEDED, BUFFERS) if value.num_bytes == 128]
    # What a loop carries is in memory until its last turn; arguments and other memories are not temporary.
    assert [(value.array, value.in_loop) for value in both] == [
        (Array("f32", (4, 8)), True),
        (Array("f32", (8, 4)), False),
    ]
    assert set(found) == {64, 8}
    assert found[64].op_name == "state.params['kernel']"
    assert found[8].array is None
    assert list(values_at_peak(PROGRAM, "", "")) == []


@pytest.mark.parametrize(
    ("name", "dims", "in_loop", "kind"),
    [
        ("state.params['stack']['kernel']", (8, 4), False, "weights"),
        ("frozen.base['kernel']", (9,), False, "weights"),
        ("frozen.reference['kernel']", (8, 4), False, "reference"),
        (FORWARD, (1, 4, 8), True, "weights"),  # a copy of a weight, in another layout
        (FORWARD, (64, 64), True, "activations"),
        (BACKWARD, (8, 4), True, "gradients"),
        (BACKWARD, (64, 64), True, "activations"),
        ("jit(train_step)/while/body/closed_call/add", (8, 4), False, "gradients"),
        ("jit(train_step)/jvp(Transformer.packed)/Transformer.head_kernel/dot_general", (64, 99), False, "head"),
        ("jit(train_step)/transpose(jvp())/shard_map/while/body/dot_general", (64, 99), True, "head"),
        ("jit(train_step)/mul", (5,), False, "other"),
        ("", (64, 64), True, "activations"),
    ],
)
def test_a_value_belongs_to_the_kind_of_its_place_and_shape(
    name: str, dims: tuple[int, ...], in_loop: bool, kind: str
) -> None:
    assert kind_of(Value(1, Array("f32", dims), name, in_loop), frozenset({(4, 8)})) == kind


def tiny_config(folder: Path, *words: str) -> TrainConfig:
    """The config of a Llama with two layers whose folder holds nothing except config.json."""
    shape = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    shape |= {"max_position_embeddings": 128, "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(shape))
    usual = ["compute_dtype=float32", "max_length=64", "global_batch_size=16", "reference=cached"]
    keys = [f"model_name_or_path={folder}", "datasets=x", "output_dir=x", *usual, *words]
    return load_config(CONFIGS["dpo"], None, keys)


def test_the_kinds_of_a_compiled_step_add_up_to_what_it_needs(tmp_path: Path) -> None:
    run = planned_run(tiny_config(tmp_path, "remat=full"), jax.devices(), [(16, 24, 24)])
    planned = run.step("full", 128)
    compilation = compile_with_dump(planned.assembly.lower_step(planned.batch))
    assert compilation.program is not None
    needed = program_bytes(compilation.program)
    kinds = compiled_memory(planned, compilation, needed)
    assert kinds.total == needed
    assert min(dataclasses.astuple(kinds)) >= 0
    # Arguments are known exactly, and two moments are as large as the weights.
    weights = local_bytes(planned.assembly.state.params)
    assert kinds.weights >= weights
    assert kinds.moments == pytest.approx(2 * weights, rel=0.01)
    assert min(kinds.gradients, kinds.activations) > 0
    assert kinds.reference == 0


def test_estimated_kinds_follow_the_tokens_the_reference_and_the_optimizer(tmp_path: Path) -> None:
    def kinds(*words: str, tokens: int = 64) -> MemoryByKind:
        run = planned_run(tiny_config(tmp_path, *words), jax.devices(), [(16, 24, 24)])
        planned = run.step("full", tokens)
        return estimated_memory(planned, estimate_step(run.assembly, ["full"], planned.batch))

    cached = kinds()
    assert min(cached.weights, cached.gradients, cached.moments, cached.activations, cached.head) > 0
    assert cached.reference == 0
    assert kinds("reference=live").reference == cached.weights
    assert kinds("optimizer=sgd").moments < cached.moments / 100
    assert kinds(tokens=128).activations > cached.activations
    assert functools.reduce(int.__add__, dataclasses.astuple(cached)) == cached.total
