"""The same checks for a model that no recipe can name: a module of one's own with a loss of one's own.

Knows modules and tensors, patterns and findings; nothing of runs. `show_findings` prints what comes out as the table
of `grpo verify`:

    findings = verify_model(model, lambda: model(**batch).loss, trainable=["projector"], optimizer=make_optimizer)
    show_findings(findings, title="my model")
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor, nn

from grpo.config.module_patterns import check_pattern, matching, nearest
from grpo.diagnostics.checks.gradient import judge_flow
from grpo.diagnostics.checks.kept_memory import KeptMemory
from grpo.diagnostics.checks.numbers import check_pass, judge_dtypes
from grpo.diagnostics.checks.scope import CHECK as SCOPE
from grpo.diagnostics.findings import Finding, worst_status
from grpo.diagnostics.gradflow import gradient_flow
from grpo.runtime.model_parts import model_parts
from grpo.runtime.policy import dropout_off
from grpo.runtime.trainable import (
    BYTES_PER_PARAMETER,
    adapter_parameters,
    plain_name,
    sizes_by_part,
    told_by_part,
    told_bytes,
)
from grpo.update.non_finite import first_non_finite_module

Loss: TypeAlias = Callable[[], Tensor]
MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

STEPS = "steps"
"""The check's name: what an optimizer makes of the model."""
NUM_STEPS = 3
"""A step that ruins the weights shows in the second one's loss."""


def verify_model(
    model: nn.Module,
    loss: Loss,
    *,
    trainable: str | Sequence[str] | None = None,
    optimizer: MakeOptimizer | None = None,
) -> list[Finding]:
    """Scope, gradient flow and numbers of a model as it stands, and, where an optimizer is given, three of its steps.

    Parameters and buffers are afterwards what they were, to the bit, and `.grad` is None. Dropout is off meanwhile, but
    for the passes whose memory is counted. Costs about a dozen forward and backward passes.

    Args:
        model: in train mode, with requires_grad set as it will learn; peft's adapters are known.
        loss: one batch's forward pass through the model, and a scalar; the same number again for the same weights.
        trainable: patterns over module names (`grpo.config.module_patterns`) of what is meant to learn: in each module
            that they match, the adapter's parameters where it has any, else all. None: what has requires_grad.
        optimizer: makes the optimizer of the parameters that learn; not called where the checks before it failed.
    Returns:
        A finding or more of each check, for `show_findings`, `findings_as_json` and `worst_status`.
    Raises:
        ValueError: what is no pattern of module names.
    """
    patterns = [trainable] if isinstance(trainable, str) else list(trainable or ())
    for pattern in patterns:
        check_pattern(pattern)
    learning = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if not learning:
        return [_nothing_learns()]
    with _left_as_it_was(model):
        with dropout_off(model):
            passes = list(check_pass(model, loss))
        numbers = [*passes, *judge_dtypes(learning)]
        if worst_status(passes) == "failed":  # that leaves nothing else to look at
            return [*_check_scope(model, patterns, None), *numbers]
        scope = list(_check_scope(model, patterns, KeptMemory(model=model, loss=loss)))
        with dropout_off(model):
            flow = gradient_flow(model, loss)
            found = [*judge_flow(flow, model, meant=_meant(model, patterns) or learning.keys()), *scope, *numbers]
            if optimizer is not None and flow.has_graph:
                found.append(_check_steps(model, loss, learning, optimizer))
        return found


# --- scope


def _check_scope(model: nn.Module, patterns: Sequence[str], kept: KeptMemory | None) -> Iterator[Finding]:
    """Args: kept: counts what the batch keeps for its backward pass; None where there is no pass."""
    parts = model_parts(_without_peft(model))
    learning = {name: one.numel() for name, one in model.named_parameters() if one.requires_grad}
    by_part = sizes_by_part({plain_name(name): size for name, size in learning.items()}, parts)
    count = sum(learning.values())
    kept_bytes = kept.total() if kept else None
    figures: dict[str, Any] = {
        "parameters": count,
        "bytes": count * BYTES_PER_PARAMETER,
        "kept_bytes": kept_bytes,
        "parts": {part: {"tensors": tensors, "parameters": size} for part, (tensors, size) in by_part.items()},
    }
    meant = _meant(model, patterns)
    idle = list(_idle_patterns(model, patterns, learning))
    besides = [name for name in learning if patterns and name not in meant]
    strays = {plain_name(name): learning[name] for name in besides}
    frozen = [] if idle else sorted(plain_name(name) for name in meant - learning.keys())
    yield from idle
    if strays:
        figures["kept_because_of_strays"] = kept.because_of(besides) if kept else None
        yield _strays(strays, told_by_part(sizes_by_part(strays, parts)), patterns, figures)
    if frozen:
        yield Finding(
            check=SCOPE,
            status="failed",
            what=f"meant to learn: {', '.join(patterns)}; {len(meant) - len(frozen)} of {len(meant)} tensors do; "
            f"frozen are such as {', '.join(frozen[:3])}",
            meaning="a part of what was meant stays what it is",
            remedy="set requires_grad_(True) on the whole part after everything else is frozen",
            figures={**figures, "frozen": frozen},
        )
    if not (idle or strays or frozen):
        told = f"what learns: {told_by_part(by_part)}; {count:,} parameters with gradients and AdamW's moments"
        told += "" if kept_bytes is None else f"; {told_bytes(kept_bytes)} kept of this batch for its backward pass"
        yield Finding(check=SCOPE, status="ok", what=told, figures=figures)


def _strays(sizes: Mapping[str, int], by_part: str, patterns: Sequence[str], figures: Mapping[str, Any]) -> Finding:
    """Args: by_part: the same in words."""
    size, kept = sum(sizes.values()), figures["kept_because_of_strays"]
    activations = "" if kept is None else f", this batch keeps {told_bytes(kept)} more for its backward pass"
    return Finding(
        check=SCOPE,
        status="failed",
        what=f"meant to learn: {', '.join(patterns)}; {len(sizes)} tensors learn besides: {by_part}",
        meaning=f"{size:,} parameters more than was meant take {told_bytes(size * BYTES_PER_PARAMETER)} with "
        f"gradients and AdamW's moments{activations}, and that part of the model is trained too",
        remedy="patterns decide what learns, and nothing else does: peft matches a list's entries by the end of a "
        "module's name wherever it is, whatever the task_type. Give target_modules the part's path as a regular "
        "expression, or call requires_grad_(False) on the other parts",
        figures={**figures, "strays": list(sizes)},
    )


def _nothing_learns() -> Finding:
    return Finding(
        check=SCOPE,
        status="failed",
        what="no parameter has requires_grad",
        meaning="the optimizer would get nothing, or what never changes",
        remedy="call requires_grad_(True) on the part that should learn, after all is frozen, or put adapters on",
    )


def _idle_patterns(model: nn.Module, patterns: Sequence[str], learning: Collection[str]) -> Iterator[Finding]:
    names = _module_names(model)
    for pattern in patterns:
        modules = matching(pattern, names)
        if any(_is_inside(plain_name(name), modules) for name in learning):
            continue
        what = "holds nothing that learns" if modules else "matches no module"
        yield Finding(
            check=SCOPE,
            status="failed",
            what=f"{pattern!r} {what}",
            meaning="what it was meant for stays frozen, without a word",
            remedy="it has requires_grad_(False), or no adapter: peft's target_modules left it out"
            if modules
            else f"write a name that the model has: {nearest(pattern, names)}",
        )


def _meant(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Parameters that the patterns want to learn, as the model calls them; empty without patterns."""
    modules = {one for pattern in patterns for one in matching(pattern, _module_names(model))}
    own = {name for name, _ in model.named_parameters()}
    added = adapter_parameters(model) | {name for name in own if ".modules_to_save." in name}
    meant: set[str] = set()
    for module in modules:
        inside = {name for name in own if _is_inside(plain_name(name), [module])}
        meant |= inside & added or inside
    return meant


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in _without_peft(model).named_modules() if name]


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _without_peft(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


# --- steps


def _check_steps(
    model: nn.Module, loss: Loss, learning: Mapping[str, nn.Parameter], make_optimizer: MakeOptimizer
) -> Finding:
    """Undone by the caller."""
    optimizer = make_optimizer(list(learning.values()))
    before = {name: parameter.detach().clone() for name, parameter in learning.items()}
    losses: list[float] = []
    for step in range(NUM_STEPS + 1):
        value = loss()
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            return _not_finite(model, loss, losses, step)
        optimizer.zero_grad()
        if step < NUM_STEPS:
            value.backward()
            optimizer.step()
    moved = sum(not torch.equal(parameter, before[name]) for name, parameter in learning.items())
    what = f"{NUM_STEPS} steps: loss {losses[0]:.4f} -> {losses[-1]:.4f}; {moved} of {len(learning)} tensors moved"
    figures = {"losses": losses, "moved": moved}
    if moved and losses[-1] < losses[0]:
        return Finding(check=STEPS, status="ok", what=what, figures=figures)
    return Finding(
        check=STEPS,
        status="warning" if moved else "failed",
        what=what,
        meaning="the same batch's loss does not fall, so its steps do not go where the gradient says"
        if moved
        else "nothing is learned",
        remedy="try a learning rate ten times smaller" if moved else "give the optimizer the parameters that learn",
        figures=figures,
    )


def _not_finite(model: nn.Module, loss: Loss, losses: Sequence[float], step: int) -> Finding:
    place = first_non_finite_module(model, loss)
    return Finding(
        check=STEPS,
        status="failed",
        what=f"the loss is {losses[0]:.4f} at first and not finite after {step} of the optimizer's steps; first in "
        f"{place}",
        meaning="from then on every batch is NaN: a loop that skips such batches skips all of them, and never ends",
        remedy="keep what learns in float32 (AdamW's eps of 1e-8 is 0 in float16, so a gradient of 0 becomes 0 / 0), "
        "or lower the learning rate; and bound the skips in a row",
        figures={"place": place, "losses": list(losses)},
    )


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    parameters = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    buffers = {name: one.detach().clone() for name, one in model.named_buffers()}
    try:
        yield
    finally:
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in parameters.items():
                own[name].copy_(value)
                own[name].grad = None
            for name, one in model.named_buffers():
                one.copy_(buffers[name])
