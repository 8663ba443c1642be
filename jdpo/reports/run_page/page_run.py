"""The content of the page of a run: plain values of the files in its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jdpo.reports.findings import Finding

Json = Mapping[str, Any]
RunStatus = Literal["running", "finished", "stopped", "failed", "unfinished"]
"""The state of a run; `unfinished` if its files do not tell how it ended: it was killed, or runs on another machine."""


class PageFile(NamedTuple):
    """A file or folder of a run.

    Attributes:
      name: in the run's folder.
      num_bytes: of the file, or of all files in the folder.
      about: what it is.
    """

    name: str
    num_bytes: int
    about: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageRun:
    """One run.

    Attributes:
      name: short, different for every run of a page.
      path: the folder of the run.
      command: sft or dpo; empty if unknown.
      version: version of jdpo that started it; empty if unknown.
      status: see `RunStatus`.
      reason: of a run that failed or was stopped, in words; else empty.
      step: the last step that is known to be made.
      num_steps: steps of the whole run; None if unknown.
      written: when the page was made, in words.
      lines: the objects of metrics.jsonl.
      samples: the objects of samples.jsonl.
      data: the object of data.json; None without it.
      config: the resolved config.
      config_text: the same as YAML.
      record: the object of run.json.
      files: what the folder holds.
      checkpoints: steps that can be resumed from or exported, oldest first.
      notes: what is missing or damaged, in sentences.
      verdict: what came of the run, in sentences.
      findings: what it shows about itself, the most serious first.
      start_loss: the loss where policy and reference are equal; None if it is no constant, or unknown.
    """

    name: str
    path: str
    command: str
    version: str
    status: RunStatus
    reason: str
    step: int
    num_steps: int | None
    written: str
    lines: Sequence[Json]
    samples: Sequence[Json] = ()
    data: Json | None = None
    config: Json = dataclasses.field(default_factory=dict)
    config_text: str = ""
    record: Json = dataclasses.field(default_factory=dict)
    files: Sequence[PageFile] = ()
    checkpoints: Sequence[int] = ()
    notes: Sequence[str] = ()
    verdict: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    start_loss: float | None = None

    @property
    def model(self) -> str:
        """The model that training started from; empty if unknown."""
        name = self.config.get("model_name_or_path")
        return name if isinstance(name, str) else ""

    @property
    def digests(self) -> Sequence[tuple[str, str]]:
        """The inputs of the run, each with its digest."""
        found = [self.record.get(name) for name in ("inputs", "files")]
        return [(name, str(digest)) for one in found if isinstance(one, Mapping) for name, digest in one.items()]

    @property
    def held_out(self) -> str | None:
        """Digest of the held-out rows; runs with the same one can be compared. None without, or if unknown."""
        return dict(self.digests).get("the evaluation rows")
