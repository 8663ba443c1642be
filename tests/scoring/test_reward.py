"""Rewards: the head times the last hidden state of the plain forward pass, whatever the packing and the mesh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jdpo
from jdpo.config import MeshConfig
from jdpo.data.tokens.tokenizer import load_tokenizer
from jdpo.generation.values import Answer, Question
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer
from jdpo.models.weights.loading import load_params
from jdpo.scoring.protocol import Asked
from jdpo.scoring.reward import RewardModel, Rewards, RewardScorer, open_reward_model, rewards_of, tokenize
from jdpo.scoring.scorers import make_scorer, parse_by
from jdpo.sharding.mesh import make_mesh
from tests.conftest import sentence
from tests.scoring.conftest import make_reward_folder
from tests.scoring.toys import answer, question


def made(num: int = 9, seed: int = 0) -> list[tuple[Question, Answer]]:
    """Returns conversations and plain texts with answers of 1 to 40 words."""
    rng = np.random.default_rng(seed)
    prompts: list[Any] = [[{"role": "user", "content": sentence(rng, 5)}], sentence(rng, 4)]
    return [
        (question(f"q{i}", prompts[i % 2]), answer(f"q{i}", text=sentence(rng, int(rng.integers(1, 41)))))
        for i in range(num)
    ]


def by_hand(base: Path, folder: Path, rows: list[tuple[Question, Answer]], *, skipped: int = 0) -> list[float]:
    """The causal model's own hidden state of the last token, times the weights of the file.

    Args:
      skipped: tokens at the end that do not count.
    """
    model = Transformer(read_model_config(base))
    params = load_params(base, model)
    head = load_file(folder / "model.safetensors")["score.weight"][0]
    tokenizer = load_tokenizer(folder, chat_template=None)
    sequences = []
    for asked, given in rows:
        if isinstance(asked.prompt, str):
            text = asked.prompt + given.message["content"]
        else:
            text = tokenizer.hf.apply_chat_template([*asked.prompt, given.message], tokenize=False)
        ids = tokenizer.encode([text])[0]
        sequences.append(ids[: len(ids) - skipped])
    longest = max(map(len, sequences))
    tokens = np.array([ids + [0] * (longest - len(ids)) for ids in sequences])
    mask = np.array([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences], bool)
    hidden = jax.jit(lambda *args: model.apply({"params": params}, *args, method="hidden_states"))(tokens, mask)
    return [float(hidden[i, len(ids) - 1] @ head) for i, ids in enumerate(sequences)]


def one_device(folder: Path, **options: Any) -> RewardModel:
    return open_reward_model(str(folder), mesh=make_mesh(MeshConfig(), jax.devices()[:1]), **options)


def test_rewards_are_those_of_the_plain_forward_pass(toy_model: Path, reward_folder: Path) -> None:
    rows = made()
    found = rewards_of(one_device(reward_folder), rows)
    np.testing.assert_allclose(found, by_hand(toy_model, reward_folder, rows), atol=2e-5)
    assert [float(str(np.float32(value))) for value in found] == found, "no digits beyond those of float32"


def test_rewards_are_equal_on_a_mesh_and_in_parts(toy_model: Path, reward_folder: Path) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows, model = made(), open_reward_model(str(reward_folder), mesh=mesh)
    rewards = Rewards(model, [rows[:2], [], rows[2:]], max_tokens_per_device=64)
    found = [value for part in (2, 0, 1) for value in rewards.of(part)]
    np.testing.assert_allclose([*found[-2:], *found[:-2]], by_hand(toy_model, reward_folder, rows), atol=2e-5)


def test_padding_tokens_at_the_end_do_not_count(toy_model: Path, tmp_path: Path) -> None:
    """ChatML ends a conversation in a line feed, which is the padding token here, as the EOS is of some models."""
    newline = load_tokenizer(toy_model, chat_template=None).encode(["\n"])[0][0]
    folder = make_reward_folder(toy_model, tmp_path / "reward", pad_token_id=newline)
    rows = made()[::2]
    model = one_device(folder)
    np.testing.assert_allclose(rewards_of(model, rows), by_hand(toy_model, folder, rows, skipped=1), atol=2e-5)


def test_answers_without_a_reward_are_counted_by_reason(reward_folder: Path) -> None:
    rows = [
        *made(2),
        (question("q7", "short"), answer("q7", text="a road " * 60)),
        (question("q8", ""), answer("q8", text="")),
        (question("q9", "text"), answer("q9", text="\ud83d")),
    ]
    model = one_device(reward_folder, max_length=110)
    blocks = [[Asked(row[0], [row[1]]) for row in rows[:1]], [Asked(row[0], [row[1]]) for row in rows[1:]]]
    scores = [score for block in blocks for score in RewardScorer(model, blocks, None).score(block).scores]
    assert [score.reason for score in scores] == [
        *(None, None),
        *("longer than max_length", "no tokens", "text that is not Unicode"),
    ]
    assert [score.score is None for score in scores] == [False, False, True, True, True]
    assert rewards_of(model, rows[2:]) == [score.reason for score in scores[2:]]


def test_a_reward_that_is_not_finite_is_none(toy_model: Path, tmp_path: Path) -> None:
    folder = make_reward_folder(toy_model, tmp_path / "reward")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = np.full_like(tensors["score.weight"], 3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in rewards_of(one_device(folder), made(3))


def test_the_scorer_describes_what_decides_the_rewards(reward_folder: Path) -> None:
    made = [
        make_scorer(parse_by(f"reward:{reward_folder}"), [], options).describe()
        for options in ({}, {"max_length": 9}, {"dtype": "bfloat16"})
    ]
    assert made[0]["by"] == f"reward:{reward_folder}"
    assert made[0]["dtype"] == "float32"
    assert made[0] != made[1] != made[2] != made[0]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_labels": 2}, "2 labels"),
        ({"architectures": ["LlamaForCausalLM"]}, "not a reward model"),
        ({"vocab_size": 7}, "wrong shape of model.embed_tokens.weight"),
    ],
)
def test_what_is_not_a_reward_model_is_refused(
    toy_model: Path, tmp_path: Path, settings: dict[str, Any], part: str
) -> None:
    folder = make_reward_folder(toy_model, tmp_path / "reward", **settings)
    with pytest.raises(ValueError, match=part):
        open_reward_model(str(folder))


def test_a_reward_model_is_no_policy(reward_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"jdpo score --by reward:"):
        jdpo.load(reward_folder)


def test_a_reward_model_without_a_template_refuses_conversations(reward_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in reward_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = one_device(folder)
    with pytest.raises(ValueError, match=r"reward model .*bare has no chat template; put"):
        tokenize(model, made(1))
    assert isinstance(rewards_of(model, made(2)[1:])[0], float)
