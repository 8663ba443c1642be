from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jdpo.generation.answer_files import read_answers, read_unanswered
from jdpo.generation.prompts import Prompts, make_question
from jdpo.generation.values import Answer, Question, Sampling, Unanswered
from jdpo.generation.writing import write_answers
from tests.conftest import write_jsonl

QUESTIONS = [make_question(text, f"p:{i}", columns={"n": i}) for i, text in enumerate(("Red", "Gelb", "Été", "\u2028"))]


class Echo:
    """Answers with the prompt and the sample's number; fails after `most` shards, and on questions in `fails`."""

    def __init__(self, most: int = 99, fails: dict[str, bool] | None = None, **settings: Any) -> None:
        self.left, self.fails, self.settings = most, fails or {}, settings
        self.asked: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {"model": "echo", "about": {"place": id(self)}, **self.settings}

    def answers(
        self, questions: Sequence[Question], num_samples: int, following: Sequence[Question] = ()
    ) -> list[Answer | Unanswered]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += [str(question.prompt) for question in questions]
        return [self._one(question, sample) for question in questions for sample in range(num_samples)]

    def _one(self, question: Question, sample: int) -> Answer | Unanswered:
        if question.prompt in self.fails:
            return Unanswered(question.prompt_id, sample, "busy", self.fails[str(question.prompt)])
        message = {"role": "assistant", "content": f"{question.prompt} {sample}"}
        return Answer(question.prompt_id, sample, message, [7, sample], "stop", -1.234567)


def written(folder: Path, source: Echo, *, questions: Sequence[Question] = QUESTIONS, **options: Any) -> list[str]:
    log: list[str] = []
    settings: dict[str, Any] = {"sampling": Sampling(), "num_samples": 3, "answers_per_shard": 4, **options}
    write_answers(folder, Prompts([*questions], "p", 4, 0, 0, {}, {}), source, log=log.append, **settings)
    return log


def content(folder: Path) -> dict[str, Any]:
    """Returns the bytes of every file, and the manifest without what may change."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["about"]
    return {**files, "manifest.json": manifest}


def test_files_have_the_documented_form(tmp_path: Path) -> None:
    written(tmp_path, Echo())
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock")
    assert names == [f"answers-0000{i}.jsonl.gz" for i in range(4)] + ["manifest.json", "prompts.jsonl.gz"]
    packed = (tmp_path / "answers-00002.jsonl.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # no name and no time
    first = json.loads(gzip.decompress(packed).decode().split("\n")[0])
    message = {"role": "assistant", "content": "Été 0"}
    prompt_id = QUESTIONS[2].prompt_id
    answer = {"prompt_id": prompt_id, "prompt": "Été", "sample": 0, "message": message, "tokens": [7, 0]}
    assert first == {**answer, "finish_reason": "stop", "logp": -1.2346}
    manifest, questions, answers = read_answers(tmp_path)
    assert (manifest.num_samples, manifest.prompts["questions"], len(answers)) == (3, 4, 12)
    assert [(one.prompt_id, one.sample) for one in answers] == [(q.prompt_id, s) for q in QUESTIONS for s in range(3)]
    assert [*answers] == [*answers]
    assert [(one.prompt, one.columns) for one in questions.values()] == [(one.prompt, one.columns) for one in QUESTIONS]


def test_an_interrupted_folder_ends_with_the_same_bytes(tmp_path: Path) -> None:
    written(tmp_path / "whole", Echo())
    for most in (0, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path / "cut", Echo(most))
        with pytest.raises(ValueError, match="not complete"):
            read_answers(tmp_path / "cut")
    (tmp_path / "cut" / "answers-00003.jsonl.gz").write_bytes(b"written, but killed before it was listed")
    (tmp_path / "cut" / "answers-00003.jsonl.gz.tmp").write_bytes(b"half")
    log = written(tmp_path / "cut", (last := Echo()))
    assert "3 of 4 shards" in log[0]
    assert last.asked == ["\u2028"]
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    written(tmp_path / "cut", (last := Echo()))
    assert not last.asked


def test_a_kill_before_the_manifest_is_written(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl.gz.tmp").write_bytes(b"half")
    (tmp_path / "manifest.json.tmp").write_bytes(b"{")
    written(tmp_path, Echo())
    assert not [*tmp_path.glob("*.tmp")]


def test_answers_that_are_cut_off_are_counted(tmp_path: Path) -> None:
    class Cut(Echo):
        def _one(self, question: Question, sample: int) -> Answer | Unanswered:
            found = super()._one(question, sample)
            return found._replace(finish_reason="length") if isinstance(found, Answer) and sample else found

    written(tmp_path, Cut(), answers_per_shard=6)
    assert [shard.cut_off for shard in read_answers(tmp_path).manifest.shards] == [4, 4]
    assert json.loads((tmp_path / "manifest.json").read_text())["shards"][0]["cut_off"] == 4


def test_a_damaged_shard_is_named_and_made_again(tmp_path: Path) -> None:
    written(tmp_path, Echo())
    before = content(tmp_path)
    path = tmp_path / "answers-00001.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"answers-00001.* has changed"):
        list(read_answers(tmp_path).answers)
    (tmp_path / "answers-00002.jsonl.gz").unlink()
    (tmp_path / "prompts.jsonl.gz").write_bytes(b"")
    log = written(tmp_path, (again := Echo()))
    assert again.asked == ["Gelb", "Été"]
    for words in ("answers-00001.jsonl.gz is damaged", "answers-00002.jsonl.gz is missing", "prompts.jsonl.gz is"):
        assert any(words in line for line in log), (words, log)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "settings", "named"),
    [
        ({"sampling": Sampling(top_p=0.9)}, {}, "sampling.top_p: 1.0 there, 0.9 now"),
        ({"num_samples": 2}, {}, "num_samples: 3 there, 2 now"),
        ({"questions": QUESTIONS[:3]}, {}, "prompts.digest"),
        ({}, {"digest": "ab"}, 'source.digest: null there, "ab" now'),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, options: Any, settings: Any, named: str) -> None:
    written(tmp_path, Echo())
    with pytest.raises(ValueError, match="made in another way") as caught:
        written(tmp_path, Echo(**settings), **options)
    assert named in str(caught.value)


def test_models_that_differ_are_named_with_short_digests(tmp_path: Path) -> None:
    written(tmp_path, Echo(model_digest="a" * 64, about={"model": "runs/pretrain"}))
    named = r"source.model_digest: runs/pretrain \(aaaaaaaa\) there, runs/dpo \(bbbbbbbb\) now"
    with pytest.raises(ValueError, match=named):
        written(tmp_path, Echo(model_digest="b" * 64, about={"model": "runs/dpo"}))


def test_a_broken_manifest_is_refused_with_what_to_do(tmp_path: Path) -> None:
    written(tmp_path, Echo())
    whole = json.loads((tmp_path / "manifest.json").read_text())
    for text in ("{", json.dumps({**whole, "sampling": {"top_p": 7}}), json.dumps({**whole, "shards": None})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json: .*put a copy of it back, or generate"):
            read_answers(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "own.jsonl", [{}])
    (tmp_path / "their.tmp").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"not one of answers \(it holds own.jsonl, their.tmp"):
        written(tmp_path, Echo())
    assert (tmp_path / "their.tmp").exists()
    with pytest.raises(ValueError, match="expected a folder of answers"):
        read_answers(tmp_path)
    written(tmp_path / "gen", Echo())
    (tmp_path / "gen" / "answers-00007.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"answers-00007.* does not belong"):
        written(tmp_path / "gen", Echo())


def test_failures_are_counted_and_asked_again_if_that_may_help(tmp_path: Path) -> None:
    written(tmp_path / "gen", Echo(fails={"Gelb": True, "Été": False}))
    manifest = read_answers(tmp_path / "gen").manifest
    assert (manifest.unanswered, len(read_answers(tmp_path / "gen").answers)) == ({"busy": 6}, 6)
    assert [one.sample for one in read_unanswered(tmp_path / "gen", 1)] == [0, 1, 2]
    written(tmp_path / "gen", (again := Echo(fails={"Été": False})))
    assert again.asked == ["Gelb"]
    assert read_answers(tmp_path / "gen").manifest.unanswered == {"busy": 3}
    written(tmp_path / "other", Echo(fails={"Été": False}))
    assert content(tmp_path / "other") == content(tmp_path / "gen")


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    class Nested(Echo):
        def answers(self, *asked: Any) -> list[Answer | Unanswered]:
            with pytest.raises(ValueError, match="another process"):
                written(tmp_path, Echo())
            return super().answers(*asked)

    written(tmp_path, Nested())
