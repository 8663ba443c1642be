"""Two processes on loopback draw answers together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jdpo.config import MeshConfig
from tests.integration.cluster import run_cluster
from tests.integration.draw_by_two import draw

MODEL = Path(__file__).parents[1] / "golden" / "logits" / "qwen3"


@pytest.mark.full
def test_two_processes_have_the_answers_of_one(tmp_path: Path) -> None:
    ends = run_cluster([[Path(__file__).parent / "draw_by_two.py", MODEL, tmp_path]] * 2)
    assert [end.code for end in ends] == [0, 0], ends
    first, second = (json.loads((tmp_path / str(index)).read_text()) for index in range(2))
    assert first == second
    alone = draw(MODEL, MeshConfig(data=2, fsdp=2, tensor=2))
    assert [answer[2] for answer in first] == [answer.tokens for answer in alone]
