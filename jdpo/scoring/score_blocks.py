"""Scoring in blocks that are kept on disk, so that a killed command continues where it was.

gen/scores/.NAME.parts/made_by.json   what makes the scores, and the digest of the answers
gen/scores/.NAME.parts/00000.json     the scores and verdicts of a block of questions
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jdpo.durable import write_durably
from jdpo.file_locks import lock_file
from jdpo.generation.values import Answer
from jdpo.json_files import read_json
from jdpo.safe_text import terminal
from jdpo.scoring.protocol import Block, Scored, Scorer
from jdpo.scoring.score_files import (
    SCORES,
    VERDICTS,
    Score,
    Verdict,
    check_name,
    read_about,
    write_scores,
    write_verdicts,
)

Progress = Callable[[int, int], None]
"""Called with the number of answers that have their scores, and the number of all; first when those of an earlier call
are read, then after each block."""


def score_answers(
    folder: Path,
    name: str,
    scorer: Scorer,
    blocks: Sequence[Block],
    *,
    digest: str,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> bool:
    """Scores all answers and writes gen/scores/NAME.jsonl, and gen/verdicts/NAME.jsonl for scorers that compare.

    Blocks that an earlier call has finished are not scored again.

    Args:
      folder: the `gen` folder.
      scorer: made for `blocks`.
      digest: `answers_digest` of the answers.
      overwrite: replace scores of this name, whatever made them.

    Returns:
      False if these very scores were there already, complete, and nothing was done.

    Raises:
      ValueError: scores of this name come from another scorer or belong to other answers, another process writes them,
        or an answer cannot be scored.
    """
    check_name(name)
    made_by = json.loads(json.dumps(scorer.describe()))  # as it will be read back
    (folder / SCORES).mkdir(exist_ok=True)
    parts = folder / SCORES / f".{name}.parts"
    with _locked(folder / SCORES / f".{name}.lock", name):
        if not overwrite and _is_complete(folder, name, made_by, digest):
            shutil.rmtree(parts, ignore_errors=True)  # left by a call that was killed at its very end
            return False
        _prepare(folder, name, parts, {"made_by": made_by, "answers": digest}, overwrite=overwrite)
        scored = _all_blocks(parts, scorer, blocks, progress)
        # Also where there are none, so that verdicts of other scores with this name do not stay.
        if scored.verdicts or read_about(folder, VERDICTS, name) is not None:
            write_verdicts(folder, name, scored.verdicts, made_by=made_by, digest=digest)
        # Last, since complete scores end the work.
        write_scores(folder, name, scored.scores, made_by=made_by, digest=digest, counts=scored.counts)
        shutil.rmtree(parts)
    return True


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = lock_file(path)
    if lock is None:
        raise ValueError(f"another process is writing the scores {name}; wait for it, or choose another --name")
    with lock:  # closing it releases it; the file stays, since removing it could give two processes a lock each
        yield


def _is_complete(folder: Path, name: str, made_by: dict[str, Any], digest: str) -> bool:
    """Returns whether these very scores are there; refuses to replace others."""
    about = read_about(folder, SCORES, name)
    if about is None:
        return False
    differs = _difference(about, made_by, digest)
    if differs:
        raise ValueError(
            f"{folder / SCORES / name}.jsonl is there already and {differs}; choose another --name, or --overwrite it"
        )
    return True


def _difference(found: dict[str, Any], made_by: dict[str, Any], digest: str) -> str:
    """Describes how scores differ from those asked for; empty if they do not."""
    if found.get("answers") != digest:
        return "belongs to other answers than those in the folder"
    theirs = found.get("made_by", {})
    if theirs.get("by") != made_by.get("by"):
        return f"comes from {terminal(theirs.get('by'))}"
    names = [key for key in sorted({*theirs, *made_by}) if theirs.get(key) != made_by.get(key)]
    return f"was made with another {', '.join(map(terminal, names))}" if names else ""


def _prepare(folder: Path, name: str, parts: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Makes the folder of the parts; keeps those of an earlier call for the same scores."""
    about = folder / SCORES / f"{name}.json"
    if overwrite and about.is_file():
        shutil.rmtree(parts, ignore_errors=True)
        # Scores without this file are not complete, so a restart does not mistake them for the new ones.
        about.unlink()
    made_by = parts / "made_by.json"
    if made_by.is_file():
        if not (differs := _difference(read_json(made_by), identity["made_by"], identity["answers"])):
            return
        # Without a finished block nothing is lost, such as when a rule failed at once and was fixed.
        if not overwrite and any(parts.glob("[0-9]*.json")):
            raise ValueError(f"{parts} is unfinished work that {differs}; choose another --name, or --overwrite it")
    # Parts without this file come from a call that was killed while it removed them.
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    write_durably(made_by, json.dumps(identity, indent=2) + "\n")


def _all_blocks(parts: Path, scorer: Scorer, blocks: Sequence[Block], progress: Progress) -> Scored:
    """Scores the blocks that are not on disk, and returns the results of all."""
    found, counts = Scored([], []), Counter[str]()
    total = sum(len(one.answers) for block in blocks for one in block)
    has_started = False
    for number, block in enumerate(blocks):
        answers = [answer for one in block for answer in one.answers]
        path = parts / f"{number:05d}.json"
        scored = _read_part(path, answers)
        if scored is None:
            if not has_started:
                progress(len(found.scores), total)
            has_started = True
            scored = scorer.score(block)
            assert _belong(scored, answers), f"the scorer left out answers of block {number}"
            write_durably(path, json.dumps(scored))
        found.scores.extend(scored.scores)
        found.verdicts.extend(scored.verdicts)
        counts.update(scored.counts or {})
        if has_started:
            progress(len(found.scores), total)
    return found._replace(counts=dict(sorted(counts.items())))


def _read_part(path: Path, answers: Sequence[Answer]) -> Scored | None:
    """Returns what an earlier call found for a block; None if it did not get that far, or cut other blocks."""
    try:
        scores, verdicts, counts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    scored = Scored([Score(*score) for score in scores], [Verdict(*verdict) for verdict in verdicts], counts)
    return scored if _belong(scored, answers) else None


def _belong(scored: Scored, answers: Sequence[Answer]) -> bool:
    at = [(score.prompt_id, score.sample) for score in scored.scores]
    return at == [(answer.prompt_id, answer.sample) for answer in answers]
