"""The check of a cluster, read from top to bottom: every process collects facts, process 0 compares them."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from jdpo.config.addresses import shown_text
from jdpo.devices import leave_out_missing_tpus
from jdpo.doctor.device_trial import find_devices, sum_over_all
from jdpo.doctor.diagnosis import diagnose
from jdpo.doctor.doctor_page import first_problem, page
from jdpo.doctor.fact_exchange import FactExchange
from jdpo.doctor.finding import Finding, numbers
from jdpo.doctor.folder_trial import FolderTrial, Trial, try_folders
from jdpo.doctor.local_facts import DISK_SECONDS, Given, folders_of, local_facts
from jdpo.doctor.mirror_trial import MirrorTrial
from jdpo.doctor.process_facts import ProcessFacts
from jdpo.doctor.roll_call import RollCall, call_roll
from jdpo.doctor.time_limit import TimeLimits
from jdpo.exit_codes import DONE, FAILED, LOST, USAGE
from jdpo.processes import Membership, ending_together, find_cluster, join_cluster
from jdpo.processes.joining import initialize_through_relay
from jdpo.safe_text import terminal
from jdpo.words import listed

_PHASE_SECONDS = 900.0
"""How long a process waits for another between two checks; each check has a shorter time limit of its own."""

_MOST_HOSTS = 16

Read = Callable[[], Given | None]


def check_cluster(read: Read, *, timeout: float) -> int:
    """Checks the processes of a cluster, or this one alone; process 0 prints the page on stdout.

    Args:
      read: returns the config, or None if none was given; raises a ValueError if it cannot be read.
      timeout: seconds to wait for the other processes, and for the devices to answer.

    Returns:
      the exit code, which is the same on all processes: 0, 1 if there is a problem, 2 if the config is wrong, or 75 if
      processes are missing.

    Raises:
      ValueError: the cluster is described wrongly, or the config of a process alone cannot be read.
      ConnectionError: process 0 cannot listen at its address.
    """
    # It tries the devices, and needs none of their memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    leave_out_missing_tpus()
    membership = find_cluster(os.environ)
    if membership is None or membership.num_processes == 1:
        alone = FactExchange(None, process=0, count=1, timeout=timeout)
        return _check(read, alone, membership, timeout)
    here = call_roll(membership, timeout)
    if not here.complete:
        return _incomplete(here, membership, timeout)
    join_cluster(initialize=partial(initialize_through_relay, join_seconds=timeout))
    from jax._src import distributed  # the coordination client has no public name

    exchange = FactExchange(
        distributed.global_state.client,
        process=membership.process_id,
        count=membership.num_processes,
        timeout=_PHASE_SECONDS,
    )
    again = "Run `jdpo doctor` again on every host."
    with ending_together(shown_text, advice=lambda: again):
        return _check(read, exchange, membership, timeout)


def _incomplete(here: RollCall, membership: Membership, timeout: float) -> int:
    """Reports that processes are missing or do not fit each other; returns the exit code."""
    code = FAILED if here.faults else LOST
    if here.faults:
        text, advice = "; ".join(here.faults), "see how the launcher numbers the processes"
    elif here.unreachable:
        text = (
            f"process 0 cannot be reached at {membership.coordinator_address} within {timeout:.0f} s "
            f"({here.unreachable})"
        )
        advice = "start process 0, and see whether its port is open to this host"
    else:
        there = listed([f"{index} ({host})" for index, host in sorted(here.hosts.items())], _MOST_HOSTS)
        text = (
            f"{numbers(here.missing)} of {membership.num_processes} did not come within {timeout:.0f} s; here are: "
            f"{there}"
        )
        advice = f"start what is missing, and see whether it reaches {membership.coordinator_address}"
    if membership.process_id == 0:
        findings = [Finding("problem", "processes", text, advice)]
        if code == LOST:
            findings.append(Finding("skipped", "the rest", "is checked once all processes are here"))
        print(page(findings), flush=True)
    print(terminal(f"jdpo: error: {text}"), file=sys.stderr, flush=True)
    return code


def _check(read: Read, exchange: FactExchange, membership: Membership | None, timeout: float) -> int:
    limits = TimeLimits()
    # --------------------------------------------------------------------------------------------- what a process knows
    given = _given(read, limits)
    if isinstance(given, ValueError) and exchange.count == 1:
        raise given
    facts = local_facts(exchange.process, membership, given, limits)

    # ---------------------------------------------------------------------------------------------------------- folders
    token = exchange.from_first("token", lambda: secrets.token_hex(4))
    trials: dict[str, Trial] = {
        key: FolderTrial(path, token=token, process=exchange.process) for key, path in folders_of(given).items()
    }
    if isinstance(given, Given) and given.config.mirror is not None:
        trials["mirror"] = MirrorTrial(given.config.mirror, token=token, process=exchange.process)
    folders = try_folders(trials, exchange, limits)

    # ----------------------------------------------------------------------------------------------------------- clocks
    offset, error = exchange.clock_offset()
    facts = dataclasses.replace(facts, folders=folders, clock_offset=offset, clock_error=error)

    # ---------------------------------------------------------------------------------------------------------- devices
    # All processes or none: JAX waits for all when it looks for devices, and all take part in a sum.
    if exchange.all_agree("flags", facts.flag_error is None):
        config = given.of_a_run if isinstance(given, Given) else None
        devices = find_devices(config, limits, timeout)
        if exchange.all_agree("devices", devices.error is None):
            devices = sum_over_all(devices, limits, timeout)
        facts = dataclasses.replace(facts, devices=devices)

    # -------------------------------------------------------------------------------------------------------- diagnosis
    facts = dataclasses.replace(facts, stuck=tuple(limits.stuck))
    everyone = [ProcessFacts.from_json(text) for text in exchange.to_first("facts", facts.to_json())]
    verdict = json.loads(exchange.from_first("verdict", lambda: _verdict(everyone)))
    if verdict["reason"] and exchange.process != 0:
        print(f"jdpo: error: {verdict['reason']} (process 0 has the whole page)", file=sys.stderr, flush=True)
    code = int(verdict["code"])
    if verdict["stuck"]:
        exchange.part("verdict read")
        _leave(code)
    return code


def _given(read: Read, limits: TimeLimits) -> Given | ValueError | None:
    """Returns the config, or why it cannot be read: on one host this is a finding, and no reason to end."""
    try:
        return limits.run("the config", DISK_SECONDS, read)
    except ValueError as error:
        return error
    except OSError as error:  # a TimeoutError is one, too
        return ValueError(f"the config cannot be read: {error}")


def _verdict(everyone: list[ProcessFacts]) -> str:
    """Prints the page, on process 0, and returns how the processes are to end."""
    findings = diagnose(everyone)
    print(page(findings), flush=True)
    reason = first_problem(findings)
    code = FAILED if reason else DONE
    if all(facts.config_error is not None for facts in everyone):
        code = USAGE
    return json.dumps({"code": code, "reason": reason, "stuck": any(facts.stuck for facts in everyone)})


def _leave(code: int) -> NoReturn:
    """Ends the process although threads of it are inside calls that do not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
