"""The diagnosis compares the facts of all processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from jdpo.doctor.diagnosis import diagnose
from jdpo.doctor.doctor_page import WIDTH, first_problem, page, summary
from jdpo.doctor.finding import Finding, differences
from jdpo.doctor.process_facts import DeviceFacts, FolderFacts, ProcessFacts

COUNT = 4
OUTPUT = FolderFacts(
    key="output_dir",
    path="/mnt/runs/first",
    mount="/mnt/runs",
    file_system="nfs4",
    free_bytes=2**40,
    seconds=0.01,
    sees=tuple(range(COUNT)),
)
CACHE = dataclasses.replace(OUTPUT, key="cache_dir", path="/root/.cache/jdpo", mount="/", file_system="ext4")
DEVICES = DeviceFacts(
    platform="tpu",
    kinds=("TPU v5 lite",) * 4,
    num_all=16,
    mesh="data 1 x fsdp 16",
    sums=(136.0,) * 4,
    sum_seconds=0.002,
)


def healthy(process: int) -> ProcessFacts:
    """Returns the facts of one of four processes on two hosts, with nothing wrong."""
    return ProcessFacts(
        process=process,
        host=f"node{process // 2}",
        pid=100 + process,
        found_by="Slurm",
        versions={"python": "3.11.7", "jax": "0.10.2"},
        code={"__init__.py": "a" * 16, "losses/dpo.py": "b" * 16},
        code_place="/opt/jdpo",
        config={"beta": "0.1", "mesh.fsdp": "-1"},
        files={"pairs.jsonl": "c" * 64, "model: config.json": "d" * 64},
        environment={"XLA_FLAGS": "--xla_a=1", "NCCL_DEBUG": "INFO"},
        memory_size=2**38,
        memory_free=2**37,
        checkpoint_bytes=2**35,
        clock_error=0.001,
        folders=(OUTPUT, CACHE),
        devices=DEVICES,
    )


def cluster(**changes: dict[int, Any]) -> list[ProcessFacts]:
    """Returns the facts of four processes; `field={process: value}` replaces values of some."""
    return [
        dataclasses.replace(
            healthy(process), **{name: each[process] for name, each in changes.items() if process in each}
        )
        for process in range(COUNT)
    ]


def wrong(facts: Sequence[ProcessFacts]) -> list[Finding]:
    return [finding for finding in diagnose(facts) if finding.level not in ("ok", "skipped")]


def folder(**changes: Any) -> tuple[FolderFacts, FolderFacts]:
    return dataclasses.replace(OUTPUT, **changes), CACHE


def devices(**changes: Any) -> DeviceFacts:
    return dataclasses.replace(DEVICES, **changes)


def test_a_healthy_cluster_has_nothing_wrong() -> None:
    findings = diagnose(cluster())
    assert {finding.level for finding in findings} == {"ok"}
    text = page(findings)
    for words in ("all is well", "4 on 2 hosts, found by Slurm", "16 x TPU v5 lite", "136 as expected", "nfs4"):
        assert words in text
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    ("changes", "level", "subject", "words"),
    [
        ({"found_by": {1: "torchrun"}}, "warning", "processes", "torchrun on process 1 (node0)"),
        ({"code": {2: {"__init__.py": "a" * 16, "losses/dpo.py": "e" * 16}}}, "problem", "code", "losses/dpo.py"),
        ({"code": {2: {"__init__.py": "a" * 16}}}, "problem", "code", "process 2 (node1)"),
        ({"versions": {0: {"python": "3.11.7", "jax": "0.10.0"}}}, "problem", "versions", "jax is 0.10.0 on process 0"),
        ({"versions": {3: {"python": "3.11.7"}}}, "problem", "versions", "jax is not installed on process 3"),
        ({"config": {1: {"beta": "0.2", "mesh.fsdp": "-1"}}}, "problem", "config", "beta is 0.2 on process 1"),
        ({"config": {1: None}, "config_error": {1: "no file"}}, "problem", "config", "process 1 (node0): no file"),
        (
            {"files": {3: {"pairs.jsonl": "0" * 64, "model: config.json": "d" * 64}}},
            "problem",
            "data and model",
            "pairs.jsonl: process 3 (node1) has another content",
        ),
        (
            {"files": {3: {"pairs.jsonl": "c" * 64}}},
            "problem",
            "data and model",
            "config.json: process 3 (node1) lacks",
        ),
        ({"file_errors": {0: ("no such model",)}}, "problem", "data and model", "process 0 (node0): no such model"),
        ({"slow_files": {0: ("big: too slow",)}}, "warning", "data and model", "not compared: big"),
        (
            {"environment": {2: {"XLA_FLAGS": "--xla_a=1"}}},
            "warning",
            "environment",
            "NCCL_DEBUG is not set on process 2",
        ),
        (
            {"environment": {2: {"XLA_FLAGS": "", "NCCL_DEBUG": "INFO"}}},
            "problem",
            "environment",
            "XLA_FLAGS",
        ),
        ({"clock_offset": {1: 5.0}}, "warning", "clocks", "5.0 s ahead of process 0"),
        ({"clock_offset": {3: -90.0}}, "problem", "clocks", "90.0 s behind process 0"),
        ({"memory_free": {3: 2**28}}, "warning", "host memory", "process 3"),
        ({"folders": {2: folder(error="[Errno 30] Read-only", sees=())}}, "problem", "output_dir", "process 2 (node1)"),
        ({"folders": {2: folder(error="x", answers=False, sees=())}}, "problem", "output_dir", "cannot write"),
        ({"folders": {2: folder(read_error="Permission denied")}}, "problem", "output_dir", "cannot read"),
        ({"folders": {2: folder(seconds=9.0)}}, "warning", "output_dir", "9 s to write"),
        ({"folders": {1: folder(free_bytes=2**31)}}, "warning", "output_dir: disk", "checkpoints take up to 32.00 GiB"),
        ({"folders": {1: folder(file_system="tmpfs")}}, "warning", "output_dir", "in memory"),
        (
            {"devices": {0: devices(error="RuntimeError: busy")}},
            "problem",
            "devices",
            "process 0 (node0): JAX finds no",
        ),
        ({"devices": {3: devices(kinds=("TPU v5 lite",) * 3)}}, "problem", "devices", "3 x TPU v5 lite on process 3"),
        ({"devices": {3: devices(unused="8 NVIDIA")}}, "problem", "devices", "the host has 8 NVIDIA"),
        ({"devices": {3: devices(sums=(136.0, 135.0))}}, "problem", "psum", "is 135 instead of 136"),
        ({"devices": {3: devices(sums=(), sum_error="no answer")}}, "problem", "psum", "no answer"),
        ({"devices": {0: devices(mesh_error="does not fit")}}, "problem", "mesh", "does not fit"),
    ],
)
def test_what_is_wrong_on_one_process_is_named(
    changes: dict[str, dict[int, Any]], level: str, subject: str, words: str
) -> None:
    (finding,) = wrong(cluster(**changes))
    assert (finding.level, finding.subject) == (level, subject)
    assert words in finding.text


def test_a_missing_mount_shows_as_two_groups_of_processes() -> None:
    shared = {process: folder(sees=(0, 1)) for process in (0, 1)}
    local = {process: folder(sees=(2, 3), mount="/", file_system="ext4") for process in (2, 3)}
    (finding,) = wrong(cluster(folders=shared | local))
    assert finding.level == "problem"
    assert "processes 0, 1 (node0): /mnt/runs/first on nfs4 mounted at /mnt/runs" in finding.text
    assert "processes 2, 3 (node1): /mnt/runs/first on ext4 mounted at /" in finding.text


def test_a_cache_of_each_host_is_said_and_no_fault() -> None:
    caches = {
        process: (OUTPUT, dataclasses.replace(CACHE, sees=(process // 2 * 2, process // 2 * 2 + 1)))
        for process in range(COUNT)
    }
    findings = diagnose(cluster(folders=caches))
    (cache,) = (finding for finding in findings if finding.subject == "cache_dir")
    assert cache.level == "ok"
    assert "node-local: 2 stores" in cache.text
    assert "processes 0, 1, processes 2, 3" in cache.text


def test_a_mirror_that_one_process_cannot_write_is_a_problem() -> None:
    store = dataclasses.replace(
        OUTPUT, key="mirror", path="s3://bucket/run", mount="", file_system="object store", free_bytes=None
    )
    good = dict.fromkeys(range(COUNT), (OUTPUT, CACHE, store))
    assert not wrong(cluster(folders=good))
    bad = (OUTPUT, CACHE, dataclasses.replace(store, error="403 Forbidden", sees=()))
    (finding,) = wrong(cluster(folders=good | {1: bad}))
    assert finding.subject == "mirror"
    assert "credentials" in finding.advice


def test_a_view_that_is_not_mutual_is_a_problem_of_a_cache_too() -> None:
    caches = {0: (OUTPUT, dataclasses.replace(CACHE, sees=(0, 1, 2)))}
    (finding,) = wrong(cluster(folders=caches))
    assert (finding.level, finding.subject) == ("problem", "cache_dir")


def test_processes_that_only_wait_for_devices_are_not_the_cause() -> None:
    waiting = {process: devices(error="no answer within 300 s", waited=True) for process in (0, 1, 3)}
    (finding,) = wrong(cluster(devices=waiting | {2: devices(error="RuntimeError: busy")}))
    assert "process 2 (node1)" in finding.text
    assert "busy" in finding.text


def test_flags_that_xla_does_not_know_leave_the_devices_alone() -> None:
    facts = cluster(
        flag_error={2: "XLA does not know --xla_tpu_x=1"}, devices=dict.fromkeys(range(COUNT)), environment={}
    )
    findings = diagnose(facts)
    (flags,) = (finding for finding in findings if finding.level == "problem")
    assert "process 2" in flags.text
    assert "LIBTPU_INIT_ARGS" in flags.advice
    assert "skipped" in {finding.level for finding in findings if finding.subject == "devices"}


def test_a_skew_within_the_round_trip_is_none() -> None:
    assert not wrong(cluster(clock_offset={1: 1.5}, clock_error={1: 0.8}))


def test_facts_travel_as_json_and_other_versions_may_have_others() -> None:
    facts = healthy(1)
    assert ProcessFacts.from_json(facts.to_json()) == facts
    newer = facts.to_json().replace('"pid"', '"fact_of_tomorrow": 1, "pid"')
    assert ProcessFacts.from_json(newer) == facts


def test_the_page_counts_and_escapes() -> None:
    findings = [Finding("problem", "code", "a\x1b[31m"), Finding("warning", "clocks", "late", "mend it")]
    assert summary(findings) == "1 problem and 1 warning"
    assert r"a\x1b[31m" in page(findings)
    assert "-> mend it" in page(findings)
    assert first_problem(findings) == r"code: a\x1b[31m"


def test_the_most_frequent_value_is_the_usual_one() -> None:
    tables = {0: {"a": "1"}, 1: {"a": "2"}, 2: {"a": "2", "b": "3"}}
    assert differences(tables) == {
        "a": [("2", [1, 2]), ("1", [0])],
        "b": [("not there", [0, 1]), ("3", [2])],
    }
