"""The manifest of a folder of answers: what made them, and which files hold them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.durable import write_durably
from jdpo.generation.values import Sampling
from jdpo.json_files import read_json

FORMAT = "jdpo answers"
VERSION = 1
_AGAIN = "the file is damaged: put a copy of it back, or generate the answers again in another folder"
MANIFEST = "manifest.json"


class Shard(NamedTuple):
    """One file of answers.

    Attributes:
      file: its name in the folder.
      sha256: digest of the file.
      questions: number of questions that it answers.
      answers: number of answers in it.
      unanswered: number of answers that could not be made.
      again: number of those that asking again may make.
      cut_off: number of answers that end at their largest number of tokens.
    """

    file: str
    sha256: str
    questions: int
    answers: int
    unanswered: int = 0
    again: int = 0
    cut_off: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a folder of answers.

    Attributes:
      source: what answered: a model of jdpo or a server; see `AnswerSource.describe`.
      sampling: how answers were drawn.
      num_samples: number of answers to each question.
      answers_per_shard: number of answers that a shard holds at most, unless one question has more.
      prompts: digest and counts of the questions.
      about: names that may change without changing the answers, such as the path of the prompts.
      shards: the shards written so far.
      unanswered: {reason: number of answers that could not be made}.
      complete: whether all shards are written.
    """

    source: dict[str, Any]
    sampling: Sampling
    num_samples: int
    answers_per_shard: int
    prompts: dict[str, Any]
    about: dict[str, Any]
    shards: tuple[Shard, ...] = ()
    unanswered: dict[str, int] = dataclasses.field(default_factory=dict)
    complete: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the answers."""
        return {
            "source": self.source,
            "sampling": dataclasses.asdict(self.sampling),
            "num_samples": self.num_samples,
            "answers_per_shard": self.answers_per_shard,
            "prompts": self.prompts,
        }

    @property
    def answers_digest(self) -> str:
        """A digest of all answers, 64 hexadecimal digits."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @property
    def num_answers(self) -> int:
        return sum(shard.answers for shard in self.shards)

    def as_dict(self) -> dict[str, Any]:
        """Returns the content of manifest.json."""
        # Of the counts of a shard, only those of its questions and answers are always there.
        shards = [
            {key: value for key, value in shard._asdict().items() if value or key == "answers"} for shard in self.shards
        ]
        rest = {"shards": shards, "unanswered": self.unanswered, "complete": self.complete}
        return {"format": FORMAT, "version": VERSION, **self.settings, "about": self.about, **rest}


def read_manifest(folder: Path) -> Manifest:
    """Reads manifest.json.

    Raises:
      ValueError: there is none, or it is not one of this format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: expected a folder of answers, as `jdpo generate` writes it, but it has no {MANIFEST}"
        )
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_AGAIN}") from None
    if found.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a manifest of answers (format {FORMAT!r}), found {found.get('format')!r}")
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {found.get('version')!r} of the format; this jdpo reads version {VERSION}: generate the "
            "answers again, or use the jdpo that wrote them"
        )
    try:
        return Manifest(
            source=dict(found["source"]),
            sampling=Sampling(**found["sampling"]),
            num_samples=int(found["num_samples"]),
            answers_per_shard=int(found["answers_per_shard"]),
            prompts=dict(found["prompts"]),
            about=dict(found["about"]),
            shards=tuple(Shard(**shard) for shard in found["shards"]),
            unanswered=dict(found["unanswered"]),
            complete=bool(found["complete"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: unexpected content: {error}; {_AGAIN}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json whole."""
    write_durably(folder / MANIFEST, json.dumps(manifest.as_dict(), indent=2, ensure_ascii=False) + "\n")
