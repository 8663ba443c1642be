"""The remat policy and the tokens at once of a run that leaves them open, as its estimates say: nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable

from jdpo.chips import GPU_POOL
from jdpo.models.remat import remat_order
from jdpo.training.fit.assembly import Assembly
from jdpo.training.fit.estimates import estimate_step
from jdpo.training.fit.fit_search import MAX_TOKENS_PER_DEVICE, Measured, search_fit
from jdpo.training.fit.memory_fit import SHARES, TOKEN_STEP, Fit
from jdpo.training.setup.batches import Batches


def planned_fit(assembly: Assembly, plan: Callable[[int], Batches], *, platform: str, memory: float) -> Fit:
    """Returns the fit that a run would compile first; it keeps it if the compiled step fits.

    Args:
      assembly: the step of a run, under any policy.
      plan: tokens per device at most -> the batches.
      platform: "cpu", "gpu" or "tpu".
      memory: bytes of a device.
    """
    config = assembly.setup.config
    most = config.max_tokens_per_device or MAX_TOKENS_PER_DEVICE[platform]
    widest = plan(most)
    needed = -(-widest.tokens_per_device // TOKEN_STEP) * TOKEN_STEP
    fixed_tokens = bool(config.max_tokens_per_device or config.micro_batch_size)
    policies = remat_order(platform) if config.remat == "auto" else (config.remat,)
    estimate = estimate_step(assembly, policies, widest.demanding()[-1])

    def expected(remat: str, tokens: int) -> Measured:
        return Measured(estimate.num_bytes(remat, tokens), tokens)

    # As `memory_limit` says where there is such a device, and the command has reserved the pool of a GPU.
    limit = memory * SHARES.get(platform, 1.0) * (GPU_POOL if platform == "gpu" else 1.0)
    most_tokens = needed if fixed_tokens else min(most, needed)
    least_tokens = most_tokens if fixed_tokens else min(TOKEN_STEP, most_tokens)
    fit = search_fit(
        expected, estimate, policies=policies, most_tokens=most_tokens, least_tokens=least_tokens, limit=limit
    )
    return fit._replace(max_tokens_per_device=most) if fixed_tokens else fit
