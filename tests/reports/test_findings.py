"""Findings of runs: each with a run that shows it and one that does not, and noise that must not."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdpo import safe_text
from jdpo.reports.findings import Finding, RunFacts, finding_lines, findings_of, verdict
from jdpo.reports.share_tests import length_bias
from tests.reports.simulated_runs import BETA, simulated

LN2 = math.log(2)
FACTS = RunFacts(
    command="dpo",
    status="finished",
    step=200,
    num_steps=200,
    batch_size=16,
    num_rows=3200,
    num_eval_rows=200,
    losses=("sigmoid",),
    has_reference=True,
    start_loss=LN2,
    beta=BETA,
    learning_rate=1e-6,
    warmup_steps=20,
    max_grad_norm=1.0,
)
SFT = dataclasses.replace(
    FACTS, command="sft", losses=(), has_reference=False, start_loss=None, beta=None, num_eval_rows=None
)


def good(seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    return simulated(lambda done: 1.2 * done, seed=seed, held_out_margin=lambda done: 0.9 * done, **options)


def keys(lines: list[dict[str, Any]], facts: RunFacts = FACTS, **changes: Any) -> set[str]:
    return {finding.key for finding in findings_of(lines, dataclasses.replace(facts, **changes))}


def found(key: str, lines: list[dict[str, Any]], facts: RunFacts = FACTS, **changes: Any) -> Finding:
    (finding,) = (one for one in findings_of(lines, dataclasses.replace(facts, **changes)) if one.key == key)
    return finding


def sft_lines(losses: list[float], held_out: dict[int, float] | None = None) -> list[dict[str, Any]]:
    lines = [{"step": 10 * (n + 1), "loss": loss, "learning_rate": 1e-5} for n, loss in enumerate(losses)]
    return lines + [{"step": step, "eval_loss": loss} for step, loss in (held_out or {}).items()]


# --- no finding without a reason


def test_good_runs_have_no_findings_whatever_their_noise() -> None:
    fired = [key for seed in range(60) for key in keys(good(seed))]
    # Small runs: 40 steps of 4 pairs, 40 held-out pairs.
    small = {"num_steps": 40, "logging_steps": 5, "eval_steps": 10, "batch_size": 4, "num_eval_rows": 40}
    facts = dataclasses.replace(FACTS, step=40, num_steps=40, batch_size=4, num_rows=160, num_eval_rows=40)
    fired += [key for seed in range(60) for key in keys(good(seed, **small), facts, warmup_steps=4)]
    assert len(fired) <= 2, fired


def test_supervised_runs_with_noise_have_no_findings() -> None:
    rng, fired = np.random.default_rng(0), list[str]()
    for _ in range(100):
        losses = 1.0 + np.exp(-np.arange(20) / 3) + 0.05 * rng.normal(size=20)
        fired += keys(sft_lines(losses.tolist(), {50: 1.3, 200: 1.08}), SFT, num_eval_rows=100)
    assert not fired


@pytest.mark.parametrize("status", ["running", "stopped", "failed", "finished"])
def test_a_run_without_lines_has_no_findings(status: Any) -> None:
    assert keys([], status=status, step=0) == set()
    assert "No metrics were logged." in verdict([], dataclasses.replace(FACTS, status=status), [])


# --- learning


def test_a_policy_that_has_not_moved_has_learnt_nothing() -> None:
    still = simulated(lambda done: 1e-4 * done, spread=lambda done: 1e-4 * done)
    # Noise-free rounding may rank most pairs right without any use.
    lines = [line | {"rewards/chosen": 5e-5, "rewards/rejected": -5e-5, "rewards/accuracies": 0.9} for line in still]
    finding = found("learnt_nothing", lines, num_eval_rows=None)
    assert finding.level == "error"
    assert "hardly moved" in finding.title
    assert "learning_rate" in finding.advice
    assert "0.6931" in finding.evidence
    sentences = verdict(lines, FACTS, [finding])
    assert "Do not use this model" in sentences[-1]
    # A stopped run can go on, and one in its warm-up has not had its chance.
    assert found("learnt_nothing", lines, status="stopped").level == "warning"
    assert keys(lines[:4], status="running", step=40, warmup_steps=100) == set()


@pytest.mark.parametrize("seed", range(5))
def test_a_policy_that_moves_at_random_has_learnt_nothing(seed: int) -> None:
    lines = simulated(lambda done: 0.0, seed=seed)
    finding = found("learnt_nothing", lines, num_eval_rows=None)
    assert finding.level == "error"
    assert "95 % interval" in finding.evidence
    # Four pairs show nothing, one way or the other.
    assert "learnt_nothing" not in keys(lines, num_rows=4)


def test_without_a_reference_the_first_quarter_is_compared_with_the_last() -> None:
    free = {"losses": ("simpo",), "has_reference": False, "start_loss": None}
    flat = simulated(lambda done: 0.2, spread=lambda done: 1.0)
    assert found("learnt_nothing", flat, **free).level == "warning"
    assert "learnt_nothing" not in keys(good(), **free)
    assert "learnt_nothing" not in keys(flat[:4], **free)


def test_supervised_losses_that_do_not_fall_or_rise() -> None:
    noise = 0.05 * np.random.default_rng(0).normal(size=20)
    assert keys(sft_lines((2.0 + noise).tolist()), SFT) == {"learnt_nothing"}
    assert found("learnt_nothing", sft_lines((2.0 + noise).tolist(), {100: 2.1, 200: 2.099}), SFT).level == "error"
    assert keys(sft_lines((2.0 + noise + np.linspace(0, 1, 20)).tolist()), SFT) == {"loss_rises"}
    assert keys(sft_lines([2.0, 3.0, 4.0]), SFT) == set()


def test_a_gradient_of_zero_at_the_end() -> None:
    def dead(num: int, loss: float = 0.7) -> list[dict[str, Any]]:
        return [line | {"grad_norm": 0.0 if at >= 20 - num else 1.0, "loss": loss} for at, line in enumerate(lines)]

    lines = simulated(lambda done: 1.2 * done)
    assert "learnt_nothing" not in keys(dead(20))
    finding = found("dead_gradient", dead(5), num_eval_rows=None)
    assert finding.level == "error"
    assert "from step 160 to step 200" in finding.evidence
    assert "dead_gradient" not in keys(dead(2))
    assert "dead_gradient" in keys(dead(20)[:1], step=10, num_steps=10)
    hinge = {"losses": ("hinge",), "start_loss": 1.0}
    assert found("margins_met", dead(5, loss=0.0), **hinge).level == "note"
    assert "dead_gradient" in keys(dead(5), **hinge)


def test_one_row_or_one_step_shows_nothing() -> None:
    assert "one_row_or_step" in keys(good(), num_rows=1)
    assert "one_row_or_step" in keys(good()[:1], num_steps=1, step=1)
    assert keys(good(), num_rows=2, num_eval_rows=200) == set()
    finding = found("few_eval_rows", good(), num_eval_rows=10)
    assert "between 0.24 and 0.76" in finding.evidence


# --- chosen log-prob


def test_a_fall_of_the_chosen_log_prob_without_better_accuracy() -> None:
    lines = simulated(lambda done: 1.5 * done, chosen=lambda done: -40 * done, spread=lambda done: 1.5)
    # Accuracy rises in the same steps: this is what the loss is for.
    assert "chosen_falls" not in keys(lines)
    flat = simulated(lambda done: 1.0, chosen=lambda done: -120 * done, spread=lambda done: 1.0)
    finding = found("chosen_falls", flat, num_eval_rows=None)
    assert (finding.level, "of training chosen answers fell" in finding.evidence) == ("warning", True)
    for word in ("rpo_alpha", "beta", "learning_rate", "max_steps", "docs/running.md"):
        assert word in finding.advice
    assert "chosen_falls" not in keys(flat, losses=("apo_down",))
    assert "rpo_alpha" not in found("chosen_falls", flat, losses=("sigmoid", "rpo")).advice
    # A few nats are part of DPO; a rise is no fall.
    for nats in (-4.0, 40.0):
        assert "chosen_falls" not in keys(simulated(lambda done: 1.0, chosen=lambda done, n=nats: n * done))


def test_a_fall_is_judged_per_token_and_on_held_out_rows_where_these_are_known() -> None:
    lines = simulated(
        lambda done: 1.0,
        chosen=lambda done: -40 * done,
        held_out_margin=lambda done: 0.5,
        spread=lambda done: 1.0,
    )
    finding = found("chosen_falls", lines, data={"train": {"lengths": {"chosen": {"mean": 1000.0}}}})
    assert finding.level == "note"
    assert "of held-out chosen answers fell" in finding.evidence
    assert "per token" in finding.evidence
    # Ties before the first step are no accuracy of 0, from which there would be a rise.
    zero = {f"eval_{name}": 0.0 for name in ("rewards/accuracies", "rewards/chosen", "rewards/margins")}
    assert found("chosen_falls", [{"step": 0, "eval_loss": LN2, **zero}, *lines]).evidence == (
        found("chosen_falls", lines).evidence
    )
    assert found("chosen_falls", lines, data={"train": {"lengths": {"chosen": {"mean": 50.0}}}}).level == "warning"


def test_without_a_reference_noise_of_the_batches_is_no_fall() -> None:
    free = {"losses": ("cpo",), "has_reference": False, "start_loss": None, "num_eval_rows": None}
    rng = np.random.default_rng(0)
    lines = [line | {"logps/chosen": -200 + 20 * rng.normal()} for line in simulated(lambda done: 1.0)]
    assert "chosen_falls" not in keys(lines, **free)
    falling = [line | {"logps/chosen": line["logps/chosen"] - line["step"]} for line in lines]
    assert "chosen_falls" in keys(falling, **free)


# --- held-out rows


def test_held_out_loss_above_that_of_the_start() -> None:
    lines = simulated(
        lambda done: 3 * done, spread=lambda done: 2 * done, held_out_margin=lambda done: 0.5 * done - 1.5 * done**2
    )
    finding = found("held_out_loss_above_start", lines)
    assert finding.level == "warning"
    assert "ln 2" in finding.evidence
    # The same loss on a few rows may be chance, and says so.
    little = simulated(lambda done: 0.3 * done, held_out_margin=lambda done: -0.02, num_eval_rows=20)
    finding = found("held_out_loss_above_start", little, num_eval_rows=20)
    assert (finding.level, "may be chance" in finding.evidence) == ("note", True)
    assert "held_out_loss_above_start" not in keys(good())
    # 1 is the loss of hinge at the start.
    assert "held_out_loss_above_start" not in keys(lines, losses=("hinge",), start_loss=2.0)


def test_held_out_accuracy_below_chance() -> None:
    swapped = simulated(lambda done: done, held_out_margin=lambda done: -done)
    finding = found("below_chance", swapped)
    assert (finding.level, "jdpo inspect" in finding.advice) == ("error", True)
    assert "below_chance" not in keys(good())
    # Ties count as wrong, so a policy that is the reference has accuracy 0; and a few rows show nothing.
    still = [line | {"eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0} for line in swapped]
    assert "below_chance" not in keys(still)
    slightly = simulated(lambda done: done, held_out_margin=lambda done: -0.1, num_eval_rows=30)
    assert "below_chance" not in keys(slightly, num_eval_rows=30)


def test_an_evaluation_before_the_first_step_is_decided_by_chance() -> None:
    tied = {"step": 0, "eval_loss": LN2, "eval_rewards/accuracies": 0.2, "eval_rewards/margins": -1e-9}
    lines = [tied, *simulated(lambda done: 1.2 * done)[:5]]
    stopped = dataclasses.replace(FACTS, status="stopped", step=50)
    assert keys(lines, stopped) == set()
    assert "not evaluated yet" in verdict(lines, stopped, [])[1]


def test_a_gap_between_training_and_held_out_accuracy() -> None:
    lines = simulated(lambda done: 3 * done, held_out_margin=lambda done: 0.3 * done)
    assert found("overfit", lines).level == "warning"
    assert "overfit" not in keys(good())
    # 8 held-out pairs say little about a gap.
    few = simulated(lambda done: 1.2 * done, held_out_margin=lambda done: 0.4 * done, num_eval_rows=8)
    assert "overfit" not in keys(few, num_eval_rows=8)


def test_a_gap_between_supervised_losses_must_grow() -> None:
    falling = np.linspace(2.0, 0.5, 20).tolist()
    assert "overfit" in keys(sft_lines(falling, {20: 2.0, 200: 1.8}), SFT, num_eval_rows=100)
    # Harder rows from the start are no sign of learning by heart; one evaluation shows no growth.
    assert "overfit" not in keys(sft_lines(falling, {20: 3.0, 200: 1.6}), SFT, num_eval_rows=100)
    assert "overfit" not in keys(sft_lines(falling, {200: 1.8}), SFT, num_eval_rows=100)


@pytest.mark.parametrize("metric", ["eval_loss", "eval_rewards/accuracies"])
def test_a_best_evaluation_that_is_long_past(metric: str) -> None:
    lines = simulated(
        lambda done: 1.5 * done,
        held_out_margin=lambda done: 3 * done - 4 * done**2,
        spread=lambda done: 0.5,
        eval_steps=20,
    )
    finding = found("best_long_past", lines, metric_for_best_model=metric)
    assert (finding.level, "load_best_model_at_end" in finding.advice) == ("warning", True)
    best = {"load_best_model_at_end": True, "exported_step": 80}
    if metric == "eval_loss":
        assert found("best_long_past", lines, **best).level == "note"
    assert "best_long_past" not in keys(good(eval_steps=20), metric_for_best_model=metric)


def test_the_best_margin_is_no_share() -> None:
    lines = simulated(lambda done: done, held_out_margin=lambda done: 8 - 20 * abs(done - 0.3), eval_steps=20)
    assert "at step 60 (8" in found("best_long_past", lines, metric_for_best_model="eval_rewards/margins").evidence


# --- too far, clipping, warm-up


def test_large_margins_and_small_losses() -> None:
    lines = simulated(lambda done: 40 * done, spread=lambda done: 3.0)
    finding = found("large_margin", lines)
    assert "beta" in finding.advice
    # The margin is beta times the difference of the log-ratios.
    assert re.search(r"moved 3\d\d(\.\d)? nats apart", finding.evidence)
    assert {"large_margin", "small_loss"} <= keys(lines)
    assert not {"large_margin", "small_loss"} & keys(simulated(lambda done: 3 * done))
    # The loss of other kinds has another scale.
    assert "small_loss" not in keys(lines, losses=("apo_zero",), start_loss=1.0)
    assert keys(sft_lines(np.linspace(2, 0.001, 20).tolist()), SFT) == set()
    assert "small_loss" in keys(sft_lines([2.0, *[0.01] * 19]), SFT)


def test_gradients_that_are_often_clipped() -> None:
    def clipped(share: float, norm: float = 3.0, until: int = 200) -> list[dict[str, Any]]:
        lines = good()
        return [
            line | {"grad_clipped": share if line["step"] <= until else 0.0, "grad_norm": norm}
            for line in lines
            if "loss" in line
        ]

    finding = found("often_clipped", clipped(0.5))
    assert (finding.level, "50 % of 180 steps" in finding.evidence) == ("note", True)
    assert found("often_clipped", clipped(1.0, norm=50.0)).level == "warning"
    assert "often_clipped" not in keys(clipped(0.25))
    assert "often_clipped" not in keys(clipped(1.0, until=20))  # in the warm-up
    assert "often_clipped" not in keys(clipped(1.0)[-1:], step=5, num_steps=5, warmup_steps=0, max_grad_norm=None)


def test_most_steps_in_warm_up() -> None:
    stopped = found("mostly_warm_up", good()[:3], status="stopped", step=30, warmup_steps=20)
    assert "Resume" in stopped.advice
    planned = found("mostly_warm_up", good(), warmup_steps=150)
    assert "warmup_ratio" in planned.advice
    assert "mostly_warm_up" not in keys(good(), warmup_steps=20)
    assert "mostly_warm_up" not in keys(good()[:3], status="running", step=30, warmup_steps=20)


# --- data and time


def counted(rows: int, first: str = "a.jsonl:3") -> dict[str, Any]:
    return {"rows": rows, "share": rows / 100, "first": first}


@pytest.mark.parametrize(
    ("part", "key", "few"),
    [
        ("answer_cut", "often_cut", 5),
        ("same_row", "repeated_rows", 2),
        ("contradictions", "contradicting_rows", 2),
        ("leakage", "leakage", 0),
    ],
)
def test_rows_that_are_cut_repeated_contradicted_or_leaked(part: str, key: str, few: int) -> None:
    def data(rows: int) -> dict[str, Any]:
        count = counted(rows) | {"examples": [{"eval": "e\x1b[31m.jsonl:1", "train": "t.jsonl:2"}]}
        train = {"rows_kept": 100, "answer_cut": counted(0), "repeats": {}, "length_bias": None}
        if part == "leakage":
            return {"train": train, "leakage": count}
        where = train if part == "answer_cut" else train["repeats"]
        where[part] = count | {"first": "a\x1b[31m\u202e.jsonl:3"}
        return {"train": train}

    finding = found(key, good(), data=data(10))
    assert finding.level == "warning"
    assert "10 rows of 100" in finding.evidence or "10 of 200" in finding.evidence
    assert not any(safe_text.is_unseen(one) for text in finding for one in text)
    assert keys(good(), data=data(few)) == set()


@pytest.mark.parametrize("way", ["longer", "shorter"])
def test_length_alone_explains_the_choice(way: str) -> None:
    def data(share: float, pairs: int = 200) -> dict[str, Any]:
        more = np.arange(pairs) < share * pairs
        chosen, rejected = np.where(more, 9, 5), np.where(more, 5, 9)
        bias = length_bias(*((chosen, rejected) if way == "longer" else (rejected, chosen)))
        return {"train": {"length_bias": bias}}

    finding = found("length_explains", good(), data=data(0.9))
    assert (finding.level, f"preferring the {way} answer" in finding.evidence) == ("warning", True)
    # 75 % by length where the model reaches 82 %.
    assert found("length_explains", good(), data=data(0.7)).level == "note"
    assert keys(good(), data=data(0.55)) == set()
    assert keys(good(), data=data(0.75, pairs=8)) == set()


def test_late_programs_and_waiting_for_data() -> None:
    assert "late_compilation" in keys(good(), late_programs=2)
    assert "data_wait" in keys(good(), timing={"step": 900.0, "data_wait": 100.0})
    assert keys(good(), timing={"step": 990.0, "data_wait": 10.0}) == set()
    assert keys(good(), timing={"step": 9.0, "data_wait": 1.0}) == set()


def test_batches_that_are_mostly_padding() -> None:
    wasteful = [line | {"padding": 0.54} if "learning_rate" in line else line for line in good()]
    finding = found("mostly_padding", wasteful, batch_parts=8)
    assert "54 % of the slots in steps" in finding.evidence
    assert "2 pairs per step" in finding.evidence
    frugal = [line | {"padding": 0.2} if "learning_rate" in line else line for line in good()]
    assert keys(frugal, batch_parts=8) == set()
    assert keys(wasteful, batch_parts=1) == keys(wasteful, batch_parts=None) == set()
    assert keys(wasteful, batch_parts=8, batch_size=128) == set()


def test_uploads_that_failed() -> None:
    mirror = {"address": "s3://bucket/run", "step": 400, "failures": 3}
    finding = found("mirror_failed", good(), mirror=mirror | {"error": "PermissionError: Access Denied"})
    assert (finding.level, "Access Denied" in finding.evidence) == ("warning", True)
    assert "step 400" in finding.evidence
    assert found("mirror_failed", good(), mirror=mirror).level == "note"
    assert keys(good(), mirror=mirror | {"failures": 0}) == set()


# --- as text


def test_every_finding_is_explained_in_the_documentation() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "running.md").read_text(encoding="utf-8")
    table = page.partition("<!-- table: findings -->")[2].partition("<!-- end -->")[0]
    explained = {
        key
        for row in table.splitlines()
        for key in re.findall("`([a-z_]+)`", row.split("|")[1:2][0] if "|" in row else "")
    }
    sources = "".join(path.read_text(encoding="utf-8") for path in (root / "jdpo/reports/findings").glob("*.py"))
    made = set(re.findall(r'Finding\(\s*"(\w+)"', sources))
    assert explained == made
    (section,) = re.findall(
        '"(Why .*?)"', found("chosen_falls", simulated(lambda done: 1.0, chosen=lambda done: -120 * done)).advice
    )
    assert f"## {section}\n" in page


def test_the_most_serious_findings_come_first() -> None:
    lines = simulated(lambda done: done, held_out_margin=lambda done: -done)
    found = findings_of(lines, dataclasses.replace(FACTS, late_programs=1))
    # What follows from swapped sides is no over-fitting, and the best step is the start.
    assert [one.key for one in found] == ["below_chance", "held_out_loss_above_start", "late_compilation"]
    assert [one.level for one in found] == ["error", "warning", "note"]
    shown = finding_lines(found)
    assert shown[0].startswith("error: ")
    assert shown[2] == f"  {found[0].advice}"
    # A terminal shows no more than the titles of notes, and of what comes after the first three.
    assert shown[-1] == f"note: {found[-1].title} [{found[-1].key}]"
    assert len(finding_lines([found[0]] * 5)) == 3 * 3 + 2


def test_the_verdict_says_how_far_the_run_came_and_what_it_reached() -> None:
    first, reached, judged = verdict(good(), dataclasses.replace(FACTS, exported_step=150), [])
    assert "finished after 200 steps" in first
    assert "that of step 150" in first
    assert "200 pairs, 95 % interval 0.7" in reached
    assert "looks wrong" in judged
    stopped = dataclasses.replace(FACTS, status="stopped", step=100)
    first, reached, _ = verdict(simulated(lambda done: done)[:10], stopped, [])
    assert "stopped after 100 of 200 steps" in first
    assert "not evaluated yet" in reached
    _, reached, _ = verdict(simulated(lambda done: done), dataclasses.replace(FACTS, num_eval_rows=None), [])
    assert "No pairs were held out" in reached
