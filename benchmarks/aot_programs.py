"""Measures the programs of benchmarks/results/*-aot.md with benchmarks/aot.py, one after the other.

    python benchmarks/aot_programs.py --out FOLDER [--programs v5e-64 ...] [--layers 2] [--code CHECKOUT]
    python benchmarks/aot_programs.py --table BEFORE [AFTER]

The first writes FOLDER/NAME.json for each program; TPU ones take minutes each. The second prints their table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"
LENGTHS = "256,384,384"


class Program(NamedTuple):
    """A program of the table; pairs are such that they fill the tokens of all devices without padding."""

    title: str
    config: str
    target: str
    words: tuple[str, ...]


def _words(remat: str, tokens: int, pairs: int) -> tuple[str, ...]:
    return f"remat={remat}", f"max_tokens_per_device={tokens}", f"global_batch_size={pairs}"


PROGRAMS = {
    "8b-v5e-64": Program("8B full, v5e-64", "llama_3_1_8b_tpu", "v5e-64", _words("full", 4096, 256)),
    "8b-v5p-64": Program("8B full, v5p-64", "llama_3_1_8b_tpu", "v5p-64", _words("attention", 8192, 256)),
    "8b-v6e-64": Program("8B full, v6e-64", "llama_3_1_8b_tpu", "v6e-64", _words("full", 4096, 256)),
    "8b-lora-v5e-8": Program("8B LoRA, v5e-8", "llama_3_1_8b_lora", "v5e-8", _words("attention", 4096, 32)),
    "1.5b-h200": Program("1.5B full, H200", "qwen2_5_1_5b", "h200x1", _words("none", 8192, 8)),
    "1.5b-h200-dots": Program("1.5B full, H200, dots", "qwen2_5_1_5b", "h200x1", _words("dots", 8192, 8)),
    "8b-lora-h200": Program("8B LoRA, H200", "llama_3_1_8b_lora", "h200x1", _words("dots", 8192, 8)),
}


def main() -> int:
    assert __doc__ is not None
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path)
    made.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    made.add_argument("--layers", type=int)
    made.add_argument("--code", type=Path)
    made.add_argument("--table", type=Path, nargs="+", metavar="FOLDER")
    options = made.parse_args()
    if options.table:
        print(table(*options.table))
        return 0
    if options.out is None:
        made.error("give --out FOLDER, or --table FOLDER")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.programs:
        done = subprocess.run(command(name, options.layers, options.code), capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
            return 1
        (options.out / f"{name}.json").write_text(done.stdout, encoding="utf-8")
        print(name, flush=True)
    return 0


def command(name: str, layers: int | None = None, code: Path | None = None) -> list[str]:
    """Returns the words of a shell that measure a program."""
    program = PROGRAMS[name]
    words = [sys.executable, str(HERE / "aot.py"), str(CONFIGS / f"{program.config}.yaml"), "--on", program.target]
    words += ["--lengths", LENGTHS]
    words += [] if layers is None else ["--layers", str(layers)]
    words += [] if code is None else ["--code", str(code)]
    return [*words, *program.words]


COLUMNS = ("peak GiB", "PFLOPs", "memory traffic GiB", "wire GiB", "in the open GiB", "estimated ms", "bound on MFU")


def table(before: Path, after: Path | None = None) -> str:
    """Returns the measurements of one or two folders as a table in Markdown."""
    head = ["program", "remat", "tokens", *(["side"] if after else []), *COLUMNS]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|" + ("---|" if after else "") + "---:|" * len(COLUMNS)]
    for name, program in PROGRAMS.items():
        for side, folder in (("before", before), ("now", after)):
            path = None if folder is None else folder / f"{name}.json"
            if path is None or not path.exists():
                continue
            found = json.loads(path.read_text(encoding="utf-8"))
            cells = [program.title, found["remat"], f"{found['tokens_per_device']:,}", *([side] if after else [])]
            lines.append(f"| {' | '.join([*cells, *figures(found)])} |")
    return "\n".join(lines)


def figures(found: dict[str, Any]) -> list[str]:
    """Returns the figures of a measurement, in the order of COLUMNS."""
    in_the_open = sum(row["wire_bytes"] for row in found["collectives"] if not row["compute_meanwhile"])
    return [
        f"{found['peak_bytes'] / 2**30:.2f} ({100 * found['share_of_memory']:.0f} %)",
        f"{sum(found['executed_flops'].values()) / 1e15:.3f}",
        f"{found['memory_traffic_bytes'] / 2**30:.0f}",
        f"{found['wire_bytes'] / 2**30:.1f}",
        f"{in_the_open / 2**30:.1f}",
        f"{found['time_ms']['total']:.0f}",
        f"{100 * found['mfu_bound']:.1f} %",
    ]


if __name__ == "__main__":
    sys.exit(main())
