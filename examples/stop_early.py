"""A callback that reads answers as the model learns, and stops the run when held-out pairs are ranked well enough.

A stopped run has a checkpoint: `jdpo.load` opens it, and the same call of `jdpo.train` continues it.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import jdpo

SKIES = ["morning", "noon", "evening", "night", "spring", "summer", "autumn", "winter"]
ROWS = [
    {"prompt": f"The sky in the {time} is", "chosen": f" {good}.", "rejected": f" {bad}."}
    for time in SKIES
    for good, bad in (("blue", "green"), ("wide", "narrow"), ("high", "low"))
]


class StopEarly(jdpo.Callback):
    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy

    def on_evaluate(self, run: jdpo.RunView, metrics: Mapping[str, float]) -> None:
        ((answer,),) = run.sample(["The sky in the night is"], temperature=0, max_new_tokens=8)
        found = metrics["eval_rewards/accuracies"]
        print(f"step {run.step}: accuracy {found:.2f}, answer {answer.text!r}")
        if found >= self.accuracy:
            run.stop(f"held-out accuracy {found:.2f}")


def main(folder: Path) -> jdpo.RunResult:
    model = jdpo.random_model(folder / "toy", [text for row in ROWS for text in row.values()])
    config = jdpo.DPOConfig(
        model_name_or_path=str(model),
        output_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        max_steps=200,
        global_batch_size=6,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_steps=2,
        max_length=64,
    )
    result = jdpo.train(config, train_dataset=ROWS[:-6], eval_dataset=ROWS[-6:], callbacks=[StopEarly(accuracy=1.0)])
    print(f"stopped after {result.step} of 200 steps: {result.stopped}")
    loss = result.metrics["eval_loss"].dropna()
    print(f"loss {loss.iloc[0]:.4f} -> {loss.iloc[-1]:.4f} on held-out pairs")
    print(jdpo.load(result.output_dir))
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
