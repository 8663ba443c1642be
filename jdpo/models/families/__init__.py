"""The supported families of models, `FAMILIES`, and `read_model_config`, which reads a config.json."""

from jdpo.models.families.hf_config import RewardConfig, image_tokens, read_model_config, read_reward_config
from jdpo.models.families.table import FAMILIES

__all__ = ["FAMILIES", "RewardConfig", "image_tokens", "read_model_config", "read_reward_config"]
