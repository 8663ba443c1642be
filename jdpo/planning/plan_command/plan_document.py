"""A plan for several targets as one JSON document; docs/plan.md lists its keys, which name their units."""

from __future__ import annotations

from typing import Any

from jdpo._version import __version__
from jdpo.config import without_queries
from jdpo.planning.plan_command.outlook import Outlook, Range
from jdpo.planning.plan_command.pasted_settings import pasted_settings
from jdpo.planning.plan_command.question import Question
from jdpo.planning.target_plan import TargetPlan

DOCUMENT_VERSION = 1
"""Raise this when a key changes its meaning or is removed."""

Json = dict[str, Any]


def plan_document(question: Question, outlooks: list[Outlook]) -> Json:
    """Returns the answer for all targets, in the order in which they were asked for."""
    rows, run, prices = question.rows, question.run, question.prices
    parts = ("prompt", "chosen", "rejected") if rows.lengths.shape[1] == 3 else ("row",)
    return {
        "jdpo": __version__,
        "version": DOCUMENT_VERSION,
        "command": question.command,
        "model": without_queries(question.model),
        "rows": {
            "source": rows.source,
            "rows_per_epoch": rows.rows_per_epoch,
            "rows_per_step": question.rows_per_step,
            "mean_tokens": dict(zip(parts, (round(mean, 1) for mean in rows.lengths.mean(0).tolist()), strict=True)),
            "max_tokens": dict(zip(parts, rows.lengths.max(0).tolist(), strict=True)),
        },
        "run": {
            "steps": run.num_steps,
            "steps_from": run.why,
            "reference": run.reference,
            "notes": list(run.notes),
        },
        "prices": prices and {"file": str(prices.path), "currency": prices.currency},
        "targets": [_target(question, each) for each in outlooks],
    }


def _target(question: Question, outlook: Outlook) -> Json:
    machine, plan = outlook.machine, outlook.plan
    found: Json = {
        "target": machine.name,
        "device_kind": machine.kind,
        "chips": machine.chips,
        "devices": machine.num_devices,
        "hosts": machine.num_hosts,
        "slices": machine.slices,
        "fits": None if plan is None else plan.fits,
        "failure": outlook.failure,
    }
    if plan is None:
        return found
    return (
        found
        | _step(plan)
        | _ends("training_seconds", outlook.training_seconds)
        | _ends("reference_seconds", outlook.reference_seconds)
        | _ends("run_seconds", outlook.run_seconds)
        | {"price_per_hour": outlook.price_per_hour}
        | _ends("cost", outlook.cost)
        | {"settings_yaml": pasted_settings(plan, question.optimizer, question.rows_per_device) if plan.fits else None}
    )


def _step(plan: TargetPlan) -> Json:
    return {
        "missing_bytes": plan.missing_bytes,
        "how": plan.how,
        "compiler_error": plan.error,
        "mesh": dict(plan.mesh),
        "max_tokens_per_device": plan.max_tokens_per_device,
        "remat": plan.remat,
        "optimizer": plan.optimizer,
        "micro_batches": plan.micro_batches,
        "rows_per_micro_batch": plan.pairs_per_micro_batch,
        "memory_bytes": plan.as_dict()["memory"],
        "peak_bytes": plan.peak_bytes,
        "hbm_bytes": plan.hbm_bytes,
        "limit_bytes": plan.limit_bytes,
        "wire_inside_bytes": plan.wire_inside_bytes,
        "wire_across_bytes": plan.wire_across_bytes,
        "slots_per_token": plan.padding,
        "tokens_per_step": plan.tokens_per_step,
        **_ends("step_seconds", plan.step_seconds),
        **_ends("mfu", plan.mfu),
        "rests_on": plan.rests_on,
        "compilations": plan.num_compilations,
        "from_cache": plan.from_cache,
        "suggestions": list(plan.suggestions),
    }


def _ends(name: str, found: Range | None) -> Json:
    """Returns both ends of a range, in order of size."""
    low, high = (None, None) if found is None else sorted(found)
    return {f"{name}_low": low, f"{name}_high": high}
