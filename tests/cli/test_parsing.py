"""The parsers: the forms in which keys may be given, help at any width, help of one key, and shell completion."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jdpo.cli.commands import completion
from jdpo.cli.commands.answers import iterate, pair
from jdpo.cli.commands.clusters import plan
from jdpo.cli.commands.runs import export, inspect, quickstart, reference, train
from jdpo.cli.key_help import key_help
from jdpo.cli.main import main
from jdpo.cli.parsing import Parser, parse
from jdpo.cli.run_options import read_config
from jdpo.config import CONFIGS, DPOConfig, SFTConfig
from jdpo.config.key_specs import key_specs

REQUIRED = ["model_name_or_path=m", "datasets=rows.jsonl", "output_dir=out"]


def read(*words: str) -> DPOConfig:
    return read_config(DPOConfig, parse(train.parser("dpo"), [*REQUIRED, *words]))


@pytest.mark.parametrize(
    "words",
    [
        ["--simpo_gamma", "-1e-3", "--lora.r", "8", "--load-best-model-at-end", "--mesh.fsdp", "-1"],
        ["--simpo-gamma=-1e-3", "lora.r=8", "load-best-model-at-end=true", "mesh.fsdp=-1"],
        ["simpo_gamma=5", "simpo_gamma=-1e-3", "--lora", "--lora.r=8", "--load_best_model_at_end", "--mesh={fsdp: -1}"],
    ],
)
def test_every_form_of_a_key_is_read_and_the_last_one_wins(words: list[str]) -> None:
    config = read(*words)
    assert config.lora
    assert (config.simpo_gamma, config.lora.r, config.load_best_model_at_end, config.mesh.fsdp) == (-1e-3, 8, True, -1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bf16", "true", "--beta", "0.2"], "here it is `--compute_dtype bfloat16`"),
        (["--bf16"], "here it is `--compute_dtype bfloat16`"),
        (["beta=0.2", "run.yaml"], "cannot read 'run.yaml'"),
        (["--beta"], "--beta needs a value"),
        (["--beta="], "--beta needs a value"),
        (["--dry_run=yes"], "--dry_run takes no value"),
        (["--bta", "0.2"], "did you mean 'beta'?"),
        (["--datasets", "a.jsonl", "b.jsonl"], "`--datasets '[a.jsonl, b.jsonl]'`"),
        (["--datasets", "*.jsonl"], "put quotes within the quotes of your shell"),
        (["-beta", "0.2"], "did you mean `--beta`?"),
        (["lora"], "did you mean `--lora`?"),
        (["--max_steps", "None"], "here it is `--max_steps null`"),
        (["--loss_type", "sigmoid,sft"], "as a list, [sigmoid, sft]"),
        (["--loss_type", "kto"], "unknown loss_type 'kto'. The losses are"),
    ],
)
def test_wrong_words_are_answered_as_before(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(*words)


def test_a_key_without_dashes_is_not_read_as_a_config_file() -> None:
    with pytest.raises(ValueError, match=r"cannot read '0.2'; did you mean `--beta 0.2`\?"):
        parse(train.parser("dpo"), ["beta", "0.2"])


def test_the_help_of_an_option_names_the_losses_that_read_it() -> None:
    (line,) = (line for line in key_help("dpo", DPOConfig, "margin_gamma").splitlines() if "losses" in line)
    assert line.split(None, 1)[1] == "sigmoid, robust, sigmoid_norm"
    assert "losses  " not in key_help("dpo", DPOConfig, "max_length")


PARSERS = {
    "dpo": train.parser("dpo"),
    "sft": train.parser("sft"),
    "inspect": inspect.parser(),
    "reference": reference.parser(),
    "export": export.parser(),
    "quickstart": quickstart.parser(),
    "completion": completion.parser(),
    "pair": pair.parser(),
    "iterate": iterate.parser(),
    "plan": plan.parser(),
}


@pytest.mark.parametrize("command", PARSERS)
def test_help_fits_a_terminal_of_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = PARSERS[command].format_help().splitlines()
    wide = [line for line in lines if len(line) > 80]
    assert wide == []
    assert f"usage: jdpo {command}" in lines[0]


def test_help_has_each_key_once_under_the_heading_of_its_group() -> None:
    lines = PARSERS["dpo"].format_help().splitlines()
    headings = [line for line in lines if line.endswith(":") and line[0] not in " T"]
    assert headings == [
        "Options:",
        "Model:",
        "Keys of lora (--lora.KEY VALUE; in YAML lora: {KEY: VALUE}):",
        "Data:",
        "Keys of each entry of datasets and eval_datasets:",
        "Loss and reference:",
        "Optimization:",
        "Keys of optimizer (--optimizer.KEY VALUE; in YAML optimizer: {KEY: VALUE}):",
        "Memory and mesh:",
        "Keys of mesh (--mesh.KEY VALUE; in YAML mesh: {KEY: VALUE}):",
        "Logging and saving:",
        "Sampled answers:",
        "Output:",
        "Keys of watchdog (--watchdog.KEY VALUE; in YAML watchdog: {KEY: VALUE}):",
        "Examples:",
    ]
    begins = [line.split()[0] for line in lines if line.startswith("  -") or line.startswith("  p")]
    options = [f"--{spec.name}" for spec in key_specs(DPOConfig) if "datasets." not in spec.name]
    assert sorted(word for word in begins if word in options) == sorted(options)
    assert sum(line.startswith("  column_map ") for line in lines) == 1


def test_help_has_choices_defaults_in_yaml_and_required_keys() -> None:
    text = " ".join(PARSERS["dpo"].format_help().split())
    for words in (
        "--lr_scheduler_type {constant,linear,cosine}",
        "(default: [sigmoid])",
        "(default: 1e-6)",
        "(default: null)",
        "(default: true)",
        "to continue from. (required)",
    ):
        assert words in text


@pytest.mark.parametrize("cls", [SFTConfig, DPOConfig])
def test_every_key_has_a_page_whose_example_is_read(cls: type[DPOConfig]) -> None:
    command = next(name for name, config in CONFIGS.items() if config is cls)
    for spec in key_specs(cls):
        page = key_help(command, cls, spec.name)
        assert spec.name in page.splitlines()[0]
        assert " ".join(spec.description.split()[:3]) in page
        if spec.example:
            group, _, inner = spec.name.rpartition(".")
            if group.endswith("datasets"):
                value = f"{group}=[{{path: x, {inner}: {spec.example}}}]" if inner != "path" else "datasets=[{path: x}]"
            else:
                value = f"{spec.name}={spec.example}"
            extra = ["optimizer=sgd"] if spec.name == "optimizer.momentum" else []
            read_config(cls, parse(train.parser(command), [*REQUIRED, *extra, value]))


def test_help_of_one_key_names_type_range_choices_and_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "--help", "optimizer.name"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "choices adamw, adamw_bf16, adafactor, lion, sgd default adamw" in printed
    assert "command line --optimizer.name sgd in YAML optimizer: {name: sgd}" in printed
    assert main(["sft", "run.yaml", "--help=eval_fraction"]) == 0
    assert "at least 0 and at most 1" in capsys.readouterr().out
    for words in (["dpo", "--help", "--max-length"], ["dpo", "-h", "max_length"], ["reference", "--help=max_length=3"]):
        assert main(words) == 0
        assert capsys.readouterr().out.startswith("max_length (")
    for words in (["dpo", "--help", "--dry_run"], ["inspect", "rows.yaml", "--help", "rows"]):
        assert main(words) == 0
        assert capsys.readouterr().out.startswith("usage:")
    assert main(["sft", "--help", "beta"]) == 2
    assert "it is a key of `jdpo dpo`" in capsys.readouterr().err
    assert main(["dpo", "--help", "learning_rat"]) == 2
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_scripts_offer_commands_keys_and_choices(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("reference", "lora.target_modules", "adamw_bf16", "dry_run"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_keys_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "jdpo.bash"
    script.write_text(capsys.readouterr().out)

    def offered(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in ("jdpo", *words))
        ask = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_jdpo; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert offered("ref") == ["reference"]
    assert offered("dpo", "--warmup") == ["--warmup_ratio", "--warmup_steps"]
    assert offered("dpo", "--optimizer.name", "ada") == ["adamw", "adamw_bf16", "adafactor"]
    assert "v5p-64" in offered("plan", "--on", "v5p")


def test_neither_help_nor_completion_imports_jax() -> None:
    code = """
import sys
from jdpo.cli.main import main
for words in (["--help"], ["dpo", "--help"], ["dpo", "--help", "lora"], ["completion", "bash"]):
    assert main(words) == 0
assert main(["dpo", "bta=1"]) == 2
assert not {"jax", "flax", "optax"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_options_of_argparse_raise_value_errors() -> None:
    parser = Parser("dpo", "", "")
    with pytest.raises(ValueError, match="unrecognized arguments: --rows"):
        parser.parse_args(["--rows"])
