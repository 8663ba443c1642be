"""The supported families of models, `FAMILIES`, and `read_model_config`, which reads a config.json."""

from jdpo.models.families.hf_config import RewardConfig, read_model_config, read_reward_config
from jdpo.models.families.table import FAMILIES

__all__ = ["FAMILIES", "RewardConfig", "read_model_config", "read_reward_config"]
