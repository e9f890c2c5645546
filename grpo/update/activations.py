"""What a policy pass keeps for its backward pass: everything, or only the inputs of the model's blocks.

That changes no number. transformers' own checkpointing switches the cache off, and with it the sharing of prompts that
show images; here a block is computed again with all that it read, which does not change when it is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.errors import ModelError

Checkpointing = Literal["none", "selective", "full"]


def checkpointed_blocks(model: PreTrainedModel, checkpointing: Checkpointing) -> list[nn.Module]:
    """The blocks that are computed twice: all of them, or every second one.

    Raises:
        ModelError: the model does not say what its blocks are.
    """
    if checkpointing == "none":
        return []
    blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(
            f"update.checkpointing is {checkpointing}, but {type(model).__name__} has no blocks that transformers "
            "marks for it (GradientCheckpointingLayer). Set update.checkpointing=none."
        )
    return blocks if checkpointing == "full" else blocks[1::2]


@contextlib.contextmanager
def checkpointed(model: PreTrainedModel, checkpointing: Checkpointing) -> Iterator[None]:
    """The forward passes within keep a chosen block's input alone; their backward passes compute the block again.

    Raises:
        ModelError: see `checkpointed_blocks`.
    """
    blocks = checkpointed_blocks(model, checkpointing)
    given = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(_checkpointed_forward, model, block, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, given, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _checkpointed_forward(
    model: PreTrainedModel, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    attention = model.config._attn_implementation
    casts = any(m.cast_input_dtype_enabled for m in block.modules() if isinstance(m, BaseTunerLayer))

    def once(*args: Any) -> Any:
        # the second time is in the backward pass, where what surrounded the first is over
        with attention_of(model, attention), disable_input_dtype_casting(block, active=not casts):
            return forward(*args, **kwargs)

    # no random numbers to repeat: dropout is off in an update
    return checkpoint(once, *args, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def attention_of(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """The model's attention by another of transformers' implementations, for the while."""
    given = model.config._attn_implementation
    if name is None or name == given:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(given)  # pyright: ignore[reportArgumentType]
