"""Plants one fault at a time in jdpo and runs the tests that should find it.

    python benchmarks/mutants.py --record             # all areas; about 30 minutes on two CPU cores
    python benchmarks/mutants.py --areas losses masks --jobs 2
    python benchmarks/mutants.py --list               # shows the mutants and runs nothing
    python benchmarks/mutants.py --only _with_eos --per-function 100

A mutant is one edit of one function in a temporary copy of the package; the operators are listed in
`mutation_operators.py`. The functions are those of `mutant_targets.py`, with the test files that should find a fault in
them; the doctests of the function's own module run too. A fixed seed draws a few mutants of each function.

A mutant is killed if a test fails, and also if its tests take more CPU seconds than a limit, as it may never end; the
result says how many did. It survives if all tests pass, and is shown. Mutants that no test can kill, because they
change nothing that can be observed, are listed next to the functions with the reason. `--record` keeps the outcomes in
`results/mutants.json`, so that a run of some areas or functions brings `results/mutants.md` up to date for all.
"""

from __future__ import annotations

import argparse
import compileall
import math
import os
import py_compile
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import ROOT
from mutant_report import Outcome, Records, report
from mutant_targets import TARGETS, Job, Target
from mutation_operators import mutants_of, sample

SEED = 15
PER_FUNCTION = 1
RECORDS = ROOT / "benchmarks" / "results" / "mutants.json"
COPIED = ("jdpo", "tests", "benchmarks", "configs", "docs", "examples", "scripts", "pyproject.toml", "README.md")

CPU_SECONDS = 100.0
"""CPU seconds that the tests of a mutant may take; wall time would depend on what else runs."""


class Workspace:
    """A copy of the package and its tests, in which one mutant at a time is tested."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        # Compiled by content, since a mutant may have its original's size and be written in the same second.
        compileall.compile_dir(
            folder / "jdpo", quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH, force=True
        )
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def test(self, tests: Sequence[str], cpu_seconds: float | None) -> tuple[str, str, float]:
        """Runs tests until the first that fails.

        Returns:
          "passed", "failed" or "timed out"; what pytest printed; seconds.

        Raises:
          RuntimeError: pytest could not run them.
        """
        command = [sys.executable, "-m", "pytest", "-x", "-q", *tests]
        limit = "unlimited" if cpu_seconds is None else str(math.ceil(cpu_seconds))
        start = time.monotonic()
        done = subprocess.run(
            ["sh", "-c", f'ulimit -S -t {limit}; exec "$@"', "sh", *command],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
        )
        seconds = time.monotonic() - start
        output = done.stdout + done.stderr
        if done.returncode in (3, 4, 5):  # pytest's own errors, and no tests
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{output}")
        if done.returncode == -signal.SIGXCPU:
            return "timed out", output, seconds
        return "failed" if done.returncode else "passed", output, seconds

    def test_mutant(self, job: Job, cpu_seconds: float) -> Outcome:
        """Tests a mutant and restores the original."""
        path = self.folder / job.target.module
        original = path.read_text(encoding="utf-8")
        path.write_text(job.mutant.source, encoding="utf-8")
        try:
            result, _, seconds = self.test(job.tests, cpu_seconds)
        finally:
            path.write_text(original, encoding="utf-8")
        return Outcome(job, {"failed": "killed", "passed": "survived"}.get(result, result), seconds)


def jobs_of(targets: Iterable[Target], *, per_function: int, seed: int) -> list[Job]:
    """Draws the mutants of each function."""
    jobs = []
    for target in targets:
        source = (ROOT / target.module).read_text(encoding="utf-8")
        for function in target.functions:
            jobs.extend(Job(target, mutant) for mutant in sample(mutants_of(source, function), per_function, seed))
    return jobs


def run(jobs: Sequence[Job], *, num_workers: int, cpu_seconds: float, on_outcome: Callable[[Outcome], None]) -> None:
    """Checks that the tests pass without a mutant, then tests every mutant.

    Raises:
      RuntimeError: a test fails without a mutant.
    """
    with tempfile.TemporaryDirectory(prefix="jdpo-mutants-") as place:
        cache = _made(Path(place, "xla"))
        free: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
        for index in range(num_workers):
            free.put(Workspace(_made(Path(place, str(index))), cache))
        workspace = free.get()
        tests = [*dict.fromkeys(path for job in jobs for path in job.tests)]
        result, output, seconds = workspace.test(tests, None)
        if result != "passed":
            raise RuntimeError(f"tests fail without a mutant:\n{output}")
        print(f"{seconds:6.1f} s without a mutant", flush=True)
        free.put(workspace)

        def outcome(job: Job) -> Outcome:
            workspace = free.get()
            try:
                return workspace.test_mutant(job, cpu_seconds)
            finally:
                free.put(workspace)

        with ThreadPoolExecutor(num_workers) as pool:
            for found in pool.map(outcome, jobs):
                on_outcome(found)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 if no mutant survived."""
    areas = [*dict.fromkeys(target.area for target in TARGETS)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--areas", nargs="+", choices=areas, default=areas, help="only these areas")
    parser.add_argument("--only", nargs="+", default=[], metavar="FUNCTION", help="only these functions")
    parser.add_argument("--per-function", type=int, default=PER_FUNCTION, help="mutants per function (default: 1)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"which mutants are drawn (default: {SEED})")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at once (default: 1)")
    parser.add_argument(
        "--cpu-seconds", type=float, default=CPU_SECONDS, help=f"per mutant at most (default: {CPU_SECONDS:g})"
    )
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument(
        "--record", action="store_true", help=f"bring {RECORDS.relative_to(ROOT)} and its .md file up to date"
    )
    options = parser.parse_args(words)
    every = jobs_of(TARGETS, per_function=options.per_function, seed=options.seed)
    asked = [job for job in every if job.target.area in options.areas]
    if options.only:
        asked = [job for job in asked if job.mutant.function in options.only]
    if options.list:
        print("\n\n".join(job.diff() for job in asked))
        print(f"\n{len(asked)} mutants")
        return 0
    with tempfile.TemporaryDirectory() as place:
        records = Records(RECORDS if options.record else Path(place, RECORDS.name))
        records.drop_all_but(every)

        def on_outcome(outcome: Outcome) -> None:
            records.keep(outcome)
            print(f"{outcome.seconds:6.1f} s  {outcome.verdict:<9}  {outcome.job.mutant.function}", flush=True)
            if outcome.verdict == "survived":
                print(outcome.job.diff(), flush=True)

        to_test = [job for job in asked if job.reason is None]
        run(to_test, num_workers=options.jobs, cpu_seconds=options.cpu_seconds, on_outcome=on_outcome)
        outcomes = records.outcomes(every if options.record else asked)
    text = report(outcomes, seed=options.seed, per_function=options.per_function, cpu_seconds=options.cpu_seconds)
    if options.record:
        RECORDS.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return int(any(outcome.verdict == "survived" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
