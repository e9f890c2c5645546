"""Gradient flow: does the real loss reach every parameter that should learn, and no other?"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from grpo.diagnostics.checks.subject import Subject
from grpo.diagnostics.findings import Finding
from grpo.diagnostics.gradflow import Cut, GradientFlow, gradient_flow, group_by_module

CHECK = "gradient flow"
_SHOWN = 4


def check_gradient_flow(subject: Subject) -> Iterator[Finding]:
    """Two micro-steps over one micro-batch of the recipe's size."""
    policy = subject.parts.policy
    loss, *_ = subject.losses(subject.batch(subject.teaching[:1]))
    loss()  # from here on the old policy is the one that sampled, and the loss's value moves with the model
    flow = gradient_flow(policy.model, loss)
    meant = policy.learner.names
    yield from judge_flow(flow, policy.model, meant=meant)
    yield from _judge_meant(policy.model, meant)


def judge_flow(flow: GradientFlow, model: nn.Module, *, meant: Collection[str]) -> Iterator[Finding]:
    """Args: meant: names of the parameters that should learn, and no others."""
    parameters = dict(model.named_parameters())
    learning = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    count, total = (sum(one.numel() for one in own.values()) for own in (learning, parameters))
    is_frozen = "yes" if learning.keys() <= set(meant) else "no"
    rest = "every parameter learns" if count == total else f"base frozen: {is_frozen}"
    share = f"trainable {count:,} = {count / total:.1%}; {rest}"
    figures = _figures(flow, count, total)
    if not (flow.unreached or flow.cuts):
        late = f"; {len(flow.zero_at_start)} from the second step on" if flow.zero_at_start else ""
        late += " (where a B starts at 0)" if any(".lora_" in name for name in flow.zero_at_start) else ""
        yield Finding(check=CHECK, status="ok", what=f"{share}; {_by_part(flow)}{late}", figures=figures)
    if flow.unreached:
        yield _unreached(flow, share, figures)
    yield from (_cut(cut) for cut in flow.cuts)
    if flow.zero_always:
        yield Finding(
            check=CHECK,
            status="warning",
            what=f"the gradient is exactly 0 in {len(flow.zero_always)} tensors: "
            + _some([_told(name) for name in flow.zero_always]),
            meaning="they take no part in this batch (an expert that no token went to, a factor of 0), or in any",
            remedy="run it again with other prompts (seed=1); what stays at 0 is not used: leave it out",
            figures={"zero": list(flow.zero_always)},
        )


def _judge_meant(model: nn.Module, meant: Collection[str]) -> Iterator[Finding]:
    parameters = dict(model.named_parameters())
    strays = [name for name, one in parameters.items() if one.requires_grad and name not in meant]
    asleep = [name for name, one in parameters.items() if not one.requires_grad and name in meant]
    if strays or asleep:
        names = [f"{_told(name)} learns" for name in strays] + [f"{name} is frozen" for name in asleep]
        yield Finding(
            check=CHECK,
            status="failed",
            what=f"another part of the model learns than was meant: {_some(names)}",
            meaning="what was meant to learn does not, or more learns and takes memory for its gradients and moments",
            remedy="somebody set requires_grad after the model was made ready: take that out",
            figures={"strays": strays, "asleep": asleep},
        )


def _unreached(flow: GradientFlow, share: str, figures: dict[str, object]) -> Finding:
    modules: dict[str, tuple[int, int]] = {}
    for name, (got, all_) in group_by_module({_told(name): norm for name, norm in flow.norms.items()}).items():
        before = modules.get(name.rpartition(".")[0], (0, 0))
        modules[name.rpartition(".")[0]] = (before[0] + got, before[1] + all_)
    parts = [f"{name}: gradient in {got} of {all_}" for name, (got, all_) in modules.items() if got < all_]
    return Finding(
        check=CHECK,
        status="failed",
        what=f"{share}; no gradient in {len(flow.unreached)} of {len(flow.norms)} tensors that should learn: "
        f"{_some(parts)}",
        meaning="these stay what they are for the whole run"
        + ("" if flow.has_graph else "; the loss has no grad_fn, so nothing learns at all"),
        remedy=_where_to_look(flow),
        figures=figures,
    )


def _cut(cut: Cut) -> Finding:
    return Finding(
        check=CHECK,
        status="failed",
        what=f"the graph is cut in {cut}",
        meaning="gradient goes in and none comes out, though the loss depends on it: what lies before learns nothing "
        "through here",
        remedy=_REMEDIES[cut.kind],
        figures={"module": cut.module, "kind": cut.kind, "around": list(cut.around), "operation": cut.operation},
    )


def _by_part(flow: GradientFlow) -> str:
    """Such as "projector: gradient in 4 of 4": the model's parts are what stands before a name's first number."""
    parts: dict[str, int] = {}
    for name in flow.norms:
        plain = _told(name)
        numbered = re.match(r"(.*?)\.\d+\.", plain)
        part = numbered[1] if numbered else plain.rpartition(".")[0]
        parts[part] = parts.get(part, 0) + 1
    if len(parts) > _SHOWN:
        return f"gradient in {len(flow.norms)} of {len(flow.norms)} tensors"
    return ", ".join(f"{part}: gradient in {number} of {number} tensors" for part, number in parts.items())


_REMEDIES = {
    "no_grad": "take the torch.no_grad() away from there: frozen parts need requires_grad_(False) only, and gradient "
    "flows through them",
    "detach": "take the detach() (or .data) away, or put it on what needs no gradient only",
    "integer cast": "keep the tensor floating: a cast to integers has no gradient, even when it is cast back",
    "custom forward": "look at that forward for an autograd.Function, numpy or an operation without a gradient, and "
    "write it with torch's differentiable operations",
}


def _where_to_look(flow: GradientFlow) -> str:
    if flow.cuts:
        return "mend the cut named below and verify again"
    if flow.whole_pass_is_off:
        return "the model is called under torch.no_grad() from outside: take that away from the training pass"
    if flow.outside:
        return f"the loss itself drops the gradient ({', '.join(flow.outside[:2])}): look at update.loss"
    return (
        "no module was seen to cut the graph: they are not part of the forward pass, or gradient checkpointing of the "
        "reentrant kind, or an autograd.Function whose backward returns None, lies before them"
    )


def _figures(flow: GradientFlow, count: int, total: int) -> dict[str, object]:
    return {
        "trainable": count,
        "total": total,
        "has_grad_fn": flow.has_graph,
        "groups": {name: {"reached": got, "of": all_} for name, (got, all_) in group_by_module(flow.norms).items()},
        "unreached": list(flow.unreached),
        "from_second_step": list(flow.zero_at_start),
    }


def _told(name: str) -> str:
    """Without peft's wrapper and the adapter's own name: model.layers.0.q_proj.lora_A.weight."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
