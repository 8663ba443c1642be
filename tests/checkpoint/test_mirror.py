"""The mirror of a run's folder: what is uploaded, in which order, by whom, and what comes back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jdpo.checkpoint.mirror.checkpoint_fetch import fetch_newest
from jdpo.checkpoint.mirror.contents import CHECKPOINTS, record_files, share_of
from jdpo.checkpoint.mirror.daemon_threads import in_daemon_threads
from jdpo.checkpoint.mirror.leading_upload import Leader
from jdpo.checkpoint.mirror.object_store import ObjectStore, StoreError
from jdpo.checkpoint.mirror.run_fetch import RunInMirror, fetch_run
from jdpo.checkpoint.mirror.share_upload import Follower
from jdpo.checkpoint.mirror.upload_notes import NOTES, UploadNotes
from jdpo.checkpoint.steps import MANIFEST, complete_steps, delete_step, digests_of, fault_of
from jdpo.config import DPOConfig, to_public_yaml

CONFIG = {"model_name_or_path": "model", "datasets": "pairs.jsonl"}
INPUTS = {"the training rows": "a" * 64}
FILES = ("state/ocdbt.process_0/d/aa", "state/ocdbt.process_1/d/bb", "state/manifest.ocdbt", "position/metadata")
DEADLINE = 60.0


def write_step(run: Path, step: int, content: str = "", **manifest: Any) -> None:
    """Writes a checkpoint with the files of two processes."""
    folder = run / CHECKPOINTS / str(step)
    for name in (
        "state/ocdbt.process_0/d/aa",
        "state/ocdbt.process_1/d/bb",
        "state/manifest.ocdbt",
        "position/metadata",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{step} {name} {content}")
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": digests_of(folder), **manifest}))
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(f'{{"step": {step}}}\n')


def settings_of(run: Path, mirror: Path, **changes: Any) -> DPOConfig:
    return DPOConfig(**{**CONFIG, "output_dir": str(run), "mirror": f"file://{mirror}", **changes})


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


@pytest.fixture
def run(tmp_path: Path, mirror: Path) -> Path:
    """The folder of a run without checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "resolved_config.yaml").write_text(to_public_yaml(settings_of(folder, mirror)))
    (folder / "run.json").write_text(json.dumps({"command": "dpo", "jdpo": "1", "inputs": INPUTS}))
    return folder


class Uploads:
    """The uploads of a run by one process or several, which are threads here."""

    def __init__(self, run: Path, mirror: Path, count: int = 1, start: int = 1) -> None:
        self.lines: list[str] = []
        self.run, self.store = run, ObjectStore(f"file://{mirror}")
        notes = [UploadNotes(run, index, start) for index in range(count)]
        self.leader = Leader(self.store, run, notes[0], count, self.lines.append)
        self.followers = []
        for index, each in list(enumerate(notes))[1:]:
            each.join(self.store.address)
            self.followers.append(Follower(self.store, run, each, index, count))

    def follow(self, newest: int | None = None, keep: int = 2) -> None:
        def kept(manifests: Mapping[int, Any]) -> Collection[int]:
            return sorted(manifests)[-keep:]

        def delete_old() -> None:
            steps = complete_steps(self.run / CHECKPOINTS)
            for step in set(steps) - set(kept(dict.fromkeys(steps))) - set(self.leader.held()):
                delete_step(self.run / CHECKPOINTS / str(step))

        self.leader.follow(newest, kept, delete_old)

    def wait(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not is_so():
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.01)

    def close(self) -> list[str]:
        self.leader.close(lambda: False)
        for each in self.followers:
            each.close(lambda: False)
        return self.leader.missing()


@pytest.fixture
def uploads(run: Path, mirror: Path) -> Iterator[Callable[..., Uploads]]:
    started: list[Uploads] = []

    def start(**options: Any) -> Uploads:
        started.append(Uploads(run, mirror, start=len(started) + 1, **options))
        return started[-1]

    yield start
    for each in started:
        each.leader.close(lambda: True)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and NOTES not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_intact(mirror: Path) -> None:
    """Asserts that every checkpoint in a mirror that counts agrees with its manifest."""
    assert [fault_of(mirror / CHECKPOINTS / str(step)) for step in complete_steps(mirror / CHECKPOINTS)] == [
        None for _ in complete_steps(mirror / CHECKPOINTS)
    ]


def test_a_mirror_is_a_copy_of_the_runs_folder(run: Path, mirror: Path, uploads: Callable[..., Uploads]) -> None:
    for step in (2, 4):
        write_step(run, step)
    (run / "model").mkdir()
    (run / "model" / ".jdpo_export").write_text("{}")
    (run / "model" / "model.safetensors").write_text("weights")
    (run / "trackers").mkdir()
    (run / "trackers" / "wandb.json").write_text("{}")
    (run / ".lock").write_text("not for others")
    one = uploads()
    one.follow(4)
    assert one.close() == []
    found = files_of(mirror)
    assert json.loads(found.pop("model.manifest.json"))["files"]["model.safetensors"][0] == len("weights")
    expected = files_of(run)
    del expected[".lock"]
    assert found.keys() == expected.keys()
    manifests = {name for name in expected if name.endswith(MANIFEST)}
    assert {name: found[name] for name in expected.keys() - manifests} == {
        name: expected[name] for name in expected.keys() - manifests
    }
    assert_intact(mirror)
    for step in (2, 4):  # the manifest last, and the metrics of the step before it
        times = {
            path: path.stat().st_mtime_ns for path in (mirror / CHECKPOINTS / str(step)).rglob("*") if path.is_file()
        }
        assert max(times, key=lambda path: times[path]).name == MANIFEST
    assert one.leader.failures == 0
    assert one.lines == []


def test_old_steps_are_deleted_in_the_mirror_as_on_the_disk(
    run: Path, mirror: Path, uploads: Callable[..., Uploads]
) -> None:
    write_step(run, 1)
    one = uploads()
    one.follow(1)
    for step in (2, 3, 4):
        write_step(run, step)
        one.leader.sealed()
        one.wait(lambda: one.leader.newest == step)  # noqa: B023
    assert one.close() == []
    assert complete_steps(mirror / CHECKPOINTS) == complete_steps(run / CHECKPOINTS) == [3, 4]
    assert not [name for name in one.store.sizes(CHECKPOINTS) if name.split("/")[1] in ("1", "2")]


def test_each_file_is_uploaded_by_one_process_its_own_by_itself(
    run: Path, mirror: Path, uploads: Callable[..., Uploads]
) -> None:
    write_step(run, 1)
    one = uploads(count=3)
    one.follow(1)
    assert one.close() == []
    assert_intact(mirror)
    shares = [set(json.loads((run / NOTES / f"process-{index}.json").read_text())["done"]) for index in range(3)]
    assert len(set.union(*shares)) == sum(map(len, shares)) == 4
    for index in (0, 1):
        assert {name for name in set.union(*shares) if f"ocdbt.process_{index}/" in name} <= shares[index]
    assert all(shares)


def test_shares_cover_all_files_once_whatever_the_number_of_processes() -> None:
    sizes = {f"state/ocdbt.process_{index}/d/x": 100 + index for index in range(5)} | {f"f{n}": n for n in range(20)}
    for count in (1, 2, 3, 8):
        shares = [share_of(sizes, index, count) for index in range(count)]
        assert sorted(name for share in shares for name in share) == sorted(sizes)
        loads = [sum(sizes[name] for name in share) for share in shares]
        assert count == 8 or max(loads) - min(loads) <= 210


def test_what_the_store_refuses_is_counted_and_tried_again(
    run: Path, mirror: Path, uploads: Callable[..., Uploads]
) -> None:
    one = uploads()
    one.leader.records.upload()
    (mirror / CHECKPOINTS).write_text("a file where a folder has to be: every write below it fails")
    write_step(run, 1)
    one.follow(1)
    one.wait(lambda: one.leader.failures >= 2)
    assert len(one.lines) == 1
    assert "not up to date" in one.lines[0]
    (mirror / CHECKPOINTS).unlink()
    write_step(run, 2)
    one.leader.sealed()  # does not wait for the end of the pause
    one.wait(lambda: one.leader.newest == 2)
    assert one.close() == []
    assert one.leader.error is None
    assert "checkpoints/2 now" in one.lines[1]
    assert complete_steps(mirror / CHECKPOINTS) == [1, 2]


def test_a_damaged_checkpoint_is_not_mirrored(run: Path, mirror: Path, uploads: Callable[..., Uploads]) -> None:
    write_step(run, 1)
    write_step(run, 2)
    (run / CHECKPOINTS / "1" / "state" / "manifest.ocdbt").write_text("1 state/manifest.ocdbt?")
    one = uploads()
    one.follow(2)
    assert one.close() == ["the checkpoint of step 1"]
    assert complete_steps(mirror / CHECKPOINTS) == [2]
    assert "is not the file that was written" in str(one.leader.error)


def test_a_checkpoint_of_a_run_that_ends_while_the_mirror_is_compared_is_uploaded(
    run: Path, mirror: Path, uploads: Callable[..., Uploads]
) -> None:
    one, looks, ends = uploads(), threading.Event(), threading.Event()

    def kept(manifests: Mapping[int, Any]) -> Collection[int]:
        looks.set()
        assert ends.wait(DEADLINE)
        return list(manifests)

    def given_up() -> bool:
        ends.set()
        return False

    one.leader.follow(None, kept, lambda: None)
    assert looks.wait(DEADLINE)
    write_step(run, 1)
    one.leader.close(given_up)
    assert one.leader.missing() == []
    assert complete_steps(mirror / CHECKPOINTS) == [1]


def test_nothing_is_left_of_a_step_that_was_deleted_before_its_upload_succeeded(
    run: Path, mirror: Path, uploads: Callable[..., Uploads]
) -> None:
    one = uploads()
    one.leader.records.upload()
    obstacle = mirror / CHECKPOINTS / "1" / "state" / "manifest.ocdbt"
    obstacle.mkdir(parents=True)  # where a file has to be
    write_step(run, 1)
    one.follow(1)
    one.wait(lambda: one.leader.failures >= 1)
    assert any(path.is_file() for path in obstacle.parent.rglob("*")), "other files were uploaded"
    delete_step(run / CHECKPOINTS / "1")
    write_step(run, 2)
    assert one.close() == []
    assert complete_steps(mirror / CHECKPOINTS) == [2]
    assert not [path for path in (mirror / CHECKPOINTS / "1").rglob("*") if path.is_file()]


def test_a_metric_that_becomes_known_later_is_mirrored(
    run: Path, mirror: Path, uploads: Callable[..., Uploads]
) -> None:
    write_step(run, 1, metric=None)
    one = uploads()
    one.follow(1)
    one.wait(lambda: one.leader.newest == 1)
    files = {path: path.stat().st_mtime_ns for path in (mirror / CHECKPOINTS / "1" / "state").rglob("*")}
    manifest = json.loads((run / CHECKPOINTS / "1" / MANIFEST).read_text())
    (run / CHECKPOINTS / "1" / MANIFEST).write_text(json.dumps({**manifest, "metric": 0.5}))
    one.leader.sealed()
    assert one.close() == []
    assert json.loads((mirror / CHECKPOINTS / "1" / MANIFEST).read_text())["metric"] == 0.5
    assert {path: path.stat().st_mtime_ns for path in files} == files, "no file is uploaded a second time"


SLOW = """
import sys, threading
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem
from jdpo.checkpoint.mirror.leading_upload import Leader
from jdpo.checkpoint.mirror.object_store import ObjectStore
from jdpo.checkpoint.mirror.upload_notes import UploadNotes

class Slow(LocalFileSystem):
    protocol = "slow"
    asked = threading.Semaphore(0)

    def put_file(self, *_, **__):
        self.asked.release()
        threading.Event().wait()

fsspec.register_implementation("slow", Slow)
run = Path(sys.argv[1])
leader = Leader(ObjectStore(f"slow://{run}-mirror"), run, UploadNotes(run, 0, 1), 1, print)
leader.follow(1, list, lambda: None)
Slow.asked.acquire()
leader.close(lambda: True)
print(*leader.missing())
"""


@pytest.mark.ci
def test_a_process_that_ends_does_not_wait_for_uploads_that_it_has_given_up(run: Path) -> None:
    """A store that does not answer must not keep a stopped run until it is killed."""
    write_step(run, 1)
    ended = subprocess.run([sys.executable, "-c", SLOW, run], capture_output=True, text=True, timeout=DEADLINE)
    assert (ended.returncode, ended.stdout) == (0, "the checkpoint of step 1\n"), ended.stderr


def test_no_further_file_is_begun_once_uploads_are_given_up() -> None:
    begun: list[str] = []
    errors = in_daemon_threads(begun.append, "abcdef", 1, lambda: len(begun) == 2)
    assert begun == ["a", "b"]
    assert "given up" in str(errors)
    assert in_daemon_threads(begun.append, "", 4, lambda: True) == []


def test_an_interrupted_upload_is_continued(run: Path, mirror: Path, uploads: Callable[..., Uploads]) -> None:
    write_step(run, 1)
    one = uploads()
    one.follow(1)
    assert one.close() == []
    # As after a kill: no manifest, one file is missing, and one is of an upload that the notes do not know.
    (mirror / CHECKPOINTS / "1" / MANIFEST).unlink()
    (mirror / CHECKPOINTS / "1" / "position" / "metadata").unlink()
    (mirror / CHECKPOINTS / "1" / "state" / "old").write_text("of an earlier save of this step")
    kept = mirror / CHECKPOINTS / "1" / "state" / "ocdbt.process_0" / "d" / "aa"
    before = kept.stat().st_mtime_ns
    again = uploads()
    again.follow(1)
    assert again.close() == []
    assert kept.stat().st_mtime_ns == before
    assert (mirror / CHECKPOINTS / "1" / "position" / "metadata").exists()
    assert not (mirror / CHECKPOINTS / "1" / "state" / "old").exists()
    assert_intact(mirror)


def test_a_file_that_another_program_changed_in_the_mirror_is_uploaded_again(
    run: Path, mirror: Path, uploads: Callable[..., Uploads]
) -> None:
    write_step(run, 1)
    one = uploads()
    one.follow(1)
    assert one.close() == []
    (mirror / CHECKPOINTS / "1" / "state" / "manifest.ocdbt").write_text("short")
    again = uploads()
    again.follow(1)
    assert again.close() == []
    assert_intact(mirror)


def test_what_is_left_of_others_goes_once_the_run_has_come_as_far(
    run: Path, mirror: Path, uploads: Callable[..., Uploads]
) -> None:
    for step in (1, 2, 4):
        write_step(run, step)
    one = uploads()
    one.follow(4, keep=9)
    assert one.close() == []
    delete_step(run / CHECKPOINTS / "4")
    (mirror / CHECKPOINTS / "4" / "position" / "metadata").unlink()  # damaged: the run continues from step 2
    (mirror / CHECKPOINTS / "3").mkdir()
    (mirror / CHECKPOINTS / "3" / "state").write_text("of an upload that was interrupted on another machine")
    again = uploads()
    again.follow(2)
    again.wait(lambda: not (mirror / CHECKPOINTS / "3" / "state").exists())
    assert (mirror / CHECKPOINTS / "4" / MANIFEST).exists()
    write_step(run, 5)
    again.leader.sealed()
    again.wait(lambda: not (mirror / CHECKPOINTS / "4" / MANIFEST).exists())
    assert again.close() == []
    assert complete_steps(mirror / CHECKPOINTS) == [2, 5]
    assert not again.store.sizes("checkpoints/4")


# --- the way back


def mirrored(run: Path, uploads: Callable[..., Uploads], *steps: int) -> None:
    for step in steps:
        write_step(run, step)
    one = uploads()
    one.follow(steps[-1], keep=5)
    assert one.close() == []


def test_a_run_comes_back_to_an_empty_folder(
    run: Path, mirror: Path, tmp_path: Path, uploads: Callable[..., Uploads]
) -> None:
    mirrored(run, uploads, 2, 4)
    empty = tmp_path / "empty"
    config = settings_of(empty, mirror)
    assert fetch_run(empty, config, "dpo", None)
    assert not (empty / "metrics.jsonl").exists()
    lines: list[str] = []
    found = RunInMirror(ObjectStore(f"file://{mirror}"))
    assert fetch_newest(found, empty, None, 10, None, lines.append) == 4
    assert complete_steps(empty / CHECKPOINTS) == [4]
    assert fault_of(empty / CHECKPOINTS / "4") is None
    for name in record_files(run):
        assert (empty / name).read_bytes() == (run / name).read_bytes()
    assert not (empty / NOTES / "fetching").exists()
    # Only what is later is brought.
    assert not fetch_run(empty, config, "dpo", INPUTS)
    assert fetch_newest(found, empty, 4, 10, None, lines.append) == 4
    assert len(lines) == 1


@pytest.mark.parametrize("damage", ["changed", "missing", "manifest", "escapes"])
def test_a_damaged_checkpoint_in_the_mirror_is_passed_over(
    damage: str, run: Path, mirror: Path, tmp_path: Path, uploads: Callable[..., Uploads]
) -> None:
    mirrored(run, uploads, 2, 4)
    file, manifest = mirror / CHECKPOINTS / "4" / "state" / "manifest.ocdbt", mirror / CHECKPOINTS / "4" / MANIFEST
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text('{"step": 4, "files": ')
    else:
        manifest.write_text(json.dumps({"step": 4, "files": {"../../../../outside": [1, "0" * 64]}}))
    empty = tmp_path / "empty"
    lines: list[str] = []
    found = RunInMirror(ObjectStore(f"file://{mirror}"))
    assert fetch_newest(found, empty, None, 10, None, lines.append) == 2
    assert complete_steps(empty / CHECKPOINTS) == [2]
    assert any("step 4" in line and "damaged" in line for line in lines)
    assert not (tmp_path / "outside").exists()


def test_a_mirror_without_an_intact_checkpoint_is_no_reason_to_start_over(
    run: Path, mirror: Path, tmp_path: Path, uploads: Callable[..., Uploads]
) -> None:
    mirrored(run, uploads, 2)
    (mirror / CHECKPOINTS / "2" / "position" / "metadata").unlink()
    found = RunInMirror(ObjectStore(f"file://{mirror}"))
    with pytest.raises(OSError, match="agrees with its manifest"):
        fetch_newest(found, tmp_path / "empty", None, 10, None, print)
    with pytest.raises(ValueError, match="ends at step 1"):
        fetch_newest(found, tmp_path / "empty", None, 1, None, print)


def test_the_best_checkpoint_comes_back_if_it_is_to_be_exported(
    run: Path, mirror: Path, tmp_path: Path, uploads: Callable[..., Uploads]
) -> None:
    for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6)):
        write_step(run, step, metric_name="eval_loss on rows", metric=loss)
    one = uploads()
    one.follow(4, keep=5)
    assert one.close() == []
    found = RunInMirror(ObjectStore(f"file://{mirror}"))
    assert fetch_newest(found, tmp_path / "empty", None, 10, "eval_loss", print) == 4
    assert complete_steps(tmp_path / "empty" / CHECKPOINTS) == [2, 4]


def test_a_finished_run_comes_back_with_its_model(
    run: Path, mirror: Path, tmp_path: Path, uploads: Callable[..., Uploads]
) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"finished": True}))
    (run / "model").mkdir()
    for name in (".jdpo_export", "model.safetensors"):
        (run / "model" / name).write_text(name)
    mirrored(run, uploads, 2)
    empty = tmp_path / "empty"
    assert fetch_run(empty, settings_of(empty, mirror), "dpo", None)
    assert files_of(empty / "model") == files_of(run / "model")
    assert (empty / "metrics.jsonl").exists()
    assert not (empty / NOTES / "fetching").exists()
    shutil.rmtree(empty)
    (mirror / "model" / "model.safetensors").write_text("another file!!!!!")
    assert fetch_run(empty, settings_of(empty, mirror), "dpo", None)
    assert not (empty / "model").exists()


def test_a_mirror_of_another_run_is_refused(
    run: Path, mirror: Path, tmp_path: Path, uploads: Callable[..., Uploads]
) -> None:
    mirrored(run, uploads, 2)
    config = settings_of(run, mirror)
    with pytest.raises(ValueError, match=r"the training rows: aaaaaaaaaaaa in the mirror, bbbbbbbbbbbb in"):
        fetch_run(run, config, "dpo", {"the training rows": "b" * 64})
    with pytest.raises(ValueError, match=r"beta: 0\.1 before, 0\.5 now"):
        fetch_run(tmp_path / "empty", settings_of(tmp_path / "empty", mirror, beta=0.5), "dpo", None)
    with pytest.raises(ValueError, match="jdpo dpo in the mirror, jdpo sft now"):
        fetch_run(tmp_path / "empty", config, "sft", None)
    with pytest.raises(ValueError, match="resume is 'never'"):
        fetch_run(tmp_path / "empty", settings_of(tmp_path / "empty", mirror, resume="never"), "dpo", None)
    assert not (tmp_path / "empty").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path, mirror: Path) -> None:
    mirror.mkdir()
    (mirror / ".jdpo-doctor-1-0").write_text("of a trial that was killed")
    assert not fetch_run(tmp_path / "run", settings_of(tmp_path / "run", mirror), "dpo", None)
    (mirror / "photos").mkdir()
    (mirror / "photos" / "a.jpg").write_text("")
    with pytest.raises(ValueError, match="is not that of a run"):
        fetch_run(tmp_path / "run", settings_of(tmp_path / "run", mirror), "dpo", None)


def test_a_store_that_cannot_be_opened_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"pip install 'jdpo\[gcs\]'"):
        ObjectStore("gs://bucket/run")
    with pytest.raises(ValueError, match="mirror nothing://"):
        ObjectStore("nothing://bucket/run")
    store = ObjectStore(f"file://{tmp_path}")
    with pytest.raises(StoreError, match="gone"):
        store.download("gone", tmp_path / "x")
    assert store.read("gone") is None
    store.delete("gone")
