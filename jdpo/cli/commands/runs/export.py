"""`jdpo export CHECKPOINT OUT`: a Hugging Face model folder from any checkpoint of a run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from jdpo.cli.option_types import not_empty
from jdpo.cli.parsing import Parser, add_help, spellings
from jdpo.safe_text import terminal_lines


def parser() -> Parser:
    """Returns the parser of the command."""
    parser = Parser(
        "export",
        "CHECKPOINT OUT [--step N] [--dtype DTYPE] [--merge] ...",
        "Writes the model of a checkpoint as a Hugging Face folder. The run may be in progress, stopped or finished; "
        "its folder is only read. The export runs on the CPU and needs as much host memory as the weights in the "
        "checkpoint take.",
    )
    arguments = parser.add_argument_group("Arguments")
    options = add_help(parser, keys=False)
    arguments.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=not_empty, help="The output_dir of a run, or its checkpoints/STEP."
    )
    arguments.add_argument(
        "out", metavar="OUT", type=not_empty, help="The folder to write. An older export there is replaced."
    )
    options.add_argument("--step", type=int, metavar="N", help="The checkpoint to export; by default the newest.")
    options.add_argument(
        "--dtype",
        choices=("source", "float32", "bfloat16", "float16"),
        help="Dtype of the weights; by default the run's export_dtype.",
    )
    options.add_argument(
        *spellings("--max_shard_size"),
        metavar="SIZE",
        help="Maximum size of one weight file, such as 5GB; by default the run's max_shard_size.",
    )
    options.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Merge adapters into their base and write a whole model, or write the adapters alone; by default as the "
        "run's lora.merge.",
    )
    options.add_argument(
        *spellings("--push_to_hub"),
        metavar="REPO",
        type=not_empty,
        help="Also upload OUT to this model repository on the Hugging Face Hub, which is private.",
    )
    options.add_argument("--public", action="store_true", help="Make the repository of --push_to_hub public.")
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "export", command
    asked = parser().parse_args(words)
    if asked.public and not asked.push_to_hub:
        raise ValueError("--public makes the repository of --push_to_hub public; give both, or neither")
    out = _folder_here(asked.out)
    import jax

    # Before any device is used: the run may be in progress and hold the accelerators.
    jax.config.update("jax_platforms", "cpu")
    from jdpo.checkpoint.hub_push import check_push, push_folder
    from jdpo.training.saved.exporting import export_checkpoint
    from jdpo.training.saved.saved_runs import find_checkpoint

    checkpoint = find_checkpoint(Path(asked.checkpoint), asked.step)
    if asked.push_to_hub:
        # A wrong name or token is reported before the export, not after it.
        check_push(asked.push_to_hub)
    export_checkpoint(
        checkpoint,
        out,
        export_dtype=asked.dtype,
        max_shard_size=asked.max_shard_size,
        merge_adapters=asked.merge,
        log=_log,
    )
    _log(f"done: model in {out}")
    if asked.push_to_hub:
        message = f"Step {checkpoint.step} of a jdpo run"
        _log(f"pushed to {push_folder(out, asked.push_to_hub, public=asked.public, message=message)}")
    return 0


def _folder_here(text: str) -> Path:
    # One slash suffices: `Path` turns s3:// into s3:/.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
        scheme = text.partition(":")[0]
        raise ValueError(
            f"OUT is an address ({scheme}://..), but an export is written to a local folder; give a folder, and "
            "copy it to the store afterwards"
        )
    return Path(text)


def _log(text: str) -> None:
    print(terminal_lines(text), flush=True)
