"""`transformers serve` as a real server: jdpo starts it, asks it, and reads what jdpo itself would answer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import jdpo
from jdpo.generation.prompts import make_question
from jdpo.generation.servers.endpoint import EndpointSource
from jdpo.generation.servers.server_process import running_server
from jdpo.generation.servers.server_settings import ServerSettings
from jdpo.generation.values import Answer, Question, Sampling

pytestmark = [pytest.mark.full, pytest.mark.torch]

SERVE = (
    f"{sys.executable} -m transformers.cli.transformers serve {{model}} --port {{port}} --device cpu --dtype float32"
)
QUESTIONS = [
    *(make_question([{"role": "user", "content": text}], "p:1") for text in ("river stone", "Which road?", "7")),
    make_question([{"role": "system", "content": "slow"}, {"role": "user", "content": "green bread"}], "p:2"),
    *(make_question(text, "p:3") for text in ("The river", "mountain paper winter")),
]


def answers_of(
    model: Path, folder: Path, sampling: Sampling, num_samples: int, questions: list[Question] = QUESTIONS
) -> tuple[list[Answer], EndpointSource]:
    with (
        running_server(SERVE, model=str(model), log_file=folder / "server.log") as url,
        EndpointSource(ServerSettings(url=url, concurrency=4), sampling) as source,
    ):
        found = source.answers(questions, num_samples)
    assert all(isinstance(answer, Answer) for answer in found)
    return [answer for answer in found if isinstance(answer, Answer)], source


def test_greedy_answers_equal_those_of_jdpo(toy_model: Path, tmp_path: Path) -> None:
    found, source = answers_of(toy_model, tmp_path, Sampling(temperature=0, max_new_tokens=24), 1)
    loaded = jdpo.load(toy_model, dtype="float32")
    for question, answer in zip(QUESTIONS, found, strict=True):
        (own,) = loaded.generate(question.prompt, temperature=0, max_new_tokens=24)
        assert answer.message == own.message
        assert answer.finish_reason == own.finish_reason
    assert source.client.not_taken == {"return_token_ids"}


def test_samples_differ_only_if_the_model_samples(
    toy_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sampling = Sampling(temperature=1, max_new_tokens=8)
    found, _ = answers_of(toy_model, tmp_path, sampling, 2)
    assert [one.message for one in found[::2]] == [one.message for one in found[1::2]]
    assert "do_sample" in caplog.text

    caplog.clear()
    samples = tmp_path / "samples"
    shutil.copytree(toy_model, samples)
    config = samples / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"do_sample": True}))
    found, _ = answers_of(samples, tmp_path, sampling, 2)
    assert all(one.message != other.message for one, other in zip(found[::2], found[1::2], strict=True))
    assert not caplog.text
