r"""Is the completion's mathematical answer equal to the reference? 1 or 0, by math-verify in a killable process.

Equal as mathematics: 1/2, 0.5, `\frac{1}{2}` and `\frac12` are one answer, and so is `5 + 5` for 10. The reference may
be plain ("1,234"), LaTeX with or without dollars, boxed, or a GSM8K solution that ends in "#### 42".
"""

from __future__ import annotations

import asyncio
from typing import Literal, TypeAlias

from pydantic import Field, PrivateAttr

from rewards.answer_text import ReadsAnswer
from rewards.errors import RewardUnavailable
from rewards.processes import Finished, Outcome, ProcessPool, score_at_limit
from rewards.types import RewardInput, Score

Extraction: TypeAlias = Literal["auto", "boxed", "last_number"]

_VALUES = {"right": 1.0, "wrong": 0.0, "no_answer": 0.0, "bad_reference": None}


class MathAnswer(ReadsAnswer):
    """1 where the answer equals the reference, 0 where it does not or where there is none.

    Missing where the reference is no mathematics, and where no verdict was reached within the limits.
    """

    extract: Extraction = "auto"
    r"""Where the answer stands. "boxed": in the last \boxed{...}. "last_number": the last number of the text.
    "auto": in the last \boxed{...}, else after the last "####", else what math-verify finds: after "the answer is",
    the last LaTeX, the last number."""
    timeout_s: float = Field(10.0, gt=0)
    """Longest wall time of one comparison."""
    memory_bytes: int = Field(2 << 30, ge=512 << 20)
    """Largest address space of one comparison's process."""
    limit_score: float | None = Field(None, allow_inf_nan=False)
    """Score of a completion whose comparison passes the time or memory limit. None leaves it missing; 0 keeps a policy
    from hiding wrong answers behind `10^{10^{10}}`."""

    _pool: ProcessPool = PrivateAttr()

    def model_post_init(self, _: object) -> None:
        self._pool = ProcessPool(
            "rewards.math_equivalence:compare",
            timeout_s=self.timeout_s,
            memory_bytes=self.memory_bytes,
            warm_up=("$1$", "1", "auto"),
        )

    async def check(self) -> None:
        """Start a worker and let it compare.

        Raises:
            RewardUnavailable: it does not come back with the right verdict.
        """
        outcome = await self._pool.call("#### 1,000", r"\boxed{10^3}", "auto")
        if not isinstance(outcome, Finished) or outcome.value["verdict"] != "right":
            raise RewardUnavailable(f"reward 'math_answer': the comparison does not work here ({outcome})")

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion, compared side by side."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._score_one(one)) for one in inputs]
        return [task.result() for task in running]

    async def aclose(self) -> None:
        """End the worker processes."""
        await self._pool.aclose()

    async def _score_one(self, one: RewardInput) -> Score:
        if one.reference is None or not one.reference.strip():
            return Score(value=None, reason="the prompt has no reference")
        answer = self.answer_in(one.completion)
        if answer is None:
            return Score(value=0.0, reason=self.no_answer)
        return self._score_of(await self._pool.call(one.reference, answer, self.extract))

    def _score_of(self, outcome: Outcome) -> Score:
        if not isinstance(outcome, Finished):
            return score_at_limit(outcome, self.limit_score)
        verdict, detail = outcome.value["verdict"], outcome.value["detail"]
        return Score(value=_VALUES[verdict], reason=f"{verdict.replace('_', ' ')}: {detail}")
