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

import jdpo
from jdpo.checkpoint.tokenizer_export import write_tokenizer
from jdpo.data.tokens.tokenizer import load_tokenizer

LLAMA_2_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR_LIKE = (  # markers made of roles: the template's text does not contain them
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<start_of_turn>' + m['role'] + ' ' + m['content'] + '<end_of_turn>' }}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def template(tmp_path: Path, text: str) -> str:
    path = tmp_path / "chat.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_without_a_template_nothing_is_changed(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level, chat_template=None)
    eos = tokenizer.hf.convert_tokens_to_ids("<|endoftext|>")
    assert (tokenizer.added_tokens, tokenizer.notes, tokenizer.has_chat_template) == ((), (), False)
    assert tokenizer.end_token_ids == (eos,)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (eos, None)
    assert tokenizer.pad_token_id == eos  # no pad token: EOS pads, and masks come from lengths
    assert tokenizer.size == len(tokenizer.hf)


def test_chatml_brings_two_tokens_and_ends_with_its_own(byte_level: Path) -> None:
    before = load_tokenizer(byte_level, chat_template=None)
    tokenizer = load_tokenizer(byte_level, chat_template="chatml")
    start, end = before.size, before.size + 1
    assert tokenizer.added_tokens == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.hf.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [start, end]
    assert tokenizer.hf.eos_token == "<|im_end|>"
    assert tokenizer.end_token_ids == (end, before.eos_token_id)  # the model may still end answers with its old EOS
    assert tokenizer.size == before.size + 2
    assert tokenizer.notes == (
        "chat template: chatml",
        "new tokens of the chat template: <|im_start|> <|im_end|>",
        "EOS token: <|im_end|> (was <|endoftext|>)",
    )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.render(messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert tokenizer.render(messages[:1], add_generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_a_tokenizer_that_is_saved_comes_back_the_same(byte_level: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level, chat_template="chatml")
    tokenizer.hf.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path, chat_template=None)
    assert again.hf.eos_token == "<|im_end|>"
    assert again.end_token_ids == tokenizer.end_token_ids[:1]
    assert again.size == tokenizer.size
    text = "<|im_start|>user\nParis<|im_end|>\n"
    (ids,) = again.encode([text])
    assert [ids] == tokenizer.encode([text])
    assert again.hf.decode(ids, skip_special_tokens=True) == "user\nParis\n"


@pytest.mark.parametrize(
    ("text", "added", "end"),
    [
        (ZEPHYR_LIKE, ("<|system|>", "<|end|>", "<|user|>", "<|assistant|>"), "<|end|>"),
        (NO_SYSTEM, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
        (LLAMA_2_LIKE, (), "</s>"),
        (BARE, (), None),
    ],
)
def test_markers_of_a_template_file_become_tokens(
    word_level: Callable[..., Path], tmp_path: Path, text: str, added: tuple[str, ...], end: str | None
) -> None:
    folder = word_level(["a"], specials={"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = load_tokenizer(folder, chat_template=template(tmp_path, text))
    assert tokenizer.added_tokens == added
    assert tokenizer.hf.eos_token == (end or "</s>")
    assert tokenizer.hf.convert_tokens_to_ids("</s>") in tokenizer.end_token_ids
    assert any("not learnt where to stop" in note for note in tokenizer.notes) == (end is None)


def test_markers_in_the_vocabulary_keep_their_ids(word_level: Callable[..., Path]) -> None:
    folder = word_level(["a", "<|im_end|>", "<|im_start|>"])
    tokenizer = load_tokenizer(folder, chat_template="chatml")
    assert tokenizer.added_tokens == ()
    assert tokenizer.encode(["<|im_start|>a<|im_end|>"]) == [[4, 2, 3]]
    assert tokenizer.end_token_ids == (3, 1)
    assert tokenizer.size == 5


def test_a_template_of_the_model_is_kept_and_its_end_of_turn_found(word_level: Callable[..., Path]) -> None:
    folder = word_level(["a"], markers=["<|end|>"], chat_template=ZEPHYR_LIKE)
    tokenizer = load_tokenizer(folder, chat_template=None)
    assert tokenizer.hf.eos_token == "</s>"
    assert tokenizer.end_token_ids == (1, 2)
    assert tokenizer.added_tokens == ()
    replaced = load_tokenizer(folder, chat_template="chatml")
    assert replaced.notes[0] == "chat template: chatml, in place of its own"
    assert replaced.digest != tokenizer.digest


def test_the_end_of_turn_replaces_a_missing_eos(word_level: Callable[..., Path]) -> None:
    folder = word_level(["a"], specials={}, markers=["<|end|>"], chat_template=ZEPHYR_LIKE)
    tokenizer = load_tokenizer(folder, chat_template=None)
    assert tokenizer.hf.eos_token == "<|end|>"
    assert tokenizer.end_token_ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("chat_template", [None, BARE])
def test_no_token_to_end_with_is_an_error(word_level: Callable[..., Path], chat_template: str | None) -> None:
    folder = word_level(["a"], specials={}, chat_template=chat_template)
    with pytest.raises(ValueError, match=r"no EOS token.*set eos_token .* or chat_template: chatml"):
        load_tokenizer(folder, chat_template=None)


def test_chatml_writes_bos_if_the_model_always_saw_it(word_level: Callable[..., Path]) -> None:
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = word_level(["a"], specials=specials, adds_bos=True)
    tokenizer = load_tokenizer(folder, chat_template="chatml")
    assert tokenizer.bos_token_id == 1
    assert tokenizer.render([{"role": "user", "content": "a"}]).startswith("<s><|im_start|>user")
    unused = load_tokenizer(word_level(["a"], specials=specials), chat_template="chatml")
    assert unused.bos_token_id is None
    assert unused.render([{"role": "user", "content": "a"}]).startswith("<|im_start|>user")


def test_a_template_of_the_processor_is_that_of_the_tokenizer_where_it_has_none(
    byte_level: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(byte_level, tmp_path / "model"))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": BARE}))
    tokenizer = load_tokenizer(folder, chat_template=None)
    assert tokenizer.hf.chat_template == BARE
    write_tokenizer(tmp_path, tokenizer.hf, folder)
    assert (tmp_path / "chat_template.json").read_bytes() == (folder / "chat_template.json").read_bytes()
    (folder / "chat_template.jinja").write_text(ZEPHYR_LIKE)
    assert load_tokenizer(folder, chat_template=None).hf.chat_template == ZEPHYR_LIKE


def test_a_pad_token_is_used_where_there_is_one(word_level: Callable[..., Path]) -> None:
    folder = word_level(["a"], specials={"eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer = load_tokenizer(folder, chat_template=None)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2)


def test_ids_with_holes_need_an_embedding_up_to_the_largest(word_level: Callable[..., Path]) -> None:
    folder = word_level(["a"])
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 2', '"a": 9'))
    assert load_tokenizer(folder, chat_template=None).size == 10


def test_the_digest_follows_vocabulary_special_tokens_and_template(
    word_level: Callable[..., Path], tmp_path: Path
) -> None:
    def digest(*words: str, chat_template: str | None = None, **options: dict[str, str]) -> str:
        return load_tokenizer(word_level(words, **options), chat_template=chat_template).digest

    digests = [
        digest("a", "b"),
        digest("b", "a"),
        digest("a", "b", specials={"eos_token": "<end>"}),
        digest("a", "b", chat_template="chatml"),
        digest("a", "b", chat_template=template(tmp_path, ZEPHYR_LIKE)),
    ]
    assert len(set(digests)) == len(digests)
    assert digest("a", "b") == digests[0]


def test_completions_gain_no_space_from_a_sentencepiece_tokenizer(metaspace: Path) -> None:
    tokenizer = load_tokenizer(metaspace, chat_template=None)
    alone, spaced = tokenizer.encode_completions(["Paris", " Paris"])
    (prompt,) = tokenizer.encode(["is"])
    assert tokenizer.hf.decode(prompt + alone) == "isParis"
    assert tokenizer.hf.decode(prompt + spaced) == "is Paris"
    assert tokenizer.encode(["Paris"]) == [spaced]  # what naive tokenization of "Paris" would have given


def test_completions_of_a_byte_level_tokenizer_are_as_they_are(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level, chat_template=None)
    texts = ["Paris", " Paris", "\n", "é"]
    assert tokenizer.encode_completions(texts) == tokenizer.encode(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}\n{{ m['role'] }", r"chat\.jinja: line 2: "),
        ("{{ raise_exception('never') }}", r"chat\.jinja refuses a question and its answer: never"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "without the assistant's text"),
        ("{{ messages[0].content + 1 }}", r"chat_template \S+chat\.jinja fails: TypeError: can only concatenate"),
        ("{{ messages[0].content[1 // 0] }}", r"chat\.jinja fails: ZeroDivisionError"),
    ],
)
def test_a_broken_template_is_named(byte_level: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(byte_level, chat_template=template(tmp_path, text))


def test_a_template_file_that_does_not_exist_is_named(byte_level: Path) -> None:
    with pytest.raises(ValueError, match="'chatlm' is neither a file nor the built-in 'chatml'"):
        load_tokenizer(byte_level, chat_template="chatlm")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(tmp_path / "missing", chat_template=None)
    with pytest.raises(ValueError, match="no usable tokenizer in this folder"):
        load_tokenizer(tmp_path, chat_template=None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="no usable tokenizer in this folder"):
        load_tokenizer(tmp_path, chat_template=None)


def test_a_template_of_the_model_that_breaks_on_a_question_does_not_stop_the_start(
    word_level: Callable[..., Path],
) -> None:
    folder = word_level(["a"], chat_template="{{ messages[0].content + 1 }}")
    assert load_tokenizer(folder, chat_template=None).end_token_ids == (1,)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["code.Own", "code.Own"]}, ["code.Own", None]])
def test_python_code_of_the_folder_is_never_run_nor_asked_for(
    word_level: Callable[..., Path], tmp_path: Path, auto_map: Any
) -> None:
    folder = word_level(["a"])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Own", "auto_map": auto_map}))
    marker = tmp_path / "it_ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    program = (
        "import sys\nfrom pathlib import Path\nfrom jdpo.data.tokens.tokenizer import load_tokenizer\n"
        "try: load_tokenizer(Path(sys.argv[1]), chat_template=None)\nexcept ValueError as error: print(error)\n"
    )
    root = str(Path(jdpo.__file__).parents[1])
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": root}
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder)], input="y\n", capture_output=True, text=True, env=environment
    )
    assert not marker.exists()
    assert "needs Python code of the folder" in run.stdout, run.stderr
    assert "which jdpo never runs" in run.stdout
    assert "trust_remote_code" not in run.stdout + run.stderr
    assert "[y/N]" not in run.stdout + run.stderr


@pytest.mark.parametrize("own", [True, False])
def test_conversations_without_bos_are_reported(word_level: Callable[..., Path], tmp_path: Path, own: bool) -> None:
    specials = {"bos_token": "<s>", "eos_token": "</s>"}

    def notes(text: str, adds_bos: bool) -> list[str]:
        folder = word_level(["a"], specials=specials, adds_bos=adds_bos, chat_template=text if own else None)
        tokenizer = load_tokenizer(folder, chat_template=None if own else template(tmp_path, text))
        return [note for note in tokenizer.notes if note.startswith("BOS")]

    assert notes(ZEPHYR_LIKE, adds_bos=True) == [
        "BOS: the chat template does not write <s>: conversations go without, plain text has it"
    ]
    assert notes(ZEPHYR_LIKE, adds_bos=False) == notes(LLAMA_2_LIKE, adds_bos=True) == []


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(
    word_level: Callable[..., Path], tmp_path: Path
) -> None:
    text = "{% for m in messages %}<s>{{ m.role }} {{ strftime_now('%d %b %Y') }}\n{{ m.content }}</s>{% endfor %}"
    tokenizer = load_tokenizer(
        word_level(["a"], specials={"eos_token": "</s>"}, chat_template=text), chat_template=None
    )
    assert tokenizer.render([{"role": "user", "content": "a"}]) == "<s>user 26 Jul 2024\na</s>"
    assert any("writes today's date; every row has 26 July 2024" in note for note in tokenizer.notes)


def test_a_template_that_writes_bos_twice_is_reported(word_level: Callable[..., Path]) -> None:
    text = "<s><s>{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    twice, once = (
        load_tokenizer(word_level(["a"], specials=specials, chat_template=written), chat_template=None).notes
        for written in (text, text.removeprefix("<s>"))
    )
    printed = "the chat template writes <s> twice; jdpo takes one away, which others may not do"
    assert printed in twice
    assert printed not in once
