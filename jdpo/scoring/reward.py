"""Rewards of answers by a Hugging Face `*ForSequenceClassification` folder, computed on packed rows in JAX.

The reward of an answer is the output of the head at the last token of the conversation, which the chat template of the
reward model's own tokenizer writes, without a generation prompt. A plain text prompt and its answer are joined.

Axes: m rows of slots, q sequences of a row, one per answer, t places of a sequence, d model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdpo.config import MeshConfig
from jdpo.data.batching.packing_plan import completion_sizes
from jdpo.data.prepared.prepare import cache_folder
from jdpo.data.schemas.formats import Dropped
from jdpo.data.tokens.row_rendering import NOT_UNICODE, RowTexts, encode_rendered, is_unicode, render_all
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.generation.values import Answer, Question
from jdpo.models.families import RewardConfig, read_reward_config
from jdpo.models.packed_attention import packed_sequences
from jdpo.models.transformer import (
    Params,
    Transformer,
    abstract_params,
    float32_products,
    logical_axes,
    variables,
)
from jdpo.models.weights.hub_models import resolve_folder
from jdpo.models.weights.loading import check_tensors, load_params
from jdpo.models.weights.safetensors_folder import tensor_entries
from jdpo.scoring.protocol import Block, Scored
from jdpo.scoring.score_files import Score
from jdpo.sharding.mesh import make_mesh
from jdpo.sharding.rules import param_shardings
from jdpo.training.reference.packed_scoring import PackedScorer, over_micro_batches
from jdpo.training.setup.folder_digests import folder_digest
from jdpo.training.setup.numerics import persistent_cache
from jdpo.types import PackedBatch, TokenizedCompletion

TOO_LONG = "longer than max_length"
NO_TOKENS = "no tokens"
NOT_FINITE = "not finite"

Array = Any


class RewardModel(NamedTuple):
    """A reward model whose weights are not loaded yet.

    Attributes:
      folder: the model folder.
      config: its decoder, with a reward head, and its padding token.
      model: the decoder.
      tokenizer: its own.
      mesh: the devices.
      max_length: tokens of a conversation at most; a longer one has no reward, as that of a part is another's.
    """

    folder: Path
    config: RewardConfig
    model: Transformer
    tokenizer: Tokenizer
    mesh: Mesh
    max_length: int

    def describe(self) -> dict[str, Any]:
        """Returns what decides the rewards."""
        return {
            "model_sha256": folder_digest(self.folder),
            "tokenizer_sha256": self.tokenizer.digest,
            "dtype": jnp.dtype(self.model.compute_dtype).name,
            "max_length": self.max_length,
        }


def open_reward_model(
    name_or_path: str,
    *,
    dtype: str = "auto",
    max_length: int | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> RewardModel:
    """Opens a reward model and checks its files; of the weights only headers are read.

    Args:
      name_or_path: a model folder or hub name.
      dtype: of the computation; "auto": bfloat16 on TPU and GPU, float32 on CPU.
      max_length: tokens of a conversation at most; None: the positions that the model was made for.
      mesh: the devices; None: weights and batch are split over all of them.
      revision: branch, tag or commit of a hub repository.

    Raises:
      ValueError: it is not a reward model of a supported family, or its files do not fit together.
    """
    folder = resolve_folder(name_or_path, revision)
    config = read_reward_config(folder)
    check_tensors(folder, tensor_entries(folder), config.model)
    tokenizer = load_tokenizer(folder, chat_template=None)
    vocab_size, positions = config.model.vocab_size, config.model.max_positions
    if tokenizer.size > vocab_size:
        raise ValueError(
            f"the tokenizer of the reward model {folder} has {tokenizer.size} tokens, but the model's embedding has "
            f"{vocab_size} rows; use the tokenizer that belongs to the model"
        )
    if max_length is not None and config.model.positions_end and max_length > positions:
        raise ValueError(f"max_length {max_length}: the reward model {folder} has {positions} positions")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    compute_dtype = jnp.dtype(dtype)
    # Nothing is trained, so the weights need no wider master copy.
    model = Transformer(config.model, compute_dtype=compute_dtype, param_dtype=compute_dtype)
    return RewardModel(folder, config, model, tokenizer, mesh or make_mesh(MeshConfig()), max_length or positions)


# --- rewards


class Rewards:
    """Computes the rewards of answers in parts, in batches of few shapes that are planned for all parts together."""

    def __init__(
        self,
        reward_model: RewardModel,
        parts: Sequence[Sequence[tuple[Question, Answer]]],
        *,
        max_tokens_per_device: int | None = None,
    ) -> None:
        """
        Args:
          parts: the questions and answers of every part that may be asked for. The same parts give batches of the same
            shapes, and with them the same last bits.
          max_tokens_per_device: slots of a device's part of a batch at most; None: as for the reference cache.

        Raises:
          ValueError: a question is a conversation, and the reward model has no chat template.
        """
        self._scorer = PackedScorer(
            _compiled(reward_model.model, reward_model.mesh),
            reward_model.mesh,
            functools.partial(_load_weights, reward_model),
            model=reward_model.model,
            max_tokens_per_device=max_tokens_per_device,
        )
        self._model = reward_model
        self._tokenized = [tokenize(reward_model, part) for part in parts]
        rows = [one for part in self._tokenized for one in part if isinstance(one, TokenizedCompletion)]
        ends = np.cumsum([sum(isinstance(one, TokenizedCompletion) for one in part) for part in self._tokenized])
        self._ranges = [range(start, end) for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
        lengths = np.array([len(row.tokens) for row in rows], np.int64)
        # No token is scored by its log-prob. Without any row there is nothing to plan.
        sizes = completion_sizes(lengths, np.zeros_like(lengths))
        self._plan = self._scorer.plan(rows, sizes, [part for part in self._ranges if part]) if rows else None

    def of(self, number: int) -> list[float | str]:
        """Returns the reward of each answer of a part, or the reason why it has none."""
        part = self._ranges[number]
        found: dict[int, float] = {}
        if self._plan is not None and part:
            with float32_products(self._model.model):
                for _, batch, rewards in self._scorer.run(self._plan, part):
                    real = batch.pair_weight > 0
                    # The shortest digits that are this float32: others would only be noise in files.
                    shortest = (float(str(reward)) for reward in rewards[real])
                    found.update(zip(batch.pair_row[real].tolist(), shortest, strict=True))
        rows = iter(part)
        return [one if isinstance(one, str) else _finite(found[next(rows)]) for one in self._tokenized[number]]


def rewards_of(reward_model: RewardModel, answers: Sequence[tuple[Question, Answer]]) -> list[float | str]:
    """Returns the reward of each answer, or the reason why it has none.

    Args:
      answers: each with its question, whose tools a chat template may write.

    Raises:
      ValueError: a question is a conversation, and the reward model has no chat template.
    """
    return Rewards(reward_model, [answers]).of(0)


def _finite(reward: float) -> float | str:
    return reward if math.isfinite(reward) else NOT_FINITE


def tokenize(reward_model: RewardModel, answers: Sequence[tuple[Question, Answer]]) -> list[TokenizedCompletion | str]:
    """Returns the tokens of each question with its answer up to the token that has the reward, or why there are none.

    Raises:
      ValueError: a question is a conversation, and the reward model has no chat template.
    """
    tokenizer, texts = reward_model.tokenizer, [_text(reward_model, *one) for one in answers]
    is_plain = [isinstance(question.prompt, str) for question, _ in answers]
    plain = [text for text, joined in zip(texts, is_plain, strict=True) if isinstance(text, str) and joined]
    rendered = [text for text, joined in zip(texts, is_plain, strict=True) if isinstance(text, str) and not joined]
    # The template writes special tokens itself; plain text gets those that the tokenizer puts around any text.
    of_plain = iter(tokenizer.hf(plain, return_attention_mask=False, verbose=False)["input_ids"] if plain else [])
    of_rendered = iter(encode_rendered(rendered, tokenizer))
    found: list[TokenizedCompletion | str] = []
    for (question, answer), text, joined in zip(answers, texts, is_plain, strict=True):
        if isinstance(text, Dropped):
            found.append(text.reason)
            continue
        ids = np.array(next(of_plain if joined else of_rendered), np.int32)
        found.append(_row(reward_model, ids, f"answer {answer.sample} to {question.origin}"))
    return found


def _text(reward_model: RewardModel, question: Question, answer: Answer) -> str | Dropped:
    if isinstance(question.prompt, str):
        text = question.prompt + answer.text
        return text if is_unicode(text) else Dropped(NOT_UNICODE, question.origin)
    if not reward_model.tokenizer.has_chat_template:
        raise ValueError(
            f"{question.origin} is a conversation, but the reward model {reward_model.folder} has no chat template; "
            "put the template that it was trained with into its folder as chat_template.jinja"
        )
    # `template_kwargs` are for the template of the model that answers.
    row = RowTexts(question.prompt, ([answer.message],), question.origin, question.tools)
    whole = render_all([[*question.prompt, answer.message]], [False], row, reward_model.tokenizer)
    return whole if isinstance(whole, Dropped) else whole[0]


def _row(reward_model: RewardModel, ids: np.ndarray, origin: str) -> TokenizedCompletion | str:
    if not len(ids):
        return NO_TOKENS
    if len(ids) > reward_model.max_length:
        return TOO_LONG
    # As in transformers: padding tokens at the end are skipped, even where the template wrote them.
    if (pad := reward_model.config.pad_token_id) is not None:
        ids = ids[: np.flatnonzero(ids != pad).max(initial=0) + 1]
    return TokenizedCompletion(ids, np.zeros(len(ids), bool), origin)


# --- the model on the mesh


def _load_weights(reward_model: RewardModel) -> Params:
    model = reward_model.model
    shardings = param_shardings(logical_axes(model), abstract_params(model), reward_model.mesh)
    return load_params(reward_model.folder, model, shardings, dtype=model.param_dtype)


@functools.lru_cache(maxsize=2)
def _compiled(model: Transformer, mesh: Mesh) -> Callable[[Params, PackedBatch], Array]:
    """Returns the compiled function (weights, batch [k, m, ...]) -> rewards [k, m, p]."""

    def rewards(weights: Params, micro: PackedBatch) -> Array:
        sequences = packed_sequences(micro.gather, micro.lengths, micro.scatter, micro.readers)
        hidden_msd, head_d1 = model.apply(
            variables(weights), micro.tokens, micro.positions, sequences, method="packed_hidden_and_head"
        )
        # Only the hidden states of last tokens meet the head.
        hidden_mpd = jnp.take_along_axis(hidden_msd, _last_slots(micro)[..., None], axis=1)
        return jnp.einsum("mpd,do->mpo", hidden_mpd, head_d1, preferred_element_type=jnp.float32)[..., 0]

    return over_micro_batches(rewards, mesh)


def _last_slots(micro: PackedBatch) -> Array:
    """Returns int [m, p], the slot of the last token of each supervised row of a micro-batch; any slot for padding."""
    used_ms = (micro.readers < micro.gather.shape[-2] * micro.gather.shape[-1])[..., 0, :]
    # Rows are back to back, each from position 0 on.
    item_ms = jnp.cumsum(used_ms & (micro.positions == 0), axis=-1) - 1
    until_mps = used_ms[..., None, :] & (item_ms[..., None, :] <= jnp.arange(micro.pair_weight.shape[-1])[:, None])
    return jnp.maximum(until_mps.sum(-1) - 1, 0)


# --- the scorer


class RewardScorer:
    """The scorer of `reward:MODEL`."""

    def __init__(self, reward_model: RewardModel, blocks: Sequence[Block], max_tokens_per_device: int | None) -> None:
        """
        Args:
          blocks: all that may be scored.
          max_tokens_per_device: see `Rewards`.
        """
        self._model, self._blocks, self._max_tokens = reward_model, blocks, max_tokens_per_device
        self._numbers = {_key(block): number for number, block in enumerate(blocks)}

    @functools.cached_property
    def _rewards(self) -> Rewards:
        # Made for the first block without scores: tokenizing all answers takes long.
        parts = [[(question, answer) for question, answers in block for answer in answers] for block in self._blocks]
        return Rewards(self._model, parts, max_tokens_per_device=self._max_tokens)

    def describe(self) -> dict[str, Any]:
        """Returns what decides the rewards."""
        return self._model.describe()

    def score(self, block: Block) -> Scored:
        """Computes the rewards of a block."""
        answers = [answer for one in block for answer in one.answers]
        with persistent_cache(cache_folder(None) / "programs"):
            rewards = self._rewards.of(self._numbers[_key(block)])
        return Scored(
            [
                Score(answer.prompt_id, answer.sample, None, reward)
                if isinstance(reward, str)
                else Score(answer.prompt_id, answer.sample, reward)
                for answer, reward in zip(answers, rewards, strict=True)
            ],
            [],
        )


def _key(block: Block) -> str:
    # A question is in one block only.
    return block[0].question.prompt_id


def reward_scorer(
    argument: str,
    blocks: Sequence[Block],
    *,
    dtype: str = "auto",
    max_length: int | None = None,
    max_tokens_per_device: int | None = None,
) -> RewardScorer:
    """Makes the scorer of `reward:MODEL`.

    Args:
      argument: a model folder or hub name.
      dtype, max_length: see `open_reward_model`.
      max_tokens_per_device: see `Rewards`.
    """
    reward_model = open_reward_model(argument, dtype=dtype, max_length=max_length)
    return RewardScorer(reward_model, blocks, max_tokens_per_device)
