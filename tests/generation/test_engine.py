from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.config import MeshConfig
from jdpo.generation import row_programs
from jdpo.generation.engine import Drawn, Engine
from jdpo.generation.values import Sampling
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer, abstract_params, init_params, logical_axes, make_apply_fn
from jdpo.models.weights.loading import load_params
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import param_shardings
from tests.conftest import small_llama
from tests.golden_models import golden_models

GOLDEN = Path(__file__).parents[1] / "golden" / "logits"
SHORT = ("qwen3",)
"""In the default suite; tests/models/test_decoding.py compares the logits of more."""
PROMPTS = [[3, 14, 15, 9, 26, 5], [35], [8, 9, 7, 9, 3, 2, 38, 4, 6, 2, 6, 4, 33, 8, 3, 27, 9, 5, 0, 28]]
NEW_TOKENS = 8
ENDS = (4, 6, 9, 15, 23)

Loaded = tuple[Transformer, Any]


def load(name: str) -> Loaded:
    model = Transformer(read_model_config(GOLDEN / name))
    return model, load_params(GOLDEN / name, model)


@pytest.fixture(scope="module")
def qwen3() -> Loaded:
    return load("qwen3")


def engine(loaded: Loaded, end: Sequence[int] = ENDS, slots: int = 4, mesh: Any = None, **options: Any) -> Engine:
    sampling = Sampling(**{"max_new_tokens": NEW_TOKENS, "top_p": 0.95, **options})
    return Engine(*loaded, end_token_ids=end, sampling=sampling, max_slots=slots, mesh=mesh)


def tokens(answers: Any) -> dict[tuple[int, int], list[int]]:
    return {(answer.prompt, answer.sample): answer.tokens for answer in answers}


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Transformer, params: Any, sequences: Any, lengths: Any) -> Any:
    return make_apply_fn(model)(params, sequences, jnp.arange(32) < lengths[:, None])


def logits_of(loaded: Loaded, sequences: list[list[int]]) -> np.ndarray:
    """Returns the logits of three whole sequences, right-padded to one shape."""
    padded = np.array([sequence + [0] * (32 - len(sequence)) for sequence in sequences])
    return np.asarray(forward(*loaded, padded, np.array([len(sequence) for sequence in sequences])))


def by_full_forward(loaded: Loaded) -> list[list[int]]:
    """Decodes by the argmax of the whole sequence's logits, without a cache."""
    sequences = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW_TOKENS):
        logits = logits_of(loaded, sequences)
        for row, sequence in enumerate(sequences):
            sequence.append(int(logits[row, len(sequence) - 1].argmax()))
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, PROMPTS, strict=True)]


@pytest.mark.parametrize("name", golden_models(short=SHORT))
def test_greedy_equals_the_argmax_of_the_full_forward(name: str) -> None:
    loaded = load(name)
    expected = by_full_forward(loaded)
    assert len({tuple(found) for found in expected}) == 3
    # Two rows for three prompts: the third begins where another has ended.
    found = list(engine(loaded, end=[], slots=2, temperature=0).run(PROMPTS))
    assert [answer.tokens for answer in found] == expected
    assert {answer.finish_reason for answer in found} == {"length"}
    # The first token that only some answers ever have: those end after it, the others continue.
    end = next(token for token in expected[0] if not all(token in whole for whole in expected))
    for answer, whole in zip(engine(loaded, end=[end, 39], temperature=0).run(PROMPTS), expected, strict=True):
        ends = [index for index, token in enumerate(whole) if token in (end, 39)]
        assert answer.tokens == (whole[: ends[0] + 1] if ends else whole)
        assert answer.finish_reason == ("stop" if answer.tokens[-1] in (end, 39) else "length")


def test_logps_are_those_of_the_model(qwen3: Loaded) -> None:
    answers = list(engine(qwen3, temperature=0.5).run(PROMPTS))
    logits = logits_of(qwen3, [prompt + answer.tokens for prompt, answer in zip(PROMPTS, answers, strict=True)])
    for prompt, answer, whole in zip(PROMPTS, answers, logits, strict=True):
        shifted = np.asarray(jax.nn.log_softmax(whole))[len(prompt) - 1 :][: len(answer.tokens)]
        expected = shifted[np.arange(len(answer.tokens)), answer.tokens]
        np.testing.assert_allclose(answer.logps, expected, atol=1e-4)


@pytest.fixture(scope="module")
def sampled(qwen3: Loaded) -> list[Drawn]:
    """Five answers of different lengths to each prompt; every row works on several of them."""
    return list(engine(qwen3).run(PROMPTS, 5))


def test_answers_are_in_order_and_differ(qwen3: Loaded, sampled: list[Drawn]) -> None:
    assert [(answer.prompt, answer.sample) for answer in sampled] == [(p, s) for p in range(3) for s in range(5)]
    assert len({tuple(answer.tokens) for answer in sampled}) > 12
    assert len({len(answer.tokens) for answer in sampled}) > 2
    as_completed = list(engine(qwen3).run_as_completed(PROMPTS, 5))
    assert as_completed != sampled
    assert sorted(as_completed) == sampled
    again = engine(qwen3).with_sampling(Sampling(top_p=0.95, max_new_tokens=NEW_TOKENS, seed=1))
    assert tokens(again.run(PROMPTS, 5)) != tokens(sampled)


@pytest.mark.parametrize("slots", [1, 16])
def test_the_number_of_slots_changes_no_token(qwen3: Loaded, sampled: list[Drawn], slots: int) -> None:
    assert tokens(engine(qwen3, slots=slots).run(PROMPTS, 5)) == tokens(sampled)


def test_the_order_of_prompts_changes_no_token(qwen3: Loaded, sampled: list[Drawn]) -> None:
    found = tokens(engine(qwen3).run(PROMPTS[::-1], 5))
    assert {(2 - prompt, sample): answer for (prompt, sample), answer in found.items()} == tokens(sampled)


def test_a_shared_prompt_equals_separate_ones(qwen3: Loaded, sampled: list[Drawn]) -> None:
    """Streams each answer alone, with a cache of its own."""
    alone = engine(qwen3)
    for answer in sampled:
        streamed = list(alone.stream(PROMPTS[answer.prompt], answer.sample))
        assert [token for token, _ in streamed] == answer.tokens
        np.testing.assert_allclose([logp for _, logp in streamed], answer.logps, atol=1e-4)


def test_a_prompt_is_computed_once(qwen3: Loaded) -> None:
    def flops(num_samples: int) -> float:
        """Sums the operations of all computations of prompts, as compiled."""
        asked, total = engine(qwen3, slots=32), 0.0
        assert len(list(asked.run(PROMPTS, num_samples))) == 3 * num_samples
        for (size, columns), count in asked.prefills.items():
            shapes = jax.ShapeDtypeStruct((size, columns), jnp.int32), jax.ShapeDtypeStruct((size,), jnp.int32)
            compiled = row_programs.prefill.lower(qwen3[1], *shapes, model=asked.model).compile()
            total += count * compiled.cost_analysis()["flops"]
        return total

    assert flops(1) == flops(8) > 0


def on_mesh(loaded: Loaded, **axes: int) -> tuple[Loaded, Any]:
    model, params = loaded
    mesh = make_mesh(MeshConfig(**axes))
    return (model, jax.device_put(params, param_shardings(logical_axes(model), abstract_params(model), mesh))), mesh


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, id="data-fsdp-tensor"),
        pytest.param({"data": 8}, id="data", marks=pytest.mark.full),
        pytest.param({"data": 1, "fsdp": 8}, id="fsdp", marks=pytest.mark.full),
        pytest.param({"data": 1, "tensor": 8}, id="tensor", marks=pytest.mark.full),
    ],
)
def test_eight_devices_draw_the_same_tokens(qwen3: Loaded, sampled: list[Drawn], axes: dict[str, int]) -> None:
    placed, mesh = on_mesh(qwen3, **axes)
    assert tokens(engine(placed, mesh=mesh).run(PROMPTS, 5)) == tokens(sampled)


@pytest.mark.full
@pytest.mark.parametrize("axes", [{"data": 2, "expert": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize("name", ["mixtral", "gemma2", "gpt2", "qwen3_5_text"])
def test_eight_devices_draw_the_same_tokens_in_other_families(name: str, axes: dict[str, int]) -> None:
    loaded = load(name)
    placed, mesh = on_mesh(loaded, **axes)
    assert tokens(engine(placed, mesh=mesh).run(PROMPTS, 5)) == tokens(engine(loaded).run(PROMPTS, 5))


def test_long_answers_outgrow_their_slots_and_leave_places(small: Loaded) -> None:
    """The cache grows, samples move to free places, and free places are dropped near the end."""
    prompts = [[token] for token in range(5)]
    found = {
        slots: tokens(engine(small, end=[1, 2], slots=slots, max_new_tokens=150).run(prompts, 4)) for slots in (1, 8)
    }
    lengths = [len(answer) for answer in found[8].values()]
    assert min(lengths) < 10
    assert max(lengths) > 90
    assert found[8] == found[1]


@pytest.fixture(scope="module")
def small() -> Loaded:
    model = Transformer(small_llama(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8))
    return model, init_params(model, jax.random.key(0))


@pytest.mark.full
def test_answers_in_other_dtypes(qwen3: Loaded) -> None:
    model, params = qwen3
    with jax.enable_x64(True):
        wide = model.clone(compute_dtype=jnp.float64)
        greedy = [answer.tokens for answer in engine((wide, params), end=[], temperature=0).run(PROMPTS)]
    assert greedy == by_full_forward(qwen3)
    narrow = engine((model.clone(compute_dtype=jnp.bfloat16), params))
    streamed = [token for token, _ in narrow.stream(PROMPTS[0])]
    assert streamed == next(narrow.run(PROMPTS[:1])).tokens
    assert all(-20 < logp <= 0 for answer in narrow.run(PROMPTS, 3) for logp in answer.logps)


def test_an_answer_ends_at_the_last_position(qwen3: Loaded) -> None:
    prompts = [[3] * length for length in (63, 60, 30)]
    answers = list(engine(qwen3, end=[], max_new_tokens=20).run(prompts, 2))
    assert [len(answer.tokens) for answer in answers] == [1, 1, 4, 4, 20, 20]
    assert {answer.finish_reason for answer in answers} == {"length"}
    # What is left does not change what is drawn.
    shorter = engine(qwen3, end=[], max_new_tokens=4).run(prompts[1:2], 2)
    assert [answer.tokens for answer in answers[2:4]] == [answer.tokens for answer in shorter]


@pytest.mark.full
def test_long_prompts_of_different_lengths() -> None:
    """The attention of long prompts works in tiles; prompts of different lengths share the cache."""
    model = Transformer(small_llama(windows=(None, 70)))
    # Larger weights than at the start of training, so that all tokens of a prompt matter.
    params = jax.tree.map(lambda leaf: 4 * leaf, init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, length).tolist() for length in (300, 90, 20, 130)]
    whole = jax.jit(make_apply_fn(model))
    placed, mesh = on_mesh((model, params), data=2, fsdp=2, tensor=2)
    for found in (
        engine((model, params), end=[], slots=2, temperature=0).run(prompts),
        engine(placed, end=[], slots=2, mesh=mesh, temperature=0).run(prompts),
    ):
        for prompt, answer in zip(prompts, found, strict=True):
            sequence = np.array([prompt + answer.tokens + [0] * (320 - len(prompt) - NEW_TOKENS)])
            logits = np.asarray(whole(params, sequence, np.ones_like(sequence, bool)))[0, len(prompt) - 1 :]
            assert logits[:NEW_TOKENS].argmax(-1).tolist() == answer.tokens
            assert len(set(answer.tokens)) > 1


@pytest.mark.full
def test_an_idle_row_stays_within_the_positions() -> None:
    """Its old answer was long, and its place has another prompt now, which leaves few positions."""
    model, params = load("gpt2")
    shape = {"num_places": 1, "num_rows": 2, "prompt_slots": 64, "tail_slots": 64}
    rows = row_programs.empty_rows(model=model, **shape)
    rows = rows._replace(prompt_lengths=jnp.array([60]), count=jnp.array([[1, 62]]), active=jnp.array([[True, False]]))
    orders = row_programs.Orders(
        seed=np.uint32(0),
        digests=np.zeros((1, 2), np.uint32),
        samples=np.zeros((1, 2), np.int32),
        fresh=np.zeros((1, 2), bool),
        end_ids=np.array([-1], np.int32),
        max_new_tokens=np.int32(64),
        num_steps=np.int32(4),
        has_waiting=np.array([False]),
        uses_places=np.bool_(False),
        patience=np.int32(1),
    )
    weights = row_programs.decoding_weights(params, model=model)
    static = {"model": row_programs.decoder_of(model), "sampling": Sampling(), "most_steps": 4}
    rows, report = row_programs.advance(weights, rows, orders, **static)
    assert report.count.tolist() == [[4, 62]]
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(rows.caches))


def test_bad_prompts_are_named(qwen3: Loaded) -> None:
    assert list(engine(qwen3).run([], 2)) == []
    for prompts, message in (
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 64], r"prompt 0 has 64 tokens.* 64 positions"),
        ([[1, 40]], "prompt 0: found the token id 40"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(qwen3).run(prompts)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine(qwen3).stream([])
    with pytest.raises(ValueError, match="end_token_ids: found the token id 50"):
        engine(qwen3, end=[50])
