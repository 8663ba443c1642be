"""The files of a loop, and the command lines of a round. Nothing here touches the disk."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from jdpo.config import Settings, to_dict
from jdpo.iteration.loop_settings import SCORE_NAME, LoopSettings

Stage = Literal["generate", "score", "pair", "dpo", "compare"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class LoopFolder:
    """The files of a loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.held_out = path / "held_out.jsonl"
        self.result = path / "iterate.json"
        self.lock = path / ".lock"

    def round(self, number: int) -> RoundFolder:
        return RoundFolder(self.path / f"round-{number:03d}")


class RoundFolder:
    """The files of a round."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "round.json"
        self.commands = path / "commands.sh"
        self.prompts = path / "prompts.jsonl"
        self.gen = path / "gen"
        self.pairs = path / "pairs.jsonl"
        self.replay = path / "replay.jsonl"
        self.run = path / "run"
        self.model = path / "run" / "model"
        self.cmp = path / "cmp"


class Command(NamedTuple):
    """A stage of a round as words of a command line, without the leading `jdpo`."""

    stage: Stage
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"jdpo {shlex.join(self.words)}"


def round_commands(loop: LoopSettings, number: int, *, model: str, replays: bool) -> list[Command]:
    """Returns the stages of a round in order.

    Args:
      number: of the round, from 0.
      model: the model that the round starts from.
      replays: whether pairs of earlier rounds are added.
    """
    folder = LoopFolder(Path(loop.output_dir))
    place = folder.round(number)
    # Another seed in each round, so that a repeated prompt would not be answered by the same draws.
    seed = (loop.seed + number) % 2**32
    generate = _options(loop.generate)
    compare = _options(loop.compare)
    if loop.compare.max_new_tokens is None:
        compare.append(f"--max_new_tokens={loop.generate.max_new_tokens}")
    return [
        Command(
            "generate",
            ("generate", model, f"--prompts={place.prompts}", *generate, f"--seed={seed}", f"--output_dir={place.gen}"),
        ),
        Command("score", ("score", str(place.gen), f"--name={SCORE_NAME}", *_options(loop.score))),
        Command(
            "pair",
            (
                "pair",
                str(place.gen),
                f"--score={SCORE_NAME}",
                *_options(loop.pair),
                f"--seed={seed}",
                f"--output={place.pairs}",
            ),
        ),
        Command("dpo", ("dpo", *_dpo_words(loop, place, model, replays=replays))),
        Command(
            "compare",
            ("compare", model, str(place.model), f"--prompts={folder.held_out}", *compare, f"--output_dir={place.cmp}"),
        ),
    ]


def _options(group: Settings) -> list[str]:
    """Returns a group of settings as options; those that are null or false are left out."""
    words = []
    for name, value in to_dict(group).items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name}={value}")
    return words


def _dpo_words(loop: LoopSettings, place: RoundFolder, model: str, *, replays: bool) -> list[str]:
    files = [str(place.pairs), *([str(place.replay)] if replays else [])]
    own: dict[str, Any] = {"model_name_or_path": model, "datasets": files, "output_dir": str(place.run)}
    if loop.reference == "initial":
        own["reference_model"] = loop.model_name_or_path
    return [f"--{name}={_as_word(value)}" for name, value in {**own, **loop.dpo}.items()]


def _as_word(value: Any) -> str:
    # JSON is YAML, and stays on one line; a bare text is read as it is.
    return value if isinstance(value, str) else json.dumps(value)
