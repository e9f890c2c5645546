"""A recipe: what every key means, its bounds, and why its default. Imports no torch.

Unknown keys are errors, choices are tagged unions on `type`, and the resolved form is written beside the run.
"""

from grpo.config.base import (
    StrictModel,
)
from grpo.config.objectives import (
    BandBetaConfig,
    BetaConfig,
    DualBetaConfig,
    FixedBetaConfig,
    ObjectiveConfig,
    ObservedKl,
    ProportionalBetaConfig,
)
from grpo.config.prompts import (
    FilePrompts,
    HubPrompts,
    PromptsConfig,
    TaskPrompts,
)
from grpo.config.rollout import (
    CustomProcessorConfig,
    EngineConfig,
    RolloutConfig,
    TransformersEngineConfig,
    VllmEngineConfig,
    VllmServerConfig,
)
from grpo.config.run import (
    CheckpointConfig,
    EvalConfig,
    RunConfig,
    ScoringConfig,
    WarmupConfig,
)
from grpo.config.trackers import (
    TrackerConfig,
    TrackerType,
)
from grpo.config.trainable import (
    FullPart,
    FullTrainable,
    LoraPart,
    LoraTrainable,
    PartConfig,
    PartsTrainable,
    TrainableConfig,
)
from grpo.config.update import (
    AdaptiveEntropyConfig,
    CispoLossConfig,
    ClippedLossConfig,
    CustomLossConfig,
    EntropyConfig,
    FixedEntropyConfig,
    GradientsConfig,
    KlConfig,
    LearningRateRule,
    LossConfig,
    OptimConfig,
    RolloutCorrectionConfig,
    SapoLossConfig,
    TruncatedConfig,
    TruncatedKeep,
    TruncatedMask,
    TruncatedPenalty,
    UpdateConfig,
)

__all__ = [
    "AdaptiveEntropyConfig",
    "BandBetaConfig",
    "BetaConfig",
    "CheckpointConfig",
    "CispoLossConfig",
    "ClippedLossConfig",
    "CustomLossConfig",
    "CustomProcessorConfig",
    "DualBetaConfig",
    "EngineConfig",
    "EntropyConfig",
    "EvalConfig",
    "FilePrompts",
    "FixedBetaConfig",
    "FixedEntropyConfig",
    "FullPart",
    "FullTrainable",
    "GradientsConfig",
    "HubPrompts",
    "KlConfig",
    "LearningRateRule",
    "LoraPart",
    "LoraTrainable",
    "LossConfig",
    "ObjectiveConfig",
    "ObservedKl",
    "OptimConfig",
    "PartConfig",
    "PartsTrainable",
    "PromptsConfig",
    "ProportionalBetaConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "RunConfig",
    "SapoLossConfig",
    "ScoringConfig",
    "StrictModel",
    "TaskPrompts",
    "TrackerConfig",
    "TrackerType",
    "TrainableConfig",
    "TransformersEngineConfig",
    "TruncatedConfig",
    "TruncatedKeep",
    "TruncatedMask",
    "TruncatedPenalty",
    "UpdateConfig",
    "VllmEngineConfig",
    "VllmServerConfig",
    "WarmupConfig",
]
