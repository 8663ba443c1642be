"""`jdpo export CHECKPOINT OUT`: a Hugging Face model folder from any checkpoint of a run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jdpo.config import command_of
from jdpo.safe_text import terminal_lines


class _Parser(argparse.ArgumentParser):
    """Reports errors as all commands do."""

    def error(self, message: str) -> NoReturn:
        named = re.search(r"--([\w-]+)", message.partition("unrecognized arguments:")[2])
        elsewhere = command_of(named[1].replace("-", "_")) if named else ""
        raise ValueError(f"{message}; {elsewhere or '`jdpo export --help` lists the options'}")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's options."""
    parser = _Parser(
        prog="jdpo export",
        description="Writes the model of a checkpoint as a Hugging Face folder. The run may be in progress, stopped or "
        "finished; its folder is only read. The export uses no accelerator, and as much host memory as the weights in "
        "the checkpoint take.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=_text, help="output_dir of a run, or checkpoints/STEP")
    parser.add_argument("out", metavar="OUT", type=_text, help="the folder to write; an older export there is replaced")
    parser.add_argument("--step", type=int, help="the checkpoint to export; by default the newest")
    parser.add_argument(
        "--dtype",
        choices=("source", "float32", "bfloat16", "float16"),
        help="dtype of the weights; by default the run's export_dtype",
    )
    parser.add_argument(
        "--max_shard_size", "--max-shard-size", help="largest weight file, such as 5GB; by default the run's"
    )
    parser.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="add adapters to their base and write a whole model, or write the adapters alone; by default as the run's "
        "lora.merge says",
    )
    parser.add_argument(
        "--push_to_hub",
        "--push-to-hub",
        metavar="REPO",
        type=_text,
        help="also upload OUT to this model repository of the Hugging Face hub",
    )
    parser.add_argument("--public", action="store_true", help="make the repository of --push_to_hub public")
    return parser


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "export", command
    asked = parser().parse_args(words)
    if asked.public and not asked.push_to_hub:
        raise ValueError("--public says how --push_to_hub makes a repository; give both, or neither")
    out = _folder_here(asked.out)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jdpo.checkpoint.hub_push import check_push, push_folder
    from jdpo.training.exporting import export_checkpoint, find_checkpoint

    checkpoint = find_checkpoint(Path(asked.checkpoint), asked.step)
    if asked.push_to_hub:
        check_push(asked.push_to_hub)
    export_checkpoint(
        checkpoint,
        out,
        export_dtype=asked.dtype,
        max_shard_size=asked.max_shard_size,
        merge_adapters=asked.merge,
        say=_say,
    )
    _say(f"done: model in {out}")
    if asked.push_to_hub:
        message = f"Step {checkpoint.step} of a jdpo run"
        _say(f"pushed to {push_folder(out, asked.push_to_hub, public=asked.public, message=message)}")
    return 0


def _text(word: str) -> str:
    """A word that says something: an empty path would be the current folder."""
    if not word.strip():
        raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
    return word


def _folder_here(text: str) -> Path:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
        scheme = text.partition(":")[0]
        raise ValueError(
            f"OUT is an address ({scheme}://..): an export is written to a folder here, not to a store; give a folder, "
            "and copy it to the store afterwards"
        )
    return Path(text)


def _say(text: str) -> None:
    print(terminal_lines(text), flush=True)
