"""From a server's answers to pairs by a judge: what a biased judge prefers is not in the pairs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.cli.main import main
from tests.chat_server import prefers_first, prefers_long, serving_chat, verdict
from tests.conftest import write_jsonl


@pytest.fixture
def gen(tmp_path: Path) -> Path:
    """Four answers to each of three questions, of 1, 2, 4 and 8 words."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"question {number}"} for number in range(3)])
    folder = tmp_path / "gen"
    words = ["generate", "--prompts", str(prompts), "--output_dir", str(folder), "--n", "4"]
    with serving_chat(lambda request: [" ".join(["word"] * 2**place) for place in range(request["n"])]) as server:
        assert main([*words, "--endpoint", server.url]) == 0
    return folder


def pairs_by(judge: Callable[[dict[str, Any]], str] | str, gen: Path, *options: str) -> list[dict[str, Any]]:
    output = gen.parent / "pairs.jsonl"
    with serving_chat(judge) as server:
        assert main(["score", str(gen), "--by", f"judge:{server.url}", "--name", "j", "--overwrite"]) == 0
    main(["pair", str(gen), "--output", str(output), *options])
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


@pytest.mark.parametrize("judge", [prefers_first, verdict("second")])
def test_a_judge_of_position_makes_no_pairs(judge: Any, gen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs_by(judge, gen) == []
    # Ties are decided comparisons, in the table as in the docs.
    assert re.search(r"comparisons +18,.*\ndecided +18, ties included\nties +18,", capsys.readouterr().out)


def test_verdicts_that_cannot_be_read_make_no_pairs_and_are_counted(
    gen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pairs_by("I cannot decide.", gen) == []
    about = json.loads((gen / "scores" / "j.json").read_text())
    assert (about["num_scores"], about["nulls"]) == (0, {"unreadable verdict": 12})
    # Six comparisons of four answers, in both orders, for each of three questions.
    assert about["counts"] == {"replies without a verdict": 36}
    assert "replies without a verdict" in capsys.readouterr().out


def test_a_judge_of_length_makes_pairs_that_a_limit_takes_out(gen: Path) -> None:
    pairs = pairs_by(prefers_long, gen)
    assert [(pair["sample_chosen"], pair["sample_rejected"], pair["margin"]) for pair in pairs] == [(3, 0, 1.0)] * 3
    (gen.parent / "pairs.jsonl").unlink()
    assert pairs_by(prefers_long, gen, "--max_length_gap", "0") == []
