"""A flax.nnx model: split it into a graph, which is static, and a state, which is trained."""

from typing import Any

import jax
from flax import nnx
from toy_pairs import VOCAB, WIDTH, toy_pairs

from jdpo import dpo_loss


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array, attention_mask: jax.Array) -> Any:
        x = self.embed(tokens)
        mask = nnx.combine_masks(nnx.make_causal_mask(tokens), attention_mask[:, None, None, :])
        return self.head(x + self.attention(x, mask=mask))


def main() -> list[float]:
    graph, policy = nnx.split(Model(nnx.Rngs(0)))
    reference, batch, losses = policy, toy_pairs(), []

    def apply_fn(state: Any, tokens: jax.Array, attention_mask: jax.Array) -> Any:
        return nnx.merge(graph, state)(tokens, attention_mask)

    for _ in range(10):
        (loss, _), grads = jax.value_and_grad(dpo_loss, has_aux=True)(policy, reference, batch, apply_fn=apply_fn)
        policy = jax.tree.map(lambda weight, grad: weight - 0.5 * grad, policy, grads)
        losses.append(float(loss))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
