"""Claim: jdpo generates at least twice as many tokens per second as transformers' generate on the same CPU.

    python benchmarks/generation.py [--torch_python PATH] [--rounds 3] [--cells NAME ...] [--report FILE]
    python benchmarks/generation.py --tiny [--alone]

Random weights of a Llama of 21.7 million parameters in float32, written once, read by both. The two take turns, one
round before the first is not counted (it compiles), and medians of the rounds are compared. Both use as many threads as
there are cores, or `--threads`; transformers is in a process of its own, which waits while jdpo works. Prompts have 64
tokens. Where other processes use the cores, torch's threads wait for each other many times longer than jdpo's; then
`--threads 1` is fairer, and the ratio of CPU seconds means more than that of seconds.

- Four cells: 16 prompts, 256 new tokens each and no stops, greedy and at temperature 1 with top_p 0.95, with 32,000
  and with 4,096 tokens in the vocabulary. Bar: 2. Greedy tokens of the two are compared.
- "samples": 8 answers to each of 32 prompts, at temperature 1 with top_p 0.95, of at most 256 tokens. One in a hundred
  tokens of the vocabulary ends an answer, so that both sides stop after lengths of the same distribution: geometric,
  about 70 tokens in the median, from a few to 256. Only tokens of answers count. transformers gets the 32 prompts
  at once with num_return_sequences=8, or fewer prompts at a time if that is faster in a trial. Bar: 3.

The exit code is 1 if a ratio is below its bar. `--alone` measures jdpo only, where there is no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from machine import machine_line
from speed_model import LLAMA_22M, ModelShape, tiny, write_model

from jdpo.generation.engine import Engine
from jdpo.generation.values import Sampling
from jdpo.models.families import read_model_config
from jdpo.models.transformer import Transformer
from jdpo.models.weights.loading import load_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One comparison."""

    vocab_size: int
    num_prompts: int = 16
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 0.95
    stops: bool = False
    bar: float = 2.0


CELLS = {
    "greedy, V=32000": Cell(vocab_size=32000, temperature=0.0, top_p=1.0),
    "top_p, V=32000": Cell(vocab_size=32000),
    "greedy, V=4096": Cell(vocab_size=4096, temperature=0.0, top_p=1.0),
    "top_p, V=4096": Cell(vocab_size=4096),
    "samples": Cell(vocab_size=32000, num_prompts=32, num_samples=8, stops=True, bar=3.0),
}


class Size(NamedTuple):
    """The sizes that --tiny makes smaller."""

    shape: ModelShape
    prompt_tokens: int
    new_tokens: int


class Run(NamedTuple):
    """One side's answers to a cell, and the time they took."""

    seconds: float
    cpu_seconds: float
    answers: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all answers."""
        return sum(map(len, self.answers))


class Result(NamedTuple):
    """The counted runs of both sides in a cell; `theirs` is empty with --alone."""

    cell: Cell
    ours: list[Run]
    theirs: list[Run]
    prompts_per_batch: int


class Jdpo:
    """jdpo's side of a cell, ready to run."""

    def __init__(self, folder: Path, cell: Cell, size: Size) -> None:
        self.model = Transformer(read_model_config(folder))
        sampling = Sampling(temperature=cell.temperature, top_p=cell.top_p, max_new_tokens=size.new_tokens)
        params = load_params(folder, self.model)
        self.engine = Engine(self.model, params, end_token_ids=end_tokens(cell), sampling=sampling)
        self.sampling = sampling

    def run(self, prompts: list[list[int]], num_samples: int, seed: int) -> Run:
        engine = self.engine.with_sampling(dataclasses.replace(self.sampling, seed=seed))
        started, cpu_started = time.perf_counter(), time.process_time()
        answers = [drawn.tokens for drawn in engine.run(prompts, num_samples)]
        return Run(time.perf_counter() - started, time.process_time() - cpu_started, answers)


class Transformers:
    """The process of the other side."""

    def __init__(self, python: str, threads: int) -> None:
        script = str(Path(__file__).with_name("generation_transformers.py"))
        self.process = subprocess.Popen(
            [python, script, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about: str = self._read()

    def run(self, **request: Any) -> Run:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Run(**self._read())

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"transformers' process ended with {self.process.wait()}; its messages are above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def end_tokens(cell: Cell) -> list[int]:
    """Returns every hundredth token of a cell with stops: a draw is one of them about once in a hundred times."""
    return list(range(1, cell.vocab_size, 100)) if cell.stops else []


def make_prompts(cell: Cell, size: Size) -> list[list[int]]:
    """Returns random prompts of the same length."""
    shape = (cell.num_prompts, size.prompt_tokens)
    return np.random.default_rng(0).integers(3, cell.vocab_size, shape).tolist()


def measure(cell: Cell, size: Size, folder: Path, rounds: int, other: Transformers | None) -> Result:
    """Runs both sides of a cell in turns; the round before the first is not counted."""
    prompts, ours = make_prompts(cell, size), Jdpo(folder, cell, size)
    request = {
        "folder": str(folder),
        "prompts": prompts,
        "num_samples": cell.num_samples,
        "temperature": cell.temperature,
        "top_p": cell.top_p,
        "max_new_tokens": size.new_tokens,
        "end_token_ids": end_tokens(cell),
    }
    batch = cell.num_prompts
    if other is not None and cell.num_samples > 1:
        trials = {size: other.run(**request, prompts_per_batch=size, seed=0).seconds for size in (32, 8)}
        batch = min(trials, key=lambda size: trials[size])
    result = Result(cell, [], [], batch)
    for seed in range(rounds + 1):
        runs = [ours.run(prompts, cell.num_samples, seed)]
        if other is not None:
            runs.append(other.run(**request, prompts_per_batch=batch, seed=seed))
        if seed:
            for found, run in zip((result.ours, result.theirs), runs, strict=False):
                found.append(run)
        print(f"round {seed}:", ", ".join(f"{run.num_tokens / run.seconds:.0f} tokens/s" for run in runs), flush=True)
    return result


def report(results: dict[str, Result], size: Size, about: str | None) -> tuple[str, bool]:
    """Returns the table, and whether every ratio reaches its bar."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [f"{machine_line(('jax', 'flax'))}, {about or 'no transformers'}. Load average {load}."]
    lines += [f"Prompts of {size.prompt_tokens} tokens, at most {size.new_tokens} new ones."]
    lines += [
        "",
        "| cell | jdpo (tokens/s) | transformers (tokens/s) | ratio | of CPU seconds | bar | |",
        "|---|---|---|---|---|---|---|",
    ]
    notes, passed = [], True
    for name, result in results.items():
        ours, theirs = speeds(result.ours), speeds(result.theirs)
        ratio = median(ours) / median(theirs) if theirs else None
        of_cpu = median(cpu_speeds(result.ours)) / median(cpu_speeds(result.theirs)) if theirs else None
        reached = ratio is None or ratio >= result.cell.bar
        passed &= reached
        verdict = "not compared" if ratio is None else "reached" if reached else "**missed**"
        ratios = " | ".join("" if value is None else f"{value:.2f}" for value in (ratio, of_cpu))
        figures = f"{spread(ours)} | {spread(theirs)} | {ratios}"
        lines.append(f"| {name} | {figures} | {result.cell.bar:g} | {verdict} |")
        notes.append(f"- {name}: {described(result)}")
    return "\n".join([*lines, "", *notes]) + "\n", passed


def speeds(runs: Sequence[Run]) -> list[float]:
    """Returns tokens per second of each run."""
    return [run.num_tokens / run.seconds for run in runs]


def cpu_speeds(runs: Sequence[Run]) -> list[float]:
    """Returns tokens per second of CPU time of each run."""
    return [run.num_tokens / run.cpu_seconds for run in runs]


def spread(values: Sequence[float]) -> str:
    """Returns median and range; nothing for no values."""
    if not values:
        return ""
    middle, low, high = (
        f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (median(values), min(values), max(values))
    )
    return f"{middle} [{low}, {high}]"


def described(result: Result) -> str:
    """Returns the lengths of the answers, or how many greedy ones are the same on both sides."""
    if result.cell.temperature == 0 and result.theirs:
        pairs = list(zip(result.ours[-1].answers, result.theirs[-1].answers, strict=True))
        same = sum(ours == theirs for ours, theirs in pairs)
        return f"{same} of {len(pairs)} answers are equal, token for token"
    sides = []
    for side, runs in (("jdpo", result.ours), ("transformers", result.theirs)):
        if runs:
            lengths = [len(answer) for run in runs for answer in run.answers]
            low, middle, high = np.percentile(lengths, (5, 50, 95))
            sides.append(f"{side} {np.mean(lengths):.0f} in the mean, {low:.0f}, {middle:.0f} and {high:.0f}")
    batch = f"; transformers has {result.prompts_per_batch} prompts per batch" if result.cell.num_samples > 1 else ""
    return f"tokens per answer (5th, 50th and 95th percentile): {'; '.join(sides)}{batch}"


def main(words: Sequence[str] | None = None) -> int:
    """Measures all cells and prints the table; the exit code is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_python", default=sys.executable, help="Python that has torch and transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side; default: one per core")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--report", type=Path, help="the table as Markdown")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it works; bars mean nothing")
    parser.add_argument("--alone", action="store_true", help="measure jdpo only")
    arguments = parser.parse_args(words)
    cells = {name: CELLS[name] for name in arguments.cells}
    size = Size(LLAMA_22M, 64, 256)
    if arguments.tiny:
        size = Size(tiny(LLAMA_22M), 8, 12)
        cells = {
            name: dataclasses.replace(cell, vocab_size=cell.vocab_size // 64, bar=0) for name, cell in cells.items()
        }
    if arguments.threads < (os.cpu_count() or 1):
        # Before jax starts its threads, one for each core that it may use; the other process inherits it.
        os.sched_setaffinity(0, range(arguments.threads))
    other = None if arguments.alone else Transformers(arguments.torch_python, arguments.threads)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, cell in cells.items():
            folder = Path(scratch) / str(cell.vocab_size)
            if not folder.exists():
                write_model(dataclasses.replace(size.shape, vocab_size=cell.vocab_size), folder)
            print(name, flush=True)
            results[name] = measure(cell, size, folder, arguments.rounds, other)
    text, passed = report(results, size, other.about if other is not None else None)
    if other is not None:
        other.close()
    print(f"\n{text}", end="")
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
