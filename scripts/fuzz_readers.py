"""Feeds damaged and hostile data files to all readers, and keeps each file that causes a failure.

    python scripts/fuzz_readers.py [--minutes 10] [--seed 0] [--save fuzz_failures]
    python scripts/fuzz_readers.py --replay fuzz_failures/3f2a.parquet

A case is a file of some kind: random rows, many of a known schema with hostile values in them, written as the kind is
and then, mostly, damaged. It is read, its rows are recognised and tokenized. The only error allowed is a short
ValueError that names the file; anything else is a failure, and so are a crash, a run of more than ten seconds, and
512 MiB of memory. Cases run in a process of their own, which is started again when it dies.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import itertools
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz_cases import make_case

from jdpo.config import DatasetConfig
from jdpo.data.prepared.held_out import prompt_key
from jdpo.data.schemas.formats import Dropped, completion_rows, is_preference, preference_rows
from jdpo.data.schemas.refusal import ColumnsError
from jdpo.data.sources import open_source
from jdpo.data.tokens.tokenize import tokenize_completions, tokenize_pairs, tokenize_turns
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "train", "train", "train[:50%]", "train[-2:]", "train[1:3]")

CASE_SECONDS = 10
CASE_BYTES = 512 * 2**20
LEAK_BYTES = 512 * 2**20
LONGEST_MESSAGE = 6000
"""Characters; a message may show three rows of a file and a column_map."""


class Failure(Exception):
    """Raised if a case ends in anything but rows or a good error."""


# --- what is done with them


def train_tokenizer(folder: Path) -> Tokenizer:
    """Trains a byte-level BPE of 300 tokens with the built-in ChatML."""
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["the capital of the river is Paris"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>").save_pretrained(folder)
    return load_tokenizer(folder, chat_template="chatml")


def check_file(path: Path, tokenizer: Tokenizer, split: str = "train") -> str:
    """Reads a file to its end, or to where it breaks, and processes its rows as training would.

    Returns:
      The outcome, in a word.

    Raises:
      Failure: an error is too long, or does not name the file.
      Exception: any other failure.
    """
    try:
        source = open_source(DatasetConfig(path=str(path), split=split))
        source.digest()
        rows = 0
        for raw, origin in itertools.islice(source.rows(), 500):
            rows += 1
            _check_row(raw, origin, tokenizer)
    except ValueError as error:
        # A split of no rows names the split, and its file.
        _check_message(error, path.name)
        return "refused"
    return "read" if rows else "empty"


def _check_row(raw: dict[str, Any], origin: str, tokenizer: Tokenizer) -> None:
    lengths = {"max_length": 64, "max_prompt_length": 32}
    is_preference(raw)
    try:
        pairs = [row for row in preference_rows(raw, origin) if not isinstance(row, Dropped)]
        for pair in pairs:
            prompt_key(pair.prompt)
        tokenize_pairs(pairs, tokenizer, **lengths)
    except ValueError as error:
        _check_message(error, origin)
    try:
        completions = [row for row in completion_rows(raw, origin) if not isinstance(row, Dropped)]
        tokenize_completions(completions, tokenizer, **lengths)
        tokenize_turns(completions, tokenizer, **lengths)
    except ValueError as error:
        _check_message(error, origin)


def _check_message(error: ValueError, name: str) -> None:
    message = str(error)
    # Subclasses from elsewhere, such as UnicodeDecodeError, have messages that name no file.
    if type(error) not in (ValueError, ColumnsError):
        raise Failure(f"a {type(error).__name__} reaches the user") from error
    if name not in message:
        raise Failure(f"the message does not name {name}: {message[:500]}") from error
    if len(message) > LONGEST_MESSAGE:
        raise Failure(f"a message of {len(message)} characters") from error
    message.encode("utf-8", "backslashreplace")


def run_case(path: Path, tokenizer: Tokenizer, split: str) -> str:
    """Runs `check_file` with limits on time and memory."""

    def stop(*_: Any) -> None:
        raise Failure(f"no end after {CASE_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(3 * CASE_SECONDS, exit=True)  # for code that never returns to Python
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    signal.alarm(CASE_SECONDS)
    try:
        outcome = check_file(path, tokenizer, split)
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if grown > CASE_BYTES:
        raise Failure(f"{grown >> 20} MiB of memory for {path.stat().st_size} bytes")
    return outcome


# --- the two processes


def work(seed: int, seconds: float, folder: Path, save: Path) -> None:
    """Runs cases until the time is over; prints their outcomes as JSON."""
    warnings.simplefilter("error")
    tokenizer = train_tokenizer(folder / "tokenizer")
    rng, outcomes = random.Random(seed), Counter[str]()
    deadline, resting = time.monotonic() + seconds, 0
    for number in itertools.count():
        if time.monotonic() >= deadline:
            break
        kind, content = make_case(rng)
        for leftover in folder.glob("case*"):
            leftover.unlink()
        path = folder / f"case{kind}"
        path.write_bytes(content)
        split = rng.choice(SPLITS)
        (folder / "split").write_text(split)
        try:
            outcomes[run_case(path, tokenizer, split)] += 1
        except Exception:
            outcomes["FAILED"] += 1
            keep(path, save, f"split {split}\n{traceback.format_exc()}")
        if number == 500:
            resting = _resident()
        if number % 100 == 0:
            print(json.dumps(outcomes), flush=True)
    print(json.dumps(outcomes), flush=True)
    if resting and _resident() - resting > LEAK_BYTES:
        raise Failure(f"the process grew by {(_resident() - resting) >> 20} MiB over its cases")


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def keep(path: Path, save: Path, message: str) -> None:
    """Keeps a failing file next to a text file with its message, at most five per last line of a traceback."""
    save.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    name = hashlib.sha256(content).hexdigest()[:12]
    last = message.strip().splitlines()[-1][:200]
    if sum(last in other.read_text(errors="replace") for other in save.glob("*.txt")) < 5:
        (save / f"{name}{path.name.removeprefix('case')}").write_bytes(content)
        (save / f"{name}.txt").write_text(message, errors="backslashreplace")
    print(f"FAILED {last}", file=sys.stderr, flush=True)


def supervise(minutes: float, seed: int, save: Path) -> int:
    """Runs workers one after the other until the time is over; returns how many cases failed."""
    start, total = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while (left := minutes * 60 - (time.monotonic() - start)) > 0:
            command = [sys.executable, __file__, "--worker", str(left), "--seed", str(seed), "--save", str(save)]
            worker = subprocess.Popen([*command, "--folder", str(folder)], stdout=subprocess.PIPE, text=True)
            assert worker.stdout is not None
            outcomes: dict[str, int] = {}
            shown = time.monotonic()
            for line in worker.stdout:
                outcomes = json.loads(line)
                if time.monotonic() - shown > 30:
                    shown = time.monotonic()
                    print(f"{_said(total + Counter(outcomes), shown - start)}", flush=True)
            total.update(outcomes)
            if worker.wait():
                total["FAILED"] += 1
                for path in folder.glob("case*"):
                    split = (folder / "split").read_text()
                    keep(path, save, f"split {split}\nthe process ended with {worker.returncode}")
            seed += 1
    print(_said(total, time.monotonic() - start))
    if total["FAILED"]:
        print(f"failing files are in {save}; look at one with --replay")
    return total["FAILED"]


def _said(outcomes: Counter[str], seconds: float) -> str:
    parts = ", ".join(f"{count:,} {name}" for name, count in sorted(outcomes.items()))
    return f"{outcomes.total():,} cases in {seconds:.0f} s, {outcomes.total() / seconds:.0f} a second: {parts}"


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=Path("fuzz_failures"))
    parser.add_argument("--replay", type=Path, help="run one file again, with its traceback")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.seed, options.worker, options.folder, options.save)
        return 0
    if options.replay is None:
        return min(1, supervise(options.minutes, options.seed, options.save))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(Path(folder))
    for split in sorted(set(SPLITS)):
        print(split, run_case(options.replay, tokenizer, split))
    return 0


if __name__ == "__main__":
    sys.exit(main())
