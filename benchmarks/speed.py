"""Claim: jdpo does the same training several times faster, and in less memory, than TRL and Tunix.

    python benchmarks/speed.py [--cases long hh long-4096 hh-4096] [--trl-python PATH] [--tunix-python PATH]
    python benchmarks/speed.py --gpu 1.5b | 8b                       on one NVIDIA GPU, in bfloat16
    python benchmarks/speed.py --tiny [--gpu 8b] [--trainers jdpo]   the same way at toy sizes, to see that it works

Everything is made on the spot: random weights of the true shape, and rows of random words with the lengths of a
committed table (lengths/, made by make_lengths.py). All arms get the same folder and the same rows in the same order,
and run in turns, each in a process of its own: rounds of jdpo with live and cached reference, TRL with live and
precomputed reference (each with the attention that proved fastest in a trial), Tunix (in the first round). The first
step is the warm-up; medians, quartiles and ratios are over the same further steps of all rounds; jdpo, which still
compiles or loads programs in the background of its first steps, is measured on its second pass over them. At V = 4096
there is one round and no Tunix.

The gate: what both tokenize is held together token for token, and the first step's loss and log-probs must be equal to
1e-3. The exit status is 1 where the gate fails or a bar is missed: 4 times TRL and 3 times Tunix on long pairs, 6 times
TRL on HH, half of TRL's peak memory; each at the 22 M shape with V = 32000, cached against precomputed, live against
live. TRL and Tunix may live in other environments than jdpo; one that cannot be imported is left out, which is noted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from speed_arms import ROOT, Arm, ArmRun, Folder, jdpo_arm, missing, prepare_arm, run_arm, trl_arm, tunix_arm
from speed_cases import CPU_CASES, GPU_CASES, Case, toy
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
from speed_report import Result, render_case
from trl_parity import compare_tokens, tokenized_rows

from jdpo import __version__

WARMUP = 1
PATH_FLAGS = ("--trl-python", "--tunix-python", "--work", "--report")


def main() -> None:
    """Run the cases and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CPU_CASES, default=list(CPU_CASES), help="on the CPU")
    parser.add_argument("--gpu", nargs="+", choices=GPU_CASES, help="these instead, on one NVIDIA GPU")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU, no bars")
    parser.add_argument("--trainers", nargs="+", choices=("jdpo", "trl", "tunix"), default=["jdpo", "trl", "tunix"])
    parser.add_argument("--rounds", type=int, default=2, help="times that every arm runs")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a round, behind the warm-up")
    parser.add_argument(
        "--epoch", type=int, default=12, help="steps of jdpo's cold run, for which its shapes are planned"
    )
    parser.add_argument("--trl-python", default=sys.executable, help="python that has trl")
    parser.add_argument("--tunix-python", default=sys.executable, help="python that has google-tunix")
    parser.add_argument("--jdpo", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of jdpo")
    parser.add_argument("--work", type=Path, help="new folder that keeps all that the arms leave")
    parser.add_argument("--report", type=Path, help="default: benchmarks/results/DATE-speed.md")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no arm is left running
    report = arguments.report or ROOT / "benchmarks/results" / f"{date.today()}-speed.md"
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        if work.exists() and any(work.iterdir()):
            raise SystemExit(f"--work {work} is not empty; name a new folder, so that no old figures are read")
        passed = run_cases(arguments, work, report)
    raise SystemExit(0 if passed else 1)


def run_cases(arguments: argparse.Namespace, work: Path, report: Path) -> bool:
    """Runs every case, and writes the report anew after each."""
    cases = [GPU_CASES[name] for name in arguments.gpu] if arguments.gpu else [CPU_CASES[n] for n in arguments.cases]
    if arguments.tiny:
        cases = [toy(case) for case in cases]
    lines, passed = machine(arguments), True
    for index, case in enumerate(cases):
        found, reached = run_case(arguments, case, Folder(work / str(index)))
        lines, passed = lines + found, passed and reached
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("\n".join(lines), encoding="utf-8")
        print("\n".join(found), flush=True)
    print(f"report: {report}")
    return passed


def machine(arguments: argparse.Namespace) -> list[str]:
    """The head of the report."""
    processor = next(
        (line.split(":", 1)[1].strip() for line in cpu_lines() if line.startswith("model name")), platform.machine()
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    return [
        f"# Speed, {date.today()}",
        "",
        f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, jdpo {__version__}, {packages}. "
        f"At most {arguments.rounds} round(s), each of {WARMUP} step of warm-up and {arguments.steps} measured.",
        "",
        f"    python benchmarks/speed.py {shlex.join(without_paths(sys.argv[1:]))}",
        "",
    ]


def without_paths(words: Sequence[str]) -> list[str]:
    """A command line without the flags that say where things lie, which is nobody else's business.

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


def cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def run_case(arguments: argparse.Namespace, case: Case, folder: Folder) -> tuple[list[str], bool]:
    """One case from its weights to its part of the report."""
    case = dataclasses.replace(case, jdpo=(*case.jdpo, *arguments.jdpo))
    steps = WARMUP + arguments.steps
    selection = select(
        read_lengths(case.table),
        batch=case.batch,
        max_length=case.max_length,
        warmup=WARMUP,
        steps=arguments.steps,
        epoch=max(arguments.epoch, steps),
    )
    write_model(case.shape, folder.model)
    rows = synthesize(selection.lengths, case.shape.vocab_size)
    write_rows(rows, folder.rows)
    write_ids(rows, case.max_length, folder.ids)
    compare_tokens(folder.ids, tokenized_rows(folder.rows, folder.model, folder.root / "check", case.max_length))
    epoch = len(rows) // case.batch
    arms, notes, trials = choose_arms(arguments, case, folder, steps, epoch)
    results = {f"{arm.trainer} {arm.reference}": Result(arm, [], []) for arm in arms}
    outs = {key: folder.root / key.replace(" ", "-") for key in results}
    for key, (arm, _, cold) in results.items():
        if arm.before:
            seconds = prepare_arm(arm, outs[key] / "before", device=case.device)
            trials.append(f"`jdpo reference` took {seconds:.1f} s for the {len(rows)} rows of its epoch.")
        if arm.cold_steps:
            cold.append(
                said(arm, run_arm(arm, outs[key] / "cold", steps=arm.cold_steps, device=case.device, cold=True))
            )
    for number in range(min(arguments.rounds, case.rounds)):
        for key, (arm, runs, _) in results.items():
            if number >= arm.rounds:
                continue
            out = outs[key] / f"round{number}"
            runs.append(said(arm, run_arm(arm, out, steps=steps, device=case.device)))
            if arm.trainer == "trl":
                check_trl_tokens(out / "tokens.jsonl", folder.ids)
    facts = [*about_rows(case, selection, steps), *trials, *versions(results), ""]
    return render_case(case, results, WARMUP, facts, notes)


def choose_arms(
    arguments: argparse.Namespace, case: Case, folder: Folder, steps: int, epoch: int
) -> tuple[list[Arm], list[str], list[str]]:
    """The arms that can run, notes on those that cannot, and a line on TRL's trial."""
    wanted, notes, trials = [name for name in case.trainers if name in arguments.trainers], [], []
    arms: dict[str, list[Arm]] = {"live": [], "cached": []}
    for reference in arms:
        arms[reference].append(jdpo_arm(sys.executable, case, folder, reference, epoch=epoch))
    if "trl" in wanted:
        why = missing(arguments.trl_python, ("trl", "torch"))
        if why is None:
            attention, liger, line, left_out = fastest_attention(arguments, case, folder)
            trials.append(line)
            notes += left_out
            for reference, of_reference in arms.items():
                of_reference.append(
                    trl_arm(arguments.trl_python, case, folder, reference, attention, steps=steps, liger=liger)
                )
        else:
            notes.append(f"TRL: {why}")
    if "tunix" in wanted:
        why = missing(arguments.tunix_python, ("tunix.sft.dpo.dpo_trainer",))
        if why is None and case.device == "cpu":
            arms["live"].append(tunix_arm(arguments.tunix_python, case, folder, steps=steps))
        else:
            notes.append(f"Tunix: {why or 'two float32 copies of the weights beside its dense logits; CPU only'}")
    chosen = [arm for of_reference in arms.values() for arm in of_reference if arm.trainer in wanted]
    return chosen, notes, trials


def fastest_attention(arguments: argparse.Namespace, case: Case, folder: Folder) -> tuple[str, bool, str, list[str]]:
    """The way TRL is fastest with a live reference: one step of each after a warm-up; and what cannot be tried."""
    tried: dict[tuple[str, bool], float] = {}
    ways, notes = [("sdpa", False), ("eager", False)], []
    if case.device == "gpu":
        ways += [("flash_attention_2", False), ("sdpa", True)]
    for attention, liger in ways:
        package = "liger_kernel" if liger else "flash_attn" if attention == "flash_attention_2" else "torch"
        if (why := missing(arguments.trl_python, (package,))) is not None:
            notes.append(f"TRL with {package}: {why}")
            continue
        arm = trl_arm(arguments.trl_python, case, folder, "live", attention, steps=WARMUP + 1, liger=liger)
        out = folder.root / f"trial-{attention}{'-liger' if liger else ''}" / "round0"
        run = said(arm, run_arm(arm, out, steps=WARMUP + 1, device=case.device))
        tried[attention, liger] = run.lines[-1]["step_seconds"]
    best = min(tried, key=lambda way: tried[way])
    names = [f"{way}{' + Liger' if liger else ''} {seconds:.2f} s" for (way, liger), seconds in tried.items()]
    return *best, f"TRL's step in a trial, by attention: {', '.join(names)}.", notes


def said(arm: Arm, run: ArmRun) -> ArmRun:
    """Tells how an arm did, while the others are still to come."""
    seconds = " ".join(f"{line['step_seconds']:.3g}" for line in run.lines)
    print(f"{arm.name}: steps of {seconds} s, the first after {run.first_step:.1f} s", file=sys.stderr, flush=True)
    return run


def check_trl_tokens(found: Path, expected: Path) -> None:
    """TRL trains on the first rows only, but on the same tokens."""
    with found.open(encoding="utf-8") as theirs, expected.open(encoding="utf-8") as ours:
        for number, line in enumerate(theirs):
            if line != next(ours):
                raise ValueError(f"row {number}: TRL's collator and jdpo's tokenizer give other tokens; see {found}")


def about_rows(case: Case, selection: Selection, steps: int) -> Iterator[str]:
    """What was trained on, and whether the measured steps stand for the table."""
    cut = fitted(selection.lengths, case.max_length)
    measured = cut[WARMUP * case.batch : steps * case.batch]
    repeated = (2 * measured[:, 0] + measured[:, 1:].sum(1)).sum() / measured.sum()
    table = read_lengths(case.table)
    usual = typical_padding(fitted(table[table[:, 0] < case.max_length], case.max_length), case.batch)
    shape = case.shape
    yield (
        f"Llama, {(shape.backbone + shape.head * (1 if shape.tied else 2)) / 1e6:.1f} M parameters: width "
        f"{shape.d_model}, {shape.num_layers} layers, {shape.num_heads} heads, {shape.num_kv_heads} key heads, "
        f"V = {shape.vocab_size}, {shape.dtype}; the head has {shape.head / (shape.backbone + shape.head):.0%} of the "
        f"arithmetic. {case.batch} pairs a step, max_length {case.max_length}."
    )
    yield (
        f"Measured steps: {measured.sum() / (steps - WARMUP):.0f} tokens of prompt, chosen and rejected a step "
        f"({cut.sum() / len(cut) * case.batch:.0f} over the rows of jdpo's epoch). With prompts twice they are "
        f"{repeated:.2f} times as many, and padded to the longest of a step {padding(measured, case.batch):.2f} times "
        f"({usual:.2f} in random steps of the whole table). {selection.left_out} rows of the table whose prompt fills "
        "max_length are left out, as TRL and jdpo drop them."
    )


def versions(results: dict[str, Result]) -> Iterator[str]:
    """Versions of the other trainers, and how long TRL took to set up, precomputing (of these steps) included."""
    for result in results.values():
        about = result.runs[0].about
        if about:
            listed = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
            setup = [run.about["setup_seconds"] for run in result.runs if "setup_seconds" in run.about]
            more = f", set up in {statistics.median(setup):.1f} s" if setup else ""
            yield f"{result.arm.name}: {listed}{more}."


if __name__ == "__main__":
    main()
