"""A request to launch: the run, the machine, and what holds for every launcher."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from jdpo.config import CONFIGS, TrainConfig, load_config
from jdpo.launch.launch_options import pairs_of
from jdpo.planning.machines import Machine
from jdpo.words import figure

RUNS = ("dpo", "sft", "reference")
"""Commands that can be launched."""

MOST_CHARACTERS = 40
"""The length of a name. Kubernetes allows 63 for a pod, whose name ends in that of its job, two numbers and five
letters."""

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY(_|$)|API_?KEY", re.IGNORECASE)
_KEYS_OF_TRACKERS = {"wandb": "WANDB_API_KEY", "mlflow": "MLFLOW_TRACKING_TOKEN", "trackio": "HF_TOKEN"}
_KEYS_OF_S3 = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """A run to launch and its machine, with what holds for every launcher.

    Attributes:
      command: "dpo", "sft" or "reference".
      config_path: the config file here, on the machine that launches.
      config_text: its content.
      overrides: the words after the config, such as "beta=0.2".
      config: the settings that both result in.
      machine: what to run on.
      name: of the job: lower-case letters, digits and dashes.
      folder: where the rendered files are written.
      doctor: True to run `jdpo doctor` in every process before each start.
      max_restarts: how often a launcher starts the run again.
      env: further environment variables of the run.
      secrets: names of environment variables that come from the launcher's own store of secrets.
      required_secrets: those of them that the user has named; the others may be missing.
    """

    command: str
    config_path: Path
    config_text: str
    overrides: tuple[str, ...]
    config: TrainConfig
    machine: Machine
    name: str
    folder: Path
    doctor: bool
    max_restarts: int
    env: Mapping[str, str]
    secrets: tuple[str, ...]
    required_secrets: tuple[str, ...]

    def words(self, config_path: str) -> list[str]:
        """Returns the command of every process.

        Args:
          config_path: where the process finds the config.
        """
        return ["jdpo", self.command, config_path, *self.overrides]

    def doctor_words(self, config_path: str) -> list[str] | None:
        """Returns the command that checks the cluster before that of `words`; None if no check is asked for."""
        return ["jdpo", "doctor", config_path, *self.overrides, "--task", self.command] if self.doctor else None

    def local_paths(self) -> list[str]:
        """Returns the paths in the config that exist here: models and rows that the nodes need as well."""
        named = dict.fromkeys([self.config.model_name_or_path, *data_paths(self.config)])
        return [path for path in named if "://" not in path and Path(path).exists()]


def make_request(
    *,
    command: str,
    config_path: Path,
    overrides: Sequence[str],
    machine: Machine,
    name: str,
    folder: Path | None,
    doctor: bool,
    max_restarts: int,
    env: Sequence[str],
    secrets: Sequence[str],
) -> LaunchRequest:
    """Reads the config and checks what every launcher needs.

    Args:
      name: empty: made of the name of the config file.
      folder: None: `launch` in the config's output_dir.
      env: NAME=VALUE words.
      secrets: names that the user gives, in addition to those which the config implies.

    Raises:
      ValueError: the config is wrong, a name is not allowed, or a variable seems to hold a secret.
    """
    if not config_path.is_file():
        found = "a folder" if config_path.is_dir() else "no such file"
        raise ValueError(f"{config_path}: expected the YAML config of a run, found {found}")
    # `reference` reads the config of a DPO run.
    config = load_config(CONFIGS["sft" if command == "sft" else "dpo"], config_path, list(overrides), complete=True)
    variables = pairs_of(tuple(env), "env")
    _check_variables(variables, secrets)
    _check_mesh(config, machine)
    return LaunchRequest(
        command=command,
        config_path=config_path,
        config_text=config_path.read_text(encoding="utf-8"),
        overrides=tuple(overrides),
        config=config,
        machine=machine,
        name=_checked_name(name) if name else name_from(config_path.stem),
        folder=folder if folder is not None else Path(config.output_dir) / "launch",
        doctor=doctor,
        max_restarts=max_restarts,
        env=variables,
        secrets=tuple(dict.fromkeys([*implied_secrets(config), *secrets])),
        required_secrets=tuple(secrets),
    )


def data_paths(config: TrainConfig) -> list[str]:
    """Returns the paths and addresses of the rows for training and evaluation."""
    return [each.path for each in (*config.datasets, *config.eval_datasets)]


def implied_secrets(config: TrainConfig) -> list[str]:
    """Returns the variables that a run with this config reads secrets from: of the hub, its trackers, and S3."""
    trackers = [_KEYS_OF_TRACKERS[name] for name in config.report_to if name in _KEYS_OF_TRACKERS]
    addresses = [config.mirror or "", config.model_name_or_path, *data_paths(config)]
    stores = _KEYS_OF_S3 if any(address.startswith("s3://") for address in addresses) else ()
    return list(dict.fromkeys(["HF_TOKEN", *trackers, *stores]))


def name_from(text: str) -> str:
    """Makes the name of a job from any text.

    >>> name_from("llama_3.1 8B"), name_from("8b"), name_from("...")
    ('llama-3-1-8b', 'jdpo-8b', 'jdpo')
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"jdpo-{name}".strip("-")
    return name[:MOST_CHARACTERS].rstrip("-")


def _check_mesh(config: TrainConfig, machine: Machine) -> None:
    """Refuses a mesh or a batch that does not fit the machine, before the machine is paid for."""
    from jax.sharding import AbstractMesh, Mesh

    from jdpo.sharding.axes import AXES
    from jdpo.sharding.mesh import check_batch_size, resolve_mesh_shape

    try:
        slices = config.mesh.slices or machine.slices
        if slices != machine.slices and not machine.is_gpu:  # nodes of GPUs may be taken together
            raise ValueError(
                f"mesh.slices is {slices}, but it has {figure(machine.slices, 'slice')}; leave mesh.slices out"
            )
        shape = resolve_mesh_shape(config.mesh, machine.num_devices, slices)
        # Devices of the machine are not here; only the shape is read.
        check_batch_size(config.global_batch_size, cast(Mesh, AbstractMesh(shape, AXES)))
    except ValueError as error:
        raise ValueError(f"{machine.name}: {error}") from None


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > MOST_CHARACTERS:
        raise ValueError(
            f"--name {name!r}: expected at most {MOST_CHARACTERS} lower-case letters, digits and dashes, with a letter "
            f"first and no dash last, as Kubernetes and Google Cloud require; for example {name_from(name)!r}"
        )
    return name


def _check_variables(env: Iterable[str], secrets: Iterable[str]) -> None:
    env = list(env)
    for name in (*env, *secrets):
        given, equals, _ = name.partition("=")
        if equals:  # what follows may be the secret, and is not shown
            raise ValueError(
                f"--secret {given}=...: expected the name alone; its value belongs in the launcher's store of secrets"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(
                f"{name!r} is no name of an environment variable: letters, digits and _, with no digit first"
            )
    for name in env:
        if _SECRET_NAME.search(name):
            raise ValueError(
                f"--env {name}=...: this looks like a secret, and values of --env are written to files; give its name "
                f"alone as --secret {name}, and its value to the launcher's store of secrets"
            )
