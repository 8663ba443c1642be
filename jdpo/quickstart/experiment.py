"""The three runs of the quickstart: pre-training on conflicting answers, then two ways to correct the model.

                         corpus (frequencies)
                                 |
               random weights -> sft -> model -+-> sft on right answers
                                               +-> dpo on pairs (right over wrong)

Each run does what the command line does; this module writes their inputs and measures them. It can be stopped and
started again at any time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jdpo.config import DatasetConfig, DPOConfig, MeshConfig, SFTConfig
from jdpo.durable import write_durably
from jdpo.quickstart.corpus import chosen_rows, corpus_rows, preference_rows
from jdpo.quickstart.experiment_settings import Settings
from jdpo.quickstart.probes import Measure, Measurement, ProbeLog, Prober, Probes
from jdpo.quickstart.tiny_llama import write_model

PRETRAIN, STANDARD, DPO = "pretrain", "standard", "dpo"
"""The runs: their folders under runs/, and their names in report.json."""

MAX_LENGTH = 64


class Outcome(NamedTuple):
    """The outcome of the experiment.

    Attributes:
      exit_code: 0, or the exit code of the run that a signal stopped.
      measurements: those of each run, in the order of steps; empty if a run was stopped.
    """

    exit_code: int
    measurements: dict[str, list[Measurement]]


class Workplace:
    """The files of a quickstart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.json"
        self.corpus = path / "data" / "corpus.jsonl"
        self.pairs = path / "data" / "pairs.jsonl"
        self.chosen = path / "data" / "right_answers.jsonl"
        self.start = path / "random_llama"
        self.samples = path / "probes" / "samples.json"
        self.report = path / "report.json"

    def run(self, name: str) -> Path:
        return self.path / "runs" / name

    def model(self, name: str) -> Path:
        return self.run(name) / "model"

    def probes(self, name: str) -> Path:
        return self.path / "probes" / f"{name}.jsonl"


def prepare(place: Workplace, settings: Settings) -> None:
    """Writes corpus, pairs and the random model, unless they exist.

    Raises:
      ValueError: the folder holds a quickstart with other settings, or other files.
    """
    # Through JSON, as the file has been: tuples become lists, so that equal settings compare equal.
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    if place.settings.exists():
        found = json.loads(place.settings.read_text(encoding="utf-8"))
        changed = [f"{key} {found.get(key)} (now {value})" for key, value in wanted.items() if found.get(key) != value]
        if changed:
            raise ValueError(
                f"{place.path} holds a quickstart with {', '.join(changed)}; choose another --output_dir, or delete "
                "that folder"
            )
        return
    # A start that was killed before it wrote the settings leaves these, and may be repeated.
    ours = {place.start.name, place.corpus.parent.name}
    if place.path.exists() and (others := sorted({path.name for path in place.path.iterdir()} - ours)):
        raise ValueError(
            f"{place.path} holds {', '.join(others[:3])} and is not a quickstart; choose another --output_dir"
        )
    split = settings.split
    rows, pairs = corpus_rows(split, settings.frequencies, settings.seed), preference_rows(split)
    _write_rows(place.corpus, rows)
    _write_rows(place.pairs, pairs)
    _write_rows(place.chosen, chosen_rows(pairs))
    texts = (message["content"] for row in rows for side in row.values() for message in side)
    write_model(
        place.start, texts, hidden_size=settings.hidden_size, num_layers=settings.num_layers, seed=settings.seed
    )
    # Written last: if the process is killed before, the next start writes everything again.
    write_durably(place.settings, json.dumps(wanted, indent=1) + "\n")


def run_all(place: Workplace, settings: Settings, log: Callable[[str], None]) -> Outcome:
    """Runs everything that has not finished yet.

    Args:
      log: receives a line before each run.
    """
    prober: Prober | None = None

    def measure(step: int, params: Any) -> Measurement:
        # Made at the first measurement: a start that only repeats the report then compiles nothing.
        nonlocal prober
        if prober is None:
            prober = make_prober(place, settings)
        return prober(step, params)

    measurements = {}
    for name, config in configs(place, settings).items():
        log(_ANNOUNCEMENTS[name])
        steps = probed_steps(config.max_steps or 0, settings.probes)
        exit_code, probe_log = _run(name, config, place, steps, measure)
        if exit_code:
            return Outcome(exit_code, {})
        measurements[name] = probe_log.measurements(steps)
    return Outcome(0, measurements)


_ANNOUNCEMENTS = {
    PRETRAIN: "1/3  jdpo sft: a model of random weights reads the corpus",
    STANDARD: "2/3  jdpo sft: that model, corrected by standard training on right answers",
    DPO: "3/3  jdpo dpo: the same model, corrected by preferring right answers over wrong ones",
}


def configs(place: Workplace, settings: Settings) -> dict[str, SFTConfig | DPOConfig]:
    """Returns the configs of the three runs; the two continuations differ only in rows and loss."""
    shared: dict[str, Any] = {
        "max_length": MAX_LENGTH,
        "cache_dir": str(place.path / "cache"),
        "compute_dtype": "float32",  # the model is tiny, and probabilities are compared to several digits
        "remat": "none",
        "seed": settings.seed,
        "logging_steps": 10,
        "save_total_limit": 1,
        # One mesh for all runs, so it must divide both batch sizes.
        "mesh": _mesh(math.gcd(settings.batch_size, settings.pretrain_batch_size)),
    }
    continuation = shared | {
        "model_name_or_path": str(place.model(PRETRAIN)),
        "max_steps": settings.steps,
        "global_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "save_steps": 100,
    }
    return {
        PRETRAIN: SFTConfig(
            **shared,
            model_name_or_path=str(place.start),
            output_dir=str(place.run(PRETRAIN)),
            datasets=_dataset(place.corpus),
            max_steps=settings.pretrain_steps,
            global_batch_size=settings.pretrain_batch_size,
            learning_rate=settings.pretrain_learning_rate,
            lr_scheduler_type="cosine",
            warmup_ratio=0.05,
            shuffle=False,  # the corpus is already mixed
            save_steps=100,
        ),
        STANDARD: SFTConfig(**continuation, output_dir=str(place.run(STANDARD)), datasets=_dataset(place.chosen)),
        DPO: DPOConfig(
            **continuation, output_dir=str(place.run(DPO)), datasets=_dataset(place.pairs), beta=settings.beta
        ),
    }


def _dataset(path: Path) -> tuple[DatasetConfig, ...]:
    return (DatasetConfig(path=str(path)),)


def _mesh(batch_size: int) -> MeshConfig:
    """Returns a mesh of all devices: as many of them as divide the batch split it, the others split the model."""
    import jax

    data = math.gcd(jax.device_count(), batch_size)
    return MeshConfig(data=data, fsdp=1, tensor=jax.device_count() // data)


def probed_steps(num_steps: int, num_probes: int) -> list[int]:
    """Returns step 0, the last step, and about `num_probes` evenly spaced steps between them.

    >>> probed_steps(10, 4)
    [0, 2, 4, 6, 8, 10]
    """
    every = max(1, num_steps // num_probes)
    return sorted({*range(0, num_steps, every), num_steps})


def _run(
    name: str,
    config: SFTConfig | DPOConfig,
    place: Workplace,
    steps: list[int],
    measure: Measure,
) -> tuple[int, ProbeLog]:
    """Trains a run and measures it. A finished run whose measurements were deleted is trained again."""
    from jdpo.training.run import train

    log = ProbeLog(place.probes(name))
    callbacks = [Probes(log, measure, steps)]
    result = train(config, callbacks=callbacks)
    # A finished run takes no steps, so nothing would measure it.
    if not result.exit_code and not log.holds(steps):
        shutil.rmtree(place.run(name))
        result = train(config, callbacks=callbacks)
    return result.exit_code, log


def make_prober(place: Workplace, settings: Settings) -> Prober:
    """Returns a prober for the models of this experiment, which share their shape and tokenizer."""
    from jdpo.data.tokens.tokenizer import load_tokenizer
    from jdpo.models.families import read_model_config
    from jdpo.models.transformer import Transformer

    model = Transformer(read_model_config(place.start))
    tokenizer = load_tokenizer(place.start, chat_template=None)
    return Prober(model, tokenizer, settings.split, max_length=MAX_LENGTH)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
