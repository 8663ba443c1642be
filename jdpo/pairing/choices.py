"""A person's choices between answers, shown in the terminal and kept on disk, one line for each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

from jdpo.durable import naming
from jdpo.file_locks import lock_file
from jdpo.generation.values import Question
from jdpo.pairing.answers_read import Group
from jdpo.pairing.candidates import Candidate, PairRules, draw
from jdpo.pairing.selecting import Choice, shown_couples
from jdpo.safe_text import terminal, terminal_lines
from jdpo.words import figure

if TYPE_CHECKING:
    from rich.console import Console

Typed = Literal["1", "2", "tie", "skip", "quit"]

KEYS: dict[str, Typed] = {
    "1": "1",
    "2": "2",
    "t": "tie",
    "tie": "tie",
    "s": "skip",
    "skip": "skip",
    "q": "quit",
    "quit": "quit",
}
"""A word that a person may type -> its meaning."""


class ChoiceFile:
    """The choices of a person on disk. It is locked while it is open, so that two people do not share a file."""

    def __init__(self, path: Path, answers: str) -> None:
        """Opens the file, or creates it.

        Args:
          path: in a folder that exists.
          answers: digest of the answers that are compared.

        Raises:
          ValueError: another process has it open, a line cannot be read, or the choices are about other answers.
        """
        file = lock_file(path)
        if file is None:
            raise ValueError(f"another process is asking for choices with {path}; wait for it, or use another --output")
        self._path, self._file = path, file
        self._made: dict[tuple[str, int, int], Choice] = {}
        try:
            self._read(answers)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> ChoiceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self, answers: str) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        # A process that was killed while it wrote leaves a line without its end.
        if whole != text:
            self._file.truncate(len(whole.encode()))
        if not whole:
            self._append({"answers": answers})
            return
        lines = whole.splitlines()
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                if number == 0:
                    found = row["answers"]
                    continue
                self._made[row["prompt_id"], row["a"], row["b"]] = row["choice"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self._path}:{number + 1}: not a line of choices: {terminal(line[:80])}") from None
        if found != answers:
            raise ValueError(
                f"{self._path} has choices about other answers; use another --output, or remove it to start again"
            )

    def _append(self, row: dict[str, Any]) -> None:
        with naming(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            # What a person has decided is not to be asked twice, whatever happens next.
            os.fsync(self._file.fileno())

    def choice(self, prompt_id: str, a: Candidate, b: Candidate) -> Choice | None:
        """Returns a choice that was made, or None."""
        return self._made.get((prompt_id, a.sample, b.sample))

    def record(self, prompt_id: str, a: Candidate, b: Candidate, *, left: str, choice: Choice) -> None:
        """Stores a choice; it is on the disk when this returns.

        Args:
          left: which answer was shown on the left, as number 1: "a" or "b".
        """
        self._append({"prompt_id": prompt_id, "a": a.sample, "b": b.sample, "left": left, "choice": choice})
        self._made[prompt_id, a.sample, b.sample] = choice


def ask(groups: Sequence[Group], rules: PairRules, choices: ChoiceFile, console: Console, keys: IO[str]) -> bool:
    """Shows the answers that are not decided yet, two at a time, and records what a person types.

    Args:
      keys: where lines are read from.

    Returns:
      False if the person ended the session before the last one.
    """
    couples = list(_couples(groups, rules))
    left_over = [couple for couple in couples if choices.choice(couple[0].prompt_id, *couple[1:]) is None]
    if len(left_over) < len(couples):
        console.print(f"{len(couples) - len(left_over):,} of {figure(len(couples), 'choice')} made before")
    for number, (question, a, b) in enumerate(left_over, len(couples) - len(left_over) + 1):
        # Neither the order of the samples nor the person's habit decides which answer is on the left.
        swapped = int(draw(rules.seed, question.prompt_id, "left", a.sample, b.sample), 16) % 2 == 1
        first, second = (b, a) if swapped else (a, b)
        _show(console, question, first, second, f"{number:,} of {len(couples):,}")
        typed = _typed(console, keys)
        if typed == "quit":
            return False
        meaning: dict[Typed, Choice] = {"1": "a", "2": "b", "tie": "tie", "skip": "skip"}
        if swapped:
            meaning |= {"1": "b", "2": "a"}
        choices.record(question.prompt_id, a, b, left="b" if swapped else "a", choice=meaning[typed])
    return True


def _couples(groups: Sequence[Group], rules: PairRules) -> Iterator[tuple[Question, Candidate, Candidate]]:
    for group in groups:
        for a, b in shown_couples(group.candidates, rules, group.question.prompt_id):
            yield group.question, a, b


def _typed(console: Console, keys: IO[str]) -> Typed:
    """Reads lines until one has a meaning; the end of a pipe ends the session."""
    while True:
        console.print("1 / 2 / tie / skip / quit: ", end="")
        line = keys.readline()
        if not line:
            console.print()
            return "quit"
        word = line.strip().lower()
        if word in KEYS:
            return KEYS[word]
        console.print(f"cannot read {terminal(word)!r}: type 1 or 2 for the better answer, tie, skip or quit")


def _show(console: Console, question: Question, first: Candidate, second: Candidate, place: str) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    # As Text, in which square brackets are no markup.
    console.rule(Text(place))
    turns = (
        question.prompt if not isinstance(question.prompt, str) else [{"role": "prompt", "content": question.prompt}]
    )
    for turn in turns:
        console.print(Text(terminal_lines(f"{turn.get('role')}: {turn.get('content')}")))
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    panels = []
    for number, one in ((1, first), (2, second)):
        # Folded: text without spaces, such as Chinese, would otherwise end at the edge of the panel.
        text = Text(terminal_lines(one.text), overflow="fold")
        panels.append(Panel(text, title=f"{number} (cut off)" if one.cut_off else str(number)))
    table.add_row(*panels)
    console.print(table)
