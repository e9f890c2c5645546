"""Scope: which modules the patterns under `trainable` hit, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from peft.tuners.lora import LoraLayer
from torch import nn

from grpo.config import LoraTrainable
from grpo.diagnostics.checks.subject import Subject
from grpo.diagnostics.findings import Finding

CHECK = "scope"
BYTES_PER_PARAMETER = 20
"""Float32: the weight, its gradient, a micro-batch's own gradient, and AdamW's two moments."""


def check_scope(subject: Subject) -> Iterator[Finding]:
    """Count modules by pattern; for full training only what it costs."""
    policy, trainable = subject.parts.policy, subject.config.trainable
    count = sum(parameter.numel() for parameter in policy.trainable_parameters().values())
    cost = f"{count:,} parameters, {_size(count * BYTES_PER_PARAMETER)} with gradients and AdamW's moments"
    if not isinstance(trainable, LoraTrainable):
        yield Finding(check=CHECK, status="ok", what=f"every parameter learns: {cost}", figures={"parameters": count})
        return
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for name, module in policy.causal_lm.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module)
    }
    patterns = [trainable.modules] if isinstance(trainable.modules, str) else list(trainable.modules)
    yield from judge_scope(sizes, patterns, cost=cost)


def judge_scope(sizes: Mapping[str, int], patterns: Sequence[str], *, cost: str) -> Iterator[Finding]:
    """Args: sizes: module with an adapter -> parameters of it; patterns: as the recipe has them."""
    matched = {pattern: [name for name in sizes if _matches(name, pattern)] for pattern in patterns}
    stacks = {pattern: _by_stack(names, sizes) for pattern, names in matched.items()}
    figures = {
        "modules": len(sizes),
        "parameters": sum(sizes.values()),
        "bytes": sum(sizes.values()) * BYTES_PER_PARAMETER,
        "patterns": {
            pattern: {name: {"modules": modules, "parameters": size} for name, (modules, size) in own.items()}
            for pattern, own in stacks.items()
        },
    }
    faults = [pattern for pattern, names in matched.items() if not names]
    wide = {pattern: own for pattern, own in stacks.items() if len(own) > 1}
    if not faults and not wide:
        counts = ", ".join(f"{pattern} {len(names)}" for pattern, names in matched.items())
        where = ", ".join(dict.fromkeys(stack for own in stacks.values() for stack in own))
        yield Finding(check=CHECK, status="ok", what=f"modules: {counts}, in {where}; {cost}", figures=figures)
    for pattern in faults:
        yield Finding(
            check=CHECK,
            status="failed",
            what=f"trainable.modules {pattern!r} matches no module",
            meaning="what it was meant for stays frozen, without a word",
            remedy=f"write a name that the model has; those with an adapter are such as {', '.join(list(sizes)[:3])}",
            figures=figures,
        )
    for pattern, own in wide.items():
        hits = ", ".join(
            f"{modules} modules in {stack or 'the model'} ({_size(size * BYTES_PER_PARAMETER)})"
            for stack, (modules, size) in own.items()
        )
        yield Finding(
            check=CHECK,
            status="warning",
            what=f"trainable.modules {pattern!r} matches in several parts of the model: {hits}",
            meaning="a pattern meant for one part trains the others too, and each costs its memory",
            remedy="name the modules by their whole path where only one part should learn",
            figures=figures,
        )


def _matches(name: str, pattern: str) -> bool:
    """As peft matches a list's entries."""
    return pattern == "all-linear" or name == pattern or name.endswith(f".{pattern}")


def _by_stack(names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Stack of layers -> (modules, parameters): what stands before a name's first number is the stack."""
    found: dict[str, tuple[int, int]] = {}
    for name in names:
        numbered = re.match(r"(.*?)\.\d+(\.|$)", name)
        stack = numbered[1] if numbered else name.rpartition(".")[0]
        modules, size = found.get(stack, (0, 0))
        found[stack] = (modules + 1, size + sizes[name])
    return found


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
