"""The public API: its page, its help, and type checking of code that uses it."""

from __future__ import annotations

import importlib.util
import os
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import jdpo
import jdpo.losses
from jdpo.config.key_specs import key_specs
from tests.reports.tracker_toys import install_diary

ROOT = Path(__file__).resolve().parent.parent

USER_SCRIPT = """
from collections.abc import Mapping
from pathlib import Path

import jdpo

config = jdpo.DPOConfig(
    model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct",
    datasets="pairs.jsonl",
    output_dir="runs/first",
    loss_type="ipo",
    lora={"r": 8},
    mesh={"fsdp": 1},
    optimizer="lion",
    report_to="wandb",
)
mixed = jdpo.DPOConfig(
    model_name_or_path="m",
    datasets=["pairs.jsonl", {"path": "org/name", "split": "train"}, jdpo.DatasetConfig(path="x", weight=2)],
    output_dir="runs/mixed",
    loss_type=["sigmoid", "sft"],
    loss_weights=[1, 0.2],
    lora=jdpo.LoraConfig(r=8, target_modules=["q_proj"]),
    mesh=jdpo.MeshConfig(tensor=2),
    optimizer={"name": "adamw", "b2": 0.98},
)
sft = jdpo.SFTConfig(model_name_or_path="m", datasets=["a", "b"], output_dir="o", lora=True)


def first_path(config: jdpo.DPOConfig) -> str:
    return config.datasets[0].path


def train_from(path: Path) -> int:
    config = jdpo.load_config(jdpo.DPOConfig, path, ["beta=0.2"])
    print(first_path(config), config.beta + 1, config.loss_type[0], config.mesh.fsdp)
    return jdpo.train(config).exit_code


class Stop(jdpo.Callback):
    def on_evaluate(self, run: jdpo.RunView, metrics: Mapping[str, float]) -> None:
        ((answer,),) = run.sample([[{"role": "user", "content": "Where?"}]], top_p=0.9, top_k=5)
        if metrics["eval_loss"] < 0.3:
            run.stop(answer.text)


def train_on(rows: list[dict[str, str]], held_out: Path) -> Path | None:
    print(jdpo.inspect(rows, "m", task="sft", num_rows=1).document["findings"])
    result = jdpo.train(sft, train_dataset=rows, eval_dataset=held_out, callbacks=[Stop()])
    return result.report if result.stopped is None else result.model_dir


def ask(folder: Path) -> list[str]:
    model = jdpo.load(folder, mesh=jdpo.MeshConfig(tensor=2))
    question = [{"role": "user", "content": "Where?"}]
    one, several = model.generate(question, n=2), model.generate(["There", "Here"], temperature=0)
    scored: float = model.logps(question, one[0].text).total + model.next_tokens(question, 3)[0].logp
    return [answer.text for answers in several for answer in answers] + [*model.stream("There")] + [str(scored)]
"""

WRONG_SCRIPT = """
import jdpo

jdpo.DPOConfig(model_name_or_path="m", output_dir="o", datasets=3, beta="x", loss_typ="ipo")
jdpo.SFTConfig(model_name_or_path="m", output_dir="o", datasets="d").max_length.upper()
jdpo.load("m").generate("x")[0].upper()
jdpo.train(config=3, callbacks=[print])
"""


def test_the_api_page_matches_the_code() -> None:
    path = ROOT / "scripts" / "write_api.py"
    spec = importlib.util.spec_from_file_location("write_api", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/write_api.py"
    assert {name for names in script.SECTIONS.values() for name in names} == {*jdpo.__all__} - {"__version__", "losses"}


def test_every_public_name_exists_and_is_documented() -> None:
    assert set(jdpo.__all__) == set(dir(jdpo))
    for module in (jdpo, jdpo.losses):
        for name in module.__all__:
            value = getattr(module, name)
            assert isinstance(value, str | dict) or (value.__doc__ or "").strip(), name


@pytest.mark.parametrize("cls", [jdpo.DPOConfig, jdpo.SFTConfig])
def test_help_of_a_config_has_the_sentence_of_each_key(cls: type[jdpo.DPOConfig]) -> None:
    shown = pydoc.plain(pydoc.render_doc(cls))
    for spec in key_specs(cls):
        if "." not in spec.name:
            assert f"{spec.name}: {spec.description}" in shown


def test_a_config_takes_yaml_values_and_is_frozen() -> None:
    names: dict[str, object] = {}
    exec(USER_SCRIPT, names)
    config = names["config"]
    assert isinstance(config, jdpo.DPOConfig)
    assert isinstance(config.lora, jdpo.LoraConfig)
    assert (config.datasets[0].path, config.loss_type, config.lora.r) == ("pairs.jsonl", ("ipo",), 8)
    assert (config.mesh.fsdp, config.optimizer.name, config.report_to) == (1, "lion", ("wandb",))
    with pytest.raises(AttributeError, match="cannot assign"):
        config.beta = 0.2


@pytest.mark.full
def test_a_typed_script_passes_a_strict_type_checker_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_SCRIPT)
    (tmp_path / "wrong.py").write_text(WRONG_SCRIPT)
    # The tracker of docs/trackers.md is one, to a type checker, too.
    tracker = (install_diary(tmp_path) / "diary.py").read_text()
    use = "\n\ndef opened(run: jdpo.TrackedRun) -> jdpo.Tracker:\n    return Diary(run)\n"
    (tmp_path / "diary.py").write_text(tracker + use)
    words = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    done = subprocess.run(
        [*words, f"--cache-dir={tmp_path / 'cache'}", "user.py", "wrong.py", "diary.py"],
        env={**os.environ, "MYPYPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "user.py" not in done.stdout, done.stdout
    assert "diary.py" not in done.stdout, done.stdout
    for words_of_error in (
        'keyword argument "loss_typ"',
        'Argument "datasets"',
        'Argument "beta"',
        '"int" has no attribute "upper"',
        '"Answer" has no attribute "upper"',
        'expected "Callback"',
    ):
        assert words_of_error in done.stdout
