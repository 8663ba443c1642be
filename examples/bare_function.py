"""A dict of arrays and a function are enough: no framework, plain gradient descent."""

from typing import Any

import jax
import jax.numpy as jnp
from toy_pairs import VOCAB, WIDTH, toy_pairs

from jdpo import dpo_loss


def apply_fn(params: Any, tokens: jax.Array, attention_mask: jax.Array) -> Any:
    """A causal model of one line: the running mean of embeddings, then a head."""
    embedded = params["embedding"][tokens] * attention_mask[..., None]
    return jnp.tanh(jnp.cumsum(embedded, 1) / jnp.cumsum(attention_mask, 1)[..., None]) @ params["head"]


def main() -> list[float]:
    keys = jax.random.split(jax.random.key(0))
    policy = {
        "embedding": jax.random.normal(keys[0], (VOCAB, WIDTH)),
        "head": jax.random.normal(keys[1], (WIDTH, VOCAB)),
    }
    reference, batch, losses = policy, toy_pairs(), []
    for _ in range(20):
        (loss, metrics), grads = jax.value_and_grad(dpo_loss, has_aux=True)(
            policy, reference, batch, apply_fn=apply_fn, beta=0.1
        )
        policy = jax.tree.map(lambda weight, grad: weight - 0.5 * grad, policy, grads)
        losses.append(float(loss))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, accuracy {metrics['rewards/accuracies']:.2f}")
    return losses


if __name__ == "__main__":
    main()
