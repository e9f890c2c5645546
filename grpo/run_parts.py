"""What a run is made of: the parts that `grpo.preflight` has checked and built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo.errors import DatasetError
from grpo.prompt_images import ImageTextEncoder, PromptImages
from grpo.prompts import EncodedPrompt, PromptSource, encode_prompt
from grpo.rollout.base import RolloutEngine, SamplingParams
from grpo.runtime.distributed import Ranks
from grpo.runtime.policy import Policy
from grpo.scoring import Scorer
from grpo.types import Prompt, ScoredGroup
from grpo.update.step import Updater

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """All that the trainer puts together."""

    ranks: Ranks
    """The processes of the run."""
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSource
    max_prompt_tokens: int | None
    """Room that the model's context leaves beside rollout.max_new_tokens; None where the context has no end."""
    params: SamplingParams
    policy: Policy
    engine: RolloutEngine
    scorer: Scorer
    """Of training; without rewards in a run that is only evaluated."""
    eval_scorer: Scorer
    """Of evaluation; without rewards in a run that is never evaluated."""
    updater: Updater
    image_encoder: ImageTextEncoder | None = None
    """Of a vision-language model; None for one that reads text alone."""

    def encode(self, prompts: list[Prompt]) -> list[EncodedPrompt]:
        """Prompts as token ids. Raises DatasetError for one that does not fit the context, or whose images are gone."""
        room, images = self.max_prompt_tokens, self.image_encoder
        return [encode_prompt(prompt, self.tokenizer, max_tokens=room, image_encoder=images) for prompt in prompts]

    def images_of(self, groups: Sequence[ScoredGroup]) -> dict[str, PromptImages]:
        """Prompt id -> its images, read anew: between sampling and update, and in a journal, files are only named.

        All ranks call it alike, each with its own groups.

        Raises:
            DatasetError: they are not those that the completions were sampled for.
        """
        return {} if self.image_encoder is None else self.ranks.together(lambda: self._images_again(groups))

    def _images_again(self, groups: Sequence[ScoredGroup]) -> dict[str, PromptImages]:
        shown = [group.rollout for group in groups if group.rollout.image_digest is not None]
        found: dict[str, PromptImages] = {}
        for rollout, encoded in zip(shown, self.encode([rollout.prompt for rollout in shown]), strict=True):
            is_same = encoded.token_ids == rollout.prompt_token_ids
            if encoded.images is None or encoded.images.digest != rollout.image_digest or not is_same:
                raise DatasetError(
                    f"the images of prompt {rollout.prompt.id!r} ({', '.join(rollout.prompt.images)}) have changed "
                    "since its completions were sampled. Put the files back as they were."
                )
            found[rollout.prompt.id] = encoded.images
        return found

    def close(self) -> None:
        """Stop the scorers' threads and free the engine."""
        self.scorer.close()
        self.eval_scorer.close()
        self.engine.close()
