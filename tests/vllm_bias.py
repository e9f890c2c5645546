"""A logits processor of one's own, importable where vLLM runs."""

from __future__ import annotations

from torch import Tensor

from grpo.rollout.processors import Prefix


class Bias:
    """Adds `by` to one token's logit while the completion is shorter than `until`."""

    def __init__(self, *, token: int, by: float, until: int = 1 << 30) -> None:
        self._token, self._by, self._until = token, by, until

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        added = logits.new_zeros(logits.shape)
        added[prefix.lengths < self._until, self._token] = self._by
        return logits + added
