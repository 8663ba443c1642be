"""The folder of a run: what lies where, whose run it is, and how far it has come.

resolved_config.yaml   every key, defaults included; `jdpo dpo resolved_config.yaml` repeats the run
run.json               the command, digests of what went in, and whether the run is finished
metrics.jsonl          one JSON object a logged step
checkpoints/<step>/    what a resumed run starts from
model/                 the trained Hugging Face model
plots/                 PNGs
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jdpo._version import __version__
from jdpo.config import TrainConfig, differences, to_yaml
from jdpo.training.processes import barrier, is_first

USED_BY_A_RUN = ("metrics.jsonl", "checkpoints", "model", "run.json", "resolved_config.yaml")


class RunDirectory:
    """Owns output_dir. Only the first process writes."""

    def __init__(self, config: TrainConfig, command: str) -> None:
        """Opens a new folder, or the folder of the same run.

        Args:
          config: the run's settings.
          command: "sft" or "dpo".

        Raises:
          ValueError: the folder cannot be written, or holds another run; every difference is named.
        """
        self.path = Path(config.output_dir)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.plots = self.path / "plots"
        self._run_file = self.path / "run.json"
        self._config_file = self.path / "resolved_config.yaml"
        self.is_new = not self._check_owner(config, command)
        barrier("run directory read")
        if is_first():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_atomically(self._config_file, to_yaml(config))
                if self.is_new:
                    self._write_run({"command": command, "jdpo": __version__, "finished": False, "inputs": {}})
            except OSError as error:
                raise ValueError(
                    f"cannot write to output_dir {self.path}: {error}; choose a folder on a writable disk with room"
                ) from None
        barrier("run directory made")

    def _check_owner(self, config: TrainConfig, command: str) -> bool:
        """True where the folder holds this very run, False where it is free; another run is refused."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir {self.path} is a file; choose a folder")
        used = [name for name in USED_BY_A_RUN if (self.path / name).exists()]
        if not used or self._never_began():
            return False
        advice = "choose another output_dir, or delete this one if it is no longer needed"
        if config.resume == "never":
            raise ValueError(f"output_dir {self.path} holds a run already, and resume is 'never'; {advice}")
        if not (self._run_file.exists() and self._config_file.exists()):
            raise ValueError(f"output_dir {self.path} holds {', '.join(used)} of something else; {advice}")
        if (found := self.state()["command"]) != command:
            raise ValueError(f"output_dir {self.path} holds a run of `jdpo {found}`, not of `jdpo {command}`; {advice}")
        changed = differences(yaml.safe_load(self._config_file.read_text(encoding="utf-8")), config)
        if changed:
            raise ValueError(
                f"output_dir {self.path} holds a different run, so this one cannot resume it:\n  "
                + "\n  ".join(changed)
                + f"\nUndo these, or {advice}"
            )
        return True

    def _never_began(self) -> bool:
        """Whether a start was refused or killed before it left anything: its folder is free, for a repaired config."""
        trained = self.metrics.exists() and self.metrics.stat().st_size > 0
        saved = self.checkpoints.exists() and any(self.checkpoints.iterdir())
        ours = not self._run_file.exists() or "jdpo" in self.state()
        return ours and not (trained or saved or self.model.exists())

    def state(self) -> dict[str, Any]:
        """What run.json says."""
        state: dict[str, Any] = json.loads(self._run_file.read_text(encoding="utf-8"))
        return state

    @property
    def finished(self) -> bool:
        """True once everything that the run leaves stands there."""
        return not self.is_new and self.state()["finished"] and self.model.exists()

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Remembers digests of what goes into a run; on resume refuses what has changed.

        Args:
          inputs: name of an input, as a person would say it -> digest of its content.

        Raises:
          ValueError: naming each input that is not what the run started with.
        """
        saved = self.state()["inputs"]
        changed = [name for name, digest in inputs.items() if name in saved and saved[name] != digest]
        if changed:
            raise ValueError(
                f"cannot resume the run in {self.path}: since it started, the content of {' and of '.join(changed)} "
                "has changed; bring the old content back, or choose another output_dir"
            )
        barrier("run inputs checked")
        if is_first():
            self._write_run({**self.state(), "inputs": {**saved, **inputs}})

    def finish(self, results: Mapping[str, Any]) -> None:
        """Says that the run is complete; the last thing a run writes."""
        if is_first():
            self._write_run({**self.state(), "finished": True, "results": dict(results)})

    def _write_run(self, state: Mapping[str, Any]) -> None:
        write_atomically(self._run_file, json.dumps(state, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes all or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
