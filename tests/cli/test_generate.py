"""`jdpo generate` on a toy."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import jdpo
from jdpo.cli.failures import leaving_on_signals
from jdpo.cli.main import main
from jdpo.config import DatasetConfig
from jdpo.generation.answer_files import read_answers, read_unanswered
from jdpo.generation.asking.model_source import TOO_LONG, ModelSource
from jdpo.generation.loaded_model import LoadedModel
from jdpo.generation.prompts import read_prompts
from jdpo.generation.values import Sampling
from jdpo.generation.writing import write_answers
from tests.conftest import chat_pairs, write_jsonl

Capture = pytest.CaptureFixture[str]

SAMPLING = Sampling(top_p=0.9, max_new_tokens=6, seed=3)
SHARD = 8
N = 2


@pytest.fixture(scope="module")
def model(toy_model: Path) -> LoadedModel:
    return jdpo.load(toy_model)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten prompts, one of them too long for the model, of three schemas."""
    rows: list[dict[str, Any]] = [*chat_pairs(7, words=(3, 5)), {"prompt": "slow river", "answer": "green"}]
    rows += [{"prompt": "bread " * 300}, {"messages": [{"role": "user", "content": "paper"}]}, {"prompt": "slow river"}]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "p.jsonl", rows)


def words(model: Path, prompts: Path, folder: Path, *more: str) -> list[str]:
    given = ["--prompts", str(prompts), "--output_dir", str(folder), "--n", str(N), "--top_p", "0.9", "--seed", "3"]
    return ["generate", str(model), *given, "--max-new-tokens", "6", "--answers_per_shard", str(SHARD), *more]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", "manifest.json")}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    del found["about"]
    return found


def asked(source: ModelSource, prompts_file: Path, folder: Path) -> None:
    prompts = read_prompts(DatasetConfig(path=str(prompts_file)))
    settings: dict[str, Any] = {"sampling": SAMPLING, "num_samples": N, "answers_per_shard": SHARD}
    write_answers(folder, prompts, source, log=lambda _: None, **settings)


@pytest.fixture(scope="module")
def whole(model: LoadedModel, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of one device."""
    folder = tmp_path_factory.mktemp("answers") / "whole"
    asked(ModelSource(model, SAMPLING), prompts_file, folder)
    return folder


def test_eight_devices_write_the_bytes_of_one(
    toy_model: Path, prompts_file: Path, whole: Path, tmp_path: Path, capsys: Capture
) -> None:
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert main(words(toy_model, prompts_file, tmp_path / "gen", *mesh)) == 0
    assert content(tmp_path / "gen") == content(whole)
    assert manifest(tmp_path / "gen") == manifest(whole)
    shown = capsys.readouterr()
    assert f"done: 18 answers in {tmp_path / 'gen'}" in shown.out
    for line in (
        "prompts: 10 questions from 11 rows",
        "1 row repeated a prompt",
        "on 8 devices",
        "2 prompts in plain text",
        f"2 answers missing: {TOO_LONG} (1 prompt: p.jsonl:9)",
    ):
        assert line in shown.err, line


def test_the_answers_are_those_of_the_model(model: LoadedModel, whole: Path) -> None:
    found = read_answers(whole)
    assert found.manifest.source["model_digest"] == model.digest
    assert found.manifest.unanswered == {TOO_LONG: 2}
    assert [one.sample for one in read_unanswered(whole, 2)] == [0, 1]
    for question in list(found.questions.values())[:2]:
        again = model.generate(question.prompt, n=N, max_new_tokens=6, top_p=0.9, seed=3)
        stored = [answer for answer in found.answers if answer.prompt_id == question.prompt_id]
        assert [one._replace(logp=round(one.logp or 0, 4)) for one in again] == stored
    text = next(question for question in found.questions.values() if question.prompt == "slow river")
    assert text.columns == {"answer": "green"}


def test_the_manifest_says_what_may_change_an_answer(toy_model: Path, model: LoadedModel) -> None:
    exact = ModelSource(model, SAMPLING).describe()
    half = ModelSource(
        jdpo.load(toy_model, dtype="bfloat16", mesh=jdpo.MeshConfig(data=8, fsdp=1)), SAMPLING
    ).describe()
    assert "note" not in exact
    assert "may change an answer" in half["note"]
    assert (half["mesh"], exact["about"]["mesh"]) == ({"data": 8}, {})
    assert half["model_digest"] == exact["model_digest"]


@pytest.mark.parametrize("point", [1, 5, 9, 17])
def test_a_stop_within_a_shard_changes_no_byte(
    model: LoadedModel, prompts_file: Path, whole: Path, tmp_path: Path, point: int
) -> None:
    left = point

    def stop(_: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(ModelSource(model, SAMPLING, stop), prompts_file, tmp_path / "gen")
    assert len(manifest(tmp_path / "gen")["shards"]) == (point - 1) // SHARD
    asked(ModelSource(model, SAMPLING), prompts_file, tmp_path / "gen")
    assert (content(tmp_path / "gen"), manifest(tmp_path / "gen")) == (content(whole), manifest(whole))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "-1"], "temperature: expected 0"),
        (["--top_p", "1.5"], "top_p: expected a probability"),
        (["--n", "0"], "n: expected 1 or more"),
        (["--num_prompts", "0"], "num_prompts: expected 1 or more"),
        (["--answers_per_shard", "0"], "answers_per_shard: expected 1 or more"),
        (["--column_map", "prompt"], "--column_map: expected a mapping in YAML"),
        (["--column_map", "{prompt: q}"], "column_map takes 'prompt' from 'q', which the row lacks"),
        (["--split", "test"], "a file has one split"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--prompts", " "], "it is empty"),
        (["--max_new_token", "3"], "unrecognized arguments: --max_new_token"),
    ],
)
def test_bad_input_is_named_before_the_model_is_read(
    prompts_file: Path, tmp_path: Path, capsys: Capture, more: list[str], message: str
) -> None:
    assert main(words(tmp_path / "no_model", prompts_file, tmp_path / "gen", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "gen").exists()


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_unknown_columns_get_advice_that_fits_the_command(
    command: str, toy_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"query": "One"}])
    models = {"generate": ["no_model"], "compare": [str(toy_model), str(toy_model)]}
    given = ["--prompts", str(queries), "--output_dir", str(tmp_path / "out")]
    advice = {"generate": "give this mapping as --column_map", "compare": "rename these columns"}
    assert main([command, *models[command], *given]) == 2
    message = capsys.readouterr().err
    assert advice[command] in message
    assert "    prompt: query" in message
    assert "in the config" not in message


def test_prompts_that_all_are_too_long_are_an_error(toy_model: Path, tmp_path: Path, capsys: Capture) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "river " * 300}])
    assert main(words(toy_model, long, tmp_path / "gen")) == 1
    assert "done: 0 answers" in capsys.readouterr().out


def test_one_process_of_several_is_refused(
    prompts_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = {"JAX_COORDINATOR_ADDRESS": "localhost:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    assert main(words(tmp_path / "no_model", prompts_file, tmp_path / "gen")) == 2
    assert "runs in one process, and this one is one of 2" in capsys.readouterr().err


def test_sigterm_ends_the_command_in_order(capsys: Capture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, leaving_on_signals("the same command continues"):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert "the same command continues" in capsys.readouterr().err


# --- real processes


def process(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts the command on one device."""
    # A shell that starts the tests in the background lets them, and their children, ignore SIGINT.
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from jdpo.cli.main import main; sys.exit(main(sys.argv[1:]))"
    flags = {"XLA_FLAGS": ""}
    return subprocess.Popen([sys.executable, "-c", code, *command], env={**os.environ, **flags}, **options)


def _long_words(toy_model: Path, folder: Path, output: str) -> list[str]:
    prompts = folder / "many.jsonl"
    if not prompts.exists():
        write_jsonl(prompts, chat_pairs(120, words=(3, 5)))
    return words(toy_model, prompts, folder / output, "--max_new_tokens", "60")


@pytest.fixture(scope="module")
def uninterrupted(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder of 240 answers in 30 shards, and the seconds that they took, start of the process included."""
    folder = tmp_path_factory.mktemp("long")
    assert process(_long_words(toy_model, folder, "warm")).wait() == 0  # compiles
    started = time.monotonic()
    assert process(_long_words(toy_model, folder, "whole")).wait() == 0
    return folder, time.monotonic() - started


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_a_process_killed_at_a_random_moment_changes_no_byte(
    toy_model: Path, uninterrupted: tuple[Path, float], seed: int
) -> None:
    folder, seconds = uninterrupted
    killed = process(_long_words(toy_model, folder, f"cut{seed}"))
    with pytest.raises(subprocess.TimeoutExpired):
        killed.wait(random.Random(seed).uniform(0.2, 0.9) * seconds)
    killed.kill()
    killed.wait()
    assert process(_long_words(toy_model, folder, f"cut{seed}")).wait() == 0
    assert content(folder / f"cut{seed}") == content(folder / "whole")
    assert manifest(folder / f"cut{seed}") == manifest(folder / "whole")


@pytest.mark.full
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_process_with_the_code_of_shells(
    toy_model: Path, uninterrupted: tuple[Path, float], signum: int, code: int
) -> None:
    folder, _ = uninterrupted
    output = folder / f"signal{signum}"
    stopped = process(_long_words(toy_model, folder, output.name), stderr=subprocess.PIPE)
    while not (output / "answers-00001.jsonl.gz").exists():
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signum)
    _, errors = stopped.communicate()
    assert (stopped.returncode, b"Traceback" in errors) == (code, False)
    assert b"stopped; the same command continues" in errors
    assert not [*output.glob("*.tmp")]
