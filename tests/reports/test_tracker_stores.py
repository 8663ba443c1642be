"""A run with all four trackers, killed and resumed, read back from the store of each."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import jdpo
from jdpo.reports.metrics_file import read_metrics
from jdpo.reports.trackers.mlflow_tracker import MlflowTracker
from jdpo.reports.trackers.tensorboard_tracker import TensorBoardTracker
from jdpo.reports.trackers.trackio_tracker import TrackioTracker
from tests.conftest import chat_pairs, write_jsonl

# mlflow uses parts of SQLAlchemy that will go.
pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
LAST = 10

TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

import jdpo

words, run, signum, at_step = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])


class Kill(jdpo.Callback):
    def on_step(self, at):
        if at.step == at_step:
            files = [run / "trackers" / f"{name}.json" for name in sys.argv[5].split(",")]
            while any(json.loads(file.read_text())["step"] < at_step for file in files):
                time.sleep(0.05)
            os.kill(os.getpid(), signum)


sys.exit(jdpo.train(jdpo.load_config(jdpo.DPOConfig, None, words), callbacks=[Kill()]).exit_code)
"""


class Store(NamedTuple):
    """The folder of a run, and the environment in which its trackers find their stores."""

    run: Path
    root: Path

    def lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.run / "metrics.jsonl")

    def values(self, name: str) -> dict[int, float]:
        """The values of a metric in metrics.jsonl."""
        return {line["step"]: line[name] for line in self.lines() if name in line}

    def id_in(self, tracker: str) -> str:
        return str(json.loads((self.run / "trackers" / f"{tracker}.json").read_text())["id"])


@pytest.fixture(scope="module")
def store(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A run that was killed after step 7, resumed from step 4, stopped after step 9, and resumed again."""
    root = tmp_path_factory.mktemp("stores")
    rows = write_jsonl(root / "pairs.jsonl", chat_pairs(20))
    run = root / "run"
    settings = {
        "model_name_or_path": toy_model,
        "datasets": rows,
        "eval_fraction": 0.2,
        "output_dir": run,
        "cache_dir": root / "cache",
        "max_length": 64,
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "max_steps": LAST,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 4,
        "remat": "none",
        "mesh.data": 8,
        "mesh.fsdp": 1,
        "sample_prompts": '["winter river", "seven"]',
        "sample_steps": 2,
        "sample_max_new_tokens": 4,
        "report_to": f"[{', '.join(TRACKERS)}]",
        "run_project": "toys",
        "run_name": "first",
        "run_group": "sweep",
        "run_tags": "[small, fast]",
    }
    words = json.dumps([f"{key}={value}" for key, value in settings.items()])
    script = root / "train.py"
    script.write_text(TRAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, value in {
            "WANDB_MODE": "offline",
            "WANDB_ERROR_REPORTING": "false",
            "TRACKIO_DIR": str(root / "trackio"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
        }.items():
            patch.setenv(name, value)

        def train(signum: int, at_step: int) -> int:
            signed = "https://host/rows.jsonl?X-Amz-Signature=0a1b2c3d"  # as may be in a command line
            values = [words, str(run), str(int(signum)), str(at_step), ",".join(TRACKERS), signed]
            done = subprocess.run([sys.executable, str(script), *values], capture_output=True, text=True, check=False)
            assert "Traceback" not in done.stderr, done.stderr
            assert "warning: tracker" not in done.stdout, done.stdout
            return done.returncode

        assert train(signal.SIGKILL, 7) == -signal.SIGKILL
        (run / "report.html").write_text("<p>a report")
        assert train(signal.SIGTERM, 9) == 128 + signal.SIGTERM
        assert train(signal.SIGTERM, 0) == 0
        yield Store(run, root)


def test_the_run_repeated_steps(store: Store) -> None:
    assert [line["step"] for line in store.lines() if "loss" in line] == list(range(1, LAST + 1))
    assert {2, 4, 6, 8, 10} <= set(store.values("eval_loss"))


def test_tensorboard_has_each_step_once(store: Store) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(store.run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    for name in ("loss", "eval_loss", "rewards/margins", "epoch"):
        points = [(point.step, point.value) for point in events.Scalars(name)]
        assert [step for step, _ in points] == sorted(store.values(name))
        assert dict(points) == pytest.approx(store.values(name), rel=1e-6)
    texts = events.Tensors("samples/1/text_summary")
    assert [text.step for text in texts] == [0, 2, 4, 6, 8, 10]
    assert "seven" in texts[0].tensor_proto.string_val[0].decode()
    (about,) = events.Tensors("run/text_summary")
    assert "beta: 0.1" in about.tensor_proto.string_val[0].decode()


def test_wandb_has_each_step_once_under_one_id(store: Store) -> None:
    folders = sorted((store.run / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    found: dict[str, list[tuple[int, Any]]] = {}
    runs, exits, artifacts, content = [], [], [], b""
    for folder in folders:
        (path,) = folder.glob("*.wandb")
        content += path.read_bytes()
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
            elif kind == "exit":
                exits.append(record.exit.exit_code)
            elif kind == "artifact":
                artifacts.append(record.artifact.name)
            elif kind == "history":
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for name, value in values.items():
                    found.setdefault(name, []).append((values["_step"], value))
    for name in ("loss", "eval_loss", "rewards/margins", "epoch"):
        assert [step for step, _ in found[name]] == sorted(store.values(name))
        assert dict(found[name]) == pytest.approx(store.values(name))
    assert [step for step, _ in found["samples/path"]] == [0, 2, 4, 6, 8, 10]
    assert {(run.run_id, run.project, run.display_name, run.run_group) for run in runs} == {
        (store.id_in("wandb"), "toys", "first", "sweep")
    }
    assert set(runs[0].tags) == {"small", "fast"}
    config = {item.key: item.value_json for item in runs[-1].config.update}
    assert (config["beta"], json.loads(config["run_tags"])) == ("0.1", ["small", "fast"])
    assert exits[-2:] == [1, 0]
    assert artifacts.count(f"report-{store.id_in('wandb')}") == 2
    assert b"X-Amz-Signature" not in content
    table = json.loads(sorted(folders[0].glob("files/media/table/samples_*.json"))[0].read_text())
    assert table["columns"] == ["step", "prompt", "answer"]
    assert [row[1] for row in table["data"]] == ["user: winter river", "user: seven"]


def wandb_records(path: Path) -> Iterator[Any]:
    """Yields the records of a .wandb file: blocks as of LevelDB's log, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # the rest of a block, too small for a record
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def test_trackio_has_each_step_once_under_one_id(store: Store) -> None:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("toys")
    assert run.name == f"first-{store.id_in('trackio')}"
    assert run.config["beta"] == 0.1
    assert run.config["_Group"] == "sweep"
    logs = SQLiteStorage.get_logs("toys", run.name, run_id=run.id)
    for name in ("loss", "eval_loss", "rewards/margins", "epoch"):
        points = [(line["step"], line[name]) for line in logs if name in line]
        assert [step for step, _ in points] == sorted(store.values(name))
        assert dict(points) == pytest.approx(store.values(name))
    tables = [(line["step"], line["samples"]) for line in logs if "samples" in line]
    assert [step for step, _ in tables] == [0, 2, 4, 6, 8, 10]
    assert [row["prompt"] for row in tables[0][1]["_value"]] == ["user: winter river", "user: seven"]
    assert {alert["title"] for alert in run.alerts()} == {"run stopped", "run finished"}


def test_mlflow_has_each_step_once_in_one_run(store: Store) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("toys")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert {"small": "true", "fast": "true", "group": "sweep"}.items() <= run.data.tags.items()
    assert run.data.params["beta"] == "0.1"
    assert run.data.params["mesh.data"] == "8"
    for name in ("loss", "eval_loss", "rewards/margins", "epoch"):
        points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        assert sorted(step for step, _ in points) == sorted(store.values(name))
        assert dict(points) == pytest.approx(store.values(name))
    table = client.load_table(experiment.experiment_id, "samples.json", [run.info.run_id])
    assert list(table["step"]) == [step for step in (0, 2, 4, 6, 8, 10) for _ in range(2)]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "report.html",
        "samples.json",
    }


def test_a_store_without_the_run_says_so(store: Store) -> None:
    empty = {"project": "other", "name": "first", "group": None, "tags": (), "config": {}, "folder": store.root}
    run = jdpo.TrackedRun(id="0a1b2c3d", resumed=True, **empty)
    for tracker in (MlflowTracker, TrackioTracker, TensorBoardTracker):
        with pytest.raises(LookupError):
            tracker(run)
