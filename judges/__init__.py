"""Ask a model for a verdict on a text. Knows no RL and no torch; httpx is imported by `clients` alone."""

from judges.audit import AuditLog
from judges.clients.base import JudgeClient
from judges.clients.scripted import ScriptedClient
from judges.config import EndpointConfig, JudgeConfig, ScaleConfig
from judges.errors import (
    AuditFailed,
    BudgetExceeded,
    InvalidVerdict,
    JudgeConfigError,
    JudgeDenied,
    JudgeError,
    JudgeFailure,
    JudgeOverloaded,
    JudgeRefused,
    JudgeRejected,
    JudgeTimeout,
    JudgeUnavailable,
)
from judges.pool import JudgePool
from judges.types import (
    Call,
    ChatReply,
    ChatRequest,
    Failed,
    Judgement,
    JudgeRequest,
    Message,
    Scored,
    Usage,
    Verdict,
)

__all__ = [
    "AuditFailed",
    "AuditLog",
    "BudgetExceeded",
    "Call",
    "ChatReply",
    "ChatRequest",
    "EndpointConfig",
    "Failed",
    "InvalidVerdict",
    "JudgeClient",
    "JudgeConfig",
    "JudgeConfigError",
    "JudgeDenied",
    "JudgeError",
    "JudgeFailure",
    "JudgeOverloaded",
    "JudgePool",
    "JudgeRefused",
    "JudgeRejected",
    "JudgeRequest",
    "JudgeTimeout",
    "JudgeUnavailable",
    "Judgement",
    "Message",
    "ScaleConfig",
    "Scored",
    "ScriptedClient",
    "Usage",
    "Verdict",
]
