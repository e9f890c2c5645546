"""Numbers: NaN and infinity by module, writes in place explained, and updates that a dtype would swallow."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from grpo.diagnostics.checks.subject import Subject
from grpo.diagnostics.findings import Finding
from grpo.diagnostics.tracing import InPlaceWrite, Trace, traced
from grpo.runtime.policy import dropout_off
from grpo.update.non_finite import NOWHERE, first_non_finite_module

CHECK = "numbers"
_LEAF = re.compile(r"leaf Variable that requires grad")
_SAVED = re.compile(
    r"modified by an inplace operation.*?\[[\w.]*Tensor \[([\d, ]*)\]\](?:, which is output \d+ of (\w+),)?"
)


def check_numbers(subject: Subject) -> Iterator[Finding]:
    """One micro-batch, forwards and backwards; a fault here means that the other checks cannot run."""
    policy = subject.parts.policy
    loss, *_ = subject.losses(subject.batch(subject.teaching[:1]))
    with dropout_off(policy.model):
        yield from check_pass(policy.model, loss)
    yield from judge_dtypes(policy.trainable_parameters())


def judge_dtypes(learning: Mapping[str, nn.Parameter]) -> Iterator[Finding]:
    """Args: learning: the parameters that learn, by name. Yields nothing where they are wide enough."""
    narrow = sorted(name for name, parameter in learning.items() if parameter.dtype.itemsize < 4)
    if narrow:
        yield Finding(
            check=CHECK,
            status="failed",
            what=f"{len(narrow)} tensors that learn are 16-bit, such as {narrow[0]}",
            meaning="updates below 0.4% of a weight are rounded away (bfloat16), or AdamW's eps is 0 (float16)",
            remedy="keep what learns in float32; dtype is only for frozen weights and products",
        )


def check_pass(model: nn.Module, loss: Callable[[], Tensor]) -> Iterator[Finding]:
    """Args: loss: a forward pass and a scalar."""
    fault = in_place_fault(model, loss)
    if fault is not None:
        yield fault
        return
    place = first_non_finite_module(model, lambda: _with_a_graph(model, loss()))
    if place == NOWHERE and bool(torch.isfinite(loss().detach())):
        yield Finding(
            check=CHECK,
            status="ok",
            what="every output and gradient of every module is finite; no write in place breaks the graph",
        )
        return
    yield Finding(
        check=CHECK,
        status="failed",
        what=f"not finite; first in {place}",
        meaning="every step with such a batch is skipped, and the weights stay what they are",
        remedy="try dtype=float32 and attention=eager: a module that is finite then overflows in 16 bits. In a module "
        "of your own look for log(0), a division by 0, or -inf in a row that is masked altogether",
        figures={"place": place},
    )


def in_place_fault(model: nn.Module, loss: Callable[[], Tensor]) -> Finding | None:
    """Run forwards and backwards; autograd's complaint about a write in place, in words, with its line."""
    trace = Trace()
    try:
        with traced(model) as trace:
            value = loss()
        if value.requires_grad:
            learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(value, learning, allow_unused=True)
    except RuntimeError as exc:
        found = explain_in_place(str(exc), trace)
        if found is None:
            raise
        return found
    return None


def explain_in_place(message: str, trace: Trace) -> Finding | None:
    """Args: message: of the RuntimeError. None where it is about something else."""
    if _LEAF.search(message):
        write = trace.writes[-1] if trace.writes else None  # it is noted before it is tried
        where = str(write) if write else f"a write in {trace.failed_in or 'the loss'}"
        return Finding(
            check=CHECK,
            status="failed",
            what=f"a parameter, or an input that learns, is written into in place: {where}",
            meaning="torch refuses: the value that the gradient is taken at would be lost",
            remedy=_instead(write) + "; what needs no gradient goes into torch.no_grad()",
            figures={"message": message, "module": write.module if write else trace.failed_in},
        )
    saved = _SAVED.search(message)
    if saved is None:
        return None
    write = _culprit(trace.writes, shape=saved[1], made_by=saved[2] or "")
    where = str(write) if write else "not seen by a hook: look for an operation with a trailing underscore"
    return Finding(
        check=CHECK,
        status="failed",
        what=f"a tensor that the backward pass needs is overwritten in place: {where}",
        meaning="torch refuses to differentiate: the values that the gradient is computed from are gone",
        remedy=_instead(write),
        figures={"message": message, "module": write.module if write else None},
    )


def _with_a_graph(model: nn.Module, value: Tensor) -> Tensor:
    """A loss that no parameter is reached from has its forward pass looked at all the same."""
    if value.requires_grad:
        return value
    return value + 0 * next(parameter for parameter in model.parameters() if parameter.requires_grad).reshape(-1)[0]


def judge_resolution(lost: float) -> Finding:
    """Args: lost: share of the entries that a step moved whose new value bfloat16 cannot tell from the old."""
    return Finding(
        check=CHECK,
        status="ok",
        what=f"{lost:.0%} of one step's updates are smaller than bfloat16 can show; what learns is float32, so none "
        "is lost",
        figures={"lost_in_bfloat16": lost},
    )


def _culprit(writes: list[InPlaceWrite], *, shape: str, made_by: str) -> InPlaceWrite | None:
    """The last write that fits what the message says best."""
    size = tuple(int(part) for part in shape.replace(" ", "").split(",") if part)
    fits = [write for write in writes if write.shape == size]
    same = [write for write in fits if write.made_by == made_by]
    return next(iter(reversed(same or fits or writes)), None)


def _instead(write: InPlaceWrite | None) -> str:
    name = write.name if write else ""
    if name == "__setitem__":
        return "use torch.where, index_put or masked_fill, which give a new tensor, or write into x = x.clone()"
    if name in _OPERATORS:  # torch calls x += y by the method's name
        return f"write x = x {_OPERATORS[name]} y instead of x {_OPERATORS[name]}= y or x.{name}(y)"
    plain = name.rstrip("_") or "the operation without its underscore"
    return f"write x = x.{plain}(...) instead of x.{name or '..._'}(...), or write into a clone"


_OPERATORS = {"add_": "+", "sub_": "-", "mul_": "*", "div_": "/"}
