"""The loop: rounds of stages, each recorded when it is done, so that a loop that is stopped anywhere can continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdpo.config import to_public_dict
from jdpo.durable import write_durably
from jdpo.file_locks import lock_file
from jdpo.iteration.loop_settings import LoopSettings
from jdpo.iteration.prompt_rounds import Split, read_split, write_questions
from jdpo.iteration.replay import count_lines, write_replay
from jdpo.iteration.round_plan import STAGES, Command, LoopFolder, RoundFolder, round_commands
from jdpo.iteration.stopping import Compared, Stop, read_compared, shown, why_stop
from jdpo.json_files import read_json
from jdpo.words import figure

FORMAT = 1
"""Version of iterate.json and round.json."""

FREE = ("rounds", "max_kl")
"""Settings that may change when a loop continues."""

_SHOWN = {"prompts_digest": "content of the prompts"}

Run = Callable[[Command, int], int]
"""(command, file descriptor of the loop's lock) -> exit code."""


def planned_commands(loop: LoopSettings) -> list[list[Command]]:
    """Returns the commands of all rounds, if no round stops the loop."""
    folder = LoopFolder(Path(loop.output_dir))
    rounds, model = [], loop.model_name_or_path
    for number in range(loop.rounds):
        rounds.append(round_commands(loop, number, model=model, replays=number > 0 and loop.replay > 0))
        model = str(folder.round(number).model)
    return rounds


def iterate(loop: LoopSettings, run: Run, log: Callable[[str], None]) -> int:
    """Runs all rounds that are not done yet, until a round stops the loop.

    Args:
      run: runs a stage.
      log: receives lines for the user.

    Returns:
      0, or the exit code of the stage that failed.

    Raises:
      ValueError: the folder holds another loop, another process runs this one, or there are too few prompts.
    """
    folder = LoopFolder(Path(loop.output_dir))
    split = read_split(loop)
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder.lock)
    if lock is None:
        raise ValueError(
            f"{folder.path}: another `jdpo iterate`, or a stage that it has started, is still running here; wait for "
            "it, or end it"
        )
    with lock:
        _prepare(folder, loop, split)
        log(_described(split, loop))
        return _Loop(loop, folder, split, lambda command: run(command, lock.fileno()), log).run()


class _Loop:
    """The rounds of one call of `iterate`."""

    def __init__(
        self,
        loop: LoopSettings,
        folder: LoopFolder,
        split: Split,
        run: Callable[[Command], int],
        log: Callable[[str], None],
    ) -> None:
        self._loop, self._folder, self._split, self._run, self._log = loop, folder, split, run, log
        self._rounds: list[dict[str, Any]] = []

    def run(self) -> int:
        model = self._loop.model_name_or_path
        for number in range(self._loop.rounds):
            state = self._round(number, model)
            if code := state.pop("exit_code", 0):
                return int(code)
            found = state.get("compared")
            compared = None if found is None else Compared.from_json(found)
            self._rounds.append(state)
            stop = why_stop(compared, number, self._loop)
            if compared is not None:
                self._log(
                    f"round {number}: {figure(state['pairs'], 'pair')}, {state['replayed']:,} of them replayed; won "
                    f"{shown(compared.win_rate)}; KL {compared.kl:.3g} nats per answer"
                )
            if stop is None or stop.keeps:
                model = str(self._folder.round(number).model)
            self._write_result(model, stop)
            if stop is not None:
                self._log(f"done: {stop.text}; the model is {model}")
                return 0
        raise AssertionError("the last round stops the loop")

    def _write_result(self, model: str, stop: Stop | None) -> None:
        stopped = None if stop is None else {"why": stop.why, "text": stop.text}
        result = {"format": FORMAT, "model": model, "stopped": stopped, "rounds": self._rounds}
        write_durably(self._folder.result, json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    def _round(self, number: int, model: str) -> dict[str, Any]:
        """Runs the stages of a round that are not done; returns its state, with `exit_code` if a stage failed."""
        place = self._folder.round(number)
        state = self._begun(place, number, model)
        older = [self._folder.round(earlier).pairs for earlier in range(number)]
        replays = bool(older) and self._loop.replay > 0
        for index in range(len(STAGES)):
            # Planned again before each stage: whether there are pairs to replay is known once there are pairs.
            commands = round_commands(self._loop, number, model=model, replays=replays and state["replayed"] != 0)
            command = commands[index]
            if command.stage in state["done"]:
                continue
            if command.stage == "dpo" and not state["pairs"]:
                break
            write_durably(place.commands, "".join(f"{one}\n" for one in commands))
            self._log(f"round {number}, {command.stage}: {command}")
            if code := self._run(command):
                self._log(f"round {number}: {command.stage} ended with exit code {code}; the same command continues")
                return {**state, "exit_code": code}
            if command.stage == "pair":
                self._count_pairs(place, state, older if replays else [])
            elif command.stage == "compare":
                state["compared"] = read_compared(place.cmp).to_json()
            state["done"].append(command.stage)
            _write_state(place, state)
        return state

    def _count_pairs(self, place: RoundFolder, state: dict[str, Any], older: list[Path]) -> None:
        """Adds replayed pairs to those of the round. A round without pairs of its own trains on none."""
        new = count_lines(place.pairs)
        state["replayed"] = 0
        if new and older:
            # Another seed in each round; with one seed the same pairs of the first round would be replayed in all.
            seed = self._loop.seed + len(older)
            state["replayed"] = write_replay(place.replay, place.pairs, older, self._loop.replay, seed)
        state["pairs"] = new + state["replayed"]

    def _begun(self, place: RoundFolder, number: int, model: str) -> dict[str, Any]:
        if place.state.is_file():
            return read_json(place.state)
        place.path.mkdir(exist_ok=True)
        write_questions(place.prompts, self._split.rounds[number])
        state: dict[str, Any] = {
            "format": FORMAT,
            "round": number,
            "model_before": model,
            "prompts": len(self._split.rounds[number]),
            "pairs": None,
            "replayed": None,
            "done": [],
        }
        _write_state(place, state)
        return state


def _write_state(place: RoundFolder, state: dict[str, Any]) -> None:
    write_durably(place.state, json.dumps(state, indent=1) + "\n")


def _prepare(folder: LoopFolder, loop: LoopSettings, split: Split) -> None:
    """Writes settings and held-out prompts, or checks that they are those of the loop that is there.

    Raises:
      ValueError: the folder holds a loop with other settings or prompts, or something else.
    """
    wanted = to_public_dict(loop)
    # What the settings mean, so that a changed file of prompts, or another number of rounds, is noticed.
    wanted |= {"prompts_per_round": len(split.rounds[0]), "prompts_digest": split.digest}
    if folder.settings.is_file():
        found = read_json(folder.settings)
        changed = [name for name, value in wanted.items() if name not in FREE and found.get(name) != value]
        if changed:
            names = [_SHOWN.get(name, name) for name in changed]
            raise ValueError(
                f"{folder.path} holds a loop with another {', '.join(names)}; use another output_dir, or delete that "
                f"folder. Only {' and '.join(FREE)} may change, and rounds if prompts_per_round is set"
            )
        _write_settings(folder, wanted)
        return
    ours = {folder.lock.name, folder.held_out.name}
    if others := sorted({path.name for path in folder.path.iterdir() if not path.name.endswith(".tmp")} - ours):
        raise ValueError(f"{folder.path} holds {', '.join(others[:3])} and is not a loop; use another output_dir")
    write_questions(folder.held_out, split.held_out)
    # Last: a start that is killed before is repeated from the beginning.
    _write_settings(folder, wanted)


def _write_settings(folder: LoopFolder, settings: dict[str, Any]) -> None:
    write_durably(folder.settings, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def _described(split: Split, loop: LoopSettings) -> str:
    parts = [
        f"prompts: {figure(loop.rounds, 'round')} of {len(split.rounds[0]):,}",
        f"{len(split.held_out):,} held out",
        *([f"{split.unused:,} left over"] if split.unused else []),
        *([f"{split.removed:,} not asked, as they are held out"] if split.removed else []),
    ]
    return ", ".join(parts)
