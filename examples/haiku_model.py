"""A haiku model, transformed and without a random key."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from toy_pairs import VOCAB, WIDTH, toy_pairs

from jdpo import dpo_loss


def forward(tokens: jax.Array, attention_mask: jax.Array) -> Any:
    x = hk.Embed(VOCAB, WIDTH)(tokens)
    causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    mask = causal[None, None] & attention_mask[:, None, None, :]
    attention = hk.MultiHeadAttention(2, WIDTH // 2, w_init=hk.initializers.VarianceScaling())
    return hk.Linear(VOCAB)(x + attention(x, x, x, mask=mask))


def main() -> list[float]:
    model, batch, losses = hk.without_apply_rng(hk.transform(forward)), toy_pairs(), []
    policy = reference = model.init(jax.random.key(0), batch.tokens[:, 0], batch.attention_mask[:, 0])
    for _ in range(10):
        (loss, _), grads = jax.value_and_grad(dpo_loss, has_aux=True)(policy, reference, batch, apply_fn=model.apply)
        policy = jax.tree.map(lambda weight, grad: weight - 0.5 * grad, policy, grads)
        losses.append(float(loss))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
