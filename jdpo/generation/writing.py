"""Answers to many questions, written shard by shard, so that a run that is killed continues where it stopped.

Which questions share a shard follows from the prompts and the settings alone, and a shard is written whole. So a folder
that was interrupted any number of times ends with the same bytes as one that was not.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from jdpo.durable import TEMPORARY
from jdpo.file_digests import file_digest
from jdpo.file_locks import lock_file
from jdpo.generation.answer_files import (
    PROMPTS,
    questions_digest,
    read_questions,
    read_shard,
    read_unanswered,
    shard_name,
    write_questions,
    write_shard,
)
from jdpo.generation.answer_manifest import MANIFEST, Manifest, Shard, read_manifest, write_manifest
from jdpo.generation.prompts import Prompts
from jdpo.generation.values import Answer, Question, Sampling, Unanswered
from jdpo.words import figure, listed

ANSWERS_PER_SHARD = 256
"""A shard holds about this many answers: a kill costs at most these."""

_LOCK = ".lock"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAMES = {"source.model_digest": "model", "prompts.digest": "prompts"}
"""Setting that is a digest -> the name under `about` of what it is a digest of."""
_SHARD_NAME = re.compile(r"answers-(\d{5,})\.jsonl\.gz")


class AnswerSource(Protocol):
    """A source of answers: a model in this process, or a server."""

    def answers(
        self, questions: Sequence[Question], num_samples: int, following: Sequence[Question] = ()
    ) -> Sequence[Answer | Unanswered]:
        """Returns the answers to the questions of one shard.

        They are in the order of the questions, and for each in the order of the samples, 0 to num_samples - 1.
        Unanswered takes the place of an answer that could not be made.

        Args:
          following: questions of the next calls. A source whose answers do not depend on what is asked together may
            begin with them, so that it is busy while the last answers of this shard come in.
        """

    def describe(self) -> dict[str, Any]:
        """Returns what decides the answers, besides questions and sampling, as plain values for the manifest.

        Values under `about` may change without changing the answers, such as the path of a model, or counts of what
        has happened so far.
        """


def write_answers(
    folder: Path,
    prompts: Prompts,
    source: AnswerSource,
    *,
    sampling: Sampling,
    num_samples: int,
    answers_per_shard: int = ANSWERS_PER_SHARD,
    log: Callable[[str], None],
    skipped: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Asks a source all questions, and writes its answers; continues a folder that an earlier call began.

    Args:
      folder: the folder to write.
      prompts: the questions.
      source: what answers them; it draws as `sampling` says.
      sampling, num_samples, answers_per_shard: see `Manifest`.
      log: receives lines for the user.
      skipped: called with the number of answers that are there already or cannot be made.

    Raises:
      ValueError: the folder holds something else, or answers made in another way; or another process writes to it.
    """
    check_counts(num_samples, answers_per_shard)
    description = source.describe()
    about = {"prompts": prompts.place, **description.pop("about", {})}
    planned = Manifest(
        source=json.loads(json.dumps(description)),
        sampling=sampling,
        num_samples=num_samples,
        answers_per_shard=answers_per_shard,
        prompts=_counted(prompts),
        about=about,
    )
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / _LOCK)
    if lock is None:
        raise ValueError(f"{folder}: another process is writing answers here; wait for it, or choose another folder")
    with lock:
        return _Writing(folder, prompts.questions, source, _begun(folder, planned, prompts, log), log, skipped).run()


def check_counts(num_samples: int, answers_per_shard: int) -> None:
    """Refuses numbers of answers below 1.

    Raises:
      ValueError: naming the number.
    """
    if num_samples < 1:
        raise ValueError(f"n: expected 1 or more answers to each prompt, found {num_samples}")
    if answers_per_shard < 1:
        raise ValueError(f"answers_per_shard: expected 1 or more, found {answers_per_shard}")


def _counted(prompts: Prompts) -> dict[str, Any]:
    return {
        "digest": questions_digest(prompts.questions),
        "questions": len(prompts.questions),
        "rows": prompts.num_rows,
        "duplicates": prompts.duplicates,
        "dropped": prompts.dropped,
    }


# --- the folder


def _begun(folder: Path, planned: Manifest, prompts: Prompts, log: Callable[[str], None]) -> Manifest:
    """Returns the manifest of the folder, written now if the folder is new.

    Raises:
      ValueError: the folder holds something else, or answers made in another way.
    """
    if not (folder / MANIFEST).exists():
        # The prompts are written first, so a run that was killed in between has left them, or what it wrote of them.
        own = (_LOCK, PROMPTS, PROMPTS + TEMPORARY, MANIFEST + TEMPORARY)
        if others := sorted(path.name for path in folder.iterdir() if path.name not in own):
            raise ValueError(
                f"{folder}: the folder is not empty and not one of answers (it holds {listed(others, 5)}); choose "
                "another, or empty it"
            )
        write_questions(folder, prompts.questions)
        write_manifest(folder, planned)
        return planned
    found = read_manifest(folder)
    if differences := _differences(found.settings, planned.settings):
        lines = "".join(
            f"\n  {name}: {_shown(name, old, found)} there, {_shown(name, new, planned)} now"
            for name, old, new in differences
        )
        raise ValueError(
            f"{folder}: it holds answers that were made in another way:{lines}\nGive the same settings to continue, or "
            "another output_dir"
        )
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink()  # of a write that was killed
    if not (folder / PROMPTS).is_file() or _changed_prompts(folder, prompts):
        log(f"{folder / PROMPTS} is missing or damaged; made again")
        write_questions(folder, prompts.questions)
    return found


def _changed_prompts(folder: Path, prompts: Prompts) -> bool:
    try:
        return questions_digest(read_questions(folder)) != questions_digest(prompts.questions)
    except ValueError:
        return True


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Returns the name of each value that differs, with both values.

    >>> _differences({"sampling": {"top_p": 1.0, "seed": 0}}, {"sampling": {"top_p": 0.9, "seed": 0}})
    [('sampling.top_p', 1.0, 0.9)]
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys((*old, *new))
        return [one for key in keys for one in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [(name, old, new)]


def _shown(name: str, value: Any, manifest: Manifest) -> str:
    """Returns a value for people: a digest is shortened, and stands after the name of what it belongs to."""
    if not (isinstance(value, str) and _DIGEST.fullmatch(value)):
        return json.dumps(value)
    of_what = manifest.about.get(_NAMES.get(name, ""))
    return f"{of_what} ({value[:8]})" if of_what else value[:8]


# --- the shards


class _Writing:
    """The loop over the shards of a folder."""

    def __init__(
        self,
        folder: Path,
        questions: Sequence[Question],
        source: AnswerSource,
        manifest: Manifest,
        log: Callable[[str], None],
        skipped: Callable[[int], None],
    ) -> None:
        self.folder, self.source, self.log, self.skipped = folder, source, log, skipped
        self.manifest, self.num_samples = manifest, manifest.num_samples
        # At least one question, however many answers it has.
        size = max(1, manifest.answers_per_shard // manifest.num_samples)
        self.parts = [questions[start : start + size] for start in range(0, len(questions), size)]
        self.shards = {shard.file: shard for shard in manifest.shards}
        # Why answers of each shard are missing; kept, since the lists of thousands of shards take long to read.
        self.reasons: dict[int, Counter[str]] = {}

    def run(self) -> Manifest:
        """Writes the shards that are missing, and returns the manifest of the complete folder."""
        self._refuse_foreign()
        kept = {number: shard for number in range(len(self.parts)) if (shard := self._whole(number))}
        self.skipped(sum(shard.answers + shard.unanswered - shard.again for shard in kept.values()))
        if kept:
            self.log(f"{self.folder}: {len(kept):,} of {len(self.parts):,} shards are there already")
        self.shards = {shard.file: shard for shard in kept.values()}
        self.reasons = {number: _reasons(read_unanswered(self.folder, number)) for number in kept}
        todo = {number: questions for number in range(len(self.parts)) if (questions := self._todo(number, kept))}
        waiting = [question for questions in todo.values() for question in questions]
        for number, questions in todo.items():
            if number in kept:
                self.log(f"asking {figure(len(questions), 'question')} of {shard_name(number)} again")
            del waiting[: len(questions)]
            fresh = self._checked(questions, self.source.answers(questions, self.num_samples, waiting))
            results = self._with_old(number, fresh) if number in kept else fresh
            shard = write_shard(self.folder, number, self.parts[number], results)
            self.shards[shard.file], self.reasons[number] = shard, _reasons(results)
            self._write_manifest()
        return self._write_manifest()

    def _refuse_foreign(self) -> None:
        for path in sorted(self.folder.glob("answers-*")):
            match = _SHARD_NAME.fullmatch(path.name)
            if match is None or int(match[1]) >= len(self.parts):
                raise ValueError(
                    f"{path}: this file does not belong to these answers, which have {figure(len(self.parts), 'shard')}"
                    "; move it away"
                )

    def _whole(self, number: int) -> Shard | None:
        """Returns a shard that is in the folder as the manifest lists it; None if it is to be made."""
        name = shard_name(number)
        path, shard = self.folder / name, self.shards.get(name)
        if shard is None:
            # Written by a run that was killed before it listed the shard, or put there by somebody.
            return None
        if not path.is_file():
            self.log(f"{path} is missing; made again")
            return None
        if file_digest(path) != shard.sha256 or self._num_unanswered(number) != shard.unanswered:
            self.log(f"{path} is damaged or another file (its digest is not that of the manifest); made again")
            return None
        return shard

    def _num_unanswered(self, number: int) -> int:
        try:
            return len(read_unanswered(self.folder, number))
        except (ValueError, TypeError):
            return -1

    def _todo(self, number: int, kept: Mapping[int, Shard]) -> list[Question]:
        """Returns the questions of a shard that are to be asked: all, or those whose answers may come this time."""
        if number not in kept:
            return list(self.parts[number])
        if not kept[number].again:
            return []
        ids = {one.prompt_id for one in read_unanswered(self.folder, number) if one.again}
        return [question for question in self.parts[number] if question.prompt_id in ids]

    def _with_old(self, number: int, fresh: Sequence[Answer | Unanswered]) -> list[Answer | Unanswered]:
        """Returns the results of a shard of which some questions were asked again."""
        old: list[Answer | Unanswered] = [
            *read_shard(self.folder, self.shards[shard_name(number)]),
            *read_unanswered(self.folder, number),
        ]
        ids = {one.prompt_id for one in fresh}
        places = {question.prompt_id: place for place, question in enumerate(self.parts[number])}
        results: list[Answer | Unanswered] = [*fresh, *(one for one in old if one.prompt_id not in ids)]
        return sorted(results, key=lambda one: (places[one.prompt_id], one.sample))

    def _checked(self, part: Sequence[Question], results: Sequence[Answer | Unanswered]) -> list[Answer | Unanswered]:
        """Checks that every answer is there once and in its place."""
        found = [(one.prompt_id, one.sample) for one in results]
        asked = [(question.prompt_id, sample) for question in part for sample in range(self.num_samples)]
        assert found == asked, (found[:5], asked[:5], len(found), len(asked))
        return list(results)

    def _write_manifest(self) -> Manifest:
        names = map(shard_name, range(len(self.parts)))
        shards = tuple(self.shards[name] for name in names if name in self.shards)
        unanswered = Counter[str]()
        for number in sorted(self.reasons):
            unanswered.update(self.reasons[number])
        self.manifest = replace(
            self.manifest,
            about=self.manifest.about | self.source.describe().get("about", {}),
            shards=shards,
            unanswered=dict(unanswered),
            complete=len(shards) == len(self.parts),
        )
        write_manifest(self.folder, self.manifest)
        return self.manifest


def _reasons(results: Sequence[Answer | Unanswered]) -> Counter[str]:
    return Counter(one.reason for one in results if isinstance(one, Unanswered))
