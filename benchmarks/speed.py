"""Claim: jdpo does the same training several times faster, and in less memory, than TRL and Tunix.

    python benchmarks/speed.py [--cases long hh long-4096 hh-4096] [--trl-python PATH] [--tunix-python PATH]
    python benchmarks/speed.py --gpu 1.5b | 8b                       on one NVIDIA GPU, in bfloat16
    python benchmarks/speed.py --tiny [--gpu 8b] [--trainers jdpo]   the same way at toy sizes, to see that it works

All inputs are generated: random weights of the true shape, and rows of random words with the lengths of a
committed table (lengths/, made by make_lengths.py). Every arm runs in a process of its own, in turns, in rounds.

jdpo gets the whole table: warm-up, filler, the measured steps, the rest. Its shapes are planned for all of that; the
filler is there because it compiles or loads programs in the background of its first steps; it is stopped after the
measured steps. TRL and Tunix get the same warm-up and measured rows in the same order. Medians, quartiles and ratios
are over these steps of all rounds. A run before the rounds compiles jdpo's programs. On a GPU TRL goes twice through
the measured rows, and the second time counts. At V = 4096 there is one round, live reference only; Tunix takes part in
`long` alone, in one round.

TRL runs with live and precomputed reference, each with the attention that is fastest in a trial (on a GPU also Liger
and the micro-batch), the whole step at once and no gradient checkpointing on the CPU: these are what the bars are for.
In the same round: one pair at a time, which pads nothing but the pair, and with gradient checkpointing.

The gate: tokens are compared one by one; the first step's loss and log-probs of all arms, and those of all steps of TRL
and of a jdpo run on TRL's own file, must be equal to 1e-3 (in bfloat16 1e-2, and after the first step the loss to
3e-2). The exit status is 1 if the gate fails or a bar is missed or not measured: 4 times TRL
and 3 times Tunix on long pairs, 6 times TRL on HH, half of TRL's peak memory, checkpointing included, at most 10 % of
padding; each at the 22 M shape with V = 32000, cached against precomputed, live against live. TRL and Tunix may live in
other environments than jdpo; one that cannot be imported, or an arm that fails, is left out, which is noted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from machine import ROOT, machine_line
from speed_arms import GATE, LEARNING_RATE, MAIN, WARMUP, Arm, Folder, TrlWay
from speed_cases import CPU_CASES, GPU_CASES, Case, toy
from speed_choice import choose_arms, num_passes, wanted_trainers
from speed_data import (
    Selection,
    fitted,
    padding,
    read_lengths,
    select,
    synthesize,
    typical_padding,
    write_ids,
    write_rows,
)
from speed_model import write_model
from speed_padding import memory_choice, padding_of
from speed_report import render_case
from speed_run import ArmFailed, prepare_arm, run_arm
from speed_verdicts import Result
from trl_parity import compare_tokens, tokenized_rows

PATH_FLAGS = ("--trl-python", "--tunix-python", "--work", "--report")


def main() -> None:
    """Runs the cases and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CPU_CASES, default=list(CPU_CASES), help="on the CPU")
    parser.add_argument("--gpu", nargs="+", choices=GPU_CASES, help="these instead, on one NVIDIA GPU")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU, no bars")
    parser.add_argument("--trainers", nargs="+", choices=("jdpo", "trl", "tunix"), default=["jdpo", "trl", "tunix"])
    parser.add_argument("--rounds", type=int, default=2, help="times that every arm runs")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per round, after the warm-up")
    parser.add_argument("--filler", type=int, default=6, help="steps of jdpo between the warm-up and those measured")
    parser.add_argument("--trl-python", default=sys.executable, help="python that has trl")
    parser.add_argument("--tunix-python", default=sys.executable, help="python that has google-tunix")
    parser.add_argument("--jdpo", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of jdpo")
    parser.add_argument("--work", type=Path, help="new folder that keeps all that the arms leave")
    parser.add_argument("--report", type=Path, help="default: benchmarks/results/DATE-speed.md")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no arm keeps running
    report = arguments.report or ROOT / "benchmarks/results" / f"{date.today()}-speed.md"
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        if work.exists() and any(work.iterdir()):
            raise SystemExit(f"--work {work} is not empty; name a new folder, so that no old figures are read")
        passed = run_cases(arguments, work, report)
    raise SystemExit(0 if passed else 1)


def run_cases(arguments: argparse.Namespace, work: Path, report: Path) -> bool:
    """Runs every case, and rewrites the report after each."""
    cases = [GPU_CASES[name] for name in arguments.gpu] if arguments.gpu else [CPU_CASES[n] for n in arguments.cases]
    if arguments.tiny:
        cases = [toy(case) for case in cases]
    lines, passed = head(arguments), True
    ways: dict[Any, TrlWay] = {}
    for index, case in enumerate(cases):
        found, reached = run_case(arguments, case, Folder(work / str(index)), ways)
        lines, passed = lines + found, passed and reached
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("\n".join(lines), encoding="utf-8")
        print("\n".join(found), flush=True)
    print(f"report: {report}")
    return passed


def head(arguments: argparse.Namespace) -> list[str]:
    return [
        f"# Speed, {date.today()}",
        "",
        f"{machine_line()}. At most {arguments.rounds} round(s), each of {WARMUP} step of warm-up and "
        f"{arguments.steps} measured; jdpo has {arguments.filler} steps between.",
        "",
        f"    python benchmarks/speed.py {shlex.join(without_paths(sys.argv[1:]))}",
        "",
    ]


def without_paths(words: Sequence[str]) -> list[str]:
    """Returns a command line without the flags that name local paths.

    >>> without_paths(["--cases", "hh", "--work", "/x", "--rounds", "1", "--report=/y.md"])
    ['--cases', 'hh', '--rounds', '1']
    """
    kept: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word in PATH_FLAGS:
            words.pop(0)
        elif word.partition("=")[0] not in PATH_FLAGS:
            kept.append(word)
    return kept


def run_case(
    arguments: argparse.Namespace, case: Case, folder: Folder, ways: dict[Any, TrlWay]
) -> tuple[list[str], bool]:
    """Runs one case, from its weights to its part of the report."""
    case = dataclasses.replace(case, jdpo=(*case.jdpo, *arguments.jdpo))
    selection = make_inputs(arguments, case, folder)
    filler = selection.num_filler // case.batch
    plan = choose_arms(arguments, case, folder, filler=filler, ways=ways)
    results = measure(plan.arms, case, folder, min(arguments.rounds, case.rounds), plan.notes)
    share, facts = None, [*about_rows(case, selection), *plan.trials]
    live = results.get(f"jdpo live {MAIN}")
    if live is not None:
        out = out_of(folder, live.arm) / "round0"
        share = padding_of(live, out, selection, batch=case.batch, max_length=case.max_length)
    facts += [*settings(case, results, folder), *about_arms(results)]
    wanted = wanted_trainers(arguments, case)
    return render_case(case, results, facts=facts, notes=plan.notes, wanted=wanted, padding=share)


def make_inputs(arguments: argparse.Namespace, case: Case, folder: Folder) -> Selection:
    """Writes the model, the rows of both files and their ids, and compares the ids with jdpo's tokens.

    Raises:
      ValueError: jdpo tokenizes other rows than were meant.
    """
    selection = select(
        read_lengths(case.table),
        batch=case.batch,
        max_length=case.max_length,
        warmup=WARMUP,
        filler=arguments.filler,
        steps=arguments.steps,
    )
    write_model(case.shape, folder.model)
    rows = synthesize(selection.lengths, case.shape.vocab_size)
    compared = [rows[index] for index in selection.compared]
    write_rows(rows, folder.rows)
    write_rows(compared, folder.compared_rows)
    write_ids(rows, case.max_length, folder.root / "ids.jsonl")
    write_ids(compared, case.max_length, folder.compared_ids)
    cache = folder.root / "check"
    compare_tokens(folder.root / "ids.jsonl", tokenized_rows(folder.rows, folder.model, cache, case.max_length))
    return selection


def measure(arms: Sequence[Arm], case: Case, folder: Folder, rounds: int, notes: list[str]) -> dict[str, Result]:
    """Runs all arms in turns; an arm that fails at any time is left out and noted."""
    results = {arm.key: Result(arm, [], [], []) for arm in arms}

    def attempt(key: str, number: int | None) -> None:
        arm, runs, cold, before = results[key]
        out = out_of(folder, arm)
        try:
            if number is not None:
                runs.append(run_arm(arm, out / f"round{number}", device=case.device))
                if arm.trainer == "trl":
                    passes = num_passes(case.device)
                    check_trl_tokens(out / f"round{number}/tokens.jsonl", folder.compared_ids, case.batch, passes)
                return
            if arm.before:
                before.append(prepare_arm(arm, out / "before", device=case.device))
            if arm.cold:
                cold.append(run_arm(arm, out / "cold", device=case.device))
        except ArmFailed as failed:
            print(failed, file=sys.stderr, flush=True)
            notes.append(f"{arm.name}: {failed.last}")
            del results[key]

    for number in (None, *range(rounds)):
        for key in list(results):
            if (number or 0) < results[key].arm.rounds:
                attempt(key, number)
    return results


def out_of(folder: Folder, arm: Arm) -> Path:
    return folder.root / arm.key.replace(" ", "-")


def check_trl_tokens(found: Path, expected: Path, batch: int, passes: int) -> None:
    """Compares the tokens of every row from TRL's collator with the intended ones.

    Raises:
      ValueError: a row is missing, too much, or another.
    """
    ours = expected.read_text(encoding="utf-8").splitlines()
    ours = ours[: WARMUP * batch] + ours[WARMUP * batch :] * passes
    theirs = found.read_text(encoding="utf-8").splitlines()
    for number, (line, wanted) in enumerate(itertools.zip_longest(theirs, ours)):
        if line != wanted:
            raise ValueError(
                f"row {number}: expected {len(ours)} rows, found {len(theirs)}, and other tokens from TRL's collator "
                f"than from jdpo's tokenizer; see {found}"
            )


# --- the text around the figures


def about_rows(case: Case, selection: Selection) -> Iterator[str]:
    """Describes the training rows, and whether the measured steps represent the table."""
    cut = fitted(selection.lengths, case.max_length)
    measured = cut[selection.measured]
    repeated = (2 * measured[:, 0] + measured[:, 1:].sum(1)).sum() / measured.sum()
    usual, shape = typical_padding(cut, case.batch), case.shape
    yield (
        f"Llama, {(shape.backbone + shape.head * (1 if shape.tied else 2)) / 1e6:.1f} M parameters: width "
        f"{shape.d_model}, {shape.num_layers} layers, {shape.num_heads} heads, {shape.num_kv_heads} key heads, "
        f"V = {shape.vocab_size}, {shape.dtype}; the head has {shape.head / (shape.backbone + shape.head):.0%} of the "
        f"arithmetic. {case.batch} pairs per step, max_length {case.max_length}."
    )
    yield (
        f"Measured steps: {measured.sum() / len(measured) * case.batch:.0f} tokens of prompt, chosen and rejected a "
        f"step ({cut.sum() / len(cut) * case.batch:.0f} over the {len(cut)} rows of the table). With prompts twice "
        f"they are {repeated:.2f} times as many, and padded to the longest of a step "
        f"{padding(measured, case.batch):.2f} times ({usual:.2f} in random steps of the whole table). "
        f"{selection.left_out} rows of the table whose prompt fills max_length are left out, as TRL and jdpo drop them."
    )


def settings(case: Case, results: Mapping[str, Result], folder: Folder) -> Iterator[str]:
    """Describes the common settings of all arms, and how each saves memory."""
    chosen = [
        f"{result.arm.name}: {memory_choice(out_of(folder, result.arm) / 'round0')}, by its own choice"
        for result in results.values()
        if result.arm.trainer == "jdpo" and result.arm.role != GATE
    ]
    further = [f"jdpo was also told {' '.join(case.jdpo)}"] if case.jdpo else []
    yield (
        f"All: AdamW at a constant {LEARNING_RATE:g}, no weight decay, clipping at 1. "
        f"TRL: {'adamw_torch_fused' if case.device == 'gpu' else 'adamw_torch'}, gradient_checkpointing=False but "
        f"where an arm is named for it{', bf16=True' if case.device == 'gpu' else ''}. "
        f"{'. '.join([*chosen, *further]) or 'No jdpo'}."
    )


def about_arms(results: Mapping[str, Result]) -> Iterator[str]:
    """Describes the other trainers' versions, TRL's setup time, and the time of `jdpo reference`."""
    for result in results.values():
        for before in result.before:
            yield f"`jdpo reference`, all rows: {before.seconds:.1f} s, peak {before.peak_rss / 2**20:.0f} MiB."
        about = result.runs[0].about
        if about:
            listed = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
            threads = f", {about['threads']} threads" if "threads" in about else ""
            setup = [run.about["setup_seconds"] for run in result.runs if "setup_seconds" in run.about]
            more = f", set up in {statistics.median(setup):.1f} s" if setup else ""
            yield f"{result.arm.name}: {listed}{threads}{more}."


if __name__ == "__main__":
    main()
