"""Prompts with their images -> the arguments of the model's pass over them, and where their completions go on.

Engine and update ask here, so that both see the same images at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo.prompt_images import PromptImages

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptInputs:
    """What a pass over G prompts gets beside their tokens and mask."""

    position_ids: Tensor
    """[G, T_prompt], or [3, G, T_prompt] for a model whose positions have time, height and width."""
    next_position: Tensor
    """[G] of the token that follows the prompt; in every dimension, for it is text."""
    images: Mapping[str, Tensor]
    """The model's arguments that carry images; empty without any."""


def prompt_inputs(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, images: Sequence[PromptImages | None] | None
) -> PromptInputs:
    """Positions and images of prompts that may be padded on either side.

    Args:
        prompt_ids: [G, T_prompt]
        prompt_mask: [G, T_prompt] 1 on tokens.
        images: of each of the G prompts; None where none has any.
    """
    shown = [one for one in images or () if one is not None]
    in_text = PromptInputs(
        position_ids=(prompt_mask.cumsum(dim=1) - 1).clamp(min=0), next_position=prompt_mask.sum(dim=1), images={}
    )
    if not shown:
        return in_text
    device = prompt_ids.device
    tensors = {name: torch.cat([one.tensors[name] for one in shown]).to(device) for name in shown[0].tensors}
    rope_index: Any = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None:
        return PromptInputs(position_ids=in_text.position_ids, next_position=in_text.next_position, images=tensors)
    token_types = torch.zeros_like(prompt_ids)
    for row, one in enumerate(images or ()):
        if one is not None:
            token_types[row, prompt_mask[row].bool()] = torch.tensor(one.token_types, device=device)
    positions, deltas = rope_index(
        prompt_ids,
        mm_token_type_ids=token_types,
        attention_mask=prompt_mask,
        image_grid_thw=tensors.get("image_grid_thw"),
    )  # [3, G, T_prompt], [G, 1] by how much the next position differs from the number of tokens
    return PromptInputs(position_ids=positions, next_position=in_text.next_position + deltas[:, 0], images=tensors)
