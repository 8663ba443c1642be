"""`jdpo generate` with --endpoint and --serve."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jdpo.cli.main import main
from jdpo.generation.answer_files import read_answers
from tests.chat_server import DROP, Fault, Raw, Reply, serving_chat
from tests.conftest import write_jsonl

ROOT = Path(__file__).resolve().parents[2]

SERVER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.chat_server import serving_chat

print("serving", sys.argv[1], flush=True)
with serving_chat("served", port=int(sys.argv[2])) as server:
    server.models[:] = [sys.argv[1]]
    time.sleep(1000)
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    rows = [{"prompt": [{"role": "user", "content": f"question {number}"}], "answer": number} for number in range(6)]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    return [
        *("generate", "--prompts", str(prompts), "--output_dir", str(tmp_path / "gen")),
        *("--n", "2", "--answers_per_shard", "4"),
    ]


def echo(request: dict[str, Any]) -> str:
    return f"{request['messages'][-1]['content']}, {request['seed']}"


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gen" / "manifest.json").read_text())
    return found


def test_a_server_answers_the_prompts(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs = ["--chat_template_kwargs", "{enable_thinking: false}", "--max_new_tokens", "9"]
    with serving_chat(echo) as server:
        assert main([*words, "--endpoint", server.url, "--concurrency", "2", *kwargs]) == 0
    _, questions, answers = read_answers(tmp_path / "gen")
    assert [answer.message["content"].split(",")[0] for answer in answers] == [
        f"question {number}" for number in range(6) for _ in range(2)
    ]
    assert [question.columns for question in questions.values()] == [{"answer": number} for number in range(6)]
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.requests[0]["max_tokens"] == 9
    manifest = manifest_of(tmp_path)
    assert manifest["source"] == {"served_model": "toy", "template_kwargs": {"enable_thinking": False}}
    assert "done: 12 answers" in capsys.readouterr().out


def test_a_server_that_fails_loses_no_answer(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trouble: dict[str, Reply] = {"question 4": Raw(500, "broken"), "question 5": Raw(400, "too long")}

    def reply(request: dict[str, Any]) -> Reply:
        return trouble.get(request["messages"][0]["content"], echo(request))

    with serving_chat(reply) as server:
        words += ["--endpoint", server.url, "--retries", "0"]
        assert main(words) == 1
        shown = capsys.readouterr().err
        assert "2 answers missing: status 500 (1 prompt: " in shown
        assert "prompts.jsonl:6" in shown
        del trouble["question 4"]
        num_requests = len(server.requests)
        assert main(words) == 0
    assert {request["messages"][0]["content"] for request in server.requests[num_requests:]} == {"question 4"}
    assert manifest_of(tmp_path)["unanswered"] == {"status 400": 2}
    assert len(read_answers(tmp_path / "gen").answers) == 10


def test_a_server_that_goes_away_ends_the_command_and_the_next_one_continues(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{number}"} for number in range(40)])
    words[2] = str(prompts)
    gone = False

    def reply(request: dict[str, Any]) -> Reply:
        return Fault(DROP) if gone and len(server.requests) > 10 else request["prompt"]

    with serving_chat(reply) as server:
        words += ["--endpoint", server.url, "--retries", "0", "--concurrency", "1"]
        gone = True
        assert main(words) == 1
        assert "same command continues" in capsys.readouterr().err
        assert not manifest_of(tmp_path)["complete"]
        gone = False
        assert main(words) == 0
    assert [answer.message["content"] for answer in read_answers(tmp_path / "gen").answers] == [
        f"{number}" for number in range(40) for _ in range(2)
    ]


def test_a_served_model_answers_and_no_server_starts_for_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    words[1:1] = [str(tmp_path / "run")]
    words += ["--serve", f"{sys.executable} {tmp_path / 'server.py'} {{model}} {{port}} --api-key s3cret"]
    assert main(words) == 0
    assert [answer.message["content"] for answer in read_answers(tmp_path / "gen").answers] == ["served"] * 12
    assert (tmp_path / "gen" / "server.log").read_text() == f"serving {model}\n"
    manifest = manifest_of(tmp_path)
    assert (*manifest["source"], manifest["about"]["model"]) == ("model_digest", str(model))
    shown = capsys.readouterr().err
    assert "server: started" in shown
    assert "s3cret" not in shown + (tmp_path / "gen" / "manifest.json").read_text()

    assert main(words) == 0
    assert "server: started" not in capsys.readouterr().err

    (model / "chat_template.jinja").write_text("another")
    assert main(words) == 2
    assert "source.model_digest" in capsys.readouterr().err


def test_a_server_that_does_not_start_shows_why(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words[1:1] = ["some/model"]
    assert main([*words, "--serve", "sh -c 'echo no memory for {model}, {port}; exit 1'"]) == 1
    assert "no memory for some/model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "phrase"),
    [
        ([], "MODEL"),
        (["toy", "--endpoint", "http://localhost/v1"], "leave MODEL out"),
        (["toy", "--concurrency", "4"], "--concurrency is an option of --endpoint"),
        (["toy", "--serve", "serve {port}", "--endpoint", "http://localhost/v1"], "one of them"),
        (["--serve", "serve {model} {port}"], "expected MODEL"),
        (["toy", "--serve", "serve {model}"], "{port}"),
        (["--endpoint", "http://localhost/v1", "--mesh.fsdp", "2"], "--mesh.fsdp is read for a MODEL"),
        (["--endpoint", "http://localhost/v1", "--dtype", "float32"], "--dtype is read for a MODEL"),
        (["--endpoint", "http://localhost/v1", "--serve_timeout", "2"], "option of --serve"),
        (["--endpoint", "http://me:secret@localhost/v1"], "password"),
        (["--endpoint", "http://localhost/v1", "--concurrency", "0"], "concurrency"),
        ([".", "--serve", "serve {model} {port}"], "jdpo export"),
    ],
)
def test_options_that_do_not_go_together(
    given: list[str], phrase: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words[:1], *given, *words[1:]]) == 2
    shown = capsys.readouterr().err
    assert phrase in shown
    assert "secret" not in shown
    assert not (tmp_path / "gen").exists()
