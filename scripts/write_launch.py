"""Writes the examples in scripts/launch/, which can be read and used by hand, with `jdpo launch`.

python scripts/write_launch.py      # after a template or a launcher was changed
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from jdpo.cli.commands.clusters.launch import planned
from jdpo.launch.launched import Launch, listed_advice

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("scripts/launch")
"""Relative to the root, so that no path of this machine is in a file."""

_OF_JOBSET = "--image us-docker.pkg.dev/my-project/my-repository/jdpo:0.2.0-tpu --volume jdpo"
_ON_SHARED = "--chdir /shared/project --cache /shared/cache"

_OF_PACKAGE = "--package 'jdpo[tpu,gcs] @ git+https://github.com/my-organization/jdpo@v0.2.0'"
_OF_GPUS = _OF_PACKAGE.replace("tpu", "cuda")
_PINNED = "--constraints docker/requirements-tpu.txt"
_NFS = "--nfs 10.0.0.2:/share"

EXAMPLES = {
    "jobset-tpu": f"jobset configs/llama_3_1_8b_tpu.yaml --on v6e-16 {_OF_JOBSET}",
    "jobset-multislice": f"jobset configs/llama_3_1_8b_tpu.yaml --on 2xv5e-16 {_OF_JOBSET} --spot --doctor",
    "jobset-tpu7x": f"jobset configs/llama_3_1_8b_tpu.yaml --on tpu7x-16 {_OF_JOBSET}",
    "jobset-gpu": f"jobset configs/llama_3_1_8b_lora.yaml --on h100x16 {_OF_JOBSET.replace('-tpu', '-cuda')}",
    "slurm": f"slurm configs/llama_3_1_8b_lora.yaml --on h100x16 --time 24:00:00 {_ON_SHARED} --doctor",
    "skypilot": f"skypilot configs/llama_3_1_8b_lora.yaml --on h100x16 {_OF_GPUS} {_NFS} --spot --doctor",
    "skypilot-tpu": f"skypilot configs/llama_3_1_8b_tpu.yaml --on v6e-16 {_OF_PACKAGE} {_PINNED} {_NFS}",
    "tpu-vm": "tpu-vm configs/llama_3_1_8b_tpu.yaml --on v6e-16 --zone us-east5-b --spot --doctor "
    f"{_OF_PACKAGE} {_PINNED} {_NFS}",
    "host": f"host configs/llama_3_1_8b_lora.yaml --on h100x8 {_ON_SHARED}",
}
"""Folder -> the words after `jdpo launch`."""

INTRODUCTION = """\
# Launch files to read and to use by hand

Written by `jdpo launch` through `python scripts/write_launch.py`; a test compares them with what it renders. For a run
of your own, let `jdpo launch ... --dry_run` print its files, or copy one of these and change the values that its first
lines name. [Launching](../../docs/launch.md) explains them.
"""


def example(name: str) -> Launch:
    """Returns the launch of an example; the current folder has to be the root."""
    return planned([*shlex.split(EXAMPLES[name]), "--folder", str(FOLDER / name)])


def files() -> dict[Path, str]:
    """Returns every file of scripts/launch, relative to the root, with its content."""
    before = Path.cwd()
    # A launcher passes on the secrets that are set.
    set_here = {name: os.environ.pop(name) for name in ("HF_TOKEN", "WANDB_API_KEY") if name in os.environ}
    os.chdir(ROOT)
    try:
        launches = {name: example(name) for name in EXAMPLES}
    finally:
        os.chdir(before)
        os.environ |= set_here
    found = {path: text for launch in launches.values() for path, text in launch.files.items()}
    parts = [INTRODUCTION]
    for name, launch in launches.items():
        lines = [f"## {name}", "", f"    jdpo launch {EXAMPLES[name]}", "", "By hand:", ""]
        lines += [f"    {shlex.join(words)}" for words in launch.commands]
        for heading, advice in (("Before:", launch.before), ("Then:", launch.after)):
            if advice:
                lines += ["", heading, "", *(f"    {line}" for line in listed_advice("", advice).splitlines()[1:])]
        parts.append("\n".join(lines) + "\n")
    return {FOLDER / "README.md": "\n".join(parts), **found}


if __name__ == "__main__":
    for path, text in files().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
        if path.suffix == ".sh":
            (ROOT / path).chmod(0o755)
        print(f"wrote {path}")
