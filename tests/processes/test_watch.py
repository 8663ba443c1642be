"""Processes that are considered dead, and messages that the relay withholds from JAX's client."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import jax
import pytest

from jdpo.cli.cluster import how_to_continue
from jdpo.processes.ending import may_be_of_a_loss
from jdpo.processes.process_progress import State
from jdpo.processes.relay import CoordinatorRelay
from jdpo.processes.watch import LEAVE_SECONDS, Silence, Verdict, Watch


def test_silence_is_counted_since_the_last_new_sign() -> None:
    silence = Silence(now=0.0)
    silence.update({1: "1", 2: None}, 0.5)
    assert silence.update({1: "2", 2: None}, 1.0) == {1: 0.0, 2: 0.5}
    assert silence.update({1: "2", 2: None}, 1.5) == {1: 0.5, 2: 1.0}
    assert silence.update({1: "2", 2: "1"}, 2.0) == {1: 1.0, 2: 0.0}


def test_silence_does_not_count_while_this_process_was_stopped() -> None:
    silence = Silence(now=0.0)
    silence.update({1: "1"}, 0.5)
    assert silence.update({1: "1"}, 1000.0)[1] <= 1.0


def test_a_process_that_has_left_is_not_counted() -> None:
    silence = Silence(now=0.0)
    silence.update({1: "1", 2: "1"}, 0.5)
    assert silence.update({2: "1"}, 1.0) == {2: 0.5}


def connected() -> tuple[CoordinatorRelay, socket.socket, socket.socket]:
    """A relay with both ends of a connection through it: the client's and the service's."""
    with socket.create_server(("127.0.0.1", 0)) as service:
        relay = CoordinatorRelay(f"127.0.0.1:{service.getsockname()[1]}")
        host, _, port = relay.address.rpartition(":")
        client = socket.create_connection((host, int(port)))
        served, _ = service.accept()
    for end in (client, served):
        end.settimeout(20)
    return relay, client, served


def test_the_relay_forwards_both_ways_and_passes_on_that_the_client_ends() -> None:
    relay, client, served = connected()
    with client, served:
        client.sendall(b"question")
        assert served.recv(100) == b"question"
        served.sendall(b"answer")
        assert client.recv(100) == b"answer"
        client.close()
        assert served.recv(100) == b""
    assert not relay.lost.is_set()


def test_the_relay_tells_of_the_end_of_the_service_and_keeps_it_from_the_client() -> None:
    relay, client, served = connected()
    with client:
        with relay.holding():
            served.close()
            assert relay.lost.wait(20)
            client.setblocking(False)
            try:
                ended = client.recv(100) == b""
            except BlockingIOError:
                ended = False
            assert not ended
            client.settimeout(20)
        assert client.recv(100) == b""


def test_how_to_continue() -> None:
    words, run = ["configs/a b.yaml", "--beta", "0.2"], Path("run")
    text = how_to_continue("dpo", words, run, [2, 4], resumes=True)
    assert "The last checkpoint is step 4 in run/checkpoints" in text
    assert text.endswith("jdpo dpo 'configs/a b.yaml' --beta 0.2")
    assert "from step 0" in how_to_continue("dpo", words, run, [], resumes=True)
    assert how_to_continue("dpo", words, run, [2], resumes=False).endswith("--resume auto")
    assert "are kept" in how_to_continue("reference", words, None, [], resumes=True)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


GLOO = "UNKNOWN: Gloo AllGather failed: Connection closed by peer"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (jax.errors.JaxRuntimeError(GLOO), True),
        (ValueError(GLOO), True),
        (caused(OSError("a save failed"), jax.errors.JaxRuntimeError("UNAVAILABLE: no answer")), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (OSError("no space left on device"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_that_the_loss_of_a_process_may_have_caused(error: BaseException, expected: bool) -> None:
    assert may_be_of_a_loss(error) is expected


class Store:
    """JAX's key-value store, in this process."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        if key in self.entries and not allow_overwrite:
            raise ValueError(key)
        self.entries[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.entries.items() if key.startswith(folder)]


def watches(states: dict[int, State], heard: list[int]) -> dict[int, Watch]:
    """Returns the watches of the processes of one run, which share a store."""
    store = Store()
    return {
        index: Watch(
            store,
            index=index,
            count=len(states),
            timeout=60.0,
            host=f"host node{index}",
            state=lambda index=index: states[index],
            on_stop=heard.append,
        )
        for index in states
    }


@pytest.mark.ci  # heartbeats take seconds
def test_all_processes_get_the_verdict_on_a_stuck_one() -> None:
    waiting = State("step", 13, 0, -1.0, 301.0, 0)
    found = verdicts_of(watches({0: waiting, 1: State("evaluation", 12, 2, -1.0, 302.0, 0), 2: waiting}, []), 60)
    assert {verdict and verdict.stuck for verdict in found} == {frozenset({1})}
    assert all(verdict and "(host node1) is stuck" in verdict.text for verdict in found)


@pytest.mark.ci
def test_all_processes_hear_of_a_signal_to_one() -> None:
    heard: list[int] = []
    running = State("compile", 0, 3, 100.0, 1.0, 0)
    each = watches({0: running, 1: running, 2: running._replace(signal=15)}, heard)
    for watch in each.values():
        watch.start()
    deadline = time.monotonic() + 60
    while len(heard) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    for watch in each.values():
        watch.leave()
    assert set(heard) == {15}


@pytest.mark.ci
def test_processes_with_nothing_to_save_leave_together_unless_one_ends_in_order() -> None:
    stopping = State("compile", 0, 3, 100.0, 1.0, 15, may_leave=True)
    for ending in (False, True):
        each = watches({0: stopping, 1: stopping._replace(may_leave=not ending)}, [])
        found = verdicts_of(each, 3 * LEAVE_SECONDS if ending else 60)
        assert [verdict is not None and verdict.leaves for verdict in found] == [not ending] * 2


def verdicts_of(each: dict[int, Watch], seconds: float) -> list[Verdict | None]:
    """Returns the verdicts of watches; None for one that has none after so many seconds, when all leave."""
    with ThreadPoolExecutor(len(each)) as pool:
        for watch in each.values():
            watch.start()
        pending = [pool.submit(watch.wait) for watch in each.values()]
        wait(pending, seconds)
        for watch in each.values():
            watch.leave()
        return [future.result(60) for future in pending]
