"""Every preference loss and every option of one, as plain data.

This is the one place where a loss is declared: its formula, its paper, what it needs and which options it honours.
`jdpo.losses.catalogue` binds the names to functions. The keys of `jdpo dpo`, their defaults, range checks and help, the
tables in docs/losses.md and the cases of the tests all derive from here. Nothing is imported except the standard
library, so that reading a config or printing `--help` does not load jax.

Notation of the formulas (the log-probabilities are natural logarithms, summed over the tokens of a completion):

    a, b        policy minus reference log-prob of the chosen and of the rejected completion
    D           a - b; with an f-divergence, the difference of their scores
    l_w, l_l    log-prob of the chosen and of the rejected completion under the policy; r_w, r_l under the reference
    n_w, n_l    completion lengths in tokens
    m_w, m_l    l_w / n_w and l_l / n_l, log-probs per token
    N           chosen completion tokens of the global batch / its pairs
    s, ls       sigmoid, log-sigmoid
    e           label_smoothing
    g           score of the chosen completion minus that of the rejected one, as the rows have them
    o           margin_gamma log(g), the offset; 0 without margin_gamma
    z           beta D - o, the margin; beta D for losses that cannot honour margin_gamma

A space multiplies, and `formula, x = meaning` defines x. The tests evaluate the formulas in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, dataclass_transform

T = TypeVar("T")

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
F_DIVERGENCES: dict[FDivergence, str] = {
    "reverse_kl": "r",
    "forward_kl": "1 - exp(-r)",
    "js_divergence": "log(2) + ls(r)",
    "alpha_divergence": "(exp((f_alpha_divergence_coef - 1) r) - 1) / (f_alpha_divergence_coef - 1)",
}
"""f-DPO, arXiv 2309.16240: the score that replaces a log-ratio r under each divergence."""

Need = Literal["reference", "lengths", "token count", "state", "global batch"]


# --- options


def _number(default: float | None, description: str, *, example: str | None = None, **bounds: float) -> Any:
    """Declares a finite number. The metadata are arguments of pydantic's Field, which `jdpo.config` makes of it."""
    return _other(default, description, example=example, allow_inf_nan=False, **bounds)


def _other(default: Any, description: str, *, example: str | None = None, **details: Any) -> Any:
    examples = {} if example is None else {"examples": [example]}
    return dataclasses.field(default=default, metadata={"description": description, **examples, **details})


@dataclass_transform(kw_only_default=True)
def _frozen(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass, which for type checkers is one of the kind that `jdpo.config` makes its keys of."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@_frozen
class LossOptions:
    """The options of the preference losses. The config of `jdpo dpo` inherits these fields as its keys.

    Each field is declared once: name, type, default, range (ge, gt, le, lt) and the sentences that `--help` prints.
    """

    beta: float = _number(0.1, "Strength of the pull towards the reference: the higher, the closer it stays.", gt=0)
    label_smoothing: float = _number(
        0.0, "Assumed probability that a preference label is flipped.", example="0.1", ge=0, lt=0.5
    )
    margin_gamma: float = _number(
        0.0,
        "Weight of the log of a pair's score difference, an offset that the margin has to exceed (ODPO); 0: no offset.",
        example="0.5",
        ge=0,
    )
    f_divergence_type: FDivergence = _other(
        "reverse_kl", "Divergence between policy and reference that the loss penalizes."
    )
    f_alpha_divergence_coef: float = _number(0.5, "Alpha of alpha_divergence.")
    discopop_tau: float = _number(0.05, "Temperature of discopop.", gt=0)
    simpo_gamma: float = _number(0.5, "Target margin of simpo.")
    cpo_alpha: float = _number(1.0, "Weight of the likelihood term of cpo.", ge=0)
    orpo_lambda: float = _number(0.1, "Weight of the odds-ratio term of orpo.", ge=0)
    rpo_alpha: float | None = _number(
        None,
        "Weight of the chosen side's NLL per token, added to the loss (RPO); null: not added.",
        example="1.0",
        ge=0,
    )
    bco_delta: float = _number(0.0, "Mean reward that bco_pair compares rewards with.")
    bco_running_delta: bool = _other(
        False, "Let bco_pair use the mean reward of all pairs so far instead of bco_delta."
    )
    use_weighting: bool = _other(False, "Weight each pair by its likelihood under the policy (WPO).")
    ld_alpha: float | None = _number(
        None,
        "Weight of the tokens after the length of the shorter completion (LD-DPO); null: 1.",
        example="0.5",
        ge=0,
        le=1,
    )

    def by_name(self) -> dict[str, Any]:
        """Returns every option with its value, as the keyword arguments of `jdpo.losses.settings.loss_settings`."""
        return {name: getattr(self, name) for name in OPTIONS}


@dataclasses.dataclass(frozen=True)
class Option:
    """The declaration of one field of `LossOptions`.

    Attributes:
      default: the value that asks for nothing.
      description: the sentence in `--help`.
      is_number: True for a finite number, or None where that is the default.
      bounds: any of ge, gt, le and lt, with the limit.
    """

    default: Any
    description: str
    is_number: bool
    bounds: Mapping[str, float]

    @property
    def range(self) -> str:
        """The values that are allowed, in words.

        >>> OPTIONS["label_smoothing"].range, OPTIONS["beta"].range, OPTIONS["simpo_gamma"].range
        ('in [0, 0.5)', 'positive', 'a finite number')
        """
        lower = self.bounds.get("ge", self.bounds.get("gt"))
        upper = self.bounds.get("le", self.bounds.get("lt"))
        if upper is not None:
            return f"in {'[' if 'ge' in self.bounds else '('}{lower:g}, {upper:g}{']' if 'le' in self.bounds else ')'}"
        if lower is None:
            return "a finite number"
        return f"at least {lower:g}" if "ge" in self.bounds else "positive" if lower == 0 else f"above {lower:g}"

    def allows(self, number: float) -> bool:
        """Returns whether a number is finite and within the bounds."""
        inside = (
            number >= self.bounds.get("ge", -math.inf)
            and number > self.bounds.get("gt", -math.inf)
            and number <= self.bounds.get("le", math.inf)
            and number < self.bounds.get("lt", math.inf)
        )
        return math.isfinite(number) and inside


def _option(field: dataclasses.Field[Any]) -> Option:
    bounds = {name: limit for name, limit in field.metadata.items() if name in ("ge", "gt", "le", "lt")}
    return Option(field.default, field.metadata["description"], "allow_inf_nan" in field.metadata, bounds)


OPTIONS: dict[str, Option] = {field.name: _option(field) for field in dataclasses.fields(LossOptions)}
"""Every field of `LossOptions` by name."""

LOSS_WEIGHT = Option(1.0, "Weight of one loss of a list.", True, {"ge": 0})

BATCH_OPTIONS: dict[str, str] = {
    "num_chosen_tokens": "Chosen completion tokens of the whole batch, which token means divide by.",
    "pair_weights": "Float [b]; the loss of each pair is multiplied by its weight.",
}
"""Options of the Python functions that belong to a batch, so that they are not keys of a run."""

FOR_EVERY_LOSS = frozenset({"beta", "loss_weights", "rpo_alpha", "num_chosen_tokens"})
"""Options that go with every loss."""

READ_SCORES = frozenset({"margin_gamma"})
"""Options for which the scores of a pair's two answers must be known."""

FOR_THE_WHOLE_LIST = frozenset({"f_divergence_type", "ld_alpha", "use_weighting", "pair_weights"})
"""Options of the whole objective: every loss of a list must honour them. For the others, one loss is enough."""

INDIFFERENT_LOSSES = frozenset({"sft"})
"""Losses that read no preference, and may be in a list next to losses that honour such an option."""

SMOOTHING = ("label_smoothing",)
OFFSET = ("margin_gamma",)
DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")
TAIL = ("ld_alpha",)
WEIGHTING = ("use_weighting", "pair_weights")
SHARED_OPTIONS = (SMOOTHING, OFFSET, DIVERGENCE, TAIL, WEIGHTING)
"""Groups of options that many losses honour."""


# --- losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpec:
    """One preference loss.

    Attributes:
      formula: the loss of one pair.
      source: paper, arXiv number and equation.
      options: names of the options that it honours, in addition to `FOR_EVERY_LOSS`.
      use: when to choose it.
      push: minus the derivative of the loss with respect to l_w: what a gradient step asks of the chosen log-prob.
      kind: how it pushes the two sides; docs/losses.md explains the words.
      keeps_chosen: whether it keeps the chosen answer probable.
      needs: what it reads in addition to the policy's log-probs.
      start: its value where the policy equals the reference, at beta 0.1 and with default options; empty without a
        reference.
      in_trl: whether TRL 1.16 has it, so that tests/golden/trl_losses must hold a case of it.
    """

    formula: str
    source: str
    options: tuple[str, ...]
    use: str
    push: str
    kind: Literal["difference", "difference per token", "up", "level", "down"]
    keeps_chosen: str
    needs: tuple[Need, ...] = ("reference",)
    start: str = ""
    in_trl: bool = True

    @property
    def mean_rewards(self) -> bool:
        """True if its reward is beta times the mean, not the sum, of a completion's log-probs (no reference)."""
        return "reference" not in self.needs and "lengths" in self.needs

    @property
    def own_options(self) -> tuple[str, ...]:
        """The options that are not among `SHARED_OPTIONS`."""
        shared = {name for group in SHARED_OPTIONS for name in group}
        return tuple(name for name in self.options if name not in shared)


_LOG_ODDS = "(m_w - m_l) - (log1mexp(m_w) - log1mexp(m_l))"

LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        formula="-(1-e) ls(z) - e ls(-z)",
        source="DPO, arXiv 2305.18290, eq. 7; cDPO where e > 0",
        options=SMOOTHING + OFFSET + DIVERGENCE + TAIL + WEIGHTING,
        use="the place to start: the best understood, with few ways to fail",
        push="beta ((1-e) s(-z) - e s(z))",
        kind="difference",
        keeps_chosen="no: it fixes only the gap, and the chosen log-prob usually falls",
        start="ln 2 = 0.6931",
    ),
    "robust": LossSpec(
        formula="[-(1-e) ls(z) + e ls(-z)] / (1-2e)",
        source="robust DPO, arXiv 2403.00409",
        options=SMOOTHING + OFFSET + DIVERGENCE + TAIL + WEIGHTING,
        use="you know roughly which share e of the labels is wrong",
        push="beta ((1-e) s(-z) + e s(z)) / (1-2e)",
        kind="difference",
        keeps_chosen="no, and it never stops pushing",
        start="ln 2 = 0.6931",
    ),
    "hinge": LossSpec(
        formula="max(0, 1 - z)",
        source="SLiC and RSO, arXiv 2309.06657",
        options=DIVERGENCE + TAIL + WEIGHTING,
        use="pairs that are learnt should stop pulling at the model",
        push="beta (z < 1)",
        kind="difference",
        keeps_chosen="no, but it stops at margin 1",
        start="1",
    ),
    "ipo": LossSpec(
        formula="(a/n_w - b/n_l - 1/(2 beta))^2",
        source="IPO averaged over tokens, arXiv 2310.12036, eq. 17",
        options=DIVERGENCE + TAIL + WEIGHTING,
        use="labels are close to certain and `sigmoid` over-fits; lengths differ",
        push="2 (1/(2 beta) - (a/n_w - b/n_l)) / n_w",
        kind="difference per token",
        keeps_chosen="no, but it stops at its gap, and pushes back beyond it",
        needs=("reference", "lengths"),
        start="1/(4 beta²) = 25",
    ),
    "ipo_sum": LossSpec(
        formula="(D - 1/(2 beta))^2",
        source="IPO as in the paper, arXiv 2310.12036, eq. 17",
        options=TAIL + WEIGHTING,
        use="results of the paper; answers of similar length",
        push="2 (1/(2 beta) - D)",
        kind="difference",
        keeps_chosen="no, but it stops at its gap, and pushes back beyond it",
        start="1/(4 beta²) = 25",
        in_trl=False,
    ),
    "exo_pair": LossSpec(
        formula="s(z) [ls(z) - log(1-e)] + s(-z) [ls(-z) - log(e)]",
        source="EXO, arXiv 2402.00856, eq. 16",
        options=SMOOTHING + DIVERGENCE + TAIL + WEIGHTING,
        use="noisy pairs; needs `label_smoothing` > 0, the paper uses 0.001",
        push="beta s(z) s(-z) (log((1-e)/e) - z)",
        kind="difference",
        keeps_chosen="no, but it stops at log((1-e)/e)",
        start="2.7612",
    ),
    "nca_pair": LossSpec(
        formula="-ls(beta a) - ls(-beta a)/2 - ls(-beta b)/2",
        source="NCA, arXiv 2402.05369",
        options=TAIL + WEIGHTING,
        use="the chosen answer's probability should not fall (maths, code)",
        push="beta (1 - 3 s(beta a)/2)",
        kind="level",
        keeps_chosen="yes: a is drawn to ln 2/beta, from below and from above",
        start="2 ln 2 = 1.3863",
    ),
    "bco_pair": LossSpec(
        formula="-ls(beta a - bco_delta) - ls(-(beta b - bco_delta))",
        source="BCO, arXiv 2404.04656",
        options=TAIL + WEIGHTING + ("bco_delta", "bco_running_delta"),
        use="the same; rows whose good and bad answers hardly belong together; one of several in MPO",
        push="beta s(bco_delta - beta a)",
        kind="up",
        keeps_chosen="yes: always up, most where it fell",
        needs=("reference", "state"),
        start="2 ln 2 = 1.3863",
    ),
    "sppo_hard": LossSpec(
        formula="(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2",
        source="SPPO, arXiv 2405.00675, eq. 4.7",
        options=TAIL + WEIGHTING,
        use="rounds of self-play with fresh answers and a judge; a hard target for each side",
        push="2 (1/(2 beta) - a)",
        kind="level",
        keeps_chosen="yes: a is drawn to 1/(2 beta), harder the further away it is",
        start="1/(2 beta²) = 50",
    ),
    "aot": LossSpec(
        formula="-(1-e) ls(beta d) - e ls(-beta d), d = sort(l_w - l_l) - sort(r_w - r_l)",
        source="AOT, arXiv 2406.05882, paired",
        options=SMOOTHING + TAIL,
        use="the distribution of margins matters more than each pair; large batches",
        push="beta ((1-e) s(-beta d) - e s(beta d)), d = sort(l_w - l_l) - sort(r_w - r_l)",
        kind="difference",
        keeps_chosen="no",
        needs=("reference", "global batch"),
        start="ln 2 = 0.6931",
    ),
    "aot_unpaired": LossSpec(
        formula="-(1-e) ls(beta d) - e ls(-beta d), d = sort(a) - sort(b)",
        source="AOT, arXiv 2406.05882, unpaired",
        options=SMOOTHING + TAIL,
        use="the same, where chosen and rejected do not answer the same prompt",
        push="beta ((1-e) s(-beta d) - e s(beta d)), d = sort(a) - sort(b)",
        kind="difference",
        keeps_chosen="no",
        needs=("reference", "global batch"),
        start="ln 2 = 0.6931",
    ),
    "apo_zero": LossSpec(
        formula="1 - s(beta a) + s(beta b)",
        source="APO-zero, arXiv 2408.06266, eq. 7",
        options=TAIL + WEIGHTING,
        use="the chosen answers are better than what the model says by itself",
        push="beta s(beta a) s(-beta a)",
        kind="up",
        keeps_chosen="yes, but weakly once it is far below the reference",
        start="1",
    ),
    "apo_down": LossSpec(
        formula="s(beta a) + 1 - s(z)",
        source="APO-down, arXiv 2408.06266, eq. 8",
        options=TAIL + WEIGHTING,
        use="the chosen answers are worse than what the model says by itself, the rejected worse still",
        push="beta (s(z) s(-z) - s(beta a) s(-beta a))",
        kind="down",
        keeps_chosen="no: it pushes it down wherever a is smaller in size than D, the rejected further",
        start="1",
    ),
    "discopop": LossSpec(
        formula="-ls(z) (1 - m) + exp(-z) m, m = s(z/discopop_tau)",
        source="DiscoPOP, arXiv 2406.08414, eq. 5",
        options=DIVERGENCE + TAIL + WEIGHTING + ("discopop_tau",),
        use="comparison with its paper",
        push="beta (s(-z) (1-m) + exp(-z) m - (exp(-z) + ls(z)) m (1-m) / discopop_tau), m = s(z/discopop_tau)",
        kind="difference",
        keeps_chosen="no",
        start="(1 + ln 2)/2 = 0.8466",
    ),
    "sigmoid_norm": LossSpec(
        formula="-ls(beta (a/n_w - b/n_l) - o)",
        source="length-normalised DPO, Tulu 3, arXiv 2411.15124",
        options=OFFSET + DIVERGENCE + TAIL + WEIGHTING,
        use="answers grow longer under `sigmoid`; needs a larger beta (5)",
        push="beta s(o - beta (a/n_w - b/n_l)) / n_w",
        kind="difference per token",
        keeps_chosen="no",
        needs=("reference", "lengths"),
        start="ln 2 = 0.6931",
    ),
    "simpo": LossSpec(
        formula="-ls(beta (m_w - m_l) - simpo_gamma)",
        source="SimPO, arXiv 2405.14734, eq. 6",
        options=(*WEIGHTING, "simpo_gamma"),
        use="no memory for a reference; needs a larger beta (2 to 10) and care with the learning rate",
        push="beta s(simpo_gamma - beta (m_w - m_l)) / n_w",
        kind="difference per token",
        keeps_chosen="no, and no reference holds it either",
        needs=("lengths",),
    ),
    "cpo": LossSpec(
        formula="-ls(beta (l_w - l_l)) + cpo_alpha (-l_w/N)",
        source="CPO, arXiv 2401.08417, eq. 7",
        options=(*WEIGHTING, "cpo_alpha"),
        use="no memory for a reference, good chosen answers (translation)",
        push="beta s(-beta (l_w - l_l)) + cpo_alpha/N",
        kind="up",
        keeps_chosen="yes, through its likelihood term",
        needs=("token count",),
    ),
    "orpo": LossSpec(
        formula=f"-m_w - orpo_lambda ls({_LOG_ODDS})",
        source="ORPO, arXiv 2403.07691, eqs. 6 and 7",
        options=(*WEIGHTING, "orpo_lambda"),
        use="one stage instead of SFT and DPO, from a base model",
        push=f"(1 + orpo_lambda s(-g) / (1 - exp(m_w))) / n_w, g = {_LOG_ODDS}",
        kind="up",
        keeps_chosen="yes: it is mostly likelihood, with a small odds term",
        needs=("lengths",),
    ),
    "simper": LossSpec(
        formula="-exp(m_w) + exp(m_l)",
        source="SimPER, arXiv 2502.00883",
        options=WEIGHTING,
        use="no memory for a reference and nothing to tune: it reads neither beta nor an option",
        push="exp(m_w) / n_w",
        kind="up",
        keeps_chosen="yes: always up, but weakly once the answer is improbable",
        needs=("lengths",),
        in_trl=False,
    ),
    "sft": LossSpec(
        formula="-l_w/N",
        source="negative log-likelihood of the chosen side, mean over tokens",
        options=WEIGHTING,
        use="next to another loss; alone it is supervised training on the chosen answers",
        push="1/N",
        kind="up",
        keeps_chosen="yes: that is all it does",
        needs=("token count",),
    ),
}
"""Every preference loss by name."""
