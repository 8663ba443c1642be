"""The engine for chat templates: the output of transformers, within bounds, independent of the date."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jdpo.config import DatasetConfig
from jdpo.data.prepared.prepare import prepare_pairs
from jdpo.data.schemas.formats import Dropped, preference_rows
from jdpo.data.templates import budget as template_budget
from jdpo.data.templates import chat_template
from jdpo.data.templates.chat_template import TEMPLATE_DAY, BoundExceeded, ChatTemplate
from jdpo.data.templates.renderer import renderer_of
from jdpo.data.tokens import row_rendering
from jdpo.data.tokens.tokenize import KeptPair
from jdpo.data.tokens.tokenizer import Tokenizer, load_tokenizer
from jdpo.types import PreferenceRow
from tests.data.one_row import tokenize_pair

TEMPLATES = sorted(Path(__file__).parent.glob("*.jinja"))
QUESTION = [{"role": "user", "content": "Name a river."}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky <&>", "n": 1}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "é", "parameters": {"type": "object"}}}
CONVERSATIONS: list[tuple[list[dict[str, Any]], Any]] = [
    (QUESTION, None),
    ([{"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": "The Lee."}], None),
    ([*QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "7"}], [TOOL]),
    ([*QUESTION, {"role": "assistant", "content": "Yes.", "reasoning_content": "Think.", "name": None}], [TOOL]),
    ([*QUESTION, {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nLee."}, *QUESTION], None),
]
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def load(word_level: Callable[..., Path]) -> Callable[..., Tokenizer]:
    """Loads a tokenizer with one template, or with several named ones."""

    def of(template: str | dict[str, str], **options: Any) -> Tokenizer:
        from transformers import AutoTokenizer

        folder = word_level(
            ["user", "assistant", "system", "tool", "Name", "a", "river", "The", "Lee", "Hi", "Yes", "No", "."]
        )
        hf = AutoTokenizer.from_pretrained(str(folder))
        hf.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        hf.chat_template = template
        hf.save_pretrained(folder)
        return load_tokenizer(folder, **{"chat_template": None, **options})

    return of


def render(text: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    return ChatTemplate(text).render(messages or QUESTION, tools=None, add_generation_prompt=False, variables=variables)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_engine_writes_what_transformers_writes(path: Path, byte_level: Path) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(str(byte_level))
    hf.chat_template = path.read_text(encoding="utf-8")
    renderer = renderer_of(hf, {})
    # transformers would write the day of the test, and jdpo always writes the same one.
    today = re.compile(r"strftime_now\('([^']*)'\)")
    hf.chat_template = today.sub(lambda found: repr(TEMPLATE_DAY.strftime(found[1])), hf.chat_template)
    written = 0
    for messages, tools in CONVERSATIONS:
        for asks in (False, True):
            try:
                theirs = hf.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asks)
            except Exception:  # anything that the template's expressions raise is a refusal by the template
                with pytest.raises(Exception):  # noqa: B017, PT011
                    renderer.render(messages, tools=tools, add_generation_prompt=asks)
                continue
            assert renderer.render(messages, tools=tools, add_generation_prompt=asks) == theirs
            written += 1
    assert written


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ ['a'] * 10**9 }}",
        "{{ 2 ** 1000000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a'.zfill(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a\\nb' | indent(10**10) }}",
        "{{ ('a' * 10**6).replace('a', 'b' * 10**5) }}",
        "{{ ('a' * 10**6) | replace('a', 'b' * 10**5) }}",
        "{{ ('b' * 10**5).join(['a'] * 10**5) }}",
        "{% set ns = namespace(t='ab') %}{% for _ in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
        "{% set ns = namespace(t='ab') %}{% for _ in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
        "{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ ('a' * 4000000).strip('b' * 4000000 ~ 'a') }}",
        "{{ ('a' * 4000000) | trim('b' * 3000000 ~ 'a') }}",
        "{{ ('a' * 2000000).rfind('a' * 500000 ~ 'b' ~ 'a' * 500000) }}",
        "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
        "{{ ('1' * 4000000) | int(base=2) // 3 }}",
        "{{ (1).from_bytes('a'.encode() * 4000000, 'big') // 3 }}",
        "{{ (('<!---->' * 500000) | safe).striptags() }}",
        "{{ ('<!---->' * 500000) | striptags }}",
        "{% set ns = namespace(t=[1]) %}{% for _ in range(60) %}{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.t }}",
        "{% set ns = namespace(t=1) %}{% for _ in range(9999) %}{% set ns.t = (ns.t,) %}{% endfor %}{{ {ns.t: 1} }}",
        "{% set t %}{% for a in range(90000) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
        "{% for a in range(2000) %}{% for b in range(2000) if false %}{% endfor %}{% endfor %}",
        "{% set t = 'a' * 4000000 %}{% for a in range(90000) %}{{ '' if 'b' in t else '' }}{% endfor %}",
        "{{ {'a': [1] * 9999} | tojson(indent=10**9) }}",
        "{{ [1] | batch(10**9, 'x') | list }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
    ],
)
def test_text_and_work_are_bounded(template: str) -> None:
    with pytest.raises((BoundExceeded, OverflowError)):  # without bounds these take minutes, or all memory
        render(template)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ '%s and %(' % 'a' }}", None),
        ("{{ ('%(' * 2000000) % {'a': 1} }}", None),  # searching for each bracket's partner would take hours
        ("{{ '%(a(b)c)5d|%5.1f|%%|%-3s|' % {'a(b)c': 7} }}", None),
        ("{{ '%(a(b)c)5d|%%' % {'a(b)c': 7} }}", "    7|%"),
        ("{{ '%*d|%-4s|%5.1f%%' % (3, 7, 'a', 2.25) }}", "  7|a   |  2.2%"),
        ("{{ '{:>5}|{a[0]!r:<4}|'.format(7, a=['x']) }}", "    7|'x' |"),
        ("{{ {'a': 'b c'} | urlencode }}", "a=b+c"),
        ("{{ '  --a--' | trim | trim('-') }}", "a"),
        ("{{ [1, [2, 3]] | join(' ') ~ (4, 5) ~ none }}", "1 [2, 3](4, 5)None"),
        ("{{ [[1], [2, 3]] | sum(start=[]) }}", "[1, 2, 3]"),
        ("{{ messages | map(attribute='role') | join(',', attribute='x') }}", ""),
        ("{{ messages | selectattr('role', 'in', ['user']) | list | length }}", "1"),
        ("{% for x in range(9) if x is odd %}{{ loop.index }}/{{ loop.length }} {% endfor %}", "1/4 2/4 3/4 4/4 "),
        ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{% macro f(n) %}{{ n }}{{ f(n - 1) if n else caller is defined }}{% endmacro %}{{ f(2) }}", "210False"),
        ("{% generation %}{% set a = 1 %}x{% endgeneration %}{{ a }}", "x"),
        ("{{ {'b': 1, 'a': 'é<'} | tojson(indent=1, sort_keys=true) }}", '{\n "a": "é<",\n "b": 1\n}'),
    ],
)
def test_expressions_give_what_transformers_gives(template: str, text: str | None) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    if text is None:
        with pytest.raises((ValueError, TypeError)):
            render(template)
        return
    assert render(template) == text
    assert render_jinja_template([QUESTION], chat_template=template)[0] == [text]


def test_a_long_conversation_is_within_the_bounds() -> None:
    words = "word " * 2_000_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": words}]) == words


def test_today_is_the_same_day_however_a_template_asks() -> None:
    day = chat_template.TEMPLATE_DAY.strftime("%d %b %Y")
    assert render("{{ strftime_now('%d %b %Y') }}") == day
    assert render("{% set f = '%d %b %Y' %}{{ strftime_now(f) }}") == day
    assert render("{% set now = strftime_now %}{{ now('%d %b %Y') }}") == day


def test_todays_date_is_noted_for_one_of_several_templates_too(load: Callable[..., Tokenizer]) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + TURNS + PROMPT
    tokenizer = load({"default": dated, "tool_use": dated})
    assert any("writes today's date" in note for note in tokenizer.notes)
    assert tokenizer.render(QUESTION).startswith("26 Jul 2024")


def test_a_row_beyond_the_bounds_is_dropped_by_name(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("{% if 'river' in messages[0].content %}{{ 'a' * 10**10 }}{% endif %}" + TURNS + PROMPT)
    row = PreferenceRow(
        QUESTION, [{"role": "assistant", "content": "Yes"}], [{"role": "assistant", "content": "No"}], "x:1"
    )
    dropped = tokenize_pair(row, tokenizer, max_length=99)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == row_rendering.REFUSED
    assert "MiB" in dropped.detail
    kept = tokenize_pair(row._replace(prompt=[{"role": "user", "content": "Hi"}]), tokenizer, max_length=99)
    assert isinstance(kept, KeptPair)


def test_a_rendering_that_takes_too_long_ends_the_run(
    load: Callable[..., Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "{% for a in range(5000 if 'river' in messages[0].content else 0) %}{% endfor %}" + TURNS + PROMPT
    tokenizer = load(text)
    assert isinstance(tokenize_pair(pair_of("Yes", "No"), tokenizer, max_length=99), KeptPair)
    monkeypatch.setattr(template_budget, "MOST_SECONDS", -1.0)  # no host is that fast
    with pytest.raises(ValueError, match=r"x:1: the chat template of \S+ takes more than a minute"):
        tokenize_pair(pair_of("Yes", "No"), tokenizer, max_length=99)
    with pytest.raises(ValueError, match=r"the chat template of \S+ takes more than a minute"):
        load("{% for a in range(5000) %}{% endfor %}" + TURNS)


def test_a_template_without_end_is_named_at_load(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}" + TURNS)
    assert any("refuses a question and its answer" in note for note in tokenizer.notes)


def test_several_templates_without_a_default_are_named(load: Callable[..., Tokenizer]) -> None:
    texts = {"short": TURNS + PROMPT, "long": "Start. " + TURNS + PROMPT}
    tokenizer = load(texts)
    assert any("several chat templates (long, short)" in note or "(short, long)" in note for note in tokenizer.notes)
    with pytest.raises(ValueError, match=r"x:1 is a conversation.*choose one by name"):
        tokenize_pair(pair_of("Yes", "No"), tokenizer, max_length=99)
    assert load(texts, chat_template="long").render(QUESTION).startswith("Start. ")


def pair_of(chosen: str, rejected: str, **kwargs: Any) -> PreferenceRow:
    sides = ([{"role": "assistant", "content": words}] for words in (chosen, rejected))
    return PreferenceRow(QUESTION, *sides, "x:1", **kwargs)


def test_a_template_that_takes_parts_gets_them(load: Callable[..., Tokenizer]) -> None:
    parts = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}"
    parts += "{% endfor %}<|im_end|>\n{% endfor %}"
    tokenizer = load(parts + PROMPT)
    assert any("lists of {type: text, text}" in note for note in tokenizer.notes)
    assert "Name a river." in tokenizer.render(QUESTION)
    kept = tokenize_pair(pair_of("Yes", "No"), tokenizer, max_length=99)
    assert isinstance(kept, KeptPair)
    assert tokenizer.hf.decode(kept.row.chosen_ids).startswith("Yes")


def test_a_template_that_needs_tools_is_probed_with_them(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load("{% for t in tools %}{{ t.function.name }}{% endfor %}" + TURNS + PROMPT)
    refusal = next(note for note in tokenizer.notes if "refuses a question and its answer" in note)
    assert "it takes them with tools" in refusal
    assert tokenizer.hf.convert_tokens_to_ids("<|im_end|>") in tokenizer.end_token_ids
    assert not any("not learnt where to stop" in note for note in tokenizer.notes)


def test_doubled_brackets_are_no_marker(word_level: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}[<<{{ m.role | upper }}>>]{{ m.content }}<|end|>{% endfor %}", encoding="utf-8"
    )
    tokenizer = load_tokenizer(word_level(["Hi"]), chat_template=str(path))
    assert tokenizer.added_tokens == ("<|end|>",)


THINKING = (
    TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}No. {% endif %}{% endif %}"
)


def test_chat_template_kwargs_reach_every_rendering_and_the_digest(load: Callable[..., Tokenizer]) -> None:
    plain, quiet = load(THINKING), load(THINKING, chat_template_kwargs={"enable_thinking": False})
    assert quiet.render(QUESTION, add_generation_prompt=True).endswith("assistant\nNo. ")
    assert not plain.render(QUESTION, add_generation_prompt=True).endswith("No. ")
    assert plain.digest != quiet.digest
    assert any("chat_template_kwargs" in note for note in quiet.notes)
    own = quiet.render(QUESTION, add_generation_prompt=True, kwargs={"enable_thinking": True})
    assert own == plain.render(QUESTION, add_generation_prompt=True)


def test_a_key_that_the_template_does_not_read_names_the_nearest(load: Callable[..., Tokenizer]) -> None:
    with pytest.raises(ValueError, match="did you mean 'enable_thinking'"):
        load(THINKING, chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(ValueError, match="the chat template does not read 'thinks'"):
        tokenize_pair(pair_of("Yes", "No", template_kwargs={"thinks": 1}), load(THINKING), max_length=99)


@pytest.mark.parametrize("value", [{"enable_thinking": False}, '{"enable_thinking": false}'])
def test_a_row_has_kwargs_of_its_own(value: Any) -> None:
    raw = {"prompt": QUESTION, "chosen": "Yes", "rejected": "No", "chat_template_kwargs": value}
    (row,) = preference_rows(raw, "x:1")
    assert isinstance(row, PreferenceRow)
    assert row.template_kwargs == {"enable_thinking": False}
    with pytest.raises(ValueError, match="x:1: chat_template_kwargs is list; expected an object"):
        preference_rows(raw | {"chat_template_kwargs": [1]}, "x:1")


def test_refusals_are_counted_by_what_the_template_says(load: Callable[..., Tokenizer], tmp_path: Path) -> None:
    refusing = "{% if messages[0].content != 'Hi' %}{{ raise_exception('not ' ~ messages[0].content) }}{% endif %}"
    tokenizer = load(refusing + TURNS + PROMPT)
    asked = ["Hi", "Yes", "Hi", "No", "Yes"] + [f"Hi{n}" for n in range(30)]
    rows = tmp_path / "rows.jsonl"
    lines = (
        {
            "prompt": [{"role": "user", "content": words}],
            "chosen": "Yes",
            "rejected": [{"role": "assistant", "content": "No"}],
        }
        for words in asked
    )
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    prepared = prepare_pairs([DatasetConfig(path=str(rows))], tokenizer, max_length=99, cache_dir=tmp_path / "cache")
    reasons = {name: count for name, count in prepared.counts.items() if "refused" in name}
    assert reasons["dropped: refused by the chat template: not Yes"] == 2
    assert reasons["dropped: refused by the chat template: not No"] == 1
    assert reasons["dropped: refused by the chat template for other reasons"] == 12
    assert sum(reasons.values()) == 33
    assert prepared.drop_note is not None
    assert "33 of 35 rows (94%) were dropped" in prepared.drop_note
    assert prepared.drop_note in prepared.summary()


def test_a_tokenizer_that_two_loaders_read_differently_is_a_warning(word_level: Callable[..., Path]) -> None:
    folder = word_level(["Hello", "Paris", "is", "the", "capital", "of", "France"])
    assert load_tokenizer(folder, chat_template="chatml").warnings == ()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "GPT2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder, chat_template="chatml")
    assert any("probe texts" in warning for warning in tokenizer.warnings)
