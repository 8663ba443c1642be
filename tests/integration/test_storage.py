"""Two processes with a disk of their own each for caches, and an output_dir that shows them late what others wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_pairs, write_jsonl
from tests.integration.cluster import End, run_cluster
from tests.integration.stale_folders import stale_folder

PROGRAM = Path(__file__).parent / "stop_by_many.py"
Words = Callable[..., list[str]]


@pytest.fixture
def start(run_words: Words, tmp_path: Path) -> Callable[..., list[End]]:
    """Starts a run of two processes; `caches` is the folder of each one's cache."""
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_pairs(20))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", chat_pairs(5, seed=1))

    def run(
        output_dir: Path,
        caches: list[Path],
        *,
        stop_at: int = 0,
        outputs: list[Path] | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> list[End]:
        values = {
            "datasets": rows,
            "eval_datasets": held_out,
            "num_train_epochs": 2,
            "eval_steps": 2,
            "save_steps": 2,
            "load_best_model_at_end": True,
            "mesh.data": 1,
            "mesh.fsdp": -1,
        } | overrides
        commands = [
            [PROGRAM, stop_at, *run_words(**values, output_dir=output, cache_dir=cache)]
            for output, cache in zip(outputs or [output_dir] * 2, caches, strict=True)
        ]
        # Compiled programs in the caches, too, and not where the other tests keep theirs.
        environ = {"JAX_COMPILATION_CACHE_DIR": "", **(environ or {})}
        return run_cluster(commands, num_devices=2, environs=dict.fromkeys(range(2), environ))

    return run


def ended(ends: list[End], code: int) -> list[End]:
    assert [end.code for end in ends] == [code] * 2, "\n\n".join(end.log for end in ends)
    return ends


def result(run: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Returns the files of the model, and the metrics without times."""
    files = {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert files
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    times = ("_per_second", "_seconds", "_gib", "mfu")
    return files, [{name: value for name, value in line.items() if not name.endswith(times)} for line in lines]


@pytest.mark.full
def test_caches_on_local_disks_and_an_output_dir_that_is_seen_late(
    start: Callable[..., list[End]], tmp_path: Path
) -> None:
    shared, own = [tmp_path / "cache"] * 2, [tmp_path / "disks" / name for name in ("a", "b")]
    ended(start(tmp_path / "plain" / "run", shared), 0)
    expected = result(tmp_path / "plain" / "run")
    run = tmp_path / "nfs" / "run"
    run.parent.mkdir()
    # Processes answer from memory for longer than a start of theirs takes, as far as nothing makes them ask.
    with stale_folder(run.parent, seconds=60) as environ:
        ended(start(run, own, stop_at=3, environ=environ), 143)
        # One host has lost its caches, and files in the other's are damaged.
        assert list(own[0].glob("programs/*/*"))
        shutil.rmtree(own[1])
        for path in [*own[0].glob("tokenized/*.arrow"), *own[0].glob("reference/*/*.safetensors")]:
            path.write_bytes(path.read_bytes()[:-1])
        first, _ = ended(start(run, own, environ=environ), 0)
        assert "damaged and computed again" in first.log
        assert "tokenized into" in first.log
        # Started again, as a launcher may do at once: all know that the run is finished.
        first, _ = ended(start(run, own, environ=environ), 0)
        assert "is finished" in first.log
    assert result(run) == expected
    assert "/run/" in (run.parent / "stale.log").read_text(), "something of the run was not seen at once"
    assert not [path.name for path in run.iterdir() if path.name.startswith(".process-")]


@pytest.mark.full
def test_processes_that_do_not_share_output_dir_are_refused(start: Callable[..., list[End]], tmp_path: Path) -> None:
    ends = start(tmp_path, [tmp_path / "cache"] * 2, outputs=[tmp_path / "a", tmp_path / "b"])
    for end in ended(ends, 1):
        assert "is not one folder for all processes" in end.log
