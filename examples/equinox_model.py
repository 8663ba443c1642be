"""An equinox model: its arrays are the parameters, the rest of it is static."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from toy_pairs import VOCAB, WIDTH, toy_pairs

from jdpo import dpo_loss


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        first, second, third = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=first)
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=second)
        self.head = eqx.nn.Linear(WIDTH, VOCAB, key=third)

    def __call__(self, tokens: jax.Array, attention_mask: jax.Array) -> Any:
        x = jax.vmap(self.embed)(tokens)
        mask = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool)) & attention_mask
        return jax.vmap(self.head)(x + self.attention(x, x, x, mask=mask))


def main() -> list[float]:
    policy, static = eqx.partition(Model(jax.random.key(0)), eqx.is_array)
    reference, batch, losses = policy, toy_pairs(), []

    def apply_fn(arrays: Any, tokens: jax.Array, attention_mask: jax.Array) -> Any:
        return jax.vmap(eqx.combine(arrays, static))(tokens, attention_mask)

    for _ in range(10):
        (loss, _), grads = jax.value_and_grad(dpo_loss, has_aux=True)(policy, reference, batch, apply_fn=apply_fn)
        policy = eqx.apply_updates(policy, jax.tree.map(lambda grad: -0.5 * grad, grads))
        losses.append(float(loss))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
