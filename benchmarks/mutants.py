"""Plants one fault at a time in jdpo and runs the tests that should find it.

    python benchmarks/mutants.py                      # all areas; about 30 minutes on two CPU cores
    python benchmarks/mutants.py --areas losses masks --jobs 2
    python benchmarks/mutants.py --list               # shows the mutants and runs nothing
    python benchmarks/mutants.py --only _with_eos --per-function 100

A mutant is one edit of one function in a temporary copy of the package; the operators are listed in
`mutation_operators.py`. The functions are those of TARGETS, with the test files that should find a fault in them; the
doctests of the function's own module run too. A fixed seed draws a few mutants of each function. A mutant is killed if
a test fails, and also if its tests take longer than a time limit, as it may never end; the result says how many did. It
survives if all tests pass. Survivors are shown. Mutants that no test can kill, because they change nothing that can be
observed, are in EQUIVALENT with the reason.
"""

from __future__ import annotations

import argparse
import compileall
import datetime
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
from typing import NamedTuple

from machine import ROOT, machine_line
from mutation_operators import Mutant, mutants_of, sample

SEED = 15
PER_FUNCTION = 1
REPORT = ROOT / "benchmarks" / "results" / "mutants.md"
COPIED = ("jdpo", "tests", "benchmarks", "configs", "docs", "examples", "scripts", "pyproject.toml", "README.md")

TIMEOUT = 300.0
"""Seconds that the tests of a mutant may take."""


class Target(NamedTuple):
    """Functions of one module.

    Attributes:
      area: what a fault in them would break.
      module: its path.
      functions: their qualified names.
      tests: the fewest test files that should find a fault in them.
    """

    area: str
    module: str
    functions: tuple[str, ...]
    tests: tuple[str, ...]


TARGETS = (
    Target(
        "losses",
        "jdpo/losses/pairwise.py",
        (
            *("per_token", "smoothed", "square", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm", "exo_pair"),
            *("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"),
        ),
        ("tests/losses/test_preference.py",),
    ),
    Target(
        "losses",
        "jdpo/losses/reference_free.py",
        ("log1mexp", "simpo", "cpo", "orpo", "sft"),
        ("tests/losses/test_reference_free.py",),
    ),
    Target(
        "losses",
        "jdpo/losses/coupled.py",
        ("_by_quantile", "_ascending", "update_loss_state"),
        ("tests/losses/test_preference.py", "tests/losses/test_pair_losses.py"),
    ),
    Target("losses", "jdpo/losses/divergences.py", ("divergence_score",), ("tests/losses/test_preference.py",)),
    Target(
        "losses",
        "jdpo/losses/preference.py",
        ("loss_inputs", "loss_terms", "rewards", "token_share"),
        ("tests/losses/test_preference.py",),
    ),
    Target(
        "losses",
        "jdpo/losses/logprobs.py",
        ("token_logps", "token_log_sum_sq", "shifted_token_logps", "sequence_logps"),
        ("tests/losses/test_logprobs.py",),
    ),
    Target(
        "losses",
        "jdpo/losses/pair_logps.py",
        ("_token_scores", "pair_features", "_sums", "_reference_token_logps"),
        ("tests/losses/test_pair_losses.py",),
    ),
    Target(
        "losses",
        "jdpo/losses/pair_losses.py",
        ("pair_totals", "feature_losses", "next_loss_state", "weighted_sum"),
        ("tests/losses/test_pair_losses.py",),
    ),
    Target("losses", "jdpo/losses/dpo.py", ("_batch_loss", "_mean"), ("tests/losses/test_pair_losses.py",)),
    Target(
        "packing",
        "jdpo/losses/pair_logps.py",
        ("belongs", "completion_sums", "tail_weights"),
        ("tests/losses/test_packed_sums.py",),
    ),
    Target("packing", "jdpo/losses/pair_losses.py", ("packed_totals",), ("tests/losses/test_packed_sums.py",)),
    Target(
        "packing",
        "jdpo/data/batching/packing.py",
        ("pack", "_layout", "_slot_arrays", "_sequence_arrays", "_scored_arrays"),
        ("tests/data/batching/test_packing.py",),
    ),
    Target(
        "packing",
        "jdpo/data/batching/packing_plan.py",
        ("pair_sizes", "item_sizes", "plan_step", "_spread", "needed_shape", "plan_run"),
        ("tests/data/batching/test_packing_plan.py",),
    ),
    Target(
        "packing",
        "jdpo/data/batching/packing_shapes.py",
        ("choose_shapes", "_distinct", "_merged", "_cheapest"),
        ("tests/data/batching/test_packing_plan.py",),
    ),
    Target(
        "packing",
        "jdpo/models/packed_attention.py",
        ("packed_sequences", "num_readers", "_to_places_backward", "_to_slots_backward"),
        ("tests/models/test_packed_attention.py",),
    ),
    Target(
        "masks",
        "jdpo/models/attention/xla.py",
        ("dot_product_attention", "visible_keys", "right_padded_attention"),
        ("tests/models/attention/test_attention.py",),
    ),
    Target(
        "masks",
        "jdpo/data/batching/loader.py",
        ("collate_pairs", "collate_completions", "_weights", "bucket_length"),
        ("tests/data/batching/test_loader.py",),
    ),
    Target(
        "masks",
        "jdpo/losses/argument_checks.py",
        ("check_batch", "check_completions", "check_lengths"),
        ("tests/losses/test_argument_checks.py", "tests/losses/test_pair_losses.py"),
    ),
    Target(
        "boundaries",
        "jdpo/data/tokens/boundaries.py",
        ("_unusable", "_split_texts", "_with_bos", "_with_eos", "_split_encoded"),
        ("tests/data/tokens/test_tokenize.py",),
    ),
    Target(
        "boundaries",
        "jdpo/data/tokens/tokenize.py",
        ("_fit_pair", "_fit_completion", "_cut_prompt"),
        ("tests/data/tokens/test_tokenize.py",),
    ),
    Target(
        "boundaries",
        "jdpo/data/tokens/prompt_end.py",
        ("_merge_notes", "without_header", "_longest_suffix", "common_prefix", "_shared"),
        ("tests/data/tokens/test_prompt_end.py",),
    ),
    Target(
        "resume",
        "jdpo/data/batching/loader.py",
        ("num_steps_per_epoch", "plan", "RowPlan.step", "RowPlan._group"),
        ("tests/data/batching/test_loader.py",),
    ),
    Target(
        "resume",
        "jdpo/data/batching/mixing.py",
        ("_weighted", "apportion", "epoch_order", "_stream"),
        ("tests/data/batching/test_mixing.py",),
    ),
    Target(
        "resume",
        "jdpo/config/resuming.py",
        ("differences", "changed_keys", "_at", "_meaning", "_meaning_of_lora", "_meaning_of_dataset"),
        ("tests/test_config.py",),
    ),
    Target(
        "resume",
        "jdpo/checkpoint/steps.py",
        ("complete_steps", "fault_of", "digests_of", "settle_steps", "_refuse_foreign", "_is_cut_off", "best_of"),
        ("tests/checkpoint/test_manager.py",),
    ),
    Target(
        "resume",
        "jdpo/training/run_dir.py",
        tuple(f"RunDirectory.{name}" for name in ("_check_owner", "_never_began", "_is_lost", "_check_inputs")),
        ("tests/training/test_run_dir.py",),
    ),
)

EQUIVALENT: dict[tuple[str, str], str] = {}
"""(function, changed lines) -> why no test can tell the mutant from the original."""


class Job(NamedTuple):
    """A mutant with what should find it."""

    target: Target
    mutant: Mutant

    @property
    def tests(self) -> tuple[str, ...]:
        """What pytest is given: the doctests of the module come first, as they are fast."""
        return (self.target.module, *self.target.tests)


class Outcome(NamedTuple):
    """How a mutant fared: "killed", "timed out" (killed too), "survived" or "equivalent"."""

    job: Job
    verdict: str
    seconds: float


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

    def test(self, tests: Sequence[str], timeout: float | None) -> tuple[str, str, float]:
        """Runs tests until the first that fails.

        Returns:
          "passed", "failed" or "timed out"; what pytest printed; seconds.

        Raises:
          RuntimeError: pytest could not run them.
        """
        command = [sys.executable, "-m", "pytest", "-x", "-q", *tests]
        start = time.monotonic()
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                return "timed out", output, time.monotonic() - start
        seconds = time.monotonic() - start
        if process.returncode in (3, 4, 5):  # pytest's own errors, and no tests
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
        return "failed" if process.returncode else "passed", output, seconds

    def test_mutant(self, job: Job, timeout: float) -> Outcome:
        """Tests a mutant and restores the original."""
        path = self.folder / job.target.module
        original = path.read_text(encoding="utf-8")
        path.write_text(job.mutant.source, encoding="utf-8")
        try:
            result, _, seconds = self.test(job.tests, timeout)
        finally:
            path.write_text(original, encoding="utf-8")
        return Outcome(job, {"failed": "killed", "passed": "survived"}.get(result, result), seconds)


def jobs_of(targets: Iterable[Target], *, per_function: int, seed: int, only: Sequence[str] = ()) -> list[Job]:
    """Draws the mutants of each function.

    Args:
      only: names of functions; empty: all.
    """
    jobs = []
    for target in targets:
        source = (ROOT / target.module).read_text(encoding="utf-8")
        for function in target.functions:
            if not only or function in only:
                drawn = sample(mutants_of(source, function), per_function, seed)
                jobs.extend(Job(target, mutant) for mutant in drawn)
    return jobs


def run(
    jobs: Sequence[Job], *, num_workers: int, timeout: float, on_outcome: Callable[[Outcome], None]
) -> list[Outcome]:
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
            if _reason(job) is not None:
                return Outcome(job, "equivalent", 0.0)
            workspace = free.get()
            try:
                found = workspace.test_mutant(job, timeout)
            finally:
                free.put(workspace)
            on_outcome(found)
            return found

        with ThreadPoolExecutor(num_workers) as pool:
            return list(pool.map(outcome, jobs))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _reason(job: Job) -> str | None:
    return EQUIVALENT.get((job.mutant.function, job.mutant.after))


def diff(job: Job) -> str:
    """Shows a mutant as a diff of the lines that it changes."""
    mutant = job.mutant
    lines = [f"- {line}" for line in mutant.before.splitlines()] + [f"+ {line}" for line in mutant.after.splitlines()]
    return "\n".join([f"# {job.target.module}: {mutant.function} ({mutant.operator})", *lines])


def _show(outcome: Outcome) -> None:
    print(f"{outcome.seconds:6.1f} s  {outcome.verdict:<9} {outcome.job.mutant.function}", flush=True)
    if outcome.verdict == "survived":
        print(diff(outcome.job), flush=True)


def report(outcomes: Sequence[Outcome], *, seed: int, per_function: int, timeout: float, command: str) -> str:
    """Renders the figures and the survivors as Markdown."""
    areas = dict.fromkeys(outcome.job.target.area for outcome in outcomes)
    verdicts = ("killed", "timed out", "survived", "equivalent")
    rows = [(area, [outcome for outcome in outcomes if outcome.job.target.area == area]) for area in areas]
    rows.append(("all", list(outcomes)))
    tested = [outcome.seconds for outcome in outcomes if outcome.verdict != "equivalent"]
    survivors = [outcome.job for outcome in outcomes if outcome.verdict == "survived"]
    equivalent = [outcome.job for outcome in outcomes if outcome.verdict == "equivalent"]
    return "\n".join(
        [
            "# Mutants",
            "",
            f"`{command}`, {datetime.date.today()}, {machine_line(('jax', 'pytest'))}.",
            "",
            f"Seed {seed}, at most {per_function} mutants per function, {len(outcomes)} in all; "
            f"{sum(tested) / max(len(tested), 1):.0f} s per mutant. "
            f"A mutant whose tests take more than {timeout:.0f} s has timed out and counts as killed.",
            "",
            "| area | functions | mutants | " + " | ".join(verdicts) + " |",
            "|---|" + "---:|" * (2 + len(verdicts)),
            *(_row(area, of_area, verdicts) for area, of_area in rows),
            "",
            "## Survivors",
            "",
            *([f"```diff\n{diff(job)}\n```\n" for job in survivors] or ["None.\n"]),
            "## Equivalent mutants",
            "",
            "They change nothing that can be observed.",
            "",
            *(f"```diff\n{diff(job)}\n```\n\n{_reason(job)}\n" for job in equivalent),
        ]
    )


def _row(area: str, outcomes: Sequence[Outcome], verdicts: Sequence[str]) -> str:
    functions = {(outcome.job.target.module, outcome.job.mutant.function) for outcome in outcomes}
    counts = (sum(outcome.verdict == verdict for outcome in outcomes) for verdict in verdicts)
    return f"| {' | '.join(map(str, (area, len(functions), len(outcomes), *counts)))} |"


def main(words: Sequence[str] | None = None) -> int:
    """Returns 0 if no mutant survived."""
    areas = [*dict.fromkeys(target.area for target in TARGETS)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--areas", nargs="+", choices=areas, default=areas, help="only these areas")
    parser.add_argument("--only", nargs="+", default=[], metavar="FUNCTION", help="only these functions")
    parser.add_argument("--per-function", type=int, default=PER_FUNCTION, help="mutants per function (default: 1)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"which mutants are drawn (default: {SEED})")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at once (default: 1)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds per mutant (default: 300)")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--report", type=Path, help=f"where the result goes, such as {REPORT.relative_to(ROOT)}")
    options = parser.parse_args(words)
    jobs = jobs_of(
        [target for target in TARGETS if target.area in options.areas],
        per_function=options.per_function,
        seed=options.seed,
        only=options.only,
    )
    if options.list:
        print("\n\n".join(map(diff, jobs)))
        print(f"\n{len(jobs)} mutants")
        return 0
    outcomes = run(
        jobs,
        num_workers=options.jobs,
        timeout=options.timeout,
        on_outcome=_show,
    )
    command = " ".join(["python benchmarks/mutants.py", *(sys.argv[1:] if words is None else words)])
    text = report(
        outcomes, seed=options.seed, per_function=options.per_function, timeout=options.timeout, command=command
    )
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")
    print(text)
    return int(any(outcome.verdict == "survived" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
