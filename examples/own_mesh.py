"""The loss sharded over a mesh of your own: pairs along one axis, weights along the other.

On a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8 python own_mesh.py
"""

import jax
import numpy as np
from bare_function import apply_fn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy_pairs import VOCAB, WIDTH, toy_pairs

from jdpo import make_dpo_loss


def main() -> list[float]:
    num_model = 2 if len(jax.devices()) % 2 == 0 else 1
    mesh = jax.make_mesh(
        (len(jax.devices()) // num_model, num_model), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    keys = jax.random.split(jax.random.key(0))
    params = {
        "embedding": jax.random.normal(keys[0], (VOCAB, WIDTH)),
        "head": jax.random.normal(keys[1], (WIDTH, VOCAB)),
    }
    by_pair, by_weight = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "model"))
    # A pair stays whole on its device: shard b of [b, 2, t], never the two sides.
    batch = jax.device_put(toy_pairs(num_pairs=16), by_pair)
    policy = reference = jax.device_put(params, by_weight)
    step = jax.jit(
        jax.value_and_grad(make_dpo_loss(apply_fn), has_aux=True),
        in_shardings=(by_weight, by_weight, by_pair),
        out_shardings=(None, by_weight),
    )
    losses = []
    for _ in range(10):
        (loss, _), grads = step(policy, reference, batch)
        policy = jax.tree.map(lambda weight, grad: weight - 0.5 * grad, policy, grads)
        losses.append(float(loss))
    (alone, _) = make_dpo_loss(apply_fn)(jax.device_get(policy), params, toy_pairs(num_pairs=16))
    (sharded, _), _ = step(policy, reference, batch)
    np.testing.assert_allclose(sharded, alone, rtol=1e-5)
    print(f"{mesh.size} devices: loss {losses[0]:.4f} -> {losses[-1]:.4f}; after it {sharded:.4f}, on one {alone:.4f}")
    return losses


if __name__ == "__main__":
    main()
