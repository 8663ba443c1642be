"""Requests to a server that fails in every way: counted, sent again, and never lost."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jdpo.generation.servers.server_client import Failure, Request, ServerClient
from jdpo.generation.servers.server_settings import ServerSettings
from tests.chat_server import DROP, HANG, ChatServer, Fault, Raw, Reply, serving_chat

QUICK = {"timeout": 5.0, "backoff": 0.001, "concurrency": 4}


def asked(text: str = "Hello", **more: Any) -> Request:
    return Request("chat/completions", {"messages": [{"role": "user", "content": text}], **more}, tuple(more))


def content(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"]["content"])


def ask(server: ChatServer, requests: list[Request], **settings: Any) -> tuple[list[str | Failure], ServerClient]:
    with ServerClient(ServerSettings(url=server.url, **{**QUICK, **settings})) as client:
        return client.ask_all(requests, content), client


def in_turn(*replies: Reply) -> Any:
    """Returns a function that gives these replies one after the other, and then the last one."""
    left: Iterator[Reply] = itertools.chain(replies, itertools.repeat(replies[-1]))
    return lambda request: next(left)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (Raw(429, {"error": {"message": "slow down"}}), "status 429"),
        (Raw(429, "", retry_after="0.01"), "status 429"),
        (Raw(500, "<html>"), "status 500"),
        (Raw(200, "<html>rubbish"), "unreadable reply"),
        (Raw(200, {"choices": []}), "unreadable reply"),
        (Raw(200, [1]), "unreadable reply"),
        (Raw(200, {"choices": ["text"]}), "unreadable reply"),
        (Fault(DROP), "no connection"),
    ],
)
def test_what_fails_is_sent_again(trouble: Reply, reason: str) -> None:
    with serving_chat(in_turn(trouble, trouble, "hi")) as server:
        replies, client = ask(server, [asked()])
    assert replies == ["hi"]
    assert client.retried == {reason: 2}


def test_requests_that_fail_every_time_are_named_and_the_others_answered() -> None:
    def reply(request: dict[str, Any]) -> Reply:
        text = request["messages"][0]["content"]
        return {"a": Raw(500, "broken"), "b": Fault(HANG), "c": "hi"}[text]

    with serving_chat(reply) as server:
        replies, client = ask(server, [asked("a"), asked("b"), asked("c")], retries=1, timeout=0.3)
    assert replies == [
        Failure("status 500", "broken", lasting=False),
        Failure("timeout", "no reply within 0.3 seconds", lasting=False),
        "hi",
    ]
    assert client.retried == {"status 500": 1, "timeout": 1}


def test_a_refused_request_is_not_sent_again() -> None:
    with serving_chat(Raw(400, {"error": {"message": "the prompt is too long"}})) as server:
        replies, client = ask(server, [asked()])
    assert replies == [Failure("status 400", "the prompt is too long", lasting=True)]
    assert len(server.requests) == 1
    assert not client.retried


def test_what_a_server_does_not_take_is_left_out() -> None:
    def reply(request: dict[str, Any]) -> Reply:
        unknown = request.keys() & {"logprobs", "return_token_ids"}
        return Raw(422, {"detail": f"Unexpected fields in the request: {unknown}"}) if unknown else "hi"

    with serving_chat(reply) as server:
        replies, client = ask(server, [asked(logprobs=True, n=2), asked(return_token_ids=True)])
    assert replies == ["hi", "hi"]
    assert client.not_taken == {"logprobs", "return_token_ids"}
    assert server.requests[-1].get("n", 2) == 2


def test_a_refusal_without_a_name_leaves_out_only_what_helps() -> None:
    def reply(request: dict[str, Any]) -> Reply:
        too_long = request["messages"][0]["content"] == "long"
        return Raw(400, "bad request") if too_long or "logprobs" in request else "hi"

    with serving_chat(reply) as server:
        replies, client = ask(server, [asked("long", n=2), asked(logprobs=True)], concurrency=1)
    assert replies == [Failure("status 400", "bad request", lasting=True), "hi"]
    assert client.not_taken == {"logprobs"}


def test_max_tokens_has_a_second_name() -> None:
    both = threading.Barrier(2)

    def reply(request: dict[str, Any]) -> Reply:
        if "max_tokens" in request:
            both.wait(5)  # both are refused before either is sent again
            return Raw(400, {"error": {"message": "'max_tokens' is not supported; use 'max_completion_tokens'"}})
        return str(request["max_completion_tokens"])

    request = Request("chat/completions", {"messages": [], "max_tokens": 7, "logprobs": True}, ("logprobs",))
    with serving_chat(reply) as server:
        replies, client = ask(server, [request, request], concurrency=2)
    assert replies == ["7", "7"]
    assert len(server.requests) == 4
    assert not client.not_taken


def test_a_server_that_is_gone_ends_the_command() -> None:
    with serving_chat(Fault(DROP)) as server, pytest.raises(ConnectionError, match="no connection"):
        ask(server, [asked()] * 100, retries=0, concurrency=2)
    assert len(server.requests) < 20


def test_a_server_that_refuses_everything_ends_the_command() -> None:
    with serving_chat(Raw(400, "temperature must be 1")) as server, pytest.raises(ValueError, match="must be 1"):
        ask(server, [asked()] * 100, concurrency=2)
    assert len(server.requests) < 20


def test_many_refused_prompts_in_a_row_end_nothing() -> None:
    def reply(request: dict[str, Any]) -> Reply:
        return {"hi": "hi", "long": Raw(400, "too long"), "bad": Raw(403, "flagged")}[request["messages"][0]["content"]]

    texts = ["hi", *["long"] * 30, *["bad"] * 30, "hi"]
    with serving_chat(reply) as server:
        replies, _ = ask(server, [asked(text) for text in texts], concurrency=1)
    assert [replies[0], replies[-1]] == ["hi", "hi"]
    assert replies[1] == Failure("status 400", "too long", lasting=True)
    assert replies[31] == Failure("status 403", "flagged", lasting=True)


def test_a_model_that_is_away_for_a_while_is_asked_again() -> None:
    with serving_chat(in_turn("hi", Raw(404, "loading"), Raw(401, "key server is down"), "hi")) as server:
        replies, client = ask(server, [asked()] * 2, concurrency=1)
    assert replies == ["hi", "hi"]
    assert client.retried == {"status 404": 1, "status 401": 1}


@pytest.mark.parametrize(("status", "phrase"), [(401, "MY_KEY"), (404, "no such model")])
def test_a_wrong_key_or_model_ends_the_command_and_no_key_is_shown(
    status: int, phrase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    reply = Raw(status, {"error": {"message": "bad key sk-secret \x1b[31m"}})
    with serving_chat(reply) as server, pytest.raises(ValueError, match=phrase) as error:
        ask(server, [asked()], model="toy", api_key_env="MY_KEY")
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_an_unreadable_reply_is_described_without_names_of_code() -> None:
    for body, words in (
        ("rubbish", "not JSON"),
        ({}, "it lacks 'choices'"),
        ({"choices": []}, "another type or length"),
    ):
        with serving_chat(Raw(200, body)) as server:
            (failure,), _ = ask(server, [asked()], retries=0)
        assert isinstance(failure, Failure)
        assert words in failure.detail
        assert "Error" not in failure.detail


def test_the_only_model_is_asked() -> None:
    with serving_chat("hi") as server:
        ask(server, [asked()])
        assert server.requests[0]["model"] == "toy"
        server.models = ["one", "two"]
        with pytest.raises(ValueError, match="one, two"):
            ask(server, [asked()])
        ask(server, [asked()], model="two")
        assert server.requests[-1]["model"] == "two"


def test_a_server_that_does_not_run_is_named() -> None:
    with serving_chat("hi") as server:
        pass
    with pytest.raises(ConnectionError, match=server.url):
        ask(server, [asked()], retries=1)


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "https://host/v1?key=secret", "host:8000", "http://[", ""])
def test_addresses_without_secrets_alone(url: str) -> None:
    with pytest.raises(ValueError, match="address of a server") as error:
        ServerSettings(url=url)
    assert "secret" not in str(error.value)


def test_the_extra_is_named_where_the_client_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"jdpo\[endpoint\]"):
        ServerClient(ServerSettings(url="http://localhost:8000/v1"))
