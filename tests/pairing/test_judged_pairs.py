"""Pairs of answers that a real local server has judged, from score to pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdpo.cli.main import main
from jdpo.pairing import candidates as reasons
from tests.chat_server import Raw, Reply, compared_answers, prefers_first, prefers_long, serving_chat
from tests.pairing.gen_folders import write_gen

SHORT = ("Dublin", "Cork is it", "Galway it is")
LONG = "Let me think about that interesting question for quite a while before I answer that it is the city of"


def judged_pairs(
    folder: Path, reply: Callable[[dict[str, Any]], Reply], *words: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Scores the answers in gen by a judge, if they have no scores yet, and pairs them."""
    with serving_chat(reply) as server:
        scored = (folder / "gen" / "scores" / "judge.json").exists()
        if not scored:
            assert main(["score", str(folder / "gen"), f"--by=judge:{server.url}", "--name=judge"]) == 0
    output = folder / "pairs.jsonl"
    assert main(["pair", str(folder / "gen"), f"--output={output}", *words]) == 0
    report = json.loads((folder / "pairs.report.json").read_text())
    return [json.loads(line) for line in output.read_text().splitlines()], report


def test_a_judge_that_always_says_first_yields_no_pairs(tmp_path: Path) -> None:
    write_gen(tmp_path / "gen", {f"{n}?": SHORT for n in range(4)})
    rows, report = judged_pairs(tmp_path, prefers_first, "--strategy=adjacent")
    assert rows == []
    assert report["pairs"] == {"tried": 8, "kept": 0, "dropped": {reasons.TIED: 8}}
    assert report["prompts"]["dropped"] == {reasons.TIED: 4}


def test_length_control_removes_the_pairs_of_a_judge_that_prefers_long_answers(tmp_path: Path) -> None:
    write_gen(tmp_path / "gen", {f"{n}?": ("Dublin", f"{LONG} Cork", f"{LONG} {LONG} Galway") for n in range(4)})
    rows, report = judged_pairs(tmp_path, prefers_long, "--strategy=adjacent", "--min_margin=0.5")
    assert len(rows) == 8
    assert report["length"]["longer"] == 8
    rows, report = judged_pairs(tmp_path, prefers_long, "--strategy=adjacent", "--max_length_gap=10")
    assert rows == []
    assert report["pairs"]["dropped"] == {reasons.LENGTH_GAP: 8}


def test_answers_without_a_verdict_are_counted(tmp_path: Path) -> None:
    write_gen(tmp_path / "gen", {f"{n}?": ("Dublin", "Galway town", f"bad {n}") for n in range(4)})

    def reply(request: dict[str, Any]) -> Reply:
        return Raw(200, "rubbish") if "bad" in "".join(compared_answers(request)) else prefers_long(request)

    rows, report = judged_pairs(tmp_path, reply, "--min_margin=1")
    assert [row["chosen"][0]["content"] for row in rows] == ["Galway town"] * 4
    assert report["answers"]["dropped"] == {reasons.NO_SCORE: 4}
