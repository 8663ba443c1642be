"""The checks themselves: muster, folders, time limits, flags, and the digest of the code."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import jdpo
from jdpo.cli.main import main
from jdpo.doctor.device_trial import flag_error, unused_accelerators
from jdpo.doctor.folder_trial import FolderTrial, mount_of
from jdpo.doctor.local_facts import compared_environment
from jdpo.doctor.mirror_trial import MirrorTrial
from jdpo.doctor.roll_call import RollCall, call_roll
from jdpo.doctor.time_limit import TimeLimits
from jdpo.file_digests import code_digests
from jdpo.processes import Membership
from tests.integration.cluster import free_port

LONG = 60.0
"""Seconds that only guard against a hang."""


def mustered(indices: list[int], *, count: int, timeout: float = LONG) -> list[RollCall]:
    """Lets processes with these indices report, as threads."""
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(len(indices)) as pool:
        calls: list[Future[RollCall]] = [
            pool.submit(call_roll, Membership("hand", address, count, index), timeout) for index in indices
        ]
        return [call.result() for call in calls]


def test_all_processes_report() -> None:
    found = mustered([2, 1, 0], count=3)
    assert all(each.complete for each in found)
    assert all(set(each.hosts) == {0, 1, 2} for each in found)


def test_missing_processes_are_named_to_all_that_came() -> None:
    found = mustered([0, 3], count=5, timeout=1.0)
    assert [each.missing for each in found] == [(1, 2, 4)] * 2
    assert all(f"pid {os.getpid()}" in each.hosts[3] for each in found)


def test_a_missing_process_0_is_said() -> None:
    (found,) = mustered([1], count=2, timeout=0.5)
    assert found.unreachable
    assert not found.complete


def test_two_processes_with_one_index_are_named() -> None:
    found = mustered([0, 1, 1], count=4)
    assert all("two processes have the index 1" in each.faults[0] for each in found)


def test_processes_that_expect_another_number_are_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call_roll, Membership("hand", address, 3, 0), LONG)
        other = pool.submit(call_roll, Membership("hand", address, 4, 3), LONG)
        assert "as one of 4 processes, and process 0 as one of 3" in first.result().faults[0]
        assert other.result().faults == first.result().faults


def test_other_visitors_of_the_port_do_no_harm() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call_roll, Membership("hand", f"127.0.0.1:{port}", 2, 0), LONG)
        for said in (b"GET / HTTP/1.1\n", b'{"process": "x"}\n', b"\n"):
            with connected(port) as visitor:
                visitor.sendall(said)
                assert visitor.recv(100) == b""  # closed without an answer
        second = pool.submit(call_roll, Membership("hand", f"127.0.0.1:{port}", 2, 1), LONG)
        assert first.result().complete
        assert second.result().complete


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    while True:
        try:
            visitor = socket.create_connection(("127.0.0.1", port), LONG)
            break
        except ConnectionRefusedError:  # not listening yet
            continue
    with visitor:
        yield visitor


def test_a_process_that_was_started_again_counts_once() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(call_roll, Membership("hand", f"127.0.0.1:{port}", 3, 0), LONG)
        # Process 0 hears them in the order in which they connect.
        with connected(port) as early, connected(port) as later:
            early.sendall(json.dumps({"process": 1, "count": 3, "host": "a, pid 1"}).encode() + b"\n")
            early.shutdown(socket.SHUT_RDWR)
            later.sendall(json.dumps({"process": 1, "count": 3, "host": "a, pid 2"}).encode() + b"\n")
            assert call_roll(Membership("hand", f"127.0.0.1:{port}", 3, 2), LONG).complete
        assert first.result().hosts[1] == "a, pid 2"


def test_a_port_in_use_is_an_error_that_says_so() -> None:
    with socket.create_server(("", 0)) as taken, pytest.raises(ConnectionError, match="cannot listen"):
        call_roll(Membership("hand", f"127.0.0.1:{taken.getsockname()[1]}", 2, 0), 1.0)


def test_processes_see_what_others_write_in_a_shared_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    trials = [FolderTrial(folder, token="t", process=index) for index in range(3)]
    for trial in trials[:2]:
        trial.write()
    assert trials[0].read_others(range(2)) == (0, 1)
    (folder / ".jdpo-doctor-t-1").write_text("another content")
    with pytest.raises(OSError, match="not what process 1 wrote"):
        trials[0].read_others([1])
    for trial in trials:
        trial.remove_file()
    for trial in trials:
        trial.remove_folders()
    assert not (tmp_path / "new").exists()


def test_files_that_nobody_wrote_are_not_seen_and_folders_in_use_stay(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").touch()
    trial = FolderTrial(tmp_path, token="t", process=0)
    trial.write()
    assert trial.read_others([0, 5]) == (0,)
    trial.remove_file()
    trial.remove_folders()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_mirror_is_written_and_read_by_every_process(tmp_path: Path) -> None:
    trials = [MirrorTrial(f"file://{tmp_path}/mirror", token="t", process=index) for index in range(3)]
    assert trials[2].write() > 0
    assert trials[2].read_others(range(3)) == (2,)  # that of process 0 is not there
    trials[0].write()
    assert trials[2].read_others(range(3)) == (0, 1, 2)
    for trial in trials:
        trial.remove_file()
    assert not list((tmp_path / "mirror").iterdir())
    with pytest.raises((OSError, ValueError)):
        MirrorTrial("gone://bucket/run", token="t", process=0).write()


def test_a_disk_that_takes_no_more_is_an_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            FolderTrial(tmp_path, token="t", process=0).write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_the_last_mount_above_a_path_holds_it(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    spaced = str(tmp_path / "a b").replace(" ", r"\040")
    mounts.write_text(f"dev / ext4 rw 0 0\nserver:/x {spaced} nfs4 rw 0 0\nmore {spaced}c ext2 rw 0 0\n")
    assert mount_of(tmp_path / "a b" / "run", mounts) == (str(tmp_path / "a b"), "nfs4")
    assert mount_of(tmp_path / "other", mounts) == ("/", "ext4")
    assert mount_of(tmp_path, tmp_path / "none") == ("", "")


def test_work_that_does_not_return_is_left_alone() -> None:
    limits, never = TimeLimits(), threading.Event()
    with pytest.raises(TimeoutError):
        limits.run("a disk", 0.01, never.wait)
    assert limits.stuck == ["a disk"]
    never.set()
    assert limits.run("quick", LONG, lambda: 3) == 3
    with pytest.raises(KeyError):
        limits.run("fails", LONG, lambda: {}["x"])
    assert limits.stuck == ["a disk"]


def test_flags_that_xla_does_not_know_are_named() -> None:
    environ = dict(os.environ)
    assert flag_error({**environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}) is None
    error = flag_error({**environ, "XLA_FLAGS": "--xla_tpu_of_tomorrow=1"})
    assert error is not None
    assert "--xla_tpu_of_tomorrow" in error


def test_devices_that_jax_does_not_use_are_named(tmp_path: Path) -> None:
    assert unused_accelerators("cpu", {}, tmp_path) == ""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    assert "2 NVIDIA" in unused_accelerators("cpu", {}, tmp_path)
    assert unused_accelerators("gpu", {}, tmp_path) == ""
    assert unused_accelerators("cpu", {"JAX_PLATFORMS": "cpu"}, tmp_path) == ""
    assert unused_accelerators("cpu", {"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ""
    (tmp_path / "dev" / "accel0").touch()
    assert "TPU" in unused_accelerators("cpu", {"CUDA_VISIBLE_DEVICES": ""}, tmp_path)


def test_the_environment_of_one_process_is_not_compared() -> None:
    environ = {"JAX_PROCESS_ID": "1", "NCCL_DEBUG": "INFO", "HF_TOKEN": "secret", "MEGASCALE_NUM_SLICES": "2"}
    assert compared_environment(environ) == {"MEGASCALE_NUM_SLICES": "2", "NCCL_DEBUG": "INFO"}


def test_the_digest_of_the_code_sees_a_changed_file_and_no_bytecode(tmp_path: Path) -> None:
    package = Path(jdpo.__file__).parent
    shutil.copytree(package / "processes", tmp_path / "copy")
    same, copied = code_digests(package / "processes"), code_digests(tmp_path / "copy")
    assert same == copied
    assert "detection.py" in copied
    assert not any("__pycache__" in name for name in copied)
    (tmp_path / "copy" / "detection.py").write_text("changed")
    changed = code_digests(tmp_path / "copy")
    assert {name for name in same if same[name] != changed[name]} == {"detection.py"}


def test_one_process_without_a_cluster_and_without_a_config(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("XLA_FLAGS")  # another test tries flags; the devices are there already
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for words in ("a single process", "8 x cpu", "36 as expected", str(tmp_path / "xdg" / "jdpo"), "skipped  config"):
        assert words in printed
    assert not (tmp_path / "xdg").exists()


def test_one_process_with_a_config(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    run_words: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XLA_FLAGS")
    assert main(["doctor", *run_words()]) == 0
    printed = capsys.readouterr().out
    assert "data 8 x fsdp 1" in printed
    assert str(tmp_path / "run") in printed
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").touch()
    assert main(["doctor", *run_words(global_batch_size=9, datasets=tmp_path / "none.jsonl")]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("3 problems", "problem output_dir", "use a multiple of 8", "none.jsonl: no such file"):
        assert words in printed
    # `jdpo reference` writes no output_dir.
    assert main(["doctor", *run_words(), "--task", "reference"]) == 0
    assert "output_dir" not in capsys.readouterr().out
    # Only these keys: nothing else is known, nor wrong.
    assert main(["doctor", f"output_dir={tmp_path / 'other'}"]) == 0
    assert str(tmp_path / "other") in capsys.readouterr().out
    assert main(["doctor", *run_words(betta=1)]) == 2
    assert "did you mean 'beta'" in capsys.readouterr().err
    assert main(["doctor", "--timeout", "soon"]) == 2
