"""Groups of random tokens with random scores, for steps whose cost and gradient are looked at, not their learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, Verdict

END = 2
"""Token that every completion ends with."""


def random_groups(
    count: int,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    vocabulary: int,
    objectives: Sequence[str] = ("a",),
    completions: int = 8,
) -> list[ScoredGroup]:
    """Args: completions: K, of each group; completion_tokens: of each, the end token included."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())

    def group(number: int) -> ScoredGroup:
        answers = tuple(
            Completion(
                token_ids=(*tokens(completion_tokens - 1), END),
                text="",
                sampler_logprobs=(-1.0,) * completion_tokens,
                finish_reason="stop",
            )
            for _ in range(completions)
        )
        scores = torch.rand(completions, len(objectives), generator=generator).tolist()
        prompt = Prompt(id=str(number), messages=(Message(role="user", content=""),), objectives=tuple(objectives))
        return ScoredGroup(
            rollout=RolloutGroup(prompt=prompt, prompt_token_ids=tokens(prompt_tokens), completions=answers),
            verdicts=tuple(
                {name: Verdict(value=score, parts={}) for name, score in zip(objectives, row, strict=True)}
                for row in scores
            ),
        )

    return [group(number) for number in range(count)]
