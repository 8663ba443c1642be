"""Log-probs from anywhere: a chunked LM head that never holds the logits, and several losses added up."""

from typing import Any

import jax
import jax.numpy as jnp
from toy_pairs import VOCAB, WIDTH, toy_pairs

from jdpo import PreferenceBatch
from jdpo.losses import linear_token_logps, preference_loss, sequence_logps


def logps_of(params: Any, batch: PreferenceBatch) -> jax.Array:
    """Returns summed completion log-probs [b, 2]; the position before a token predicts it."""
    hidden = jnp.tanh(jnp.cumsum(params["embedding"][batch.tokens], axis=2))
    flat = hidden[:, :, :-1].reshape(-1, hidden.shape[2] - 1, WIDTH)
    targets = batch.tokens[:, :, 1:].reshape(flat.shape[:2])
    token_logps = linear_token_logps(flat, params["head"], targets, chunk_size=4)
    return sequence_logps(token_logps.reshape(batch.tokens[:, :, 1:].shape), batch.completion_mask[:, :, 1:])


def main() -> list[float]:
    keys = jax.random.split(jax.random.key(0))
    policy = {
        "embedding": jax.random.normal(keys[0], (VOCAB, WIDTH)),
        "head": jax.random.normal(keys[1], (WIDTH, VOCAB)),
    }
    batch, losses = toy_pairs(), []
    reference, lengths = logps_of(policy, batch), batch.completion_mask.sum(-1)

    @jax.jit
    def loss_fn(policy: Any) -> jax.Array:
        logps = logps_of(policy, batch)
        result = preference_loss(
            *logps.T, *reference.T, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 0.1],
            chosen_lengths=lengths[:, 0], rejected_lengths=lengths[:, 1],
        )  # fmt: skip
        return result.losses.mean()

    for _ in range(10):
        loss, grads = jax.value_and_grad(loss_fn)(policy)
        policy = jax.tree.map(lambda weight, grad: weight - 0.1 * grad, policy, grads)
        losses.append(float(loss))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
