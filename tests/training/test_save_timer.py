"""A checkpoint is due once it is `save_minutes` since the last one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jdpo.config import DPOConfig, load_config
from jdpo.training.run import train
from jdpo.training.save_timer import SaveTimer


def test_a_save_is_due_once_per_interval_and_counts_from_the_last_one() -> None:
    now = 0.0
    timer = SaveTimer(2.0, lambda: now)

    def at(seconds: float) -> bool:
        nonlocal now
        now = seconds
        return timer.is_due()

    assert [at(seconds) for seconds in (0, 119, 120, 121, 239, 240)] == [False, False, True, False, False, True]
    now = 300
    timer.restart()  # a save for another reason
    assert [at(seconds) for seconds in (419, 420)] == [False, True]
    assert not SaveTimer(None, lambda: 1e9).is_due()


@pytest.mark.ci
def test_a_run_saves_by_the_clock(run_words: Callable[..., list[str]]) -> None:
    # Every step takes longer than this.
    words = run_words(num_train_epochs=1, save_steps=100, save_minutes=1e-9, save_total_limit=10, export_at_end=False)
    result = train(load_config(DPOConfig, None, words))
    steps = {int(path.parent.name) for path in Path(result.output_dir).glob("checkpoints/*/manifest.json")}
    assert steps == {1, 2, 3}
