"""Where a run's figures are shown besides metrics.jsonl."""

from grpo.trackers.background import BackgroundTrackers
from grpo.trackers.base import Tracker
from grpo.trackers.ecosystem import check_trackers, open_trackers

__all__ = ["BackgroundTrackers", "Tracker", "check_trackers", "open_trackers"]
