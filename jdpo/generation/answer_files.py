"""The files of a folder of answers: its manifest, its questions, and its answers in shards.

    manifest.json            what made the answers: digests of model, prompts and template, sampling, counts, shards
    prompts.jsonl.gz         {prompt_id, prompt, tools?, template_kwargs?, columns} per question
    answers-00000.jsonl.gz   {prompt_id, prompt, sample, message, tokens, finish_reason, logp} per answer
    unanswered-00000.jsonl   {prompt_id, sample, reason, again} per answer that could not be made, if there are any

Files are written whole, and their bytes follow from their content: compression stores no time and no name.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.durable import write_durably
from jdpo.file_digests import file_digest
from jdpo.generation.answer_manifest import Manifest, Shard, read_manifest
from jdpo.generation.values import Answer, Question, Unanswered

PROMPTS = "prompts.jsonl.gz"


class AnswerShards:
    """The answers of a folder, read shard by shard each time that they are iterated over, in the order of the questions
    and, for each, of the samples.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest

    def __len__(self) -> int:
        return self._manifest.num_answers

    def __iter__(self) -> Iterator[Answer]:
        for shard in self._manifest.shards:
            yield from read_shard(self._folder, shard)


class AnswerFolder(NamedTuple):
    """A folder of answers.

    Attributes:
      manifest: what made it.
      questions: {prompt_id: question}, in the order of the prompts file.
      answers: all answers; may be iterated over several times.
    """

    manifest: Manifest
    questions: dict[str, Question]
    answers: AnswerShards


def read_answers(folder: str | Path, *, partial: bool = False) -> AnswerFolder:
    """Opens a folder written by `jdpo generate`.

    Args:
      folder: the folder.
      partial: accept a folder whose last shards are missing.

    Raises:
      ValueError: it is no such folder, is incomplete, or a file in it is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not (manifest.complete or partial):
        raise ValueError(
            f"{folder}: the answers are not complete: {len(manifest.shards)} shards are written; run the same "
            "`jdpo generate` again, which continues where it stopped"
        )
    questions = read_questions(folder)
    # Scorers read columns of the questions, so a changed file would give scores of other questions.
    if questions_digest(questions) != manifest.prompts["digest"]:
        raise ValueError(f"{folder / PROMPTS}: the file has changed since it was written; generate the answers again")
    return AnswerFolder(
        manifest, {question.prompt_id: question for question in questions}, AnswerShards(folder, manifest)
    )


# --- questions


def write_questions(folder: Path, questions: Iterable[Question]) -> None:
    """Writes prompts.jsonl.gz whole."""
    write_durably(folder / PROMPTS, _packed(map(_question_line, questions)))


def read_questions(folder: Path) -> list[Question]:
    """Reads prompts.jsonl.gz.

    Raises:
      ValueError: the file is missing or damaged.
    """
    path = folder / PROMPTS
    found = []
    for number, row in enumerate(_rows(path), 1):
        try:
            found.append(
                Question(
                    row["prompt_id"],
                    row["prompt"],
                    f"{PROMPTS}:{number}",
                    row.get("tools"),
                    row.get("template_kwargs"),
                    row["columns"],
                )
            )
        except KeyError as error:
            raise ValueError(f"{path}:{number}: the row lacks {error}; {_AGAIN}") from None
    return found


def questions_digest(questions: Iterable[Question]) -> str:
    """Returns a digest of the questions and their order; their origins do not count."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(_question_line(question))
    return digest.hexdigest()


def _question_line(question: Question) -> bytes:
    framed = {"tools": question.tools, "template_kwargs": question.template_kwargs}
    given = {name: value for name, value in framed.items() if value is not None}
    columns = _writable(question.columns or {})
    return json_line({"prompt_id": question.prompt_id, "prompt": question.prompt, **given, "columns": columns})


def _writable(value: Any) -> Any:
    """Returns a value of a row as JSON has it: bytes as base64, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- answers


def shard_name(number: int) -> str:
    """
    >>> shard_name(7)
    'answers-00007.jsonl.gz'
    """
    return f"answers-{number:05}.jsonl.gz"


def write_shard(
    folder: Path, number: int, questions: Iterable[Question], results: Iterable[Answer | Unanswered]
) -> Shard:
    """Writes the answers to some questions whole, and lists those that could not be made.

    Args:
      number: of the shard, from 0.
      questions: the questions of the shard.
      results: the answers, in the order of the questions and the samples.
    """
    prompts = {question.prompt_id: question.prompt for question in questions}
    results = list(results)
    answers = [one for one in results if isinstance(one, Answer)]
    missing = [one for one in results if isinstance(one, Unanswered)]
    listing = folder / f"unanswered-{number:05}.jsonl"
    # Before the answers, so that a shard that is listed in the manifest has its list.
    if missing:
        write_durably(listing, b"".join(json_line(one._asdict()) for one in missing))
    else:
        listing.unlink(missing_ok=True)
    path = folder / shard_name(number)
    write_durably(path, _packed(_answer_line(answer, prompts[answer.prompt_id]) for answer in answers))
    return Shard(
        file=path.name,
        sha256=file_digest(path),
        questions=len(prompts),
        answers=len(answers),
        unanswered=len(missing),
        again=sum(one.again for one in missing),
        cut_off=sum(one.finish_reason == "length" for one in answers),
    )


def read_shard(folder: Path, shard: Shard) -> list[Answer]:
    """Reads the answers of a shard.

    Raises:
      ValueError: the file is missing, or is not the one that the manifest lists.
    """
    path = folder / shard.file
    if not path.is_file():
        raise ValueError(f"{path}: the file is missing; {_AGAIN}")
    if file_digest(path) != shard.sha256:
        raise ValueError(f"{path}: the file has changed since it was written; {_AGAIN}")
    return [
        Answer(row["prompt_id"], row["sample"], row["message"], row["tokens"], row["finish_reason"], row["logp"])
        for row in _rows(path)
    ]


def read_unanswered(folder: Path, number: int) -> list[Unanswered]:
    """Reads the list of a shard's answers that could not be made; empty if all were made."""
    path = folder / f"unanswered-{number:05}.jsonl"
    if not path.exists():
        return []
    return [Unanswered(**json.loads(line)) for line in path.read_bytes().splitlines()]


def _answer_line(answer: Answer, prompt: Any) -> bytes:
    return json_line(
        {
            "prompt_id": answer.prompt_id,
            "prompt": prompt,
            "sample": answer.sample,
            "message": answer.message,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            # Four decimals, below which the sum depends on the order of additions.
            "logp": None if answer.logp is None else round(answer.logp, 4),
        }
    )


_AGAIN = "run the same `jdpo generate` again, which makes it again"


def json_line(value: Any) -> bytes:
    """Returns a value as one line of UTF-8 JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(value, allow_nan=False).encode() + b"\n"


def _packed(lines: Iterable[bytes]) -> bytes:
    buffer = io.BytesIO()
    # Without a time and a name the bytes follow from the lines alone.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        for line in lines:
            file.write(line)
    return buffer.getvalue()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    where = f"{path}"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                yield json.loads(line)
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing; {_AGAIN}") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{where}: the file is damaged here: {error}; {_AGAIN}") from None
