"""A command that asks a server is killed at 20 random points: rows are equal, and no whole shard is asked for again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import serving_chat
from tests.conftest import write_jsonl

pytestmark = pytest.mark.full

NUM_PROMPTS, NUM_SAMPLES = 80, 4


def answers(request: dict[str, Any]) -> list[str]:
    """Answers of random lengths, which follow from the prompt and the seed."""
    draw = random.Random(f"{request['prompt']} {request['seed']}")
    return [" ".join(["word"] * draw.randrange(1, 30)) for _ in range(request["n"])]


def run_with_kills(reply: Any, command: list[str], kills: list[int]) -> int:
    """Runs a command until it ends by itself; kills it when so many more requests have come. Returns the requests."""
    running: list[subprocess.Popen[bytes]] = []
    left = list(kills)
    until = 0

    def killing(request: dict[str, Any]) -> Any:
        if left and len(server.requests) == until:
            os.kill(running[-1].pid, signal.SIGKILL)
        return reply(request)

    with serving_chat(killing) as server:
        words = [sys.executable, "-m", "jdpo.cli.main", *(server.url.join(word.split("URL")) for word in command)]
        while True:
            until = len(server.requests) + left[0] if left else -1
            running.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            code = running[-1].wait(120)
            if code == 0:
                assert not left
                return len(server.requests)
            assert code == -signal.SIGKILL
            left.pop(0)


def files_of(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern))}


def test_rows_are_equal_after_20_kills(tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{number}"} for number in range(NUM_PROMPTS)])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    draw = random.Random(0)
    for folder, kills in ((whole, []), (killed, [draw.randrange(1, 8) for _ in range(20)])):
        command = ["generate", "--prompts", str(prompts), "--output_dir", str(folder), "--n", str(NUM_SAMPLES)]
        options = ["--endpoint", "URL", "--endpoint_model", "toy", "--concurrency", "2", "--answers_per_shard", "12"]
        num_requests = run_with_kills(answers, [*command, *options], kills)
        # A kill costs a shard of three questions and two that were begun, at most.
        assert num_requests <= NUM_PROMPTS + 5 * len(kills)
    assert files_of(whole, "answers-*") == files_of(killed, "answers-*")
