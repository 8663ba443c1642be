"""One of several processes of a run with rows and callbacks of Python code, one of which asks to stop.

python callbacks_by_two.py MODEL FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import pytest

import jdpo
from jdpo.processes import ending_together, join_cluster


class Fail(jdpo.Callback):
    """Fails on the second process, and samples on every process as long as it is called."""

    def on_step(self, run: jdpo.RunView) -> None:
        if jax.process_index() == 1:
            raise KeyError("mine")

    def on_log(self, run: jdpo.RunView, metrics: Mapping[str, float]) -> None:
        run.sample([[{"role": "user", "content": "river"}]], max_new_tokens=3)


class Ask(jdpo.Callback):
    """Samples on every process; the second one stops the run."""

    def __init__(self) -> None:
        self.answers: list[list[int]] = []

    def on_step(self, run: jdpo.RunView) -> None:
        if run.step == 1:
            (answers,) = run.sample([[{"role": "user", "content": "river"}]], n=2, max_new_tokens=3)
            self.answers = [answer.tokens for answer in answers]
        if run.step == 2 and jax.process_index() == 1:
            run.stop("enough")


def main(model: str, folder: Path) -> None:
    config = jdpo.DPOConfig(
        model_name_or_path=model,
        output_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        max_length=64,
        global_batch_size=8,
        max_steps=8,
        logging_steps=1,
        remat="none",
        reference="live",
        mesh={"data": 8, "fsdp": 1},
    )
    # Each process has other rows, as with a random order without a seed; those of the first one count.
    first = jax.process_index() * 100
    rows = [{"prompt": f"river {n}", "chosen": " slow", "rejected": " seven"} for n in range(first, first + 24)]
    for name, callbacks, expected in (
        ("unlike", [Fail()] * jax.process_index(), "have different callbacks"),
        ("failed", [Fail()], "mine"),
    ):
        with pytest.raises((KeyError, ValueError), match=expected):
            jdpo.train(
                dataclasses.replace(config, output_dir=str(folder / name)), train_dataset=rows, callbacks=callbacks
            )
    ask = Ask()
    stopped = jdpo.train(config, train_dataset=rows, callbacks=[ask])
    found = [stopped.step, stopped.stopped, stopped.interrupted, ask.answers]
    done = jdpo.train(config, train_dataset=rows)
    found += [done.step, done.metrics["loss"].round(6).tolist()]
    (folder / f"result-{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    join_cluster()
    with ending_together(str):
        main(sys.argv[1], Path(sys.argv[2]))
