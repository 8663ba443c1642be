"""`jdpo chat` with a real model: messages and commands from a pipe, two models, Ctrl-C, foreign text."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

import jdpo
from jdpo.cli.main import main
from jdpo.generation.chat.chat_view import ChatView
from jdpo.generation.chat.session import COMMANDS, ChatSession
from jdpo.generation.chat.speaker import Speaker
from jdpo.generation.loaded_model import LoadedModel
from jdpo.generation.values import Sampling
from jdpo.json_files import read_json, write_json

SAMPLING = Sampling(max_new_tokens=6, temperature=0.7)


@pytest.fixture(scope="module")
def loaded(toy_model: Path) -> LoadedModel:
    return jdpo.load(toy_model)


@pytest.fixture(scope="module")
def plain(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The toy without its chat template."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    shutil.copytree(toy_model, folder)
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {key: config[key] for key in config if key != "chat_template"})
    return jdpo.load(folder)


def session_of(models: Sequence[LoadedModel], out: io.StringIO, *, width: int = 120) -> ChatSession:
    console = Console(file=out, width=width, color_system=None)
    names = [f"model {number}" for number in range(len(models))]
    return ChatSession([Speaker(model) for model in models], ChatView(console, names), SAMPLING)


def answer_to(session: ChatSession, out: io.StringIO, line: str) -> str:
    """Returns what a line makes the session print."""
    before = len(out.getvalue())
    session.take(line)
    return out.getvalue()[before:]


def test_a_second_model_that_is_not_there_is_found_before_the_first_is_loaded(
    toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(toy_model), "./missing"]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "./missing" in told


def test_a_pipe_is_a_conversation(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["winter \\", "river", "/nonsense", "/save rows.jsonl", "/quit", "never asked"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    monkeypatch.chdir(tmp_path)
    assert main(["chat", str(toy_model), "--max_new_tokens", "6", "--temperature", "0.7"]) == 0
    out = capsys.readouterr().out
    assert "> winter \nriver\n" in out
    assert "there is no command /nonsense" in out
    assert "never asked" not in out
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["messages"][0] == {"role": "user", "content": "winter \nriver"}
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_an_answer_is_that_of_generate_and_retry_draws_the_next(loaded: LoadedModel) -> None:
    out = io.StringIO()
    session = session_of([loaded], out)
    messages = [{"role": "user", "content": "winter"}]
    drawn = loaded.generate(messages, n=2, max_new_tokens=6, temperature=0.7)
    for command, answer in zip(("winter", "/retry"), drawn, strict=True):
        answer_to(session, out, command)
        exchange = session.conversations[0].last
        assert exchange.answer.strip() == answer.message["content"].strip()
        assert exchange.end == answer.finish_reason
    assert len(session.conversations[0].exchanges) == 1


def test_logps_and_next_tokens_are_shown_with_their_sums(loaded: LoadedModel) -> None:
    out = io.StringIO()
    session = session_of([loaded], out)
    assert "no message yet" in answer_to(session, out, "/next")
    assert "no message yet" in answer_to(session, out, "/logp green")
    answer_to(session, out, "winter")
    shown = answer_to(session, out, "/logp green")
    found = loaded.logps([{"role": "user", "content": "winter"}], "green")
    assert (
        f"sum {found.total:.3f}, mean {found.total / len(found.logps):.3f} per token, {len(found.logps)} tokens"
        in shown
    )
    first = loaded.next_tokens([{"role": "user", "content": "winter"}], 1, start="green")[0]
    assert f"{100 * math.exp(first.logp):.2f} %" in answer_to(session, out, "/next green")
    assert "begins with 'green'" in out.getvalue()


def test_settings_are_checked_and_shown(loaded: LoadedModel) -> None:
    out = io.StringIO()
    session = session_of([loaded], out)
    answer_to(session, out, "/seed 4")
    answer_to(session, out, "/max 5")
    assert "expected a number, found 'hot'" in answer_to(session, out, "/temperature hot")
    assert "expected a probability" in answer_to(session, out, "/top_p 3")
    assert session.sampling == Sampling(seed=4, max_new_tokens=5, temperature=0.7)
    assert "seed 4" in answer_to(session, out, "/seed")
    answer_to(session, out, "/system Be kind.")
    assert session.conversations[0].prompt_of("Hi") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    answer_to(session, out, "/system none")
    assert session.conversations[0].system is None
    assert "did you mean 'reset'" in answer_to(session, out, "/rset")
    assert "needs two models" in answer_to(session, out, "/choose 1")
    listed = answer_to(session, out, "/help")
    assert all(f"/{name}" in listed for name, command in COMMANDS.items() if not command.for_two)


def test_a_conversation_that_is_too_long_is_left_as_it_was(loaded: LoadedModel) -> None:
    out = io.StringIO()
    session = session_of([loaded], out)
    assert "/undo or /reset shortens it" in answer_to(session, out, "winter " * 400)
    assert not session.conversations[0].exchanges


def test_two_models_answer_and_a_choice_becomes_a_pair(loaded: LoadedModel, plain: LoadedModel, tmp_path: Path) -> None:
    out = io.StringIO()
    session = session_of([loaded, loaded], out)
    shown = answer_to(session, out, "winter")
    assert "1 model 0" in shown.splitlines()[0]
    assert "2 model 1" in shown.splitlines()[0]
    # The same model with the same seed gives the same answer.
    assert session.conversations[0] == session.conversations[1]
    session.conversations = [
        conversation.undone().answered("winter", answer, "stop")
        for conversation, answer in zip(session.conversations, ("paper", "stone"), strict=True)
    ]
    assert "are no pair" not in answer_to(session, out, "/choose 2")
    assert [conversation.last.answer for conversation in session.conversations] == ["stone", "stone"]
    path = tmp_path / "pairs.jsonl"
    answer_to(session, out, f"/save {path}")
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "prompt": [{"role": "user", "content": "winter"}],
        "chosen": [{"role": "assistant", "content": "stone"}],
        "rejected": [{"role": "assistant", "content": "paper"}],
    }
    assert "no pairs to save" in answer_to(session, out, f"/save {path}")
    # In a narrow terminal one after the other.
    narrow = io.StringIO()
    lines = answer_to(session_of([loaded, plain], narrow, width=50), narrow, "winter").splitlines()
    assert lines[0] == "1 model 0"
    assert "2 model 1" in lines[1:]


def test_a_model_without_a_template_continues_text(plain: LoadedModel) -> None:
    out = io.StringIO()
    session = session_of([plain], out)
    answer_to(session, out, "The winter is")
    assert session.conversations[0].last_prompt == "The winter is"
    assert "after the text 'A river':" in answer_to(session, out, "/next A river")
    shown = " ".join(answer_to(session, out, "/system Be kind.").split())
    assert "needs a chat template" in shown
    assert "--chat_template chatml" in shown


class Interrupted(io.StringIO):
    """A terminal whose user presses Ctrl-C once, when the first text appears."""

    done = False

    def write(self, text: str) -> int:
        written = super().write(text)
        if text.strip() and not self.done:
            self.done = True
            raise KeyboardInterrupt
        return written


def test_ctrl_c_stops_the_answer_and_what_came_is_kept(loaded: LoadedModel) -> None:
    session = session_of([loaded], Interrupted())
    session.take("winter")
    (exchange,) = session.conversations[0].exchanges
    assert exchange.end == "interrupted"
    assert exchange.answer
    assert not session.ended


def test_text_of_a_model_moves_no_cursor() -> None:
    out = io.StringIO()
    view = ChatView(Console(file=out, width=80), ["a\x1b[2J[bold]"])

    def pieces() -> Generator[str, None, None]:
        yield from ("[red]\x1b[31m", "line\nnext\u202e")

    assert view.answers([pieces()]) == (["[red]\x1b[31mline\nnext\u202e"], False)
    assert out.getvalue() == "[red]\\x1b[31mline\nnext\\u202e\n"
