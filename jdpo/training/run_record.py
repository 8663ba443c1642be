"""run.json: what a run keeps about itself, for its later starts, for exports and for readers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from jdpo._version import __version__
from jdpo.durable import write_durably
from jdpo.json_files import read_json

ReferenceMode = Literal["live", "cached", "none"]

Ending = Literal["stopped", "failed"]

RENAMED_INPUTS = {"how many rows each data set has": "how many rows each dataset has"}  # plain: as it is
"""Names of inputs in files of older versions -> their names now; without this a resumed run would not check them."""

KINDS = {
    "command": str,
    "inputs": dict,
    "files": dict,
    "timing": dict,
    "results": dict,
    "mirror": dict,
    "given_up": list,
    "finished": bool,
    "num_steps": int | None,
    "num_rows": int | None,
    "num_eval_rows": int | None,
    "late_programs": int | None,
}
"""Types of fields in the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitRecord:
    """The fit of steps into the memory of a device, and its conditions.

    Attributes:
      remat: what the backward pass recomputes.
      max_tokens_per_device: maximum tokens of a device's part of a micro-batch.
      bytes_needed: memory that the compiled step needs on a device; None if it was not measured.
      limit: bytes of memory that a device had.
      conditions: settings, device, mesh and version of jax that the fit depends on.
    """

    remat: str
    max_tokens_per_device: int
    bytes_needed: int | None
    limit: int
    conditions: Mapping[str, Any]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FitRecord:
        """Reads a fit; in the file the conditions are next to the other values."""
        own = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        own.setdefault("bytes_needed", None)
        return cls(**own, conditions={key: value for key, value in values.items() if key not in own})

    def to_json(self) -> dict[str, Any]:
        """Returns the fit as plain data."""
        values = dataclasses.asdict(self)
        conditions: dict[str, Any] = values.pop("conditions")
        return values | conditions


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of run.json. Files of older versions lack some fields, which then have their defaults.

    Attributes:
      command: sft or dpo.
      jdpo: version that started the run; empty in a file that jdpo did not write.
      started_in: folder that relative paths of the config refer to; None if it was not written down.
      finished: True if the run is complete and its model exported.
      ended: stopped or failed, if the last start ended before the run was finished; None while one runs, after a kill,
        and in older files.
      end_reason: the error of a run that failed.
      inputs: name of an input, in words -> digest of its content.
      files: name of a file that rows were read from -> digest of its content.
      rows: summary of the training rows, for the model card.
      num_steps, num_rows, num_eval_rows: updates of the whole run, training rows, and held-out rows; None where they
        are not known, or there are none.
      reference: source of the reference's log-probs when the run started.
      fit: the fit of the steps into memory.
      timing: seconds of each phase, see `jdpo.training.logs.phases`, summed over the starts of the run.
      late_programs: programs that were compiled in the middle of training, in all starts; None in older files.
      given_up: damaged checkpoints in spite of which `--resume never` started again.
      mirror: the copy in an object store: its `address`, the newest `step` in it, how many uploads to it have failed
        (`failures`), and why the last one has (`error`); empty without.
      results: last values of all metrics, and `step`, of a finished run; before, empty.
    """

    command: str
    jdpo: str = ""
    started_in: str | None = None
    finished: bool = False
    ended: Ending | None = None
    end_reason: str | None = None
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: str | None = None
    num_steps: int | None = None
    num_rows: int | None = None
    num_eval_rows: int | None = None
    reference: ReferenceMode | None = None
    fit: FitRecord | None = None
    timing: Mapping[str, float] = dataclasses.field(default_factory=dict)
    late_programs: int | None = None
    given_up: tuple[str, ...] = ()
    mirror: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_new_run(cls, command: str) -> RunRecord:
        """Returns the record of a run that starts now, in the current folder."""
        return cls(command=command, jdpo=__version__, started_in=str(Path.cwd()))

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Reads run.json, of this or an older version; keys that this version does not know are ignored.

        Raises:
          ValueError: the file is not JSON, or not what jdpo writes.
        """
        values = read_json(path)
        try:
            return cls._from_json(values)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path} was not written by a run of jdpo, or it is damaged") from None

    @classmethod
    def parse(cls, text: str) -> RunRecord:
        """Returns the record whose `text` another process has sent."""
        return cls._from_json(json.loads(text))

    @classmethod
    def _from_json(cls, values: Mapping[str, Any]) -> RunRecord:
        known = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        for name, kind in KINDS.items():
            if name in known and not isinstance(known[name], kind):
                raise TypeError(name)
        if not all(isinstance(seconds, int | float) for seconds in known.get("timing", {}).values()):
            raise TypeError("timing")
        if known.get("reference") not in (None, *get_args(ReferenceMode)):
            raise ValueError(known["reference"])
        if known.get("fit") is not None:
            known["fit"] = FitRecord.from_json(known["fit"])
        known["inputs"] = {RENAMED_INPUTS.get(name, name): digest for name, digest in known.get("inputs", {}).items()}
        return cls(**{"command": "", **known, "given_up": tuple(known.get("given_up", ()))})

    def write(self, path: Path) -> None:
        """Writes run.json durably."""
        write_durably(path, self.text())

    def text(self) -> str:
        """Returns the content of run.json; empty values are left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"fit": None if self.fit is None else self.fit.to_json(), "given_up": list(self.given_up)}
        kept = {name: value for name, value in values.items() if value not in (None, [], {})}
        return json.dumps(kept, indent=1) + "\n"
