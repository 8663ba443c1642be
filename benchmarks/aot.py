"""Claim: what the compiled training step costs on a TPU or GPU, without either: memory, FLOPs, collectives, time.

    python benchmarks/aot.py CONFIG --on TARGET [--layers N] [--lengths 512,300,300] [--against FILE] [key=value ...]

Compiles the step of a config for v5e-8 ... v5p-256, v6e-64, tpu7x-8, 2xv5e-16 (libtpu) or h100x8, h200x1 (XLA:GPU), and
prints one JSON object; benchmarks/README.md has its fields and the environments. Compiled, not run: the times are
estimates by a roofline (jdpo/planning/roofline.py), which says what it leaves out.

CONFIG is a YAML file of `jdpo dpo` or `jdpo sft`, changed by further words as there; its model may be a folder that
holds config.json alone. A hub name stands for the folder of the same name in benchmarks/shapes, without the owner and
without -Instruct, -it or -checkpoints. `--against` exits with 1 where the step is worse than in an
earlier output, and says how.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "benchmarks" / "shapes"


def main() -> int:
    options, words = parser().parse_known_args()
    try:
        return run(options, words)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Measures a program and prints it; returns 1 if it is worse than before.

    Raises:
      ValueError: a setting or a file is not as expected, or a device has too little memory for the program.
      OSError: a file cannot be read or written.
    """
    before = measured_before(options.against) if options.against else None
    if options.hlo is not None and not options.hlo.parent.is_dir():
        raise ValueError(f"--hlo {options.hlo}: there is no folder {options.hlo.parent}")
    use_code(options.code)
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are those that programs are compiled for
    from jdpo.planning.compiled_step import compile_step_for
    from jdpo.planning.machines import machine_of
    from jdpo.planning.measurement import measure
    from jdpo.planning.regressions import regressions
    from jdpo.training.fit.memory_fit import exhaustion_as

    machine = machine_of(options.on)
    config = read_config(options.config, words, options.command)
    lengths = lengths_of(options.lengths)
    with exhaustion_as(
        lambda cause: (
            f"a device of {options.on} has too little memory for this step ({cause}): give more devices, "
            "remat=full or a smaller max_tokens_per_device"
        )
    ):
        step = compile_step_for(machine, config, lengths, num_layers=options.layers)
    if options.hlo is not None:
        options.hlo.write_text(step.text, encoding="utf-8")
    found = {"lengths": list(lengths[0]) if len(lengths) == 1 else Path(options.lengths).name} | measure(step)
    print(rendered(found))
    worse = regressions(before, found) if before else []
    for line in worse:
        print(f"worse than {options.against}: {line}", file=sys.stderr)
    return 1 if worse else 0


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = made.add_argument
    add("config", type=Path, help="YAML file of a run")
    add("--on", required=True, metavar="TARGET", help="v5e-64, v5p-64, 2xv5e-16, h100x8, h200, ...")
    add("--layers", type=layers, metavar="N", help="in place of the model's; two tell the same story in seconds")
    add(
        "--lengths",
        metavar="P,C,R|FILE",
        help="tokens of prompt, chosen and rejected, or of a supervised row; or a CSV file of them, one line per row, "
        "such as benchmarks/lengths/hh.csv",
    )
    add("--against", type=Path, metavar="FILE", help="output of an earlier run; exit 1 where the step is worse")
    add("--command", choices=("dpo", "sft"), help="command of the config (default: sft if its name ends in sft)")
    add("--code", type=Path, metavar="CHECKOUT", help="measure the code of another checkout with this one's tool")
    add("--hlo", type=Path, metavar="FILE", help="also write the optimized program there")
    return made


def layers(text: str) -> int:
    """Reads `--layers`, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)


def measured_before(path: Path) -> dict[str, Any]:
    """Reads an earlier output.

    Raises:
      ValueError: it is not one.
      OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"--against {path}: expected the JSON that this tool prints, found other text ({error})"
        ) from error
    if not isinstance(found, dict) or not {"kernels", "collectives", "peak_bytes"} <= set(found):
        raise ValueError(f"--against {path}: expected the JSON that this tool prints, found JSON without its keys")
    return found


def use_code(checkout: Path | None) -> None:
    """Imports jdpo from this checkout, or from another one with the tool of this one.

    Raises:
      ValueError: there is no jdpo in the other one.
    """
    if checkout is not None and not (checkout / "jdpo" / "__init__.py").exists():
        raise ValueError(f"--code {checkout}: expected the root of a checkout, which has a folder jdpo")
    sys.path.insert(0, str(checkout or ROOT))
    import jdpo

    if checkout is None:
        return
    # The tool must be the same for both sides of a comparison, and an older checkout has none.
    for name in ("chips", "planning"):
        path = ROOT / "jdpo" / name
        file, folders = (path / "__init__.py", [str(path)]) if path.is_dir() else (path.with_suffix(".py"), None)
        spec = importlib.util.spec_from_file_location(f"jdpo.{name}", file, submodule_search_locations=folders)
        assert spec is not None, file
        assert spec.loader is not None, file
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"jdpo.{name}"] = module
        setattr(jdpo, name, module)
        spec.loader.exec_module(module)


def lengths_of(text: str | None) -> list[tuple[int, ...]]:
    """Reads `--lengths`: the lengths of each row.

    Raises:
      ValueError: it is missing, or is neither numbers nor a file with a header and numbers.
    """
    if text is None:
        raise ValueError("--lengths is required: without rows it says how long they are, such as --lengths 512,300,300")
    from jdpo.planning.plan_command.given_lengths import read_lengths

    return read_lengths(text)


def rendered(found: dict[str, Any]) -> str:
    """Returns JSON with one line per key, and one per row of a table."""
    lines = []
    for key, value in found.items():
        rows = [json.dumps(row) for row in value] if isinstance(value, list) and value else []
        text = "[\n  " + ",\n  ".join(rows) + "\n ]" if rows and isinstance(value[0], dict) else json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


def read_config(path: Path, words: list[str], command: str | None) -> Any:
    """Reads a config, whose model becomes a folder with config.json.

    Raises:
      ValueError: naming the key, or the shapes that there are.
    """
    from jdpo.config import CONFIGS, load_config

    name = command or ("sft" if path.stem.endswith("sft") else "dpo")
    # Nothing is kept of a program that no machine here can run.
    config = load_config(CONFIGS[name], path, ["compilation_cache=false", *words])
    return load_config(
        CONFIGS[name], path, ["compilation_cache=false", *words, f"model_name_or_path={shape_of(config)}"]
    )


def shape_of(config: Any) -> Path:
    """Returns the folder with config.json of a config's model."""
    from jdpo.words import did_you_mean

    given = Path(config.model_name_or_path).expanduser()
    if (given / "config.json").exists():
        return given
    name = re.sub(r"(-Instruct|-it|-checkpoints)$", "", config.model_name_or_path.split("/")[-1])
    known = sorted(folder.name for folder in SHAPES.iterdir() if folder.is_dir())
    if name not in known:
        suggestion = f"{found} " if (found := did_you_mean(name, known)) else ""
        raise ValueError(
            f"{config.model_name_or_path} is no folder with a config.json, and benchmarks/shapes has no {name}: "
            f"{suggestion}give one of {', '.join(known)} as model_name_or_path=benchmarks/shapes/NAME"
        )
    return SHAPES / name


if __name__ == "__main__":
    sys.exit(main())
