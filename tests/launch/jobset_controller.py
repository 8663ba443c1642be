"""What Kubernetes does when the pods of a JobSet end, by the rules in its manifest.

The rules are those of https://kubernetes.io/docs/tasks/job/pod-failure-policy and of JobSet's failure policy: the first
rule that matches a pod, and then the first that matches a Job, decides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Manifest = dict[str, Any]


class Pod(NamedTuple):
    """A pod that has ended: its exit code, and True if the cluster took it away."""

    exit_code: int
    disrupted: bool = False


def job_failure(job: Manifest, pods: list[Pod]) -> str | None:
    """Returns the reason for which a Job fails when its pods end, in this order; None if it completes."""
    failures = 0
    for pod in pods:
        if pod.exit_code == 0:
            continue
        action = next((rule["action"] for rule in job["podFailurePolicy"]["rules"] if _matches(rule, pod)), "Count")
        if action == "FailJob":
            return "PodFailurePolicy"
        failures += action == "Count"
        if failures > job["backoffLimit"]:
            return "BackoffLimitExceeded"
    return None


def _matches(rule: Manifest, pod: Pod) -> bool:
    if conditions := rule.get("onPodConditions"):
        return pod.disrupted and any(each["type"] == "DisruptionTarget" for each in conditions)
    codes = rule["onExitCodes"]
    return bool((pod.exit_code in codes["values"]) == (codes["operator"] == "In"))


def outcome(jobset: Manifest, pods_of_jobs: list[list[Pod]], *, restarts: int = 0) -> str:
    """Returns what becomes of a JobSet: "complete", "failed", or "restart".

    Args:
      pods_of_jobs: for each Job, its pods in the order in which they end.
      restarts: how often it was started again before.
    """
    policy = jobset["spec"]["failurePolicy"]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    reasons = [reason for pods in pods_of_jobs if (reason := job_failure(job, pods))]
    if not reasons:
        return "complete"
    for rule in policy["rules"]:
        if any(reason in rule["onJobFailureReasons"] for reason in reasons):
            assert rule["action"] == "FailJobSet"
            return "failed"
    return "restart" if restarts < policy["maxRestarts"] else "failed"
