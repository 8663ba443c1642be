"""The tokenizer of an export: the source's own bytes if nothing changed, otherwise files for transformers 4 and 5."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jdpo.checkpoint.tokenizer_export import write_tokenizer
from jdpo.config import DPOConfig, load_config
from jdpo.training.finish import Outcome, export_trained
from jdpo.training.setup.numerics import resolve_dtype
from jdpo.training.setup.run_setup import build
from jdpo.training.setup.weight_placement import load_start

TEMPLATE = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
NEW_TEMPLATE = "{% for m in messages %}<|brand|>{{ m.content }}<|new|>{% endfor %}"
TEXT = "A green <|brand|> river in\nthe <|turn|>winter <|new|>x <|end|>"
TURNS = [{"role": "user", "content": "Name a river."}]
CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "TokenizersBackend"]

Make = Callable[..., Path]


def spelled(id: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {str(id): {"content": token, **flags, "special": True}}


def write_source(folder: Path, name: str) -> Path:
    """Writes the named class as transformers 4 saves it, or TokenizersBackend as transformers 5 does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True)
    sentencepiece = name == "LlamaTokenizer"
    special = ["<unk>", "<s>", "</s>"]
    if sentencepiece:
        bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        alphabet: list[str] = []
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["A green river in the winter, a brand new market.\n", "user assistant system: x"] * 8
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<|turn|>", "<|end|>")])
    bpe.save(str(folder / "tokenizer.json"))
    added = ("<unk>", "<s>", "</s>", "<|turn|>", "<|end|>")
    decoder: dict[str, Any] = {}
    for token in added:
        decoder |= spelled(bpe.token_to_id(token), token)
    config = {
        "tokenizer_class": name,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ["<|turn|>"],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "chat_template": TEMPLATE,
    }
    if sentencepiece:
        config |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    if name == "TokenizersBackend":
        del config["added_tokens_decoder"], config["chat_template"]
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
        config["backend"] = "tokenizers"
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if sentencepiece:
        special_map = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|turn|>"]}
        (folder / "special_tokens_map.json").write_text(json.dumps(special_map), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return folder


def load(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def changed(folder: Path) -> Any:
    """Returns the tokenizer of a folder after changes that a run may make: template, tokens, EOS."""
    tokenizer = load(folder)
    tokenizer.chat_template = NEW_TEMPLATE
    tokenizer.add_tokens(["<|brand|>", "<|new|>"], special_tokens=True)
    tokenizer.eos_token = "<|new|>"
    return tokenizer


def export(tokenizer: Any, source: Path | None, out: Path) -> Path:
    out.mkdir(parents=True)
    write_tokenizer(out, tokenizer, source)
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return out


@pytest.mark.parametrize("name", CLASSES)
def test_an_unchanged_tokenizer_is_copied_byte_for_byte_and_no_code_with_it(tmp_path: Path, name: str) -> None:
    source = write_source(tmp_path / "source", name)
    for file in ("tokenizer.py", "tokenization_own.py", "tokenizer.bin", "notes.txt", "model.safetensors"):
        (source / file).write_text("print('run')", encoding="utf-8")
    (source / "vocab.json").write_text("{}", encoding="utf-8")
    (tmp_path / "blob").write_text("#version: 0.2\n", encoding="utf-8")
    (source / "merges.txt").symlink_to(tmp_path / "blob")  # as files are in the hub's cache
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = load(source)
    tokenizer(["a", "a green river"], padding=False, truncation=True, max_length=1)  # leaves its mark on the backend
    out = export(tokenizer, source, tmp_path / "out")
    names = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "additional_chat_templates"}
    names |= {"special_tokens_map.json"} if name == "LlamaTokenizer" else set()
    names |= {"chat_template.jinja"} if name == "TokenizersBackend" else set()
    assert {path.name for path in out.iterdir()} == names | {"config.json"}
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "config.json"]
    for path in files:
        assert path.read_bytes() == (source / path.relative_to(out)).read_bytes()
        assert not path.is_symlink()


@pytest.mark.parametrize("name", CLASSES)
def test_a_changed_tokenizer_keeps_its_class_and_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    source = write_source(tmp_path / "source", name)
    tokenizer = changed(source)
    out = export(tokenizer, source, tmp_path / "out")
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == ("PreTrainedTokenizerFast" if name == "TokenizersBackend" else name)
    assert config["additional_special_tokens"] == ["<|turn|>", "<|brand|>", "<|new|>"]
    assert not {"extra_special_tokens", "backend", "is_local", "chat_template"} & config.keys()
    assert config["eos_token"] == "<|new|>"
    assert config["model_max_length"] == 512
    if name == "LlamaTokenizer":
        assert (config["add_bos_token"], config["add_eos_token"], config["legacy"]) == (True, False, False)
        special = json.loads((out / "special_tokens_map.json").read_text(encoding="utf-8"))
        assert special["eos_token"] == "<|new|>"
        assert special["additional_special_tokens"] == ["<|turn|>", "<|brand|>", "<|new|>"]
    again = load(out)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.eos_token_id == tokenizer.convert_tokens_to_ids("<|new|>")
    assert again.apply_chat_template(TURNS, tokenize=False) == "<|brand|>Name a river.<|new|>"


def test_each_single_change_counts_as_a_change(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "Qwen2Tokenizer")
    template, eos, token = load(source), load(source), load(source)
    template.chat_template = NEW_TEMPLATE
    eos.eos_token = "<|end|>"
    token.add_tokens(["<|new|>"], special_tokens=True)
    for number, tokenizer in enumerate((template, eos, token)):
        again = load(export(tokenizer, source, tmp_path / f"out{number}"))
        assert again.chat_template == tokenizer.chat_template
        assert (again.eos_token, len(again)) == (tokenizer.eos_token, len(tokenizer))


@pytest.mark.parametrize("gone", [False, True], ids=["in memory", "source gone"])
def test_without_a_source_the_files_are_still_those_of_transformers_4(tmp_path: Path, gone: bool) -> None:
    tokenizer = changed(write_source(tmp_path / "source", "PreTrainedTokenizerFast"))
    out = export(tokenizer, tmp_path / "nowhere" if gone else None, tmp_path / "out")
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|turn|>"]
    assert "extra_special_tokens" not in config
    assert load(out)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
def test_a_run_exports_the_files_of_the_tokenizer_that_it_read(
    run_words: Callable[..., list[str]], toy_model: Path, tmp_path: Path, lora: bool
) -> None:
    config = load_config(DPOConfig, None, run_words(lora=lora))
    setup = build(resolve_dtype(config), lambda line: None)
    export_trained(setup, load_start(setup), None, tmp_path / "out", Outcome("dpo"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (toy_model / file).read_bytes()


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 10**5])
def test_what_an_export_carries_over_is_read_before_anything_is_trained(
    run_words: Callable[..., list[str]], toy_model: Path, tmp_path: Path, text: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(toy_model, broken)
    (broken / "generation_config.json").write_text(text, encoding="utf-8")
    config = load_config(DPOConfig, None, run_words(model_name_or_path=broken))
    with pytest.raises(ValueError, match=r"generation_config\.json: (not valid JSON|expected a JSON object)"):
        build(resolve_dtype(config), lambda line: None)


READ = """\
import json, sys
from transformers import AutoTokenizer

found = {}
for folder in sys.argv[3:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found[folder] = [
        tokenizer(sys.argv[1])["input_ids"],
        tokenizer.apply_chat_template(json.loads(sys.argv[2]), tokenize=False),
        tokenizer.eos_token,
        len(tokenizer),
    ]
print(json.dumps(found))
"""


@pytest.mark.full
def test_transformers_4_reads_every_export_as_transformers_5_does(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, capture_output=True)
    python = environment / "bin" / "python"
    packages = ["transformers==4.57.1", "jinja2"]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"{' and '.join(packages)} cannot be installed here: {installed.stderr.strip()[-300:]}")
    copies, changes = [], []
    for name in CLASSES:
        source = write_source(tmp_path / name / "source", name)
        if (
            name != "TokenizersBackend"
        ):  # transformers 4 does not know this class: a copy is as unreadable as its source
            copies.append((export(load(source), source, tmp_path / name / "copied"), source))
        changes.append(export(changed(source), source, tmp_path / name / "changed"))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", READ, TEXT, json.dumps(TURNS), *map(str, [*sum(copies, ()), *changes])],
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for copied, source in copies:
        assert found[str(copied)] == found[str(source)], copied
    for folder in changes:
        now = load(folder)
        expected = [now(TEXT)["input_ids"], now.apply_chat_template(TURNS, tokenize=False), now.eos_token, len(now)]
        assert found[str(folder)] == expected, folder
