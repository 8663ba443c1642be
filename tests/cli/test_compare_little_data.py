"""`jdpo compare` and `jdpo eval` on a single prompt, pair and fact."""

from __future__ import annotations

import json
from pathlib import Path

from jdpo.cli.main import main
from tests.conftest import chat_pairs, write_jsonl


def test_one_prompt_one_pair_one_fact(toy_model: Path, tmp_path: Path) -> None:
    pairs, facts, cache = tmp_path / "pairs.jsonl", tmp_path / "facts.jsonl", str(tmp_path / "cache")
    write_jsonl(pairs, chat_pairs(1))
    write_jsonl(facts, [{"question": "the river", "answer": "slow"}])
    command = ["compare", str(toy_model), str(toy_model), "--pairs", str(pairs), "--facts", str(facts)]
    command += ["--prompts", str(pairs), "--by", "length", "--max_new_tokens", "4", "--cache_dir", cache]
    assert main([*command, "--output_dir", str(tmp_path / "cmp")]) == 0
    (comparison,) = json.loads((tmp_path / "cmp" / "compare.json").read_text())["comparisons"]
    assert {"accuracy", "kl", "win_rate.length_controlled", "facts.accuracy"} <= set(comparison["figures"])
    for name, figure in comparison["figures"].items():
        assert figure["all"]["after"]["low"] is None, name  # one prompt says nothing about others
    assert main(["eval", str(toy_model), "--pairs", str(pairs), "--cache_dir", cache]) == 0
