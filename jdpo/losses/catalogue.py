"""Every preference loss by name: what it needs, which options it honours, where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jdpo.losses import coupled, pairwise, reference_free
from jdpo.losses.pairwise import LossInputs

Array = Any


class LossSpec(NamedTuple):
    """One entry of the catalogue.

    Attributes:
      function: LossInputs -> float [b].
      source: paper and arXiv number.
      options: names of the options that it honours, beside beta and those that every loss honours.
      needs_reference: whether reference log-probs are read.
      needs_lengths: whether completion lengths are read.
      needs_token_count: whether the chosen tokens of the global batch are counted.
      needs_state: whether it can carry a running state from step to step.
      needs_global_batch: whether a pair's loss depends on the other pairs of the batch.
      mean_rewards: whether its reward is beta times the mean, not the sum, of a completion's log-probs.
    """

    function: Callable[[LossInputs], Array]
    source: str
    options: frozenset[str] = frozenset()
    needs_reference: bool = True
    needs_lengths: bool = False
    needs_token_count: bool = False
    needs_state: bool = False
    needs_global_batch: bool = False
    mean_rewards: bool = False


_SCORES = frozenset({"f_divergence_type", "f_alpha_divergence_coef"})
_SMOOTHED = frozenset({"label_smoothing"})
_PAIRS = frozenset({"ld_alpha", "use_weighting", "pair_weights"})

LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        pairwise.sigmoid, "DPO, arXiv 2305.18290, eq. 7; cDPO where label_smoothing > 0", _PAIRS | _SCORES | _SMOOTHED
    ),
    "robust": LossSpec(pairwise.robust, "robust DPO, arXiv 2403.00409", _PAIRS | _SCORES | _SMOOTHED),
    "hinge": LossSpec(pairwise.hinge, "SLiC/RSO, arXiv 2309.06657", _PAIRS | _SCORES),
    "ipo": LossSpec(pairwise.ipo, "IPO a token, arXiv 2310.12036, eq. 17", _PAIRS | _SCORES, needs_lengths=True),
    "ipo_sum": LossSpec(pairwise.ipo_sum, "IPO, arXiv 2310.12036, eq. 17", _PAIRS),
    "exo_pair": LossSpec(pairwise.exo_pair, "EXO, arXiv 2402.00856, eq. 16", _PAIRS | _SCORES | _SMOOTHED),
    "nca_pair": LossSpec(pairwise.nca_pair, "NCA, arXiv 2402.05369", _PAIRS),
    "bco_pair": LossSpec(
        pairwise.bco_pair, "BCO, arXiv 2404.04656", _PAIRS | {"bco_delta", "bco_running_delta"}, needs_state=True
    ),
    "sppo_hard": LossSpec(pairwise.sppo_hard, "SPPO, arXiv 2405.00675, eq. 4.7", _PAIRS),
    "aot": LossSpec(coupled.aot, "AOT, arXiv 2406.05882, paired", _SMOOTHED | {"ld_alpha"}, needs_global_batch=True),
    "aot_unpaired": LossSpec(
        coupled.aot_unpaired, "AOT, arXiv 2406.05882, unpaired", _SMOOTHED | {"ld_alpha"}, needs_global_batch=True
    ),
    "apo_zero": LossSpec(pairwise.apo_zero, "APO-zero, arXiv 2408.06266, eq. 7", _PAIRS),
    "apo_down": LossSpec(pairwise.apo_down, "APO-down, arXiv 2408.06266, eq. 8", _PAIRS),
    "discopop": LossSpec(pairwise.discopop, "DiscoPOP, arXiv 2406.08414, eq. 5", _PAIRS | _SCORES | {"discopop_tau"}),
    "sigmoid_norm": LossSpec(
        pairwise.sigmoid_norm, "length-normalised DPO, arXiv 2411.15124", _PAIRS | _SCORES, needs_lengths=True
    ),
    "simpo": LossSpec(
        reference_free.simpo,
        "SimPO, arXiv 2405.14734, eq. 6",
        frozenset({"simpo_gamma", "use_weighting", "pair_weights"}),
        needs_reference=False,
        needs_lengths=True,
        mean_rewards=True,
    ),
    "cpo": LossSpec(
        reference_free.cpo,
        "CPO, arXiv 2401.08417, eq. 7",
        frozenset({"cpo_alpha", "use_weighting", "pair_weights"}),
        needs_reference=False,
        needs_token_count=True,
    ),
    "orpo": LossSpec(
        reference_free.orpo,
        "ORPO, arXiv 2403.07691, eqs. 6 and 7",
        frozenset({"orpo_lambda", "use_weighting", "pair_weights"}),
        needs_reference=False,
        needs_lengths=True,
        mean_rewards=True,
    ),
    "sft": LossSpec(
        reference_free.sft,
        "negative log-likelihood of the chosen side, mean over tokens",
        frozenset({"use_weighting", "pair_weights"}),
        needs_reference=False,
        needs_token_count=True,
    ),
}
"""Every preference loss by name."""
