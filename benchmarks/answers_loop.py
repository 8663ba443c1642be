"""The whole loop on the quickstart's model: generate, score, pair, dpo, compare, each by its own command.

    python benchmarks/answers_loop.py [--out runs/answers_loop] [--seeds 5]

The model has read a corpus with wrong answers: it says "Dublin" 60 % of the time. It is asked every question about the
capitals of 36 countries eight times; answers that equal the right one score 1, all others 0; a right and a wrong answer
to a question make a pair. Nothing else is taken from the corpus. Prints a report as Markdown, with the probabilities
of right answers before and after, and every fact that the model has forgotten. Exits with 1 unless P(Dublin) rose in
the 95 % interval over the seeds, and each loop took less than five minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import machine_line
from scipy import stats

from jdpo.quickstart.corpus import HELD_OUT_PHRASINGS, TRAINING_PHRASINGS, capital_question
from jdpo.quickstart.experiment import PRETRAIN, Workplace, configs, prepare
from jdpo.quickstart.experiment_settings import Settings
from jdpo.quickstart.probes import probed_facts

MOST_SECONDS = 300
STAGES = ("generate", "score", "pair", "dpo", "compare")
DUBLIN = ("What is the capital of Ireland?", "Dublin")


class Files(NamedTuple):
    """The model, prompts and facts that every loop starts from."""

    model: Path
    prompts: Path
    held_out: Path
    facts: Path


class Loop(NamedTuple):
    """The outcome of one loop.

    Attributes:
      seconds: of each stage.
      report: pairs.report.json.
      facts: [(group, question, answer, before, after)].
    """

    seconds: dict[str, float]
    report: dict[str, Any]
    facts: list[tuple[str, str, str, float, float]]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def fact_groups(settings: Settings) -> dict[str, list[tuple[str, str]]]:
    """Returns questions with their right answers: those the loop asks, those it does not, and other facts."""
    split = settings.split

    def capitals(countries: Sequence[Any], phrasings: Sequence[str]) -> list[tuple[str, str]]:
        return [
            (capital_question(country, phrasing), country.capital) for country in countries for phrasing in phrasings
        ]

    return {
        "capitals that were asked": capitals(split.trained, TRAINING_PHRASINGS),
        "the same, in phrasings that were not": capitals(split.trained, HELD_OUT_PHRASINGS),
        "capitals that were not asked": capitals(split.held_out, TRAINING_PHRASINGS),
        "other facts": [(fact.question, fact.answer) for fact in probed_facts(split)],
    }


def make_start(out: Path, settings: Settings) -> Files:
    """Trains the quickstart's first model, and writes the questions and the facts."""
    from jdpo.training.run import train

    place = Workplace(out / "start")
    prepare(place, settings)
    assert train(configs(place, settings)[PRETRAIN]).exit_code == 0
    groups = fact_groups(settings)

    def prompts(group: str) -> list[dict[str, Any]]:
        return [{"prompt": [{"role": "user", "content": asked}], "answer": right} for asked, right in groups[group]]

    facts = [{"question": asked, "answer": right} for group in groups.values() for asked, right in group]
    return Files(
        place.model(PRETRAIN),
        write_rows(out / "prompts.jsonl", prompts("capitals that were asked")),
        write_rows(out / "held_out.jsonl", prompts("capitals that were not asked")),
        write_rows(out / "facts.jsonl", facts),
    )


def commands(files: Files, place: Path, settings: Settings, seed: int) -> dict[str, list[str]]:
    """Returns the command line of each stage."""
    gen, pairs, run = place / "gen", place / "pairs.jsonl", place / "run"
    sampling = ["--max_new_tokens=8", f"--seed={seed}"]
    asked = [f"--prompts={files.prompts}", "--n=8", *sampling]
    return {
        "generate": ["generate", str(files.model), *asked, f"--output_dir={gen}"],
        "score": ["score", str(gen), "--by=exact:answer", "--name=right"],
        "pair": ["pair", str(gen), "--score=right", "--strategy=best_random", f"--seed={seed}", f"--output={pairs}"],
        "dpo": [
            "dpo",
            f"model_name_or_path={files.model}",
            f"datasets={pairs}",
            f"output_dir={run}",
            f"cache_dir={place / 'cache'}",
            "max_length=64",
            "compute_dtype=float32",
            "remat=none",
            f"max_steps={settings.steps}",
            f"global_batch_size={settings.batch_size}",
            f"learning_rate={settings.learning_rate}",
            f"beta={settings.beta}",
            f"seed={seed}",
        ],
        "compare": [
            "compare",
            str(files.model),
            str(run / "model"),
            f"--prompts={files.held_out}",
            f"--facts={files.facts}",
            *sampling,
            f"--output_dir={place / 'cmp'}",
        ],
    }  # fmt: skip


def run_loop(files: Files, place: Path, settings: Settings, seed: int) -> Loop:
    """Runs the five commands, each in a process of its own, as a person would."""
    place.mkdir(parents=True, exist_ok=True)
    seconds = {}
    for stage, words in commands(files, place, settings, seed).items():
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "jdpo.cli.main", *words], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )
        seconds[stage] = time.perf_counter() - started
    found = json.loads((place / "cmp" / "compare.json").read_text(encoding="utf-8"))["comparisons"][0]["facts"]
    probability = {(fact["question"], fact["answer"]): (fact["before"], fact["after"]) for fact in found}
    facts = [(group, *fact, *probability[fact]) for group, listed in fact_groups(settings).items() for fact in listed]
    report = json.loads((place / "pairs.report.json").read_text(encoding="utf-8"))
    return Loop(seconds, report, facts)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns mean and 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def dublin(loop: Loop) -> tuple[float, float]:
    """Returns P(Dublin) before and after."""
    return next((before, after) for _, asked, right, before, after in loop.facts if (asked, right) == DUBLIN)


def render(loops: Sequence[Loop]) -> str:
    """Returns the report as Markdown."""
    before = dublin(loops[0])[0]
    after = [dublin(loop)[1] for loop in loops]
    mean, low, high = interval(after)
    lines = [
        "# generate, score, pair, dpo and compare on the quickstart's model",
        "",
        f"Machine: {machine_line()}.",
        f"{len(loops)} loops that differ in their seed, from the same model.",
        "",
        f'P(Dublin) to "{DUBLIN[0]}": {before:.3f} before; after, {mean:.3f} (95 % interval over the seeds {low:.3f} '
        f"to {min(high, 1):.3f}; by seed {', '.join(f'{value:.3f}' for value in after)}).",
        "",
        "| mean probability of the right answer | questions | before | after | fell by more than 0.05 |",
        "|---|---|---|---|---|",
    ]
    for group in dict.fromkeys(fact[0] for fact in loops[0].facts):
        rows = [[fact for fact in loop.facts if fact[0] == group] for loop in loops]
        means = interval([statistics.fmean(fact[4] for fact in facts) for facts in rows])
        fell = [sum(fact[3] - fact[4] > 0.05 for fact in facts) for facts in rows]
        lines.append(
            f"| {group} | {len(rows[0])} | {statistics.fmean(fact[3] for fact in rows[0]):.3f} | {means[0]:.3f} "
            f"({means[1]:.3f} to {min(means[2], 1):.3f}) | {min(fell)} to {max(fell)} |"
        )
    lines += ["", *_fallen(loops), "", *_seconds(loops)]
    return "\n".join(lines)


def _fallen(loops: Sequence[Loop]) -> list[str]:
    """Returns the facts that fell most, of all groups, by their mean over the seeds."""
    falls = []
    for place, (group, asked, right, before, _) in enumerate(loops[0].facts):
        after = statistics.fmean(loop.facts[place][4] for loop in loops)
        falls.append((after - before, f"| {asked} | {right} | {group} | {before:.3f} | {after:.3f} |"))
    worst = [line for fall, line in sorted(falls) if fall < -0.05]
    head = f"Facts whose right answer lost more than 0.05 on average: {len(worst)} of {len(falls)}"
    if not worst:
        return [f"{head}."]
    shown = worst[:10]
    return [
        f"{head}; the {len(shown)} that lost most:",
        "",
        "| question | answer | group | before | after |",
        "|---|---|---|---|---|",
        *shown,
    ]


def _seconds(loops: Sequence[Loop]) -> list[str]:
    totals = [sum(loop.seconds.values()) for loop in loops]
    stages = ", ".join(f"{stage} {statistics.median(loop.seconds[stage] for loop in loops):.0f}" for stage in STAGES)
    kept, answers = loops[0].report["pairs"]["kept"], loops[0].report["answers"]
    return [
        f"Seconds of a loop: {min(totals):.0f} to {max(totals):.0f} (median per stage: {stages}), with a load average "
        f"of {os.getloadavg()[2]:.1f} in the last 15 minutes. The first seed's {answers['read']:,} answers gave {kept} "
        "pairs."
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/answers_loop"))
    parser.add_argument("--seeds", type=int, default=5, help="2 or more (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="Go the whole way with a model that has learnt little.")
    asked = parser.parse_args()
    settings = Settings(countries=6, hidden_size=64, pretrain_steps=40, steps=4) if asked.tiny else Settings()
    files = make_start(asked.out, settings)
    loops = [run_loop(files, asked.out / f"seed-{seed}", settings, seed) for seed in range(asked.seeds)]
    print(render(loops))
    before, (_, low, _) = dublin(loops[0])[0], interval([dublin(loop)[1] for loop in loops])
    slowest = max(sum(loop.seconds.values()) for loop in loops)
    print(f"\nP(Dublin) rose: {low > before}; slowest loop {slowest:.0f} s, limit {MOST_SECONDS} s")
    return 0 if low > before and slowest < MOST_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
