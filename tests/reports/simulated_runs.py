"""Lines of metrics.jsonl of preference runs that never trained: margins are drawn, with the noise of real batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jdpo.config import CONFIGS, load_config, to_public_yaml
from jdpo.training.run_record import RunRecord

BETA = 0.1


def simulated(
    margin: Callable[[float], float],
    *,
    seed: int = 0,
    spread: Callable[[float], float] = lambda done: 1.0 * done,
    chosen: Callable[[float], float] = lambda done: 0.0,
    held_out_margin: Callable[[float], float] | None = None,
    num_steps: int = 200,
    logging_steps: int = 10,
    eval_steps: int = 50,
    batch_size: int = 16,
    num_eval_rows: int = 200,
) -> list[dict[str, Any]]:
    """Draws a run.

    Args:
      margin: mean margin of the training pairs after a part of the run, 0 to 1.
      spread: standard deviation of a pair's margin.
      chosen: change of the chosen log-prob, in nats.
      held_out_margin: mean margin of the held-out pairs; None: there are none.
    """
    rng, lines, window = np.random.default_rng(seed), [], []
    # The same pairs each time, as in an evaluation.
    of_pair = rng.normal(size=num_eval_rows)
    for step in range(1, num_steps + 1):
        done = step / num_steps
        before = (step - 1) / num_steps
        margins = margin(before) + spread(before) * rng.normal(size=batch_size)
        window.append(metrics(margins, chosen(before) + 3 * before * rng.normal(size=batch_size)))
        if step % logging_steps == 0:
            averages = {name: float(np.mean([one[name] for one in window])) for name in window[0]}
            norms = {"grad_norm": float(rng.lognormal()), "grad_clipped": 0.1}
            lines.append({"step": step, **averages, **norms, "learning_rate": 1e-6})
            window = []
        if held_out_margin is not None and step % eval_steps == 0:
            margins = held_out_margin(done) + spread(done) * of_pair
            found = metrics(margins, chosen(done) + 3 * done * of_pair)
            lines.append({"step": step, **{f"eval_{name}": value for name, value in found.items()}})
    return lines


def metrics(margins: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """Returns the metrics of pairs with these margins [b] and changes of the chosen log-prob [b], in nats."""
    return {
        "loss": float(np.logaddexp(0, -margins).mean()),
        "rewards/accuracies": float((margins > 0).mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/chosen": BETA * float(chosen.mean()),
        "rewards/rejected": BETA * float(chosen.mean()) - float(margins.mean()),
        "logps/chosen": -100.0 + float(chosen.mean()),
    }


def write_run(folder: Path, *, finished: bool = True, ended: str | None = None) -> Path:
    """Writes the folder of a run of 40 steps, without model and checkpoints.

    Args:
      ended: as in run.json.
    """
    folder.mkdir(parents=True)
    lines = simulated(lambda done: done, num_steps=40, eval_steps=20, held_out_margin=lambda done: done)
    record = RunRecord(command="dpo", jdpo="0.2.0", finished=finished, num_steps=40, results={"step": 40})
    (folder / "run.json").write_text(json.dumps({**vars(record), "fit": None, "given_up": [], "ended": ended}))
    config = load_config(CONFIGS["dpo"], None, ["model_name_or_path=m", "datasets=p.jsonl", f"output_dir={folder}"])
    (folder / "resolved_config.yaml").write_text(to_public_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = {"step": 0, "prompt_id": "p", "prompt": "Who?", "message": {"role": "assistant", "content": "Me."}}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    return folder
