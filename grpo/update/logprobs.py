"""Hidden states -> log-probabilities of the sampled tokens, in chunks, so that [tokens, V] is never held.

Pure functions of tensors; knows no model, no batch and no penalties (`process` brings those).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 512
"""Positions whose logits exist at one time."""


def full_precision(values: Tensor) -> Tensor:
    """Float32, or float64 where the values are: sums and exponentials are never taken in half precision."""
    return values if values.dtype == torch.float64 else values.float()


Process = Callable[[Tensor, Tensor], Tensor]
"""(raw logits [C, V] float32, positions [C] into the N given) -> processed logits [C, V], before temperature."""


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    process: Process | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of its distribution, in nats.

    Args:
        hidden: [N, H] the last hidden state at the position that predicts each target.
        lm_head_weight: [V, H].
        targets: [N] token ids.
        temperature: divides the (processed) logits; > 0.
        bias: [V] of the head, where it has one.
        logit_scale: multiplies the raw logits, bias included, for models that scale them.
        softcap: logits become softcap * tanh(logits / softcap), for models that cap them.
        process: acts on a chunk of raw logits (replay of penalties and filters); see `Process`.
        chunk_tokens: positions per chunk; changes memory, not values.
    Returns:
        (logprobs [N], entropy [N]), float32; gradients flow through logprobs, entropy is detached.
    Raises:
        ValueError: temperature is not positive, or hidden and targets differ in length.
    """
    both = logprobs_under_both_laws(
        hidden,
        lm_head_weight,
        targets,
        temperature=temperature,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        process=process,
        chunk_tokens=chunk_tokens,
    )
    return both[0], both[1]


def logprobs_under_both_laws(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    process: Process | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `token_logprobs`, and thirdly the log-probabilities [N] without `process`: one set of logits, two normalisers.

    The policy ratio is taken under the first law, the KL under the second (FORMULAS 1).
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need temperature > 0")
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states for {targets.shape[0]} targets")

    def chunk_logprobs(hidden_chunk: Tensor, targets_chunk: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = full_precision(hidden_chunk.to(lm_head_weight.dtype) @ lm_head_weight.T)  # [C, V]
        # each line is a pass over [C, V]: those that would change nothing are left out
        logits = logits if bias is None else logits + bias  # before the scale: it belongs to the head
        logits = logits if logit_scale == 1 else logits * logit_scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        plain = torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)  # [C, V]
        law = plain if process is None else torch.log_softmax(process(logits, positions) / temperature, dim=-1)
        chosen = targets_chunk[:, None]
        return law.gather(1, chosen)[:, 0], _entropy(law.detach()), plain.gather(1, chosen)[:, 0]

    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, hidden.shape[0], chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        positions = torch.arange(start, min(start + chunk_tokens, hidden.shape[0]), device=hidden.device)
        arguments = (hidden[chunk], targets[chunk], positions)
        if torch.is_grad_enabled() and hidden.requires_grad:
            parts.append(checkpoint(chunk_logprobs, *arguments, use_reentrant=False))  # logits again in backward
        else:
            parts.append(chunk_logprobs(*arguments))
    if not parts:
        empty = full_precision(hidden.new_zeros(0))
        return empty, empty, empty
    logprobs, entropy, plain = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, entropy, plain


def _entropy(logprobs: Tensor) -> Tensor:
    """[C] entropy of each row of [C, V] log-probabilities; a filtered token (-inf) adds 0, not 0 * -inf."""
    return torch.special.entr(logprobs.exp()).sum(dim=-1)
