"""Shows what one types in a notebook, cell by cell: looks at rows, trains, looks at metrics, asks the model."""

# %% Rows: a list of dicts, in any format of docs/data.md.
import tempfile

import jdpo

folder = tempfile.mkdtemp(prefix="jdpo-notebook-")
countries = {"Ireland": "Dublin", "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo"}
others = {"Ireland": "Cork", "France": "Lyon", "Spain": "Seville", "Italy": "Milan", "Japan": "Osaka"}
rows = [
    {
        "prompt": [{"role": "user", "content": question.format(country)}],
        "chosen": [{"role": "assistant", "content": countries[country]}],
        "rejected": [{"role": "assistant", "content": others[country]}],
    }
    for country in countries
    for question in ("What is the capital of {}?", "Name the capital of {}.", "{} has which capital?")
]

# %% A toy model; for your own, skip this cell and write its hub name below.
texts = [turn["content"] for row in rows for side in row.values() for turn in side]
model = str(jdpo.random_model(f"{folder}/toy", texts))

# %% What would it train on? A notebook shows the page, `print` the text.
report = jdpo.inspect(rows, model, max_length=64, cache_dir=f"{folder}/cache")
print(report)

# %% Train. The interrupt of the kernel saves a checkpoint and returns; the same cell continues.
config = jdpo.DPOConfig(
    model_name_or_path=model,
    output_dir=f"{folder}/run",
    cache_dir=f"{folder}/cache",
    max_steps=20,
    global_batch_size=8,
    learning_rate=3e-4,
    logging_steps=2,
    max_length=64,
)
result = jdpo.train(config, train_dataset=rows)
print(result)

# %% The metrics: a pandas.DataFrame with a row per logged step. In a notebook: result.metrics["loss"].plot()
columns = ["loss", "rewards/accuracies", "rewards/margins"]
print(result.metrics[columns])
print(f"loss {result.metrics['loss'].iloc[0]:.4f} -> {result.metrics['loss'].iloc[-1]:.4f}")

# %% Ask the model before and after: the odds of Dublin against Cork.
question = [{"role": "user", "content": "What is the capital of Ireland?"}]
for name in (model, str(result.model_dir)):
    asked = jdpo.load(name)
    odds = asked.logps(question, "Dublin").total - asked.logps(question, "Cork").total
    print(f"{name}: log-odds of Dublin against Cork {odds:+.2f}")
