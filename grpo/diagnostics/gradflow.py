"""Which parameters a loss reaches, and where the way to the others is cut.

A module is suspected where it holds parameters that learn, or gets an input with gradient, and gives a tensor that has
none. Many do so rightly: a rotary embedding looks only at its input's dtype. So each suspicion is tried out: the
tensor must change with that input, and the loss must change with the tensor. Knows modules and tensors only.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from grpo.diagnostics.tracing import Call, Trace, inside_peft, tensors_in, traced, with_tensors

CutKind: TypeAlias = Literal["no_grad", "detach", "integer cast", "custom forward"]

MIN_CHANGE = 1e-5
"""Relative change of a loss or an output that is no rounding: what is put in is as large as what was there."""
AROUND_SHOWN = 3
"""So many modules that one forward calls with gradients off are tried out and named."""
STIR = 0.05
"""Standard deviation of what zero-initialised parameters get, so that what lies behind them can be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A place where gradient is lost that the loss needs."""

    module: str
    """The module in whose forward; "" is the model itself."""
    kind: CutKind
    around: tuple[str, ...]
    """The modules that its forward calls with gradients off; empty where it loses the gradient itself."""
    operation: str
    """Such as "detach at my_model.py:12"; empty where no torch operation was seen to do it."""

    def __str__(self) -> str:
        where = inside_peft(self.module) or "the model's own forward"
        around = f" around {', '.join(map(inside_peft, self.around))}" if self.around else ""
        return f"{where} ({self.kind}{around}{': ' + self.operation if self.operation else ''})"


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientFlow:
    """What came of it."""

    has_graph: bool
    """Whether the loss has a grad_fn. One that was given requires_grad itself has none: backward() runs, and nothing
    learns."""
    norms: Mapping[str, float | None]
    """Parameter that learns -> norm of its gradient; None where it gets none."""
    zero_at_start: tuple[str, ...]
    """Those whose gradient is 0 only while other parameters are still zero: LoRA's A beside its B."""
    zero_always: tuple[str, ...]
    """Those that are reached, by a gradient of exactly 0 on the second micro-step too."""
    cuts: tuple[Cut, ...]
    """In the order in which the forward pass meets them."""
    outside: tuple[str, ...]
    """Operations of the loss itself, after the model, that dropped gradient; looked at only where nothing arrives."""
    whole_pass_is_off: bool
    """The model was called with gradients off from outside."""

    @property
    def unreached(self) -> tuple[str, ...]:
        """Parameters that should learn and get no gradient."""
        return tuple(name for name, norm in self.norms.items() if norm is None)


def gradient_flow(model: nn.Module, loss: Callable[[], Tensor]) -> GradientFlow:
    """Two micro-steps: one as the model is, one with its zero-initialised parameters moved off zero.

    The parameters are afterwards what they were, to the bit, and no `.grad` is touched. Costs two forward and backward
    passes, and two more forward passes for each suspicion.

    Args:
        model: in the mode it trains in, without dropout.
        loss: a forward pass through the model and a scalar that depends on what came out. It must give the same number
            again for the same weights.
    """
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = _norms(learning, loss)
    with stirred(learning):
        value, trace = _traced_pass(model, loss)
        second = _norms_of(learning, value)
        cuts = _find_cuts(model, loss, trace)
    zero = [name for name, norm in second.items() if norm == 0]
    return GradientFlow(
        has_graph=value.grad_fn is not None,
        norms={name: second[name] if norm == 0 else norm for name, norm in first.items()},
        zero_at_start=tuple(name for name, norm in first.items() if norm == 0 and second[name] not in (0, None)),
        zero_always=tuple(name for name in zero if first[name] == 0),
        cuts=cuts,
        outside=tuple(dict.fromkeys(str(operation) for operation in trace.outside)) if value.grad_fn is None else (),
        whole_pass_is_off=bool(trace.calls) and not trace.was_called_with_gradient,
    )


def group_by_module(names: Mapping[str, float | None]) -> dict[str, tuple[int, int]]:
    """Name with its layers' numbers as "*" -> (parameters that get gradient, parameters)."""
    groups: dict[str, tuple[int, int]] = {}
    for name, norm in names.items():
        group = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        reached, total = groups.get(group, (0, 0))
        groups[group] = (reached + (norm is not None), total + 1)
    return groups


@contextlib.contextmanager
def stirred(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Noise in the parameters that are zero altogether, as one step would leave them: not zero."""
    generator = torch.Generator().manual_seed(0)
    moved = [parameter for parameter in parameters.values() if not bool(parameter.detach().any())]
    try:
        with torch.no_grad():
            for parameter in moved:
                parameter.copy_(STIR * torch.randn(parameter.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for parameter in moved:
                parameter.zero_()


@contextlib.contextmanager
def _checkpointing_off(model: nn.Module) -> Iterator[None]:
    """Its first pass runs with gradients off where it is the reentrant kind, and cuts nothing by that."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    try:
        for layer in layers:
            layer.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]


def _traced_pass(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, Trace]:
    with _checkpointing_off(model), traced(model) as trace:
        return loss(), trace


def _norms(learning: Mapping[str, nn.Parameter], loss: Callable[[], Tensor]) -> dict[str, float | None]:
    return _norms_of(learning, loss())


def _norms_of(learning: Mapping[str, nn.Parameter], value: Tensor) -> dict[str, float | None]:
    if value.grad_fn is None:
        return dict.fromkeys(learning)
    gradients = torch.autograd.grad(value, list(learning.values()), allow_unused=True)
    return {
        name: None if gradient is None else float(gradient.float().norm())
        for name, gradient in zip(learning, gradients, strict=True)
    }


def _find_cuts(model: nn.Module, loss: Callable[[], Tensor], trace: Trace) -> tuple[Cut, ...]:
    """Each module once, innermost first; what holds a cut loses gradient because of it, and is not named besides."""
    probe = _Probe(model, loss)
    losing = {id(call) for call in trace.calls if call.has_gradient_on and call.lost}
    seen: set[int] = set()  # tensors
    holders: set[int] = set()  # calls
    blamed: dict[str, Call] = {}
    around: dict[str, list[Call]] = {}  # module -> what its forward calls with gradients off
    for call in trace.calls:
        places = [place for place, tensor in call.lost.items() if id(tensor) not in seen]
        if call.runs_with_gradient_off:
            assert call.parent is not None
            guilty = call.parent
        elif id(call) in losing:
            seen |= {id(tensor) for tensor in call.lost.values()}
            guilty = call
        else:
            continue
        is_known = guilty is call and call.module in blamed
        if is_known or id(guilty) in holders or len(around.get(guilty.module, [])) == AROUND_SHOWN:
            continue
        if any(probe.depends_on_input(call, place) and probe.matters(call, place) for place in places):
            blamed.setdefault(guilty.module, guilty)
            holders |= {id(holder) for holder in guilty.ancestors()}
            if guilty is not call and call.module not in [other.module for other in around.get(guilty.module, [])]:
                around.setdefault(guilty.module, []).append(call)
    return tuple(_cut(call, around.get(module, [])) for module, call in blamed.items())


def _cut(call: Call, around: Sequence[Call]) -> Cut:
    """Args: around: the calls that its forward made with gradients off."""
    if around:
        return Cut(
            module=call.module,
            kind="no_grad",
            around=tuple(inner.module for inner in around),
            operation=f"called at {around[0].called_at}",
        )
    for kind in _KINDS:
        operation = next((one for one in call.operations if one.kind == kind), None)
        if operation is not None:
            return Cut(module=call.module, kind=kind, around=(), operation=str(operation))
    return Cut(module=call.module, kind="custom forward", around=(), operation="")


_KINDS: tuple[CutKind, ...] = ("no_grad", "detach", "custom forward", "integer cast")
"""Where a forward did several things: what is surest to be the reason first."""

_BREAKS = (RuntimeError, ValueError, IndexError)
"""What a pass may raise under numbers that it was not made for; then it depends on them."""


class _Found(Exception):
    """The output that was waited for is there: the rest of the pass is not needed."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class _Probe:
    """Tries out what depends on what, by changing it."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self._modules = dict(model.named_modules())
        self._model, self._loss = model, loss
        self._value: float | None = None

    def depends_on_input(self, call: Call, place: int) -> bool:
        """Whether a tensor of the call's output changes with the inputs that carry gradient, or with what learns in
        the module: T5's attention gives its position bias besides, which knows of neither."""
        before = self._output(call, place, changes_input=False)
        after = self._output(call, place, changes_input=True)
        if before is None or after is None or before.shape != after.shape:
            return True  # a pass that takes another way under other numbers depends on them
        return bool(((after - before).abs() > MIN_CHANGE * (1 + before.abs())).any() | after.isnan().any())

    def matters(self, call: Call, place: int) -> bool:
        """Whether the loss changes with the tensor. Integers cannot be moved a little: they count as mattering."""
        if call.is_integer:
            return True
        if self._value is None:
            self._value = self._run()

        def change(_: nn.Module, __: Any, output: Any) -> Any:
            return with_tensors(output, lambda at, tensor: _noisy(tensor) if at == place else tensor)

        with self._hooked(call, after=change):
            try:
                value = self._run()
            except _BREAKS:
                return True
        return not abs(value - self._value) <= MIN_CHANGE * (1 + abs(self._value))  # NaN is a change too

    def _output(self, call: Call, place: int, *, changes_input: bool) -> Tensor | None:
        def change(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return with_tensors((args, kwargs), lambda _, tensor: _noisy(tensor) if id(tensor) in marked else tensor)

        def stop(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            raise _Found(list(tensors_in(output))[place].detach().double())

        marked: set[int] = set()

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            floating = [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point()]
            marked.update(id(tensor) for tensor in floating if tensor.requires_grad)
            if not changes_input:
                return None
            for parameter in learning:
                parameter.data = _noisy(parameter.data)
            return change(module, args, kwargs)

        learning = [one for one in self._modules[call.module].parameters() if one.requires_grad]
        kept = [parameter.data for parameter in learning]
        with self._hooked(call, before=before, after=stop, sees_kwargs=True):
            try:
                self._loss()
            except _Found as found:
                return found.tensor
            except _BREAKS:
                return None
            finally:
                for parameter, data in zip(learning, kept, strict=True):
                    parameter.data = data
        return None

    def _run(self) -> float:
        return float(self._loss().detach())  # with gradients on: a loss may refuse to be without

    @contextlib.contextmanager
    def _hooked(self, call: Call, *, after: Any, before: Any = None, sees_kwargs: bool = False) -> Iterator[None]:
        """Hooks that act on one call of one module."""
        module, count = self._modules[call.module], 0

        def counted(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            return before(*arguments) if before is not None and count - 1 == call.number else None

        def acting(*arguments: Any) -> Any:
            return after(*arguments) if count - 1 == call.number else None

        handles = [
            module.register_forward_pre_hook(counted, with_kwargs=True),
            module.register_forward_hook(acting, with_kwargs=sees_kwargs),
        ]
        try:
            with _checkpointing_off(self._model):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _noisy(tensor: Tensor) -> Tensor:
    """Plus noise ten times as large as what is there, at least 10: an integer cast changes with it too."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator).to(tensor)
    size = float(tensor.detach().float().abs().max()) if tensor.numel() else 0.0
    return tensor + noise * (10 * max(size, 1.0))
