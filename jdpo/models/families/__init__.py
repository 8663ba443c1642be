"""Which families of models jdpo trains: `FAMILIES`, and config.json -> `ModelConfig`."""

from jdpo.models.families.hf_config import read_model_config
from jdpo.models.families.table import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "read_model_config"]
