"""Mistakes of users: `jdpo` exits with 2 and a message that names the mistake, its place and what to do.

Each case is a real command line on real files; the table holds the expected parts of its message.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdpo.cli.main import main

Words = Callable[..., list[str]]
Capture = pytest.CaptureFixture[str]
Row = dict[str, Any]

ROW: Row = {"prompt": "Where is Dublin?", "chosen": "In Ireland.", "rejected": "In Peru."}


class Place(NamedTuple):
    """The place where a case builds its mistake: a folder of its own, next to a good model and good rows."""

    folder: Path
    good_model: Path
    good_rows: Path

    def model(self) -> Path:
        """Returns a copy of the model that the case may damage."""
        return Path(shutil.copytree(self.good_model, self.folder / "model"))

    def rows(self, *rows: Row) -> Path:
        """Writes these rows to a file."""
        return self.file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def tensors(self, change: Callable[[dict[str, np.ndarray]], None]) -> dict[str, Path]:
        """Returns a model with tensors changed by `change`."""
        model = self.model()
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")
        return {"model_name_or_path": model}

    def edited(self, name: str, **changes: Any) -> dict[str, Path]:
        """Returns a model with other values in one of its JSON files; None removes a key."""
        path = self.model() / name
        values = json.loads(path.read_text(encoding="utf-8")) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")
        return {"model_name_or_path": path.parent}


Overrides = dict[str, Any]
Make = Callable[[Place], Overrides]

CONFIG: dict[str, tuple[Make, list[str]]] = {
    "unknown key": (lambda at: {"learning_rat": 1e-5}, ["unknown key 'learning_rat'", "did you mean 'learning_rate'?"]),
    "unknown key of a group": (lambda at: {"mesh.fdsp": 2}, ["unknown key 'mesh.fdsp'", "did you mean 'mesh.fsdp'?"]),
    "another trainer's name": (lambda at: {"pref_beta": 0.2}, ["unknown key 'pref_beta'", "here it is called 'beta'"]),
    "wrong type": (lambda at: {"beta": "strong"}, ["'beta' on the command line is 'strong'", "number"]),
    "out of range": (
        lambda at: {"max_length": 0},
        ["'max_length' on the command line is 0", "at least 1"],
    ),
    "not one of the choices": (lambda at: {"remat": "some"}, ["'remat'", "'some'", "auto, none, dots"]),
    "unknown loss": (
        lambda at: {"loss_type": "sigmoyd"},
        ["unknown loss_type 'sigmoyd'", "sigmoid, robust, hinge, ipo"],
    ),
    "option a loss cannot honour": (
        lambda at: {"loss_type": "hinge", "label_smoothing": 0.1},
        ["loss_type 'hinge' cannot honour label_smoothing=0.1", "these can: sigmoid"],
    ),
    "mesh that does not fit the devices": (
        lambda at: {"mesh.data": 3, "mesh.fsdp": 1},
        ["mesh data=3, fsdp=1, expert=1, tensor=1 does not fit the 8 devices", "1x8x1x1"],
    ),
    "batch that does not fit the mesh": (
        lambda at: {"global_batch_size": 12},
        ["global_batch_size 12 does not split", "= 8 shards", "multiple of 8, such as 8, 16, 24"],
    ),
    "warm-up longer than the run": (
        lambda at: {"warmup_steps": 99},
        ["warmup_steps 99 is more than the", "steps of the run"],
    ),
    "unknown metric of the best model": (
        lambda at: {"metric_for_best_model": "eval_accuracy"},
        ["unknown metric_for_best_model 'eval_accuracy'", "eval_rewards/accuracies"],
    ),
    "best model without evaluation": (
        lambda at: {"load_best_model_at_end": "true"},
        ["load_best_model_at_end needs eval_datasets and eval_steps"],
    ),
    "evaluation steps without rows": (lambda at: {"eval_steps": 2}, ["eval_steps 2 needs eval_datasets"]),
    "revision of a local folder": (
        lambda at: {"model_revision": "0012345"},
        ["model_revision '0012345' is for hub names"],
    ),
    "revision of no reference": (
        lambda at: {"reference_revision": "main"},
        ["reference_revision needs reference_model"],
    ),
    "decay of 1": (lambda at: {"optimizer.b2": 1}, ["'optimizer.b2'", "less than 1"]),
    "seed that is none": (lambda at: {"seed": 2**40}, ["'seed'", "less than 4294967296"]),
    "size of a shard": (lambda at: {"max_shard_size": "large"}, ["max_shard_size", "5GB", "'large'"]),
}

MODEL: dict[str, tuple[Make, list[str]]] = {
    "missing model folder": (
        lambda at: {"model_name_or_path": at.folder / "nowhere"},
        ["model folder '{folder}/nowhere' does not exist"],
    ),
    "model is a file": (lambda at: {"model_name_or_path": at.rows(ROW)}, ["rows.jsonl' is a file; expected a folder"]),
    "no weights": (
        lambda at: {"model_name_or_path": _without(at.model(), "model.safetensors")},
        ["{folder}/model' has no *.safetensors weights"],
    ),
    "no config.json": (
        lambda at: {"model_name_or_path": _without(at.model(), "config.json")},
        ["{folder}/model", "config.json"],
    ),
    "unknown family": (lambda at: at.edited("config.json", model_type="bert"), ["'bert'", "llama"]),
    "missing shard": (
        lambda at: {"model_name_or_path": _sharded(at.model(), drop=True)},
        ["shard b.safetensors", "does not exist"],
    ),
    "truncated shard": (
        lambda at: {"model_name_or_path": _truncated(at.model())},
        ["{folder}/model/model.safetensors is truncated", "download it again"],
    ),
    "missing tensor": (
        lambda at: at.tensors(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        ["missing tensor model.layers.1.mlp.up_proj.weight, expected shape (192, 64)"],
    ),
    "extra tensor": (
        lambda at: at.tensors(lambda tensors: tensors.update({"model.adapter": np.zeros(3, np.float32)})),
        ["extra tensor model.adapter in model.safetensors, shape (3,)"],
    ),
    "wrong shape": (
        lambda at: at.tensors(lambda tensors: tensors.update({"model.norm.weight": np.ones(63, np.float32)})),
        ["wrong shape of model.norm.weight in model.safetensors: expected (64,), found (63,)"],
    ),
    "damaged weights": (
        lambda at: at.tensors(lambda tensors: tensors["model.norm.weight"].fill(np.nan)),
        ["tensor model.norm.weight", "NaN or Inf"],
    ),
    "tokenizer without chat template": (
        lambda at: at.edited("tokenizer_config.json", chat_template=None),
        ["chat template", "chatml"],
    ),
    "tokenizer without EOS": (
        lambda at: {**at.edited("tokenizer_config.json", eos_token=None, chat_template=None), "datasets": at.rows(ROW)},
        ["{folder}/model has no EOS token", "eos_token in tokenizer_config.json"],
    ),
    "tokenizer larger than the embedding": (
        lambda at: _embedding_of(at, 50),
        ["tokens, but the model's embedding has 50 rows", "use the tokenizer that belongs to the model"],
    ),
    "no tokenizer": (
        lambda at: {"model_name_or_path": _without(at.model(), "tokenizer.json")},
        ["{folder}/model: no usable tokenizer"],
    ),
    "template file that is missing": (
        lambda at: {"chat_template": "zephyr"},
        ["chat_template: 'zephyr' is neither a file nor"],
    ),
    "reference of another shape": (
        lambda at: {"reference_model": at.edited("config.json", num_hidden_layers=1)["model_name_or_path"]},
        ["reference_model {folder}/model must have the shape of", "they differ in num_layers (1 and 2)"],
    ),
}

ROWS: dict[str, tuple[Make, list[str]]] = {
    "a pattern of names": (lambda at: {"datasets": at.folder / "*.jsonl"}, ["patterns of names are not expanded"]),
    "missing file": (lambda at: {"datasets": at.folder / "no.jsonl"}, ["{folder}/no.jsonl: no such file or folder"]),
    "missing column": (
        lambda at: {"datasets": at.rows(ROW, {"prompt": "Hi", "chosen": "Hello"})},
        ["rows.jsonl:2: the columns fit no known format", "Found: prompt (string), chosen (string)", "Known formats:"],
    ),
    "empty file": (lambda at: {"datasets": at.rows()}, ["{folder}/rows.jsonl: the file is empty"]),
    "broken line": (
        lambda at: {"datasets": at.file("rows.jsonl", json.dumps(ROW) + '\n{"prompt": "Hi", "cho\n')},
        ["{folder}/rows.jsonl:2: broken JSON"],
    ),
    "line that is no object": (
        lambda at: {"datasets": at.file("rows.jsonl", json.dumps(ROW) + "\n[1, 2]\n")},
        ["{folder}/rows.jsonl:2: expected an object", "found an array"],
    ),
    "unknown ending": (
        lambda at: {"datasets": at.file("rows.xlsx", "a,b\n")},
        ["rows.xlsx: cannot read this kind of file", ".jsonl"],
    ),
    "unknown split": (
        lambda at: {"eval_datasets": "{path: " + str(at.rows(ROW)) + ", split: test}"},
        ["'test'", "rows.jsonl"],
    ),
    "nothing left to train on": (
        lambda at: {"datasets": at.rows(ROW | {"chosen": ""}, ROW | {"rejected": "In Ireland."})},
        ["no rows left of ", "2 rows read, 0 kept", "1 dropped: empty side", "1 dropped: identical sides"],
    ),
    "prompts as long as max_length": (
        lambda at: {"max_length": 4},
        ["no rows left of ", "20 dropped: prompt as long as max_length"],
    ),
}


def _without(model: Path, name: str) -> Path:
    (model / name).unlink()
    return model


def _truncated(model: Path) -> Path:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return model


def _sharded(model: Path, *, drop: bool) -> Path:
    tensors = load_file(model / "model.safetensors")
    first = dict(list(tensors.items())[:3])
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    save_file(first, model / "a.safetensors")
    if not drop:
        save_file(rest, model / "b.safetensors")
    weight_map = {name: "a.safetensors" if name in first else "b.safetensors" for name in tensors}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return _without(model, "model.safetensors")


def _embedding_of(at: Place, num_rows: int) -> Overrides:
    at.edited("config.json", vocab_size=num_rows)
    path = at.folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:num_rows].copy()
    save_file(tensors, path)
    return {"model_name_or_path": at.folder / "model"}


@pytest.fixture
def place(tmp_path: Path, toy_model: Path, pairs_file: Path) -> Place:
    folder = tmp_path / "case"
    folder.mkdir()
    return Place(folder, toy_model, pairs_file)


def refusal(words: list[str], capsys: Capture, code: int = 2) -> str:
    """Returns the error of a refused command line, without line breaks."""
    assert main(["dpo", *words]) == code
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    _, found, error = output.err.rpartition("jdpo: error: ")
    assert found, output
    return " ".join(error.split())


CASES = CONFIG | MODEL | ROWS


@pytest.mark.parametrize(("make", "parts"), CASES.values(), ids=CASES)
def test_refused(make: Make, parts: list[str], place: Place, run_words: Words, capsys: Capture) -> None:
    message = refusal(run_words(**make(place)), capsys)
    for part in parts:
        assert part.replace("{folder}", str(place.folder)) in message, message
    assert not list((place.folder.parent / "run").glob("checkpoints/*/*")), "nothing was trained"


YAML: dict[str, tuple[str | None, list[str]]] = {
    "missing": (None, ["no config file at {folder}/run.yaml"]),
    "broken": ("beta: [0.1\n", ["{folder}/run.yaml is not YAML", 'in "{folder}/run.yaml", line 2']),
    "a list": ("- beta\n", ["{folder}/run.yaml: expected 'key: value' lines, found a list"]),
    "a key twice": ("beta: 0.1\nbeta: 0.2\n", ["{folder}/run.yaml", "the key 'beta' is written twice", "line 2"]),
    "an unknown key": ("bets: 0.1\n", ["unknown key 'bets' in {folder}/run.yaml", "did you mean 'beta'?"]),
    "a wrong type": ("max_steps: long\n", ["'max_steps' in {folder}/run.yaml is 'long'", "a whole number"]),
}


@pytest.mark.parametrize(("text", "parts"), YAML.values(), ids=YAML)
def test_config_file_refused(
    text: str | None, parts: list[str], place: Place, run_words: Words, capsys: Capture
) -> None:
    path = place.folder / "run.yaml" if text is None else place.file("run.yaml", text)
    message = refusal([str(path), *run_words()], capsys)
    for part in parts:
        assert part.replace("{folder}", str(place.folder)) in message, message


def test_rows_in_the_place_of_the_config_file_are_refused(capsys: Capture) -> None:
    assert "rows are given as `--datasets pairs.jsonl`" in refusal(["pairs.jsonl"], capsys)


def test_missing_keys_are_all_named(capsys: Capture) -> None:
    message = refusal([], capsys)
    for key in ("model_name_or_path", "output_dir", "datasets"):
        assert f"missing key '{key}'" in message, message


@pytest.mark.parametrize("written", ["5e-7", "5E-7", "0.0000005"])
def test_scientific_notation_is_a_number(written: str, place: Place, run_words: Words, capsys: Capture) -> None:
    path = place.file("run.yaml", f"beta: {written}\n")
    words = [str(path), *run_words(learning_rate=written)]
    assert main(["dpo", *words, "--print_config"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^learning_rate: 5\.0?e-07$", output, re.MULTILINE), output
    assert re.search(r"^beta: 5\.0?e-07$", output, re.MULTILINE), output


def test_output_dir_that_cannot_be_created(place: Place, run_words: Words, capsys: Capture) -> None:
    blocked = place.file("a_file", "") / "run"
    message = refusal(run_words(output_dir=blocked), capsys)
    assert f"cannot write to output_dir {blocked}" in message
    assert "choose a folder on a writable disk with free space" in message


def test_output_dir_that_is_a_file(place: Place, run_words: Words, capsys: Capture) -> None:
    file = place.file("a_file", "")
    assert f"output_dir {file} is a file; choose a folder" in refusal(run_words(output_dir=file), capsys)


def test_output_dir_that_is_the_model_folder_stays_as_it_is(place: Place, run_words: Words, capsys: Capture) -> None:
    words = run_words()
    model = Path(next(word.partition("=")[2] for word in words if word.startswith("model_name_or_path=")))
    before = sorted(path.name for path in model.iterdir())
    message = refusal(run_words(output_dir=model), capsys)
    assert "is the folder of model_name_or_path; choose another folder" in message
    assert sorted(path.name for path in model.iterdir()) == before


def test_output_dir_on_a_disk_that_refuses_writes(run_words: Words, capsys: Capture) -> None:
    # /proc refuses new folders even to root; chmod would not.
    message = refusal(run_words(output_dir="/proc/jdpo_run"), capsys)
    assert "cannot write to output_dir /proc/jdpo_run" in message


def test_cache_dir_that_cannot_be_written(run_words: Words, capsys: Capture) -> None:
    message = refusal(run_words(cache_dir="/proc/jdpo_cache"), capsys)
    assert "cannot write tokenized rows to /proc/jdpo_cache" in message
    assert "set cache_dir to a writable folder" in message


def test_bad_rows_are_dropped_and_counted(place: Place, run_words: Words, capsys: Capture) -> None:
    long = ROW | {"prompt": "river " * 100}
    rows = place.rows(*[ROW] * 8, ROW | {"chosen": ""}, ROW | {"rejected": ROW["chosen"]}, long, long)
    assert main(["dpo", *run_words(datasets=rows), "--dry_run"]) == 0
    output = capsys.readouterr().out
    for part in (
        "12 rows read, 8 kept",
        "1 dropped: empty side (the first: rows.jsonl:9)",
        "1 dropped: identical sides (the first: rows.jsonl:10)",
        "2 dropped: prompt as long as max_length (the first: rows.jsonl:11)",
    ):
        assert part in output, output


def test_numbers_that_explode_name_step_and_rows(place: Place, run_words: Words, capsys: Capture) -> None:
    words = run_words(learning_rate=1e30, max_grad_norm="null", lr_scheduler_type="constant", shuffle="false")
    message = refusal(words, capsys, code=1)
    assert re.search(r"step 2 gave loss (nan|inf|-inf|[\d.e+]+) and gradient norm (nan|inf)", message), message
    assert "pairs.jsonl:9" in message, message
    assert "no checkpoint was saved yet" in message
    assert "lower learning_rate" in message


def test_unknown_command(capsys: Capture) -> None:
    assert main(["dpoo"]) == 2
    assert "unknown command 'dpoo'; did you mean 'dpo'?" in capsys.readouterr().err
