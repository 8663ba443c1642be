"""The answers that a run samples from its model while it trains: samples.jsonl, and the trackers.

Every sampling draws with the same seeds, so that answers differ only by what was learnt. Nothing of it enters training.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from jdpo.config import SampleSettings
from jdpo.data.tokens.row_rendering import RowTexts
from jdpo.durable import keep_old, naming, write_durably
from jdpo.generation.asking.answer_message import message_of
from jdpo.generation.engine import Drawn, Engine
from jdpo.generation.values import Sampling
from jdpo.models.transformer import Params, Weights
from jdpo.processes import PROGRESS, is_first
from jdpo.training.fit.memory_fit import exhaustion_as
from jdpo.training.logs.recording import Record
from jdpo.training.setup.run_setup import Log, Setup
from jdpo.training.setup.sample_prompts import SamplePrompt

MOST_AT_ONCE = 32
"""Answers computed at the same time: few enough for the memory that training leaves."""


class AnswerSamples:
    """Asks the model of a run the same prompts again and again."""

    def __init__(self, setup: Setup, path: Path, record: Record, log: Log, *, continued_from: int | None) -> None:
        """
        Args:
          path: the file of the answers, of which the lines of later steps are removed, see `cut_samples`.
          record: takes the answers for the trackers.
          log: takes lines for the user.
          continued_from: step of the checkpoint from which the run continues; None: it starts at step 0.
        """
        if is_first() and (note := cut_samples(path, continued_from)) is not None:
            log(f"warning: {note}")
        settings: SampleSettings = setup.config
        self._setup, self._path, self._record, self._log = setup, path, record, log
        self._prompts: Sequence[SamplePrompt] = setup.sample_prompts
        self._every = settings.sample_steps
        self._sampling = Sampling(
            temperature=settings.sample_temperature,
            max_new_tokens=settings.sample_max_new_tokens,
            seed=setup.config.seed,
        )

    def is_due(self, step: int) -> bool:
        """Returns True before the first step, every `sample_steps`, and after the last step."""
        if not self._prompts:
            return False
        regular = self._every is not None and step % self._every == 0
        return regular or step in (0, self._setup.num_steps)

    def take(self, step: int, params: Params | Weights) -> None:
        """Asks the model after a step, and writes its answers. Every process must call this.

        Args:
          params: whole weights on the mesh; they are only read.
        """
        drawn = self._drawn(params)
        if not is_first():
            return
        lines = [self._line(step, one) for one in drawn]
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            # On the disk before a checkpoint of this step is, from which a resumed run would not sample it again.
            os.fsync(file.fileno())
        self._record.write_samples(step, lines)
        cut_off = sum(one.finish_reason == "length" for one in drawn)
        mean = sum(len(one.tokens) for one in drawn) / len(drawn)
        self._log(
            f"answers after step {step}: {len(drawn)} in {self._path.name}, {mean:.1f} tokens on average"
            + (f", {cut_off} cut off at {self._sampling.max_new_tokens} tokens" if cut_off else "")
        )

    def _drawn(self, params: Params | Weights) -> list[Drawn]:
        setup = self._setup
        with memory_explained("sample_prompts"):
            # Kept only while it answers, since it has a copy of the weights.
            engine = Engine(
                setup.model,
                params,
                end_token_ids=setup.tokenizer.end_token_ids,
                sampling=self._sampling,
                mesh=setup.mesh,
                max_slots=min(MOST_AT_ONCE, len(self._prompts)),
            )
            drawn = list[Drawn]()
            for one in engine.run([prompt.tokens for prompt in self._prompts], 1):
                PROGRESS.made("sampling")
                drawn.append(one)
            return drawn

    def _line(self, step: int, drawn: Drawn) -> dict[str, Any]:
        question, ids = self._prompts[drawn.prompt]
        row = RowTexts(question.prompt, (), question.origin, question.tools, question.template_kwargs)
        ended = drawn.finish_reason == "stop"
        tokens = drawn.tokens[:-1] if ended else drawn.tokens
        logp = sum(drawn.logps)
        return {
            "step": step,
            "prompt_id": question.prompt_id,
            "prompt": question.prompt,
            "message": message_of(row, ids, tokens, self._setup.tokenizer, ended=ended),
            "finish_reason": drawn.finish_reason,
            # JSON has no NaN, which a run that diverges gives.
            "logp": round(logp, 4) if math.isfinite(logp) else None,
        }


def memory_explained(what: str) -> AbstractContextManager[None]:
    """Turns running out of memory while a run answers prompts into an error that says what to do.

    Args:
      what: what is answered, as the user calls it.
    """
    return exhaustion_as(
        lambda cause: (
            f"a device has too little memory to answer {what} next to the state of training ({cause}). Leave {what} "
            "out, or use more devices; `jdpo generate` and `jdpo compare` ask the checkpoints of a run afterwards"
        )
    )


def cut_samples(path: Path, last_step: int | None) -> str | None:
    """Removes the lines after `last_step` from a file of answers, atomically; a line that a crash cut off goes, too.

    Args:
      last_step: step of the checkpoint from which the run continues; None: it starts at step 0, and no line stays.

    Returns:
      a sentence for the user if the file was damaged; it is then kept under another name.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    *texts, torn = content.split(b"\n")
    del torn  # empty, unless a crash cut the last line off
    steps = [_step_of(text) for text in texts]
    note = None
    if None in steps:
        kept = keep_old(path, "damaged")
        note = f"{path} is damaged (line {steps.index(None) + 1} is not one that jdpo wrote); it is kept as {kept.name}"
    whole = [(step, text) for step, text in zip(steps, texts, strict=True) if step is not None]
    left = b"".join(text + b"\n" for step, text in whole if last_step is not None and step <= last_step)
    if note is not None or left != content:
        write_durably(path, left)
    return note


def _step_of(text: bytes) -> int | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return step if type(step) is int else None
