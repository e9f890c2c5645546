"""The contract of a reward, as a check to call in your own tests.

    from rewards.testing import check_reward

    def test_my_reward_keeps_the_contract():
        check_reward(polite, low=0.0, high=1.0)         # a function over one group, or what has `score`
        check_reward("my_rewards:polite", group=mine)   # by name, with completions that it can score

It scores one group again and again, in other orders and beside other groups, and then hostile texts. It expects:

- one score per completion, in the completions' order, whatever that order is;
- every score a finite number within the range that you name, or None; nothing is raised, whatever the text;
- None, and no number, where nothing can be judged: a prompt without the reference that the reward reads, and what
  you name by `known`;
- the same group gets the same scores: in the next call, after another group, and beside one;
- the inputs are left as they were, and the event loop is never held up for long;
- a cancelled call ends soon; of a reward that is built here, `aclose()` may be called twice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

from judges.testing import watched_loop
from rewards.base import AnyReward, RewardContext, check_reward_ready, close_reward, describe_exception
from rewards.config import RewardSpec
from rewards.contract import Check, Findings
from rewards.errors import RewardError
from rewards.registry import build_reward
from rewards.types import RewardInput


class RewardContractBroken(AssertionError):
    """What a reward does against its contract, one line each."""


def check_reward(
    reward: AnyReward | RewardSpec | str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    group: Sequence[RewardInput] | None = None,
    known: Sequence[tuple[RewardInput, float | None]] = (),
    reference_is_optional: bool = False,
    base_dir: Path | None = None,
) -> None:
    """Hold a reward to its contract.

    Args:
        reward: a reward, which stays open; or its name or spec as in a recipe, which is built here and closed.
        low: the least score that it may give.
        high: the greatest.
        group: completions of one prompt, two or more, that it can score; answers to a question about a scene, with
            reference, choices, messages and tokens, where None.
        known: inputs, and what each must get; None for what cannot be judged.
        reference_is_optional: it judges with a reference and, otherwise, without one, as some judges do. Else a number
            for a prompt without the reference that it reads counts as a default.
        base_dir: where a named reward looks for modules and files; the working directory where None.
    Raises:
        RewardContractBroken: one line per problem.
        ValueError: the group is none: fewer than two completions, or of several prompts.
    """
    inputs = list(group) if group is not None else default_group()
    if len(inputs) < 2 or len({one.prompt_id for one in inputs}) != 1:
        raise ValueError("group must be two completions or more, all of one prompt_id")
    findings = asyncio.run(_findings(reward, inputs, known, (low, high), reference_is_optional, base_dir or Path.cwd()))
    if findings:
        name = reward if isinstance(reward, str) else reward.name if isinstance(reward, RewardSpec) else None
        raise RewardContractBroken(
            f"{name or getattr(reward, '__name__', type(reward).__name__)} breaks the contract of a reward:\n"
            + "\n".join(f"- {one}" for one in findings)
        )


def default_group() -> list[RewardInput]:
    """Right, wrong, abstaining, wordy and formatted answers to one question."""
    prompt = "Anna and Omar waited at the door. Anna had forgotten the keys. Who had forgotten the keys?"
    completions = ("Anna", "Omar", "It was Anna.", "unknown", "<think>Omar waited.</think> <answer>Anna</answer>")
    return [
        RewardInput(
            prompt_id="check",
            prompt=prompt,
            completion=text,
            reference="Anna",
            num_tokens=4 + number,
            meta={"choices": ["Anna", "Omar", "unknown"], "kind": "disambiguated"},
            messages=({"role": "user", "content": prompt},),
            token_ids=tuple(range(4 + number)),
        )
        for number, text in enumerate(completions)
    ]


async def _findings(
    reward: AnyReward | RewardSpec | str,
    inputs: list[RewardInput],
    known: Sequence[tuple[RewardInput, float | None]],
    bounds: tuple[float, float],
    reference_is_optional: bool,
    base_dir: Path,
) -> list[str]:
    own = None
    try:
        if isinstance(reward, str):
            reward = RewardSpec.model_validate({"name": reward})
        if isinstance(reward, RewardSpec):
            reward = own = build_reward(reward, RewardContext(base_dir=base_dir))
        await check_reward_ready(reward)
    except RewardError as exc:
        await _close(own, findings := Findings())
        return [f"it is not ready: {exc}", *findings.lines()]
    check = Check(reward, inputs, bounds)
    blocks: list[str] = []
    async with watched_loop(blocks):
        if await check.scores_the_group():
            await check.repeats_itself()
            await check.follows_the_order()
            await check.ignores_other_groups()
            await check.needs_what_it_reads(reference_is_optional=reference_is_optional)
        if not check.findings.has("exception", "number"):  # which every text would show again
            await check.takes_hostile_texts()
        await check.gives_what_is_known(known)
    for text in blocks:
        check.findings.note("blocking", text)
    await check.ends_when_cancelled()
    await _close(own, check.findings)
    return check.findings.lines()


async def _close(reward: AnyReward | None, findings: Findings) -> None:
    if reward is None:
        return
    for number in ("first", "second"):
        try:
            await close_reward(reward)
        except Exception as exc:  # noqa: BLE001  # the check is there to find it
            findings.note(f"{number} aclose", f"the {number} aclose() raised {describe_exception(exc)}")
