"""The example datasets: their generators write them again, and their cards tell the truth about them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from jdpo.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"
DATASETS = ["word_bias", "chat_style"]
SUPERVISED = {"word_bias": "corpus.jsonl", "chat_style": "sft.jsonl"}
TEMPLATES = {"word_bias": "chatml", "chat_style": ROOT / "examples/data/chatml_tools.jinja"}
WARNINGS = {("word_bias", "sft"): {"same_row"}}
"""The corpus repeats its answers on purpose: their frequencies are what a model learns."""


def python(*words: str | Path) -> str:
    """Runs a script as its user would, in the root of the project, and returns what it prints."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", DATASETS)
def test_the_generator_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    python(DATA / f"make_{name}.py", tmp_path)
    shipped = {path.name: path.read_bytes() for path in (DATA / name).glob("*.jsonl")}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shipped


@pytest.mark.parametrize("name", DATASETS)
def test_the_card_tells_files_rows_and_lengths(name: str) -> None:
    card = (DATA / name / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "apache-2.0"
    files = {path.name: read_rows(path) for path in (DATA / name).glob("*.jsonl")}
    assert {file: int(number) for file, number in re.findall(r"^\| `(\S+)` \| (\d+) \|", card, re.MULTILINE)} == {
        file: len(rows) for file, rows in files.items()
    }
    (block,) = re.findall(r"```json\n(.*)\n```", card)
    assert json.loads(block) in files["pairs.jsonl"]
    for file in ("pairs.jsonl", "held_out_pairs.jsonl"):
        assert python(DATA / "lengths.py", DATA / name / file).strip() in card


@pytest.mark.parametrize("name", DATASETS)
def test_inspect_finds_no_fault_and_no_leak(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python(DATA / "make_model.py", tmp_path / "tiny", DATA / name / SUPERVISED[name], DATA / name / "pairs.jsonl")
    capsys.readouterr()
    words = [f"--model_name_or_path={tmp_path / 'tiny'}", f"--cache_dir={tmp_path / 'cache'}", "--strict", "--json"]
    words += [f"--chat_template={TEMPLATES[name]}"]
    for stage in ("sft", "dpo"):
        assert main(["inspect", str(ROOT / f"configs/{name}_{stage}.yaml"), f"--task={stage}", *words]) == 0
        document = json.loads(capsys.readouterr().out)
        warnings = {found["name"] for found in document["findings"] if found["severity"] != "note"}
        assert warnings == WARNINGS.get((name, stage), set())
        assert document["train"]["rows_kept"] == document["train"]["rows_read"] > 0


def test_links_of_the_cards_lead_somewhere() -> None:
    for page in DATA.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page, link)


def test_no_prompt_is_in_two_files_of_the_chats() -> None:
    rows = {file: read_rows(DATA / "chat_style" / f"{file}.jsonl") for file in ("sft", "pairs", "held_out_pairs")}
    prompts = {file: {str(row.get("prompt") or row["messages"][:-1]) for row in own} for file, own in rows.items()}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == sum(map(len, rows.values()))


@pytest.mark.ci
def test_the_data_are_in_the_sdist_and_not_in_the_wheel(tmp_path: Path) -> None:
    from uv import find_uv_bin

    subprocess.run([find_uv_bin(), "build", "--out-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = [path for path in DATA.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(ROOT).as_posix() for path in wanted} <= packed
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert {name.partition("/")[0].partition("-")[0] for name in wheel.namelist()} == {"jdpo"}


@pytest.mark.ci
@pytest.mark.parametrize("name", DATASETS)
def test_datasets_loads_a_folder_by_its_card(name: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    pairs = load_dataset(str(DATA / name), cache_dir=str(tmp_path))
    assert pairs["train"].to_list()[0]["prompt"] == read_rows(DATA / name / "pairs.jsonl")[0]["prompt"]
    assert len(pairs["test"]) == len(read_rows(DATA / name / "held_out_pairs.jsonl"))


@pytest.mark.ci
def test_the_recipe_of_word_bias_corrects_a_country_that_no_pair_mentions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    python(DATA / "make_model.py", tmp_path / "runs/tiny", DATA / "word_bias/corpus.jsonl")
    for stage in ("sft", "dpo"):
        assert main([stage, str(ROOT / f"configs/word_bias_{stage}.yaml"), f"--cache_dir={tmp_path / 'cache'}"]) == 0
    run = tmp_path / "runs/word_bias/dpo"
    assert read_rows(run / "metrics.jsonl")[-1]["eval_rewards/accuracies"] > 0.95
    answers = {(row["prompt"][-1]["content"], row["step"]): row for row in read_rows(run / "samples.jsonl")}
    brazil, australia = (f"What is the capital of {country}?" for country in ("Brazil", "Australia"))
    # The answers are the most probable ones.
    assert answers[australia, 0]["message"]["content"] == "Sydney"
    assert answers[australia, 60]["message"]["content"] == "Canberra"
    assert answers[brazil, 0]["message"]["content"] == "Sao Paulo"
    assert answers[brazil, 60]["message"]["content"] == "Brasilia"
