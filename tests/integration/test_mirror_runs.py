"""Runs with a mirror: real processes, real signals, and the S3 of moto's server on loopback."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jdpo.checkpoint.mirror.object_store import ObjectStore, StoreError
from jdpo.checkpoint.steps import complete_steps, fault_of
from jdpo.cli.main import main
from jdpo.config import DPOConfig, load_config
from jdpo.file_digests import file_digest
from jdpo.training.mirroring import MirrorIncomplete
from jdpo.training.run import train
from tests.conftest import chat_pairs, write_jsonl
from tests.integration.cluster import Cluster, run_cluster, started
from tests.object_server import BUCKET, ObjectServer, object_server
from tests.run_stops import EachStep, SignalAt

Words = Callable[..., list[str]]
Start = Callable[..., subprocess.Popen[str]]
SameRun = Callable[[Path, Path], None]

PREFIX = "runs/first"
MIRROR = f"s3://{BUCKET}/{PREFIX}"
STORE = "jdpo.checkpoint.mirror.object_store:ObjectStore"


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with object_server() as found:
        yield found


def assert_complete(server: ObjectServer, run: Path, copy: Path) -> None:
    """Asserts that the mirror holds what the folder of a run does, and no checkpoint that does not verify."""
    server.download(PREFIX, copy)
    steps = complete_steps(copy / "checkpoints")
    assert steps == complete_steps(run / "checkpoints")
    assert [fault_of(copy / "checkpoints" / str(step)) for step in steps] == [None] * len(steps)
    for folder in ("model", "plots"):
        names = {path.name: path.read_bytes() for path in (run / folder).iterdir()}
        assert names == {path.name: path.read_bytes() for path in (copy / folder).iterdir()}
    for name in ("run.json", "resolved_config.yaml", "metrics.jsonl", "data.json", "report.html"):
        assert (copy / name).read_bytes() == (run / name).read_bytes(), name


@pytest.mark.ci
def test_a_run_continues_on_an_empty_disk_with_the_same_bits(
    cut_words: Words,
    uninterrupted: Path,
    same_run: SameRun,
    server: ObjectServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    words = cut_words(run, mirror=MIRROR)
    server.refuses = _refusing_first_uploads(3)
    result = train(load_config(DPOConfig, None, words[1:]), callbacks=[SignalAt(9)])
    assert (result.step, result.exit_code) == (9, 143)
    # Once as it happens; the findings of the stopped run may have it as well, if it was not yet tried again.
    assert capsys.readouterr().err.count("warning: the mirror is not up to date") == 1
    shutil.rmtree(run)  # the machine is gone
    assert main(words) == 0
    assert "checkpoint of step 9" in capsys.readouterr().err
    same_run(run, uninterrupted)
    assert_complete(server, run, tmp_path / "copy")
    mirror = json.loads((run / "run.json").read_text())["mirror"]
    assert (mirror["address"], mirror["step"]) == (MIRROR, 12)
    assert 1 <= mirror["failures"] <= 3
    # No other prefix of the bucket is listed, read or written.
    assert all(path.startswith(f"{PREFIX}") for _, path in server.requests if path != f"/{BUCKET}")
    # Another run is refused, before it reads anything else; and a finished one is brought as it is.
    assert main([*cut_words(tmp_path / "other", mirror=MIRROR), "beta=0.7"]) == 2
    assert "beta: 0.1 before, 0.7 now" in capsys.readouterr().err
    assert not (tmp_path / "other" / "run.json").exists()
    shutil.rmtree(run)
    assert main(words) == 0
    assert "is finished (step 12)" in capsys.readouterr().err
    assert (run / "model" / "model.safetensors").read_bytes() == (
        uninterrupted / "model" / "model.safetensors"
    ).read_bytes()


def _refusing_first_uploads(count: int) -> Callable[[str, str], bool]:
    left = [count]

    def refuses(method: str, path: str) -> bool:
        if method == "PUT" and "/checkpoints/" in path and left[0]:
            left[0] -= 1
            return True
        return False

    return refuses


@pytest.mark.ci
def test_a_bucket_that_is_gone_ends_no_run_but_is_told(
    cut_words: Words, server: ObjectServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = cut_words(run, mirror=MIRROR)
    gone = EachStep(lambda view: server.delete_bucket() if view.step == 5 else None)
    with pytest.raises(MirrorIncomplete, match=r"the checkpoints of step 10, 12 and the exported model: .*exist"):
        train(load_config(DPOConfig, None, words[1:]), callbacks=[gone])
    record = json.loads((run / "run.json").read_text())
    assert record["finished"]
    assert record["mirror"]["failures"] >= 5
    assert "mirror_failed" in capsys.readouterr().err
    assert "The mirror is not up to date" in (run / "report.html").read_text()
    # Before anything is computed:
    assert main(cut_words(tmp_path / "second", mirror=f"s3://{BUCKET}/runs/second")) == 1
    assert "bucket does not exist" in capsys.readouterr().err
    assert not (tmp_path / "second" / "metrics.jsonl").exists()
    server.create_bucket()
    server.refuses = lambda method, path: method == "PUT" and "/model/" in path
    assert main(words) == 1
    assert "lacks the exported model: " in (told := capsys.readouterr().err.splitlines()[-1])
    assert "Access Denied" in told
    server.refuses = lambda method, path: False
    metrics = (run / "metrics.jsonl").read_bytes()
    assert main(words) == 0  # uploads the rest
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert_complete(server, run, tmp_path / "copy")


@pytest.mark.full
def test_a_large_file_in_parts_appears_whole_or_not_at_all(server: ObjectServer, tmp_path: Path) -> None:
    large, store = tmp_path / "large", ObjectStore(MIRROR)
    large.write_bytes(np.random.default_rng(0).bytes(130 * 2**20))
    refused = iter([False, True])
    server.refuses = lambda method, path: method == "PUT" and next(refused, False)  # the second part
    with pytest.raises(StoreError, match=r"large: PermissionError: Access Denied"):
        store.upload(large, "large")
    assert store.sizes() == {}
    store.upload(large, "large")
    assert store.sizes() == {"large": 130 * 2**20}
    assert sum(request == ("PUT", f"{PREFIX}/large") for request in server.requests) >= 5
    store.download("large", tmp_path / "back" / "large")
    assert file_digest(tmp_path / "back" / "large") == file_digest(large)


KILLS = {
    "files half uploaded": (f"{STORE}.upload", "before", 8, "mirror-upload"),
    "all files, no manifest": (f"{STORE}.write", "before", 3, "mirror"),
    "old step half deleted": (f"{STORE}.delete", "after", 3, "mirror-delete"),
}


@pytest.mark.full
@pytest.mark.parametrize("disk", ["same disk", "empty disk"])
@pytest.mark.parametrize("point", KILLS.values(), ids=KILLS)
def test_killed_during_an_upload(
    point: tuple[object, ...],
    disk: str,
    cut_words: Words,
    uninterrupted: Path,
    same_run: SameRun,
    jdpo_process: Start,
    server: ObjectServer,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    words = cut_words(run, mirror=MIRROR)
    process = jdpo_process(words, "SIGKILL", *point)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    killed = server.download(PREFIX, tmp_path / "killed")
    steps = complete_steps(killed / "checkpoints")
    assert [fault_of(killed / "checkpoints" / str(step)) for step in steps] == [None] * len(steps)
    partial = [path.name for path in (killed / "checkpoints").iterdir() if int(path.name) not in steps]
    assert partial, "killed in the middle of an upload or a deletion"
    if disk == "empty disk":
        shutil.rmtree(run)
    assert main(words) == 0
    same_run(run, uninterrupted)
    assert_complete(server, run, tmp_path / "copy")
    left = {name.split("/")[3] for name in server.names(f"{PREFIX}/checkpoints/")}
    assert left == {str(step) for step in complete_steps(run / "checkpoints")}


@pytest.fixture
def command(toy_model: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """Returns the command of a run of two processes."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", chat_pairs(16, words=(6, 7)))

    def words(run: Path, **more: object) -> list[object]:
        values = {
            "model_name_or_path": toy_model,
            "datasets": pairs,
            "output_dir": run,
            "cache_dir": tmp_path / "cache",
            "max_length": 64,
            "global_batch_size": 8,
            "max_steps": 60,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "remat": "none",
            "mesh.fsdp": 8,
        } | more
        return ["-m", "jdpo.cli.main", "dpo", *(f"{key}={value}" for key, value in values.items())]

    return words


@pytest.mark.full
def test_a_stopped_run_of_two_processes_uploads_its_last_checkpoint(
    command: Callable[..., list[object]], server: ObjectServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with started([command(run, mirror=MIRROR, max_steps=5000, save_steps=1000)] * 2) as cluster:
        deadline = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.1)
        cluster.processes[1].send_signal(signal.SIGTERM)
        ends = cluster.wait(200)
    assert [end.code for end in ends] == [143, 143], ends
    copy = server.download(PREFIX, tmp_path / "copy")
    (step,) = complete_steps(copy / "checkpoints")
    assert complete_steps(run / "checkpoints") == [step]
    assert fault_of(copy / "checkpoints" / str(step)) is None


@pytest.mark.full
def test_two_processes_upload_their_shards_and_continue_on_an_empty_disk(
    command: Callable[..., list[object]], server: ObjectServer, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert [end.code for end in run_cluster([command(whole)] * 2)] == [0, 0]
    with started([command(run, mirror=MIRROR)] * 2) as cluster:
        _await_manifest(server, cluster)
        for process in cluster.processes:
            process.kill()
    shares = [json.loads((run / ".mirror" / f"process-{index}.json").read_text())["done"] for index in (0, 1)]
    assert not set(shares[0]) & set(shares[1])
    for index in (0, 1):
        assert all(f"process_{1 - index}/" not in name for name in shares[index])
    shutil.rmtree(run)
    ends = run_cluster([command(run, mirror=MIRROR)] * 2)
    assert [end.code for end in ends] == [0, 0], ends
    assert "fetching the checkpoint of step" in ends[0].log
    assert_complete(server, run, tmp_path / "copy")
    assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (run, whole)]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1]


def _await_manifest(server: ObjectServer, cluster: Cluster) -> None:
    deadline = time.monotonic() + 300
    while not any(name.endswith("manifest.json") for name in server.names(f"{PREFIX}/checkpoints/")):
        assert time.monotonic() < deadline, cluster.logs()
        assert all(process.poll() is None for process in cluster.processes), cluster.logs()
        time.sleep(0.05)
