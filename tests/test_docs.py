"""Every block of README.md and docs/ does what a reader who copies it expects.

Rows are read by `jdpo inspect`, Python runs, settings and commands that train run with --dry_run, all others run as
they are. Hub names and files of users are toys, see `TOYS` and `place`. What cannot run is in `LISTED` with the reason.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from jdpo.cli.commands.runs.quickstart import read_settings
from jdpo.cli.main import main
from jdpo.config import DatasetConfig
from jdpo.generation.prompts import read_prompts
from tests.conftest import chat_pairs, write_jsonl
from tests.pairing.gen_folders import write_gen, write_gen_scores
from tests.reports.simulated_runs import write_run
from tests.scoring.conftest import make_reward_folder

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"api.md", "commands.md", "coming_from.md", "keys.md"}
"""Pages that scripts write; their examples are doctests of the code."""

PAGES = [
    ROOT / "README.md",
    *sorted(
        page
        for page in (ROOT / "docs").rglob("*.md")
        # A notebook's cells are run as a whole, by a test of their own.
        if page.name not in GENERATED and page.parent.name != "notebooks"
    ),
]

LISTED = {
    ("docs/index.md", "gain(answer)"): "the formula of the loss",
    ("docs/design.md", "row -> tokens"): "the stations of a row",
    ("docs/design.md", "slots "): "a drawing of packed pairs",
    ("docs/index.md", "pip install -e"): "installs; tests/test_editable_install.py does so",
    ("docs/index.md", "bash scripts/quickstart.sh"): "trains for minutes; tests/quickstart runs it",
    ("README.md", "bash scripts/quickstart.sh"): "trains for minutes; tests/quickstart runs it",
    ("README.md", "bash scripts/test.sh"): "runs this suite",
    ("README.md", "pip install -e"): "installs; tests/test_editable_install.py does so",
    ("README.md", "runs/first/"): "lists the files of a run",
    ("README.md", "jdpo chat"): "waits for what is typed; tests/generation/test_chat.py types",
    ("README.md", "jdpo compare BEFORE"): "needs two models; tests/cli/test_compare.py compares toys",
    ("docs/answers.md", "jdpo generate --endpoint"): "needs a server; tests/cli/test_generate_server.py has one",
    (
        "docs/answers.md",
        "jdpo generate runs/first --serve",
    ): "needs vLLM; tests/cli/test_generate_server.py has another",
    ("docs/answers.md", "gen/\n"): "lists the files of a folder",
    ("docs/answers.md", "jdpo chat"): "waits for what is typed; tests/generation/test_chat.py types",
    ("docs/answers.md", "printf"): "a pipe; tests/generation/test_chat.py has one",
    ("docs/answers.md", "2 x layers x"): "a formula",
    ("docs/clusters.md", "jdpo: error: process 1"): "shows what is printed",
    ("docs/clusters.md", "jdpo doctor: 1 problem"): "shows what is printed",
    ("docs/clusters.md", "jdpo dpo configs/first.yaml --output_dir"): "needs a bucket; tests/integration has one",
    ("docs/clusters.md", "srun jdpo doctor"): "needs a Slurm cluster; tests/integration/test_doctor.py has processes",
    ("docs/compare.md", "jdpo compare BEFORE"): "needs two models; tests/cli/test_compare.py compares toys",
    ("docs/compare.md", "jdpo eval AFTER"): "needs two models; tests/cli/test_compare.py evaluates toys",
    ("docs/data.md", "file -> raw row"): "a diagram",
    ("docs/devices.md", "note: "): "shows what is logged; tests/training/fit/test_padding_note.py has such notes",
    ("docs/devices.md", "pip install .[cuda]"): "installs; tests/test_editable_install.py does so",
    ("docs/devices.md", "python scripts/device_check"): "needs a GPU; tests/test_device_check.py tries it on a CPU",
    ("docs/iterate.md", "output_dir/"): "lists the files of a loop",
    ("docs/iterate.md", "jdpo iterate configs/iterate.yaml\n"): "trains; tests/iteration runs a loop",
    ("docs/jax.md", "one pair: prompt"): "a diagram",
    ("docs/launch.md", "docker build"): "needs Docker; tests/launch/test_images.py lints the Dockerfile",
    ("docs/launch.md", "gcloud container"): "needs a project of Google Cloud",
    ("docs/launch.md", "kubectl apply"): "needs a Kubernetes cluster; tests/launch/test_jobset.py checks the claim",
    ("docs/launch.md", "scontrol update"): "needs a Slurm cluster; tests/launch/test_slurm_cluster.py has one",
    ("docs/lora.md", "from peft import"): "needs PyTorch; tests/models/lora/test_peft_torch.py loads exports with PEFT",
    ("docs/losses.md", "a, b        policy minus"): "explains symbols",
    ("docs/memory.md", "pytest tests/models/test_remat.py"): "is part of this suite",
    ("docs/pairs.md", "jdpo score gen --by judge:"): "needs a judge; tests/scoring/test_judge.py has one",
    ("docs/plan.md", "hf download"): "downloads a file; tests/cli/test_plan.py plans with such a folder",
    ("docs/plan.md", "target  fits"): "shows what is printed; tests/planning/test_plan_output.py prints such tables",
    ("docs/plan.md", "currency: EUR"): "prices; tests/planning/test_prices.py reads such files",
    ("docs/quickstart.md", "bash scripts/quickstart.sh\n"): "trains for minutes; tests/quickstart runs it",
    ("docs/quickstart.md", "corpus (frequencies)"): "a diagram",
    ("docs/quickstart.md", "the pre-trained model"): "a diagram",
    ("docs/quickstart.md", "margin = beta"): "the formula of the loss",
    ("docs/running.md", "output_dir/"): "lists the files of a run",
    ("docs/speed.md", "python benchmarks/"): "trains for an hour next to other trainers",
    (
        "docs/trackers.md",
        "[project.entry-points",
    ): "part of a pyproject.toml; tests/reports/test_trackers.py has it",
    ("docs/weights.md", "jdpo export runs/first exported --push_to_hub"): "uploads; tests/cli/test_export.py has a hub",
}
"""(page, how a block or a command begins) -> why it does not run."""

TOYS = {
    "v5e-16 v6e-16 h100x8": "h100x8 h200",  # programs for TPUs compile for minutes
    "--lengths 512,300,300": "--lengths 16,20,24",
    "model_name_or_path=shape": "model_name_or_path=toy",
    "Qwen/Qwen2.5-0.5B-Instruct": "toy",
    "BASE": "toy",
    "generate runs/first --prompts prompts.jsonl": "generate toy --prompts few.jsonl --max_new_tokens 4",
    "--n 8": "--n 2",
    "--max_new_tokens 1024": "--max_new_tokens 4",
    "--output_dir gen": "--output_dir gen-new",  # other commands read gen
    "dpo ...": "dpo run.yaml",
    "report runs/first": "report runs/logged",
    "runs/second": "runs/logged-too",
    "runs/first/checkpoints/400 exported": "runs/adapters/checkpoints/1 exported",
    "--step 400": "--step 1",
    "gen --by": "gen-unscored --by",  # other commands read the only scores of gen
    "reward:Skywork/Skywork-Reward-V2-Qwen3-0.6B": "reward:toy-reward",
    "--output pairs.jsonl": "--output paired.jsonl",  # other commands read pairs.jsonl
    "--output_dir runs/sft": "--output_dir runs/sft-again",  # runs/sft has the adapter that later commands start from
}
"""A placeholder in the docs -> the toy that replaces it."""

A_TOY_LOSS = """
import jax.numpy as jnp
def apply_fn(params, tokens, attention_mask):
    return jnp.cumsum(params["table"][tokens] * attention_mask[..., None], axis=1) @ params["table"].T
policy_params = reference_params = {"table": jnp.arange(128.0).reshape(32, 4) % 7}
tokens = jnp.arange(48).reshape(2, 2, 12) % 32
attention_mask = jnp.ones((2, 2, 12), bool)
completion_mask = attention_mask.at[..., :3].set(False)
"""

NAMES = {"README.md": A_TOY_LOSS, "docs/jax.md": A_TOY_LOSS}
"""Code that defines the names which the Python of a page uses as the reader's own."""

OF_A_RUN = ("sft", "dpo", "inspect", "reference")
"""Commands that take the config of a run, and need its output_dir."""

OPTIONS_OF_SHELL = ("jdpo ", "bash ", "pip ", "python ", "pytest ", "hf ")


class Item(NamedTuple):
    """A block, or one command of a block of commands.

    Attributes:
      page: its file, relative to the repository.
      line: where the block begins.
      kind: rows, python, settings, command, listed, or "" if unknown.
      text: without indentation.
    """

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}:{self.text.split(chr(10))[0][:40]}"


def blocks_of(text: str) -> Iterator[tuple[int, str, str]]:
    """Yields (line, language, text) of fenced and of indented blocks; the latter have no language."""
    lines = text.split("\n")
    place = 0
    while place < len(lines):
        fence = re.match(r"( *)(`{3,}|~{3,}) *(\{?\w*)", lines[place])
        began = place
        if fence:
            place += 1
            while not lines[place].strip().startswith(fence[2]):
                place += 1
            inner = [line.removeprefix(fence[1]) for line in lines[began + 1 : place]]
            yield began + 1, fence[3], "\n".join(inner)
        elif lines[place].startswith("    ") and (place == 0 or not lines[place - 1].strip()):
            while place < len(lines) and (lines[place].startswith("    ") or not lines[place].strip()):
                place += 1
            yield began + 1, "", "\n".join(line[4:] for line in lines[began:place]).rstrip()
            continue
        place += 1


def kind_of(language: str, text: str) -> str:
    first = text.lstrip().split("\n")[0]
    if language in ("python", "yaml"):
        return {"python": "python", "yaml": "settings"}[language]
    if language in ("json", "jsonl") or (not language and first.startswith("{")):
        return "rows"
    commands = [line for line in text.split("\n") if line.strip()]
    return "command" if all(line.startswith(OPTIONS_OF_SHELL) for line in commands) else ""


def why_listed(page: str, text: str) -> tuple[str, str] | None:
    whole = f"{text.strip()}\n"
    return next((key for key in LISTED if key[0] == page and whole.startswith(key[1])), None)


def items() -> list[Item]:
    found = []
    for path in PAGES:
        page = path.relative_to(ROOT).as_posix()
        for line, language, text in blocks_of(path.read_text(encoding="utf-8")):
            if language.startswith("{"):  # a directive of the documentation site
                continue
            kind = kind_of(language, text)
            is_commands = kind == "command"
            for part in text.replace("\\\n", " ").split("\n") if is_commands else [text]:
                part = part.split("  #")[0].split(" # ")[0].rstrip() if is_commands else part
                if part:
                    found.append(Item(page, line, "listed" if why_listed(page, part) else kind, part))
    return found


ITEMS = items()
TRAINED_FIRST = re.compile("jdpo export")


def how(item: Item) -> str:
    """Returns in which of the three ways an item is tested."""
    if item.kind == "listed":
        return "listed"
    trains = item.kind == "command" and re.match(r"jdpo (dpo|sft) (?!--help|.*--print_config)", item.text)
    is_settings = item.kind == "settings" or item.text.startswith("bash scripts/quickstart.sh --")
    return "dry run" if trains or (is_settings and "--help" not in item.text) else "run"


def test_every_block_is_run_or_listed_and_nothing_is_listed_in_vain(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = [str(item) for item in ITEMS if not item.kind]
    assert not unknown, f"give these a language, or list them with a reason: {unknown}"
    used = {why_listed(item.page, item.text) for item in ITEMS if item.kind == "listed"}
    assert used == set(LISTED)
    counts = Counter(map(how, ITEMS))
    with capsys.disabled():
        summary = ", ".join(f"{counts[name]} {name}" for name in ("run", "dry run", "listed"))
        print(f"\nblocks and commands of README and docs: {summary}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> Iterator[Path]:
    """A folder with the files that the docs name: a model, rows, configs, and an adapter where a run leaves it."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(toy_model, folder / "toy")
    for name in ("pairs.jsonl", "hh.jsonl", "own.jsonl", "ROWS.jsonl"):
        write_jsonl(folder / name, chat_pairs(24))
    shutil.copytree(ROOT / "configs", folder / "configs")
    settings = {"model_name_or_path": "toy", "datasets": "pairs.jsonl", "max_length": 64, "global_batch_size": 8}
    write_jsonl(folder / "few.jsonl", [{"prompt": [{"role": "user", "content": "river"}]}])
    for name in ("run", "dpo", "sft"):
        (folder / f"{name}.yaml").write_text(json.dumps(settings | {"output_dir": f"runs/{name}-of-yaml"}))
    write_adapter(folder / "runs" / "sft" / "model", folder / "toy")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{n}?"} for n in range(7000)])
    for name in ("gen", "gen-strong", "gen-weak"):
        write_gen(folder / name, {f"{n}?": (f"answer {n}", f"{name} {n}") for n in range(8)})
    write_gen_scores(folder / "gen", (2, 0) * 8)
    for name in ("logged", "logged-too"):
        write_run(folder / "runs" / name)
    texts = {f"{n}?": (f"It is {n}.", "I do not know.") for n in range(3)}
    write_gen(folder / "gen-unscored", texts, columns={"answer": 1})
    make_reward_folder(toy_model, folder / "toy-reward")
    (folder / "prices.yaml").write_text("per_chip_hour: {h100: 4}")
    (folder / "rules.py").write_text(next(item.text for item in ITEMS if item.text.startswith("# rules.py")))
    patch = pytest.MonkeyPatch()
    patch.setattr("sys.path", list(sys.path))  # `jdpo score --by rule:...` adds the current folder
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    yield folder
    patch.undo()


def write_adapter(folder: Path, base: Path) -> None:
    """Writes a PEFT adapter of rank 2 on the queries."""
    config = json.loads((base / "config.json").read_text())
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        tensors[f"{name}A.weight"] = np.ones((2, config["hidden_size"]), np.float32)
        tensors[f"{name}B.weight"] = np.zeros((config["num_attention_heads"] * config["head_dim"], 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """Finished runs in the folders from which the docs export them."""
    words = ["run.yaml", "max_steps=2", "save_steps=1", "remat=none", "reference=live"]
    assert main(["dpo", *words, "output_dir=runs/first"]) == 0
    assert main(["dpo", *words, "output_dir=runs/adapters", "--lora"]) == 0
    return place


def words_of(command: str) -> list[str]:
    for written, toy in TOYS.items():
        command = re.sub(rf"(?<!\S){re.escape(written)}(?!\S)", toy, command)
    return shlex.split(command)


def tried(words: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO())  # a person who types nothing
        code = main(words)
    assert code == 0, f"jdpo {shlex.join(words)}\n{out.getvalue()}{err.getvalue()}"


COMMANDS = [item for item in ITEMS if item.kind == "command"]


@pytest.mark.parametrize("item", [item for item in COMMANDS if not TRAINED_FIRST.match(item.text)], ids=str)
def test_commands(item: Item, place: Path) -> None:
    program, *words = words_of(item.text)
    if (program, *words[:1]) == ("bash", "scripts/quickstart.sh"):
        if "--help" in words:
            tried(["quickstart", "--help"])
        else:
            read_settings(words[1:])
        return
    assert program == "jdpo", item.text
    if any(word.startswith("configs/") for word in words) and words[0] not in ("iterate", "launch"):
        words.append("--model_name_or_path=toy")  # its config names a model of the hub
    if how(item) == "dry run" and "--dry_run" not in words:
        words.append("--dry_run")
    needs_none = "--help" in words or any(".yaml" in word for word in words)
    if words[0] in OF_A_RUN and not needs_none and "output_dir" not in item.text:
        words.append("--output_dir=runs/new")
    tried(words)


@pytest.mark.full
@pytest.mark.parametrize("item", [item for item in COMMANDS if TRAINED_FIRST.match(item.text)], ids=str)
def test_exports(item: Item, trained: Path) -> None:
    tried(words_of(item.text)[1:])
    assert (trained / "exported" / "README.md").is_file()


@pytest.mark.parametrize("item", [item for item in ITEMS if item.kind == "rows"], ids=str)
def test_rows(item: Item, place: Path) -> None:
    rows = [json.loads(line) for line in item.text.splitlines()]
    (place / "copied.jsonl").write_text(item.text + "\n", encoding="utf-8")
    if any(row.keys() == {"question"} for row in rows):  # prompts without answers
        assert len(read_prompts(DatasetConfig(path="copied.jsonl")).questions) == len(rows)
        return
    task = "dpo" if any({"chosen", "rejected"} & set(row) for row in rows) else "sft"
    tried(["inspect", "--task", task, "model_name_or_path=toy", "datasets=copied.jsonl"])


@pytest.mark.parametrize("item", [item for item in ITEMS if item.kind == "settings"], ids=str)
def test_settings(item: Item, place: Path) -> None:
    (place / "copied.yaml").write_text(item.text, encoding="utf-8")
    if "rounds:" in item.text:
        tried(["iterate", "copied.yaml", "--prompts_per_round=4", "--dry_run"])
        return
    words = ["copied.yaml", "--model_name_or_path=toy", "--output_dir=runs/new", "--max_length=64"]
    given = "datasets:" in item.text
    tried(["dpo", *words, *([] if given else ["--datasets=pairs.jsonl"]), "--global_batch_size=8", "--dry_run"])


def python_pages() -> list[Any]:
    pages = sorted({item.page for item in ITEMS if item.kind == "python"})
    # This one trains.
    return [pytest.param(page, marks=[pytest.mark.ci] if page == "docs/python.md" else []) for page in pages]


@pytest.mark.parametrize("page", python_pages())
def test_python(page: str, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)  # where a reader's runs would be
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exec(NAMES.get(page, ""), names)
    for item in ITEMS:
        if item.page == page and item.kind == "python":
            printed = io.StringIO()
            text = item.text.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(toy_model)))
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * item.line + text, page, "exec"), names)
            # Expected output follows the call as a comment, on the same line or on the next ones.
            assert printed.getvalue().splitlines() == re.findall(
                r"(?:print\(.*\)  |^    )# (.*)$", item.text, flags=re.M
            )
