"""A callback that reads answers as the model learns, and stops the run when held-out pairs are ranked well enough.

A stopped run has a checkpoint: `jdpo.load` opens it, and the same call of `jdpo.train` continues it.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import jdpo

ANIMALS, THINGS = ["cat", "dog", "cow", "fox", "owl", "bee", "ant", "hen"], ["cup", "hat", "pen", "key", "bag", "map"]


def pairs(question: str) -> list[dict[str, str]]:
    """Prefers the right one of two answers, which depends on the word in the question."""
    answers = {True: "Yes.", False: "No."}
    return [
        {
            "prompt": question.format(word),
            "chosen": answers[word in ANIMALS],
            "rejected": answers[word not in ANIMALS],
        }
        for word in ANIMALS + THINGS
    ]


ROWS = [
    row for question in ("Is a {} alive? ", "A {}: is it an animal? ", "Does a {} eat? ") for row in pairs(question)
]
HELD_OUT = pairs("Can a {} eat? ")


class StopEarly(jdpo.Callback):
    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy

    def on_evaluate(self, run: jdpo.RunView, metrics: Mapping[str, float]) -> None:
        ((answer,),) = run.sample([HELD_OUT[0]["prompt"]], temperature=0, max_new_tokens=8)
        found = metrics["eval_rewards/accuracies"]
        print(f"step {run.step}: accuracy {found:.2f}, answer {answer.text!r}")
        if found >= self.accuracy:
            run.stop(f"held-out accuracy {found:.2f}")


def main(folder: Path) -> jdpo.RunResult:
    model = jdpo.random_model(folder / "toy", [text for row in ROWS + HELD_OUT for text in row.values()])
    config = jdpo.DPOConfig(
        model_name_or_path=str(model),
        output_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        max_steps=200,
        global_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=10,
        eval_steps=10,
        max_length=64,
    )
    result = jdpo.train(config, train_dataset=ROWS, eval_dataset=HELD_OUT, callbacks=[StopEarly(accuracy=0.9)])
    print(f"stopped after {result.step} of 200 steps: {result.stopped}")
    loss = result.metrics["eval_loss"].dropna()
    print(f"loss {loss.iloc[0]:.4f} -> {loss.iloc[-1]:.4f} on held-out pairs")
    print(jdpo.load(result.output_dir))
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
