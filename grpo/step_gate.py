"""Whether a step has enough verdicts to train on, and what is done where it has not. Never trains on leftovers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from grpo.batching import TrainBatch
from grpo.collection import Collected
from grpo.config import RunConfig
from grpo.errors import TooFewVerdicts
from grpo.runtime.distributed import Ranks
from grpo.scoring import Scorer, missing_objectives, shortage, with_newer
from grpo.stopwatch import Stopwatch
from grpo.types import ScoredGroup


class StepGate:
    """Looks at every step's verdicts, on all ranks alike. Counts the steps in a row that it let pass without an update:
    `skipped_in_a_row`, which a resumed run takes over."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self._scoring, self._ranks = config.scoring, ranks
        own = {name: objective.min_valid_fraction for name, objective in config.objectives.items()}
        default = config.scoring.min_valid_fraction
        self._min_valid = {name: default if value is None else value for name, value in own.items()}
        self.skipped_in_a_row = 0

    def ask_again(
        self, collected: Collected, scorer: Scorer, pause: Callable[[], bool], *, stopwatch: Stopwatch
    ) -> Collected:
        """Ask for the verdicts that are missing, round after round, while an objective has too few: a judge that is
        down may come back. What was sampled stays, and so do verdicts that are there.

        Args:
            pause: waits before a round; False: ask no more.
            stopwatch: "judge_wait" is added to.
        """
        for _ in range(self._scoring.wait_rounds):
            if not self._shortage(collected) or self._ranks.any(not pause()):
                break
            with stopwatch("judge_wait"):
                found = dict(self._ranks.gather_from(lambda now=collected: _asked_again(now, scorer)))
            groups = tuple(found.get(place, group) for place, group in enumerate(collected.groups))
            collected = replace(collected, groups=groups)
        return collected

    def check(self, step: int, collected: Collected, batch: TrainBatch) -> str:
        """Why the step, counted from 1, has too little to train on and takes no update; empty where it has enough.

        Raises:
            TooFewVerdicts: the recipe lets no such step pass, or not so many in a row.
        """
        short = self._shortage(collected) or self._nothing_left(batch)
        if not short:
            self.skipped_in_a_row = 0
            return ""
        if self._scoring.below != "skip":
            raise TooFewVerdicts(f"step {step}: {short}")
        if self.skipped_in_a_row == self._scoring.max_skipped:
            raise TooFewVerdicts(
                f"step {step}: {short}. The {self.skipped_in_a_row} steps before it took no update either "
                f"(scoring.max_skipped = {self._scoring.max_skipped})."
            )
        self.skipped_in_a_row += 1
        return short

    def _shortage(self, collected: Collected) -> str:
        return shortage([*collected.groups, *collected.discarded], self._min_valid)

    def _nothing_left(self, batch: TrainBatch) -> str:
        if self._ranks.sum(batch.num_tokens) > 0:
            return ""
        return (
            "nothing is left to train on: every completion is without a verdict, empty, or cut and masked. Where they "
            "are cut, raise rollout.max_new_tokens or set update.truncated.type=keep"
        )


def _asked_again(collected: Collected, scorer: Scorer) -> list[tuple[int, ScoredGroup]]:
    """(place, group) of this rank's groups that lacked a verdict."""
    own = {place: collected.groups[place] for place in collected.own}
    futures = {
        place: scorer.submit(group.rollout, objectives=missing)
        for place, group in own.items()
        if (missing := missing_objectives(group))
    }
    return [(place, with_newer(own[place], future.result())) for place, future in futures.items()]
