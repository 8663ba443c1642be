"""Answers from a server: what is asked for, what is read, and messages about a server that fails."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from jdpo.generation.answer_files import read_answers
from jdpo.generation.answer_manifest import Manifest
from jdpo.generation.prompts import Prompts, make_question
from jdpo.generation.servers.endpoint import EndpointSource
from jdpo.generation.servers.server_settings import ServerSettings
from jdpo.generation.values import Answer, Question, Sampling, Unanswered
from jdpo.generation.writing import write_answers
from tests.chat_server import ChatServer, Fault, Raw, Reply, serving_chat

SAMPLING = Sampling(temperature=0.5, top_p=0.9, max_new_tokens=7, seed=3)


def chat(text: str, **more: Any) -> Question:
    return make_question([{"role": "user", "content": text}], "prompts.jsonl:1", **more)


def source_of(server: ChatServer, sampling: Sampling = SAMPLING, **settings: Any) -> EndpointSource:
    quick = {"timeout": 5.0, "backoff": 0.001, "retries": 2}
    return EndpointSource(ServerSettings(url=server.url, **{**quick, **settings}), sampling)


def answers_of(
    server: ChatServer, questions: list[Question], num_samples: int = 1, **settings: Any
) -> list[Answer | Unanswered]:
    with source_of(server, **settings) as source:
        return source.answers(questions, num_samples)


def echo(request: dict[str, Any]) -> str:
    """Answers with the prompt and the seed."""
    return f"{request['messages'][-1]['content']} {request['seed']}"


def contents(answers: list[Answer | Unanswered]) -> list[str]:
    return [answer.message["content"] for answer in answers if isinstance(answer, Answer)]


def test_sampling_is_sent_and_a_conversation_with_its_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    question = chat("Hi", tools=tools, template_kwargs={"enable_thinking": False})
    with serving_chat(echo) as server:
        answers_of(server, [question], sampling=Sampling(temperature=0, top_k=5))
    (sent,) = server.requests
    assert sent["path"] == "/v1/chat/completions"
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["max_tokens"]) == (0, 1.0, 5, 1024)
    assert sent["messages"] == question.prompt
    assert sent["tools"] == tools
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}


def test_text_is_continued() -> None:
    with serving_chat(" there") as server:
        (answer,) = answers_of(server, [make_question("Hello", "prompts.jsonl:1")])
    assert isinstance(answer, Answer)
    assert answer.message == {"role": "assistant", "content": " there"}
    assert (server.requests[0]["path"], server.requests[0]["prompt"]) == ("/v1/completions", "Hello")
    assert "top_k" not in server.requests[0]


def test_a_server_with_one_choice_is_asked_once_per_sample_with_a_seed_for_each() -> None:
    with serving_chat(echo) as server:
        answers = answers_of(server, [chat("a"), chat("b")], 3, concurrency=1)
        again = answers_of(server, [chat("b")], 3)
    assert [(answer.prompt_id, answer.sample) for answer in answers] == [
        (question.prompt_id, sample) for question in (chat("a"), chat("b")) for sample in range(3)
    ]
    assert [text[0] for text in contents(answers)] == ["a"] * 3 + ["b"] * 3
    assert len(set(contents(answers))) == 6
    assert contents(again) == contents(answers)[3:]
    # The second question starts before the server is known to give one choice; no later one asks for several.
    assert [request.get("n") for request in server.requests[2:6]] == [None] * 4


def test_a_reply_with_several_choices_holds_all_samples() -> None:
    with serving_chat(lambda request: [f"{place}" for place in range(request["n"])]) as server:
        answers = answers_of(server, [chat("a"), chat("b")], 3)
    assert contents(answers) == ["0", "1", "2"] * 2
    assert len(server.requests) == 2


def test_tokens_and_logps_are_read_where_a_server_returns_them() -> None:
    listed = {"content": [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -0.5}]}

    def reply(request: dict[str, Any]) -> Reply:
        assert request.keys() >= {"logprobs", "return_token_ids"}
        if request["path"] == "/v1/completions":
            return {"text": "ab", "token_ids": [4, 5], "logprobs": {"token_logprobs": [-0.25, -0.5]}}
        cut = {"message": {"content": "ab"}, "logprobs": {"content": [{"token": "a"}]}, "finish_reason": "length"}
        return cut if request["messages"][0]["content"] == "cut" else {"message": {"content": "ab"}, "logprobs": listed}

    with serving_chat(reply) as server:
        found = answers_of(server, [make_question("text", "p:1"), chat("chat"), chat("cut")])
    assert [answer[3:] for answer in found] == [([4, 5], "stop", -0.75), (None, "stop", -1.5), (None, "length", None)]


def test_calls_and_thoughts_are_part_of_an_answer_and_text_is_made_unicode() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"content": None, "tool_calls": [call], "reasoning": "why", "audio": None}
    with serving_chat({"message": message, "finish_reason": "tool_calls"}) as server:
        (answer,) = answers_of(server, [chat("a")])
        server.reply = lambda request: Raw(
            200, '{"choices": [{"message": {"content": "\\ud83d"}, "finish_reason": "stop"}]}'
        )
        broken = answers_of(server, [chat("a")])
    assert isinstance(answer, Answer)
    assert answer.message == {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "why"}
    assert answer.finish_reason == "stop"
    assert contents(broken) == ["�"]


@pytest.mark.parametrize("reply", ["always", ["always", "always"]])
def test_identical_samples_are_named(reply: Reply, caplog: pytest.LogCaptureFixture) -> None:
    questions = [chat(f"{number}") for number in range(4)]
    with serving_chat(reply) as server, source_of(server) as source:
        source.answers(questions, 2)
        source.answers(questions, 2)
    assert caplog.text.count("identical answers") == 1
    assert source.describe()["about"]["server"]["identical_samples"] == 8


def test_different_samples_one_sample_and_greedy_answers_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    questions = [chat(f"{number}") for number in range(4)]
    for reply, num_samples, temperature in (("always", 2, 0.0), ("always", 1, 1.0), (echo, 2, 1.0)):
        with serving_chat(reply) as server, source_of(server, Sampling(temperature=temperature)) as source:
            source.answers(questions, num_samples)
        assert source.describe()["about"]["server"]["identical_samples"] == 0
    assert not caplog.text


def test_what_fails_is_named_and_asked_again_by_the_next_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trouble: dict[str, Reply] = {
        "1": Raw(400, {"error": {"message": "too long"}}),
        "2": Raw(500, "broken"),
        "3": Raw(200, "rubbish"),
        "4": Raw(200, {"choices": [{"message": {"content": "no"}, "finish_reason": "content_filter"}]}),
        "5": Fault("drop"),
    }

    def reply(request: dict[str, Any]) -> Reply:
        return trouble.get(request["messages"][0]["content"], echo(request))

    questions = [chat(f"{number}") for number in range(8)]

    def run(folder: Path, server: ChatServer) -> Manifest:
        prompts = Prompts(questions, "prompts.jsonl", 8, 0, 0, {}, {})
        with source_of(server) as source:
            return write_answers(
                folder, prompts, source, sampling=SAMPLING, num_samples=2, answers_per_shard=8, log=lambda text: None
            )

    with serving_chat(reply) as server:
        manifest = run(tmp_path / "a", server)
        assert manifest.unanswered == {
            "status 400": 2, "status 500": 2, "unreadable reply": 2, "finish_reason content_filter": 2,
            "no connection": 2,
        }  # fmt: skip
        assert manifest.about["server"]["first_failures"]["status 400"] == "too long"
        assert "too long" in caplog.text
        for number in "235":
            del trouble[number]
        num_requests = len(server.requests)
        manifest = run(tmp_path / "a", server)
        asked = {request["messages"][0]["content"] for request in server.requests[num_requests:]}
        whole = run(tmp_path / "b", server)
    assert asked == {"2", "3", "5"}
    assert manifest.unanswered == whole.unanswered == {"status 400": 2, "finish_reason content_filter": 2}
    assert manifest.answers_digest == whole.answers_digest
    assert len(read_answers(tmp_path / "a").answers) == 12


def test_the_server_is_busy_between_two_shards(tmp_path: Path) -> None:
    later_has_come = threading.Event()

    def reply(request: dict[str, Any]) -> Reply:
        text = request["messages"][0]["content"]
        if text == "2":
            later_has_come.set()
        # The first shard is not complete before a question of the second one is asked.
        return echo(request) if text != "0" or later_has_come.wait(5) else Raw(400, "nothing else has come")

    prompts = Prompts([chat(f"{number}") for number in range(6)], "prompts.jsonl", 6, 0, 0, {}, {})
    with serving_chat(reply) as server, source_of(server, concurrency=2) as source:
        manifest = write_answers(
            tmp_path, prompts, source, sampling=SAMPLING, num_samples=1, answers_per_shard=2, log=lambda text: None
        )
    assert (len(manifest.shards), manifest.unanswered) == (3, {})
    assert len(server.requests) == 6


def test_the_manifest_tells_model_and_address_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    prompts = Prompts([chat("a")], "prompts.jsonl", 1, 0, 0, {}, {})
    for _ in range(2):  # at another address each time
        with serving_chat(echo) as server, source_of(server) as source:
            write_answers(tmp_path, prompts, source, sampling=SAMPLING, num_samples=1, log=lambda text: None)
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert found["source"] == {"served_model": "toy"}
    assert found["about"]["endpoint"] == server.url
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.iterdir())
