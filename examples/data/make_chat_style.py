"""Writes the files of chat_style/: pairs of good and bad manners in a chat, from the texts in chat_style_texts/.

    python examples/data/make_chat_style.py              # into examples/data/chat_style
    python examples/data/make_chat_style.py FOLDER

Each text is used in one file only: supervised rows, pairs and held-out pairs share no prompt and no topic. Change a
text, or add topics, and run it again; the same texts give the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
Turn = dict[str, Any]

HERE = Path(__file__).parent
SEED = 0

SHARES = {"pairs": 0.7, "held_out_pairs": 0.12, "sft": 0.18}
"""The share of the topics, and of the other texts, that each file gets."""


def load(name: str) -> Any:
    return yaml.safe_load((HERE / "chat_style_texts" / f"{name}.yaml").read_text(encoding="utf-8"))


class Writer:
    """Makes pairs; phrases are drawn from shuffled decks, so that one comes again only after all others."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._phrases = load("phrases")
        self._decks: dict[str, list[str]] = {}
        self._tools = load("tool_calls")["tools"]

    def draw(self, kind: str) -> str:
        deck = self._decks.setdefault(kind, [])
        if not deck:
            deck += self._rng.sample(self._phrases[kind], len(self._phrases[kind]))
        return deck.pop()

    def topic(self, topic: Mapping[str, Any]) -> Iterator[Row]:
        """Yields the pairs of a topic of topics_*.yaml."""
        concise, direct, points, deep = (topic[kind] for kind in ("concise", "direct", "points", "deep"))
        yield _pair("rambling", [user(concise["q"])], concise["a"], self._ramble(concise))
        refusal = self.draw("refusals").format(topic=topic["topic"])
        yield _pair("refusal", [user(direct["q"])], direct["a"], refusal)
        items = points["items"]
        bullets = "\n".join(f"- {item}" for item in items)
        yield _pair("format", [user(points["q"])], bullets, self.draw("prose").format(items=_joined(items)))
        yield _pair("depth", [user(deep["q"])], deep["a"], deep["curt"])

    def _ramble(self, question: Mapping[str, str]) -> str:
        """Returns an answer that says the same after and before much else."""
        first, _, second = question["aside"].partition(". ")
        answer = question["a"]
        # After "that" or a comma the sentence continues, except with names and numbers, which keep their form.
        first_word = answer.split()[0]
        if first_word not in ("I", "January") and not first_word.isupper():
            answer = answer[0].lower() + answer[1:]
        hedged = f"{self.draw('hedges')} {answer}"
        opener, closer = self.draw("openers"), self.draw("closers")
        orders = ([opener, f"{first}.", hedged, second, closer], [opener, f"{first}.", second, hedged, closer])
        return " ".join(self._rng.choice(orders))

    def notes(self, topic: Mapping[str, Any]) -> Iterator[Row]:
        """Yields a pair whose right format is prose: the reverse of a list."""
        items = topic["points"]["items"]
        bullets = "\n".join(f"- {item}" for item in items)
        text = f"{self.draw('notes')}\n{bullets}"
        yield _pair("format", [user(text)], self.draw("sentences").format(items=_joined(items)), bullets)

    def word(self, texts: Sequence[str]) -> Iterator[Row]:
        question, instruction, chosen, rejected = texts
        yield _pair("format", [user(f"{question} {instruction}")], chosen, rejected)

    def record(self, texts: tuple[str, Mapping[str, Any]]) -> Iterator[Row]:
        text, wanted = texts
        chosen = json.dumps(wanted, ensure_ascii=False)
        values = _joined([f"{key.replace('_', ' ')} is {_spoken(value)}" for key, value in wanted.items()])
        others = (
            f"Sure! Here is the JSON you asked for:\n```json\n{chosen}\n```\nLet me know if you need other fields.",
            f"The {values}.",
            "\n".join(f"{key}: {_spoken(value)}" for key, value in wanted.items()),
            repr(dict(wanted)).replace("True", "yes").replace("False", "no"),
        )
        question = self.draw("fields").format(keys=", ".join(wanted))
        yield _pair("format", [user(f"{question}\n\n{text}")], chosen, self._rng.choice(others))

    def system(self, texts: tuple[str, Sequence[str]]) -> Iterator[Row]:
        system, (question, chosen, rejected) = texts
        yield _pair("system turn", [{"role": "system", "content": system}, user(question)], chosen, rejected)

    def conversation(self, texts: Sequence[str]) -> Iterator[Row]:
        *turns, chosen, rejected = texts
        prompt = [user(text) if index % 2 == 0 else assistant(text) for index, text in enumerate(turns)]
        yield _pair("multi-turn", prompt, chosen, rejected)

    def call(self, texts: Sequence[Any]) -> Iterator[Row]:
        offered, question, tool, arguments, answer = texts
        yield self._tool_pair(offered, [user(question)], calling(tool, arguments), assistant(answer))

    def arguments(self, texts: Sequence[Any]) -> Iterator[Row]:
        offered, question, tool, arguments, other, wrong = texts
        yield self._tool_pair(offered, [user(question)], calling(tool, arguments), calling(other, wrong))

    def needless(self, texts: Sequence[Any]) -> Iterator[Row]:
        offered, question, answer, tool, arguments = texts
        yield self._tool_pair(offered, [user(question)], assistant(answer), calling(tool, arguments))

    def result(self, texts: Sequence[Any]) -> Iterator[Row]:
        offered, question, tool, arguments, result, answer, other = texts
        prompt = [user(question), calling(tool, arguments), {"role": "tool", "content": json.dumps(result)}]
        yield self._tool_pair(offered, prompt, assistant(answer), assistant(other))

    def _tool_pair(self, offered: Sequence[str], prompt: list[Turn], chosen: Turn, rejected: Turn) -> Row:
        tools = [tool_schema(name, self._tools[name]) for name in offered]
        return {"kind": "tools", "prompt": prompt, "chosen": [chosen], "rejected": [rejected], "tools": tools}


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def calling(tool: str, arguments: Mapping[str, Any]) -> Turn:
    # As text, as OpenAI's API writes them: in a table every row would get the arguments of all tools.
    function = {"name": tool, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def tool_schema(name: str, tool: Mapping[str, Any]) -> Row:
    properties = {parameter: {"type": kind} for parameter, kind in tool["parameters"]}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": tool["description"], "parameters": parameters},
    }


def _pair(kind: str, prompt: list[Turn], chosen: str, rejected: str) -> Row:
    return {"kind": kind, "prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def _joined(items: Sequence[str]) -> str:
    """
    >>> _joined(["a", "b", "c"])
    'a, b and c'
    """
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def _spoken(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _joined([str(item) for item in value]) if isinstance(value, list) and value else str(value)


def files() -> dict[str, list[Row]]:
    """Returns the rows of every file."""
    rng = random.Random(SEED)
    writer = Writer(rng)
    topics = load("topics_1") + load("topics_2") + load("topics_3")
    short, tools = load("short_answers"), load("tool_calls")
    systems = [(group["system"], texts) for group in load("system_turns") for texts in group["turns"]]
    sources: list[tuple[Sequence[Any], Sequence[Callable[[Any], Iterator[Row]]]]] = [
        (topics, (writer.topic, writer.notes)),
        (short["words"], (writer.word,)),
        (short["records"], (writer.record,)),
        (systems, (writer.system,)),
        (load("conversations"), (writer.conversation,)),
        (tools["calls"], (writer.call,)),
        (tools["arguments"], (writer.arguments,)),
        (tools["needless"], (writer.needless,)),
        (tools["results"], (writer.result,)),
    ]
    rows: dict[str, list[Row]] = {name: [] for name in SHARES}
    for texts, makers in sources:
        for name, own in _split(texts, rng).items():
            rows[name] += [row for text in own for make in makers for row in make(text)]
    for part in rows.values():
        rng.shuffle(part)
    rows["sft"] = [_supervised(row) for row in rows["sft"]]
    prompts: list[Row] = [
        {key: row[key] for key in ("prompt", "tools") if key in row} for row in rows["held_out_pairs"]
    ]
    return {**rows, "prompts": prompts}


def _split(texts: Sequence[Any], rng: random.Random) -> dict[str, Sequence[Any]]:
    """Returns the texts of every file: shuffled, then cut."""
    shuffled = rng.sample(list(texts), len(texts))
    num_pairs, num_held_out = (round(SHARES[name] * len(texts)) for name in ("pairs", "held_out_pairs"))
    return {
        "pairs": shuffled[:num_pairs],
        "held_out_pairs": shuffled[num_pairs : num_pairs + num_held_out],
        "sft": shuffled[num_pairs + num_held_out :],
    }


def _supervised(pair: Row) -> Row:
    """Returns the conversation with the chosen answer."""
    row = {"kind": pair["kind"], "messages": pair["prompt"] + pair["chosen"]}
    return row | ({"tools": pair["tools"]} if "tools" in pair else {})


def main(words: Sequence[str]) -> None:
    folder = Path(words[0]) if words else HERE / "chat_style"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files().items():
        text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl  {len(rows)} rows  {len(text.encode()) / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
