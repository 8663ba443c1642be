"""Processes of a run over several hosts: they join, agree, watch each other and end together."""

from jdpo.processes.agreement import (
    agree_on,
    any_process,
    any_process_later,
    barrier,
    differing,
    gathered,
    is_first,
    max_over_processes,
    run_jointly,
    text_of_first,
)
from jdpo.processes.detection import Membership, find_cluster
from jdpo.processes.ending import ending_together
from jdpo.processes.guard import guarded
from jdpo.processes.joining import join_cluster
from jdpo.processes.maintenance import heeding_maintenance
from jdpo.processes.process_progress import PROGRESS
from jdpo.processes.sharing import ask_server, seen_soon, sharers_of
from jdpo.processes.watchdog import Deadlines

__all__ = [
    "PROGRESS",
    "Deadlines",
    "Membership",
    "agree_on",
    "any_process",
    "any_process_later",
    "ask_server",
    "barrier",
    "differing",
    "ending_together",
    "find_cluster",
    "gathered",
    "guarded",
    "heeding_maintenance",
    "is_first",
    "join_cluster",
    "max_over_processes",
    "run_jointly",
    "seen_soon",
    "sharers_of",
    "text_of_first",
]
