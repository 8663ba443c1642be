"""Train on a `datasets.Dataset` that a script makes, and ask the model that comes out.

The model here is a toy of random weights; for your own, give its folder or hub name as model_name_or_path.
"""

import tempfile
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped]

import jdpo

TOWNS = ["Dublin", "Cork", "Galway", "Limerick", "Sligo", "Ennis", "Tralee", "Naas"]


def pair(town: str) -> dict[str, str]:
    """A preference: a short answer over a long one."""
    return {
        "prompt": f"Where is {town}? ",
        "chosen": f"{town} is in Ireland.",
        "rejected": f"Well, that is a good question: I think {town} might be in Ireland.",
    }


def main(folder: Path) -> jdpo.RunResult:
    rows = Dataset.from_list([pair(town) for town in TOWNS])
    model = jdpo.random_model(folder / "toy", [text for row in map(pair, TOWNS) for text in row.values()])
    config = jdpo.DPOConfig(
        model_name_or_path=str(model),
        output_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        max_steps=20,
        global_batch_size=8,
        learning_rate=3e-4,
        logging_steps=5,
        max_length=128,
    )
    # The rows are kept in output_dir: `jdpo dpo RUN/resolved_config.yaml` repeats the run without this script.
    result = jdpo.train(config, train_dataset=rows)
    loss = result.metrics["loss"]  # a pandas.Series
    print(f"loss {loss.iloc[0]:.4f} -> {loss.iloc[-1]:.4f}")
    aligned = jdpo.load(result.output_dir)
    short, long = (aligned.logps(pair("Cork")["prompt"], pair("Cork")[side]).total for side in ("chosen", "rejected"))
    print(f"log-probability of the short answer {short:.1f}, of the long one {long:.1f}")
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
