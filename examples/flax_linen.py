"""A flax.linen model: `apply` is the apply_fn, its variables are the parameters."""

from typing import Any

import flax.linen as nn
import jax
import optax
from toy_pairs import VOCAB, WIDTH, toy_pairs

from jdpo import make_dpo_loss


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any, attention_mask: Any) -> Any:
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        mask = nn.combine_masks(nn.make_causal_mask(tokens), attention_mask[:, None, None, :])
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x, mask=mask)
        return nn.Dense(VOCAB)(x)


def main() -> list[float]:
    model, batch, losses = Model(), toy_pairs(), []
    policy = reference = model.init(jax.random.key(0), batch.tokens[:, 0], batch.attention_mask[:, 0])
    loss_fn, optimizer = make_dpo_loss(model.apply, loss_type="ipo", beta=0.5), optax.adam(3e-3)

    @jax.jit
    def step(policy: Any, moments: Any) -> tuple[Any, Any, jax.Array]:
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(policy, reference, batch)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(policy, updates), moments, loss

    moments = optimizer.init(policy)
    for _ in range(20):
        policy, moments, loss = step(policy, moments)
        losses.append(float(loss))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
