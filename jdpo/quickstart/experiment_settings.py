"""Settings of the quickstart. Does not import jax, so that `jdpo quickstart --help` is fast."""

from __future__ import annotations

import dataclasses

from jdpo.quickstart.corpus import Split, split_countries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of the quickstart; docs/quickstart.md describes the defaults."""

    frequencies: tuple[int, int, int] = (6, 3, 1)
    countries: int = 48
    seed: int = 0
    hidden_size: int = 192
    num_layers: int = 2
    pretrain_steps: int = 320
    pretrain_batch_size: int = 64
    pretrain_learning_rate: float = 3e-3
    steps: int = 60
    batch_size: int = 32
    learning_rate: float = 2e-4
    beta: float = 0.1
    probes: int = 20

    def __post_init__(self) -> None:
        if len(self.frequencies) != 3 or min(self.frequencies) < 1:
            found = ",".join(map(str, self.frequencies))
            raise ValueError(f"frequencies are {found}: expected three positive whole numbers, such as 6,3,1")
        split_countries(self.countries)
        for name in ("pretrain_steps", "pretrain_batch_size", "steps", "batch_size", "probes", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")

    @property
    def split(self) -> Split:
        """The countries, split into those that are corrected and those that are not."""
        return split_countries(self.countries)
