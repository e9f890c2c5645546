"""How a batch becomes questions, and how the answers become one judgement per request. Pure: no clock, no network."""

from __future__ import annotations

from judges.config import GroupwiseMode, ModeConfig, PairwiseMode, ScaleConfig
from judges.modes.base import Mode
from judges.modes.groupwise import Groupwise
from judges.modes.pairwise import Pairwise
from judges.modes.pointwise import Pointwise


def build_mode(config: ModeConfig, scale: ScaleConfig) -> Mode:
    """The mode a recipe names."""
    if isinstance(config, GroupwiseMode):
        return Groupwise(config)
    if isinstance(config, PairwiseMode):
        return Pairwise(config, scale)
    return Pointwise()
