"""How a run of several processes ends when one of them is killed, stopped, asleep or asked to stop, as a table.

    python benchmarks/process_ends.py [--only TEXT] [--markdown]

Real processes on loopback train a toy. One of them strikes itself at a named point of the code
(tests/integration/kill_point.py). The table has the exit code of every process, the seconds from the strike until the
last one that ends by itself has ended, and the last line that the other process, or the only one that is left, printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from machine import ROOT, machine_line

KILL_POINT = ROOT / "tests/integration/kill_point.py"
LIMIT_SECONDS = 240
MANAGER = "jdpo.checkpoint.manager:CheckpointManager"
STEP = "jdpo.training.step_reports:StepReports.read"
WATCHDOG = {"watchdog.step_seconds": 6, "watchdog.evaluation_seconds": 8, "watchdog.save_seconds": 8}
WATCHDOG |= {"watchdog.export_seconds": 8, "watchdog.compile_seconds": 120, "heartbeat_timeout_seconds": 8}


class Experiment(NamedTuple):
    """One way in which a process fails.

    Attributes:
      name: what happens.
      strike: a signal, or SLEEP, or both joined by +, as if the point lasted for long.
      point: function, before or after, which call of it.
      victim: index of the process; all others run undisturbed.
      resumed: the run continues from a checkpoint, so that the point may be before the first step.
      num_processes: of the run.
    """

    name: str
    strike: str
    point: tuple[str, str, int]
    victim: int = 1
    resumed: bool = False
    num_processes: int = 2


IN_STEP = (STEP, "before", 4)
IN_SAVE = (f"{MANAGER}.save", "after", 1)
IN_EXPORT = ("jdpo.training.finish:export_model", "before", 1)
IN_EVALUATION = ("jdpo.training.evaluation:RowAverages.add", "before", 1)

LOSSES = [
    *(Experiment(f"kill -9 in a step, process {i}", "SIGKILL", IN_STEP, i) for i in (0, 1)),
    *(Experiment(f"kill -9 in a save, process {i}", "SIGKILL", IN_SAVE, i) for i in (0, 1)),
    *(Experiment(f"kill -9 in the export, process {i}", "SIGKILL", IN_EXPORT, i) for i in (0, 1)),
    *(Experiment(f"SIGSTOP in a step, process {i}", "SIGSTOP", IN_STEP, i) for i in (0, 1)),
    *(Experiment(f"asleep in a step, process {i}", "SLEEP", IN_STEP, i) for i in (0, 1)),
    Experiment("asleep in a step, process 1 of 4", "SLEEP", IN_STEP, 1, num_processes=4),
    Experiment("asleep in a step, a single process", "SLEEP", IN_STEP, 0, num_processes=1),
    Experiment("asleep in an evaluation, process 1", "SLEEP", IN_EVALUATION),
    Experiment("asleep in a save, process 0", "SLEEP", IN_SAVE, 0),
    Experiment("asleep in the export, process 0", "SLEEP", IN_EXPORT, 0),
]

STARTS = {
    "before joining": ("jdpo.processes:join_cluster", "before", 1),
    "reading the data": ("jdpo.training.setup.run_setup:prepare_rows", "before", 1),
    "the reference": ("jdpo.training.run:reference_of", "before", 1),
    "compiling": ("jdpo.training.run:prepare_steps", "before", 1),
    "loading the checkpoint": ("jdpo.training.run:restore_state", "before", 1),
}
STOPS = [
    *(Experiment(f"SIGTERM, {name}", "SIGTERM", point, resumed=True) for name, point in STARTS.items()),
    *(Experiment(f"SIGTERM in a step, process {i}", "SIGTERM", IN_STEP, i) for i in (0, 1)),
    Experiment("SIGTERM in an evaluation", "SIGTERM", IN_EVALUATION),
    Experiment(
        "SIGTERM while answers are sampled",
        "SIGTERM",
        ("jdpo.training.answer_samples:AnswerSamples.take", "before", 1),
    ),
    Experiment("SIGTERM in a save", "SIGTERM", IN_SAVE),
    Experiment("SIGTERM in a short export", "SIGTERM", IN_EXPORT),
    Experiment("SIGTERM in a long export, process 0", "SIGTERM+SLEEP", IN_EXPORT, 0),
    Experiment("SIGTERM, compiling for long", "SIGTERM+SLEEP", STARTS["compiling"], resumed=True),
    Experiment("SIGTERM in a step, a single process", "SIGTERM", IN_STEP, 0, num_processes=1),
]
EXPERIMENTS = {one.name: one for one in (*LOSSES, *STOPS)}


class Outcome(NamedTuple):
    """The end of an experiment.

    Attributes:
      codes: exit code of each process; None for one that had to be killed, as nothing of jdpo can end it.
      seconds: from the strike until the last process that ended by itself.
      line: the last line of jdpo on a process that was not struck, or on the only one.
      logs: stderr of each.
    """

    codes: tuple[int | None, ...]
    seconds: float
    line: str
    logs: tuple[str, ...]


class Laboratory:
    """A folder with a toy model, rows, and a run that was stopped at a checkpoint."""

    def __init__(self, folder: Path) -> None:
        from jdpo.quickstart.tiny_llama import write_model

        self.folder = folder
        drawn = random.Random(0)
        words = ["river", "mountain", "paper", "winter", "green", "seven", "slow", "market"]
        texts = [" ".join(drawn.choices(words, k=8)) for _ in range(60)]
        write_model(folder / "toy", texts, hidden_size=64, num_layers=2, seed=0)
        rows = [
            {"prompt": a, "chosen": b, "rejected": c}
            for a, b, c in zip(texts[:20], texts[20:40], texts[40:], strict=True)
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def words(self, run: Path, **overrides: object) -> list[str]:
        """Returns the command line of a run of 12 steps that saves, evaluates and samples now and then."""
        values = {
            "model_name_or_path": self.folder / "toy",
            "datasets": self.folder / "pairs.jsonl",
            "eval_datasets": self.folder / "pairs.jsonl",
            "output_dir": run,
            "cache_dir": self.folder / "cache",
            "max_length": 64,
            "global_batch_size": 8,
            "num_train_epochs": 4,
            "logging_steps": 1,
            "eval_steps": 4,
            "eval_on_start": "false",
            "sample_prompts": "[river]",
            "sample_steps": 4,
            "sample_max_new_tokens": 4,
            "save_steps": 2,
            "remat": "none",
            "mesh.data": 4,
            "mesh.fsdp": 1,
            **WATCHDOG,
            **overrides,
        }
        return ["dpo", *(f"{key}={value}" for key, value in values.items())]

    def stopped(self, num_processes: int) -> Path:
        """Returns the folder of a run that was stopped at a checkpoint, made at the first call."""
        run = self.folder / f"stopped-{num_processes}"
        if not run.exists():
            point = ("SIGTERM", *map(str, IN_STEP))
            commands = [[str(KILL_POINT), *point, "--", *self.words(run)]]
            commands += [["-m", "jdpo.cli.main", *self.words(run)]] * (num_processes - 1)
            ends = start(commands, self.folder)
            for process in ends.processes:
                process.wait(LIMIT_SECONDS)
            assert list(run.glob("checkpoints/*/manifest.json")), ends.logs()
        return run

    def carry_out(self, experiment: Experiment) -> Outcome:
        """Makes the run of an experiment, and waits for its end."""
        run = Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        if experiment.resumed:
            shutil.copytree(self.stopped(experiment.num_processes), run)
            # The words name the folder, so the copy is the same run in another place.
        words = self.words(run)
        commands = [["-m", "jdpo.cli.main", *words] for _ in range(experiment.num_processes)]
        commands[experiment.victim] = [
            str(KILL_POINT), experiment.strike, *map(str, experiment.point), "--", *words
        ]  # fmt: skip
        running = start(commands, self.folder)
        try:
            return running.outcome(experiment)
        finally:
            for process in running.processes:
                process.kill()
                process.wait()


class Running(NamedTuple):
    """Processes that run, and the files of their stderr."""

    processes: Sequence[subprocess.Popen[bytes]]
    files: Sequence[Path]

    def logs(self) -> tuple[str, ...]:
        """Returns what each has printed so far."""
        return tuple(file.read_text(encoding="utf-8", errors="replace") for file in self.files)

    def outcome(self, experiment: Experiment) -> Outcome:
        """Waits until all have ended, except for a victim that cannot end by itself."""
        ended: dict[int, float] = {}
        limit = time.time() + LIMIT_SECONDS
        cannot_end = {experiment.victim} if experiment.strike == "SIGSTOP" else set[int]()
        while len(ended) < len(self.processes) - len(cannot_end) and time.time() < limit:
            for index, process in enumerate(self.processes):
                if index not in ended and process.poll() is not None:
                    ended[index] = time.time()
            time.sleep(0.05)
        logs = self.logs()
        struck = re.search(r"struck at ([\d.]+)", logs[experiment.victim])
        assert struck, f"the point {experiment.point} was not reached: {logs}"
        witness = next((i for i in range(len(logs)) if i != experiment.victim), 0)
        lines = [line for line in logs[witness].splitlines() if line.startswith("jdpo: ")] or [""]
        # As a shell and a launcher see them.
        codes = [process.poll() for process in self.processes]
        seen = tuple(code if code is None or code >= 0 else 128 - code for code in codes)
        return Outcome(seen, max(ended.values(), default=limit) - float(struck[1]), lines[-1], logs)


def start(commands: Sequence[Sequence[str]], folder: Path) -> Running:
    """Starts `python COMMAND` for each command, as the processes of one run on four CPU devices."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    logs = Path(tempfile.mkdtemp(dir=folder))
    files = [logs / str(index) for index in range(len(commands))]
    processes = []
    for index, (command, file) in enumerate(zip(commands, files, strict=True)):
        with file.open("wb") as stderr:
            environment = _environment(index, len(commands), port, folder)
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=stderr, cwd=folder
                )
            )
    return Running(processes, files)


def _environment(index: int, count: int, port: int, folder: Path) -> Mapping[str, str]:
    flags = f"--xla_force_host_platform_device_count={4 // count} --xla_backend_optimization_level=0"
    # By default JAX's own deadlines of a collective operation on CPU come first, after 30 and 40 s.
    flags += " --xla_cpu_collective_timeout_seconds=600 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "PYTHONPATH": str(ROOT),
    }


def main() -> None:
    """Carries out the experiments and prints a row for each as soon as it has ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="experiments whose name contains this")
    parser.add_argument("--logs", action="store_true", help="print what all processes logged")
    arguments = parser.parse_args()
    print(f"{machine_line()}\n\n| what happens | exit codes | seconds | line |\n|---|---|---:|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="process-ends-") as folder:
        laboratory = Laboratory(Path(folder))
        for experiment in EXPERIMENTS.values():
            if arguments.only in experiment.name:
                outcome = laboratory.carry_out(experiment)
                codes = ", ".join("-" if code is None else str(code) for code in outcome.codes)
                # Without the advice, which repeats the command line.
                line = outcome.line.replace(folder, "...").partition(" The last checkpoint")[0]
                print(f"| {experiment.name} | {codes} | {outcome.seconds:.1f} | {line} |", flush=True)
                if arguments.logs:
                    print("\n".join(outcome.logs), flush=True)


if __name__ == "__main__":
    main()
