"""The README.md of an exported model."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from jdpo import safe_text
from jdpo.config import DPOConfig, load_config, to_public_yaml
from jdpo.reports.cards.model_card import CODE_ENDS, CardFacts, model_card
from jdpo.reports.findings import Finding

RESULTS = {
    "step": 600,
    "epoch": 1.2,
    "num_tokens": 86187,
    "loss": 0.5812,
    "rewards/accuracies": 0.75,
    "rewards/margins": 0.000012,
    "eval_loss": 0.6,
    "eval_rewards/accuracies": 0.625,
    "learning_rate": 3.3e-7,
}
SPREAD = {"median": 20.0, "p5": 3.0, "p95": 40.0, "maximum": 1234.0}
NOWHERE = {"rows": 0, "share": 0.0, "first": None}
PART = {
    "rows_read": 120,
    "rows_kept": 100,
    "dropped": [{"reason": "chosen equals rejected", "rows": 20, "first": "a:1"}],
    "data_sets": [{"name": name, "rows_kept": 50, "tokens": 999} for name in ("one", "two")],  # plain: as it is
    "tokens": {"sequences": 1998, "longest": 77},
    "lengths": {"prompt": SPREAD, "chosen": SPREAD, "rejected": None, "sequence": SPREAD},
    "answer_cut": {"rows": 7, "share": 0.07, "first": "a:2"},
    "repeats": {"same_row": NOWHERE, "contradictions": NOWHERE},
    "length_bias": {"share_longer": 0.62, "low": 0.5, "high": 0.7},
}


def card(**changes: Any) -> str:
    values = {"command": "dpo", "config": {}, "config_yaml": "beta: 0.1\n", "version": "0.2.0", "base": "org/base"}
    return model_card(CardFacts(**(values | {"results": RESULTS} | changes)))


def metadata_of(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


def python_of(text: str) -> ast.Module:
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    return ast.parse(code)


def test_a_card_has_metadata_results_and_recipe() -> None:
    text = card(hub_datasets=("org/pairs", "org/pairs", "../etc"))
    found = metadata_of(text)
    assert (found["base_model"], found["base_model_relation"], found["library_name"]) == (
        "org/base",
        "finetune",
        "transformers",
    )
    assert (found["tags"], found["datasets"]) == (["jdpo", "dpo"], ["org/pairs"])
    assert "| Loss | 0.6 | 0.5812 |" in text
    assert "| 0.625 | 0.75 |" in text
    # One notation, also for what is folded away.
    assert "| rewards/margins | 0.000012 |" in text
    assert "| learning_rate | 0.00000033 |" in text
    assert "After 600 steps (1.2 epochs, 86,187 tokens):" in text
    assert "beta: 0.1" in text
    adapter = metadata_of(card(is_adapter=True, command="sft"))
    assert (adapter["base_model_relation"], adapter["library_name"]) == ("adapter", "peft")
    assert adapter["tags"] == ["jdpo", "sft", "lora"]


def test_the_verdict_and_the_findings_of_the_run_are_in_the_card() -> None:
    finding = Finding("learnt_nothing", "error", "Nothing was learnt", "Loss 0.6931.", "Raise learning_rate.")
    text = card(verdict=("It went badly.",), findings=(finding,))
    assert "It went badly." in text
    assert "- **Error: Nothing was learnt.** Loss 0.6931. Raise learning_rate." in text
    assert "How training went" not in card()


def test_the_data_are_described_in_tables() -> None:
    text = card(data={"train": PART, "eval": PART | {"dropped": [], "length_bias": None}})
    assert "Training: 100 rows of 120 read, 1,998 tokens, the longest 77." in text
    assert "| one | 50 | 999 |" in text
    assert "| chosen answer | 20 | 3 to 40 | 1,234 |" in text
    assert "20 rows dropped: chosen equals rejected" in text
    assert "7 cut answers (7.0 %)" in text
    assert "62 %" in text
    assert "Held-out: 100 rows" in text
    (only, _) = PART["data_sets"]  # plain: as it is
    assert "Training: 100 rows of 120 read from `one`, 1,998" in card(data={"train": PART | {"data_sets": [only]}})
    # A run of an older version has a summary in lines.
    lines = card(rows="pairs.jsonl (train)\n  20 rows read")
    assert "\n- pairs.jsonl (train)\n  - 20 rows read\n" in lines
    # So has one whose data.json is not as it should be.
    for data in ({"train": {"rows_kept": 3}}, {"train": [1]}, {"train": PART | {"lengths": 1}}):
        assert card(rows="pairs.jsonl (train)\n  20 rows read", data=data) == lines


def test_usage_fits_template_adapter_and_place() -> None:
    def calls(**changes: Any) -> str:
        return ast.unparse(python_of(card(**changes)))

    assert "messages" in calls(has_chat_template=True)
    assert "messages" not in calls()
    assert "model='me/mine'" in calls(config={"push_to_hub": "me/mine"})
    adapter = calls(is_adapter=True, config={"model_revision": "v1"})
    assert "AutoModelForCausalLM.from_pretrained('org/base', revision='v1'" in adapter
    assert "PeftModel.from_pretrained(base, '.')" in adapter


HOSTILE = 'x<img src=x onerror=alert(1)>|`*](javascript:0)``"+evil()\x1b\u202e\n---\n# fake\nlicense: mit'


def test_foreign_names_are_no_markup() -> None:
    config = load_config(DPOConfig, None, ["model_name_or_path=x", "output_dir=o", f"datasets={json.dumps([HOSTILE])}"])
    recipe = to_public_yaml(config, escaped=CODE_ENDS)
    part = PART | {
        "dropped": [{"reason": HOSTILE, "rows": 1, "first": HOSTILE}],
        "data_sets": [{"name": HOSTILE, "rows_kept": 1, "tokens": 1}] * 2,  # plain: as it is
    }
    text = card(
        config={"push_to_hub": HOSTILE, "model_revision": HOSTILE},
        config_yaml=recipe,
        base=HOSTILE,
        is_adapter=True,
        results={f"rewards/margins/{HOSTILE}": 1.0},
        data={"train": part},
        hub_datasets=(HOSTILE, "a/b\nlicense: mit"),
        verdict=(HOSTILE,),
        findings=(Finding("key", "note", HOSTILE, HOSTILE, HOSTILE),),
    )
    assert all(one == "\n" or not safe_text.is_unseen(one) for one in text)
    assert "base_model" not in metadata_of(text)
    assert set(metadata_of(text)) == {"library_name", "pipeline_tag", "tags"}
    # The only markup is that of the card itself.
    assert set(re.findall(r"<[^>]*>?", text)) == {
        "<details>",
        "</details>",
        "<summary>",
        "</summary>",
        "<code>",
        "</code>",
    }
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---\n", 2)[2])
    assert not re.search("<(img|a href=.javascript)", page)
    assert page.count("<h1>") == 1
    assert page.count("<table>") == 4
    constants = [node.value for node in ast.walk(python_of(text)) if isinstance(node, ast.Constant)]
    assert HOSTILE in constants
    assert yaml.safe_load(recipe)["datasets"][0]["path"] == HOSTILE
    assert recipe.strip() in text
    old = card(rows=f"{HOSTILE}\n  {HOSTILE}", hub_datasets=())
    assert "<img" not in old


@pytest.mark.parametrize("name", ["null", "1e5", "no"])
def test_names_are_texts_in_the_metadata(name: str) -> None:
    assert metadata_of(card(base=name))["base_model"] == name


def test_a_local_base_model_is_not_presented_as_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(base: str) -> Any:
        return metadata_of(card(command="sft", base=base, results={})).get("base_model")

    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [named(base) for base in ("/models/base", "./base", "runs/sft", "runs", "gs://bucket/base")] == [None] * 5
    assert [named(base) for base in ("gpt2", "org/base-1.5")] == ["gpt2", "org/base-1.5"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"config": {"export_dtype": "source"}}, "has them in bfloat16, and no quantization_config"),
        ({"config": {"export_dtype": "float32"}}, "has them in float32"),
        ({"config": {"export_dtype": "source"}, "is_adapter": True}, "the adapter was trained next to the result"),
    ],
)
def test_a_dequantized_base_is_named(changes: dict[str, Any], expected: str) -> None:
    assert "MXFP4" not in card(**changes)
    text = card(**changes, dequantized=True)
    assert "The experts of that model are in MXFP4. They were dequantized" in text
    assert expected in text
