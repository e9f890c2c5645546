"""Scope: which modules the patterns under `trainable` hit, in which of the model's parts, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from grpo.config import LoraPart, LoraTrainable
from grpo.diagnostics.checks.kept_memory import KeptMemory
from grpo.diagnostics.checks.subject import Subject
from grpo.diagnostics.findings import Finding
from grpo.runtime.model_parts import ModelParts, model_parts
from grpo.runtime.trainable import (
    BYTES_PER_PARAMETER,
    Taken,
    lora_layers,
    sizes_by_part,
    told_by_part,
    told_bytes,
)

CHECK = "scope"
ONE_PART = ModelParts(names=(), language="", container="")
KeptFor: TypeAlias = Callable[[Sequence[str]], int]
"""Modules with an adapter -> bytes of a micro-batch that the backward pass keeps only because they learn."""


def check_scope(subject: Subject, *, can_pass: bool = True) -> Iterator[Finding]:
    """Count modules by pattern and part, with the memory that they cost; for full training only the cost.

    Args:
        can_pass: a forward pass works, so that what it keeps can be counted.
    """
    policy, trainable = subject.parts.policy, subject.config.trainable
    count = sum(parameter.numel() for parameter in policy.trainable_parameters().values())
    cost = f"{count:,} parameters, {told_bytes(count * BYTES_PER_PARAMETER)} with gradients and AdamW's moments"
    figures: dict[str, object] = {"parameters": count, "bytes": count * BYTES_PER_PARAMETER}
    kept_for: KeptFor | None = None
    if can_pass:
        batch = subject.batch(subject.teaching[:1])
        kept = KeptMemory(model=policy.causal_lm, loss=subject.losses(batch)[0])
        total, tokens = kept.total(), batch.micro_batches[0].padded_tokens
        cost += f"; {told_bytes(total)} kept of a micro-batch of {tokens} tokens for its backward pass"
        figures |= {"kept_bytes": total, "kept_of_tokens": tokens}
        names = [name for name, _ in policy.causal_lm.named_parameters()]

        def kept_for_modules(modules: Sequence[str]) -> int:
            return kept.because_of([name for name in names if name.startswith(tuple(f"{one}." for one in modules))])

        kept_for = kept_for_modules
    parts = model_parts(policy.causal_lm)
    if policy.learner.taken:
        yield judge_taken(policy.learner.taken, parts, cost=cost, figures=figures)
        return
    if not isinstance(trainable, LoraTrainable):
        yield Finding(check=CHECK, status="ok", what=f"every parameter learns: {cost}", figures=figures)
        return
    sizes = {
        name: sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)  # pyright: ignore[reportAttributeAccessIssue]
        for name, layer in lora_layers(policy.causal_lm).items()
    }
    patterns = [trainable.modules] if isinstance(trainable.modules, str) else list(trainable.modules)
    yield from judge_scope(sizes, patterns, cost=cost, parts=parts, kept_for=kept_for, figures=figures)


def judge_taken(
    taken: Sequence[Taken], parts: ModelParts, *, cost: str, figures: Mapping[str, object] | None = None
) -> Finding:
    """What the entries of `trainable.parts` took: what they may not was refused when the model was made ready."""
    told: list[str] = []
    entries: list[dict[str, object]] = []
    for one in taken:
        by_part = sizes_by_part(one.sizes, parts)
        is_lora = isinstance(one.entry, LoraPart)
        kind = f"LoRA of rank {one.entry.rank}" if isinstance(one.entry, LoraPart) else "full"
        told.append(
            f"{kind} for {', '.join(one.entry.modules)}: {'modules' if is_lora else 'tensors'} {told_by_part(by_part)}"
        )
        entries.append(
            {
                "type": one.entry.type,
                "modules": list(one.entry.modules),
                "parts": {name: {"count": n, "parameters": size} for name, (n, size) in by_part.items()},
            }
        )
    learning = {parts.of(name) for one in taken for name in one.sizes}
    frozen = [name for name in parts.names if name not in learning]
    rest = f"; {', '.join(frozen)} stay frozen" if frozen else ""
    return Finding(
        check=CHECK,
        status="ok",
        what=f"{'; '.join(told)}{rest}; together {cost}",
        figures={**(figures or {}), "entries": entries},
    )


def judge_scope(
    sizes: Mapping[str, int],
    patterns: Sequence[str],
    *,
    cost: str,
    parts: ModelParts = ONE_PART,
    kept_for: KeptFor | None = None,
    figures: Mapping[str, object] | None = None,
) -> Iterator[Finding]:
    """Of `trainable.type: lora`, whose patterns peft matches by their end.

    Args:
        sizes: module with an adapter -> parameters of it.
        patterns: as the recipe has them.
        parts: of the model. A pattern that hits several fails; one that hits several stacks of layers is a warning.
        kept_for: counts activations; None where no pass can be made, and they are not told.
        figures: of the whole.
    """
    matched = {pattern: [name for name in sizes if _matches(name, pattern)] for pattern in patterns}
    stacks = {pattern: _by_stack(names, sizes) for pattern, names in matched.items()}
    figures = {
        **(figures or {}),
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
    by_part = {
        pattern: found
        for pattern in wide
        if len(found := sizes_by_part({name: sizes[name] for name in matched[pattern]}, parts)) > 1
    }
    if not faults and not wide:
        counts = ", ".join(f"{pattern} {len(names)}" for pattern, names in matched.items())
        where = ", ".join(dict.fromkeys(stack for own in stacks.values() for stack in own))
        frozen = [name for name in parts.names if name not in {parts.of(module) for module in sizes}]
        rest = f"; {', '.join(frozen)} stay frozen" if frozen else ""
        yield Finding(check=CHECK, status="ok", what=f"modules: {counts}, in {where}{rest}; {cost}", figures=figures)
    for pattern in faults:
        yield Finding(
            check=CHECK,
            status="failed",
            what=f"trainable.modules {pattern!r} matches no module",
            meaning="what it was meant for stays frozen, without a word",
            remedy=f"write a name that the model has; those with an adapter are such as {', '.join(list(sizes)[:3])}",
            figures=figures,
        )
    for pattern, found in by_part.items():
        entry = f"{{type: lora, modules: {next(iter(found))}.**.{pattern}}}"
        yield Finding(
            check=CHECK,
            status="failed",
            what=f"trainable.modules {pattern!r} matches in {len(found)} parts of the model: modules "
            f"{told_by_part(found)}{_told_kept(_by_part(matched[pattern], parts), kept_for)}",
            meaning="names are matched by their end, wherever that is: meant for one part, it trains the others too, "
            "and each costs its memory, for gradients and AdamW's moments and for what the backward pass needs",
            remedy=f"name the part that is meant, trainable={{type: parts, parts: [{entry}]}}, with across_parts: true "
            "in it if all of them are",
            figures=figures,
        )
    for pattern, own in wide.items():
        if pattern in by_part:
            continue
        hits = ", ".join(
            f"{modules} modules in {stack or 'the model'} ({told_bytes(size * BYTES_PER_PARAMETER)})"
            for stack, (modules, size) in own.items()
        )
        yield Finding(
            check=CHECK,
            status="warning",
            what=f"trainable.modules {pattern!r} matches in several parts of the model: {hits}"
            f"{_told_kept({stack: _of_stack(matched[pattern], stack) for stack in own}, kept_for)}",
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
        stack = _stack(name)
        modules, size = found.get(stack, (0, 0))
        found[stack] = (modules + 1, size + sizes[name])
    return found


def _stack(name: str) -> str:
    numbered = re.match(r"(.*?)\.\d+(\.|$)", name)
    return numbered[1] if numbered else name.rpartition(".")[0]


def _of_stack(names: Sequence[str], stack: str) -> list[str]:
    return [name for name in names if _stack(name) == stack]


def _by_part(names: Sequence[str], parts: ModelParts) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(parts.of(name), []).append(name)
    return found


def _told_kept(groups: Mapping[str, Sequence[str]], kept_for: KeptFor | None) -> str:
    """Args: groups: part or stack -> its modules."""
    if kept_for is None:
        return ""
    told = ", ".join(f"{told_bytes(kept_for(own))} because of {name or 'the model'}" for name, own in groups.items())
    return f"; of a micro-batch, kept only because these learn: {told}"
