"""Names of the decoder's parameters in checkpoints: one layout for each naming scheme, out of rules."""

from jdpo.models.families.layouts.tensor_rules import REWARD_HEAD, Layout, Path, Rule, Spelling, parameters_of

__all__ = ["REWARD_HEAD", "Layout", "Path", "Rule", "Spelling", "parameters_of"]
