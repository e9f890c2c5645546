"""Everything rewards raise on purpose, sorted by who can act.

RewardError
├── RewardConfigError   the user: a name or parameter is wrong
├── RewardUnavailable   retry later: what the reward asks (a judge endpoint) cannot be reached
└── RewardNotRecorded   the user: a score could not be written down, for want of room
"""

from __future__ import annotations


class RewardError(Exception):
    """Base of every error raised on purpose."""


class RewardConfigError(RewardError):
    """A reward's name or parameter is wrong. The message says what was expected and what to do."""


class RewardUnavailable(RewardError):
    """What the reward depends on, such as a judge endpoint, cannot be reached."""


class RewardNotRecorded(RewardError):
    """What was said and paid for could not be written down. No missing score: whoever scores must stop."""
