"""Findings about margins and losses that have gone further than training should."""

from __future__ import annotations

from collections.abc import Iterator

from jdpo.reports.findings.run_facts import Finding, RunFacts
from jdpo.reports.findings.series import RunMetrics, figures, last_quarter

LARGE_MARGIN = 10.0
"""In the model of preferences behind DPO, a pair of this margin is ranked right with odds of 22,000 to 1; the gradient
of sigmoid is 11,000 times smaller than at the start."""

SMALL_LOSS = 0.05
"""A sigmoid loss of this size is a mean margin of about 3 and nearly all pairs ranked right; a supervised one means
that the rows are known by heart, as text has more than 0.05 nats of choice per token."""

_LOGISTIC = {"sigmoid", "sigmoid_norm", "aot", "aot_unpaired", "simpo"}
"""Losses -log sigmoid(z), which 0.05 means the same for; others reach other values, or have none that is too low."""


def saturation(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    """Yields findings about large margins and small losses."""
    if facts.command == "dpo":
        yield from _large_margin(metrics, facts)
    losses = last_quarter(metrics.training("loss"))
    if losses is None or losses.value >= SMALL_LOSS:
        return
    if facts.command == "dpo":
        # A sum with other terms, or a loss that may be negative, has no such scale.
        if not facts.losses or not _LOGISTIC.issuperset(facts.losses):
            return
        what, advice = "pairs", "raise beta or label_smoothing"
    else:
        what, advice = "rows", "give more varied rows"
    evaluated = metrics.held_out("loss")
    on_new = f"; on held-out {what} it is {figures(evaluated[-1].value)}" if evaluated else ""
    # New rows are as easy, so that these were not learnt by heart.
    easy = bool(evaluated) and evaluated[-1].value < SMALL_LOSS
    yield Finding(
        "small_loss",
        "note" if easy else "warning",
        f"The loss is close to 0: these {what} have nothing more to teach",
        f"Training loss {figures(losses.value)} {losses.where}{on_new}.",
        "Further steps cost the model what it knew before. Train for fewer steps (num_train_epochs, max_steps), lower "
        f"learning_rate, or {advice}. "
        + (
            f"The {what} are easy; look at some of them (`jdpo inspect`)."
            if easy
            else f"Compare with held-out {what} (eval_fraction)."
        ),
    )


def _large_margin(metrics: RunMetrics, facts: RunFacts) -> Iterator[Finding]:
    evaluated = metrics.held_out("rewards/margins")
    shown = {"training": last_quarter(metrics.training("rewards/margins")), "held-out": last_quarter(evaluated)}
    large = {name: mean for name, mean in shown.items() if mean is not None and mean.value > LARGE_MARGIN}
    if not large:
        return
    where = " and ".join(f"{figures(mean.value)} on {name} pairs {mean.where}" for name, mean in large.items())
    largest = max(mean.value for mean in large.values())
    apart = ""
    if facts.has_reference and facts.beta:
        apart = f"; relative to the reference, chosen and rejected moved {figures(largest / facts.beta)} nats apart"
    yield Finding(
        "large_margin",
        "warning",
        "The margin is far larger than ranking the pairs needs",
        f"Mean margin {where}{apart}.",
        "The model has moved far from the reference, which shows in its answers (sample_prompts). Train for fewer "
        "steps (num_train_epochs, max_steps), lower learning_rate, or raise beta.",
    )
