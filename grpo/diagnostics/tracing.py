"""A forward pass, watched: every module's call, what gradient went in and came out, and the operations that dropped it.

Knows modules and tensors only. Hooks see calls; a torch-function mode sees operations, with the line that ran them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OperationKind: TypeAlias = Literal["no_grad", "detach", "integer cast", "custom forward", "other"]

_DETACHES = {"detach", "detach_", "data"}
_CASTS = {"long", "int", "short", "char", "byte", "bool", "to", "type", "type_as", "argmax", "argmin", "argsort"}
_LEAVES_TORCH = {"item", "tolist", "numpy", "__array__"}
_TORCH_FOLDER = str(Path(torch.__file__).parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation that took tensors with gradient and gave what carries none."""

    name: str
    kind: OperationKind
    where: str
    """Such as "llama/modeling_llama.py:312": the line outside torch that ran it."""

    def __str__(self) -> str:
        return f"{self.name} at {self.where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlaceWrite:
    """One operation that wrote into a tensor with gradient, or into one that it may have been saved from."""

    name: str
    module: str | None
    """In whose forward; "" is the model's own, None outside of every module."""
    where: str
    shape: tuple[int, ...]
    made_by: str
    """Name of the tensor's grad_fn before the write, as autograd's messages have it; "" for a leaf."""

    def __str__(self) -> str:
        return f"{self.name} at {self.where}, in {_told(self.module)}"


def inside_peft(module: str) -> str:
    """The name without peft's wrapper; "" is the model itself, wrapped or not."""
    return module.removeprefix("base_model.model").removeprefix(".")


def _told(module: str | None) -> str:
    return "the loss" if module is None else inside_peft(module) or "the model's own forward"


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """One call of one module."""

    module: str
    """Its name in the model; "" is the model itself."""
    number: int
    """How often the module had been called before."""
    parent: Call | None
    has_gradient_on: bool
    """Whether gradients were recorded when it was called."""
    carries_in: bool
    """Whether an input carries gradient."""
    learns: bool
    """Whether it holds a parameter that learns."""
    inputs: list[Tensor] = field(default_factory=list)
    """Only while it runs."""
    lost: dict[int, Tensor] = field(default_factory=dict)
    """Place among the output's tensors -> one that carries no gradient, though it could."""
    called_at: str = ""
    """The line that called it, where that had turned gradients off for it."""
    is_integer: bool = False
    """Whether the output is integers altogether."""
    operations: list[Operation] = field(default_factory=list)
    """Those of its own forward that dropped gradient."""

    def ancestors(self) -> Iterator[Call]:
        """The calls that this one was made in, innermost first."""
        above = self.parent
        while above is not None:
            yield above
            above = above.parent

    @property
    def runs_with_gradient_off(self) -> bool:
        """Whether the forward that called it turned gradients off for it; not where the whole pass has none."""
        return not self.has_gradient_on and self.parent is not None and self.parent.has_gradient_on

    @property
    def may_lose_gradient(self) -> bool:
        """Whether its output should carry gradient."""
        return (self.learns or self.carries_in) and (self.has_gradient_on or self.runs_with_gradient_off)


@dataclass(slots=True, kw_only=True)
class Trace:
    """What a pass did."""

    calls: list[Call] = field(default_factory=list)
    """In the order in which they ended."""
    outside: list[Operation] = field(default_factory=list)
    """Operations that dropped gradient outside of every module: the loss's own."""
    writes: list[InPlaceWrite] = field(default_factory=list)
    failed_in: str | None = None
    """The innermost module in which an exception was raised."""

    @property
    def was_called_with_gradient(self) -> bool:
        """Whether any call from outside of the model had gradients on."""
        return any(call.parent is None and call.has_gradient_on for call in self.calls)


@contextlib.contextmanager
def traced(model: nn.Module) -> Iterator[Trace]:
    """Watch every call of the model's modules, until the block ends. Backward passes within it are not watched."""
    trace, stack = Trace(), list[Call]()
    counts: dict[str, int] = {}
    handles: list[Any] = []
    for name, module in model.named_modules():
        learns = any(parameter.requires_grad for parameter in module.parameters())

        def before(_: nn.Module, args: Any, kwargs: Any, *, name: str = name, learns: bool = learns) -> None:
            inputs = list(tensors_in((args, kwargs)))
            stack.append(
                Call(
                    module=name,
                    number=counts.get(name, 0),
                    parent=stack[-1] if stack else None,
                    has_gradient_on=torch.is_grad_enabled(),
                    carries_in=any(tensor.requires_grad for tensor in inputs),
                    learns=learns,
                    inputs=inputs,
                )
            )
            counts[name] = counts.get(name, 0) + 1
            if stack[-1].runs_with_gradient_off:
                stack[-1].called_at = _line_outside_torch()

        def after(_: nn.Module, __: Any, output: Any) -> None:
            call = stack.pop()
            if sys.exc_info()[0] is not None:  # always_call: an exception is passing
                trace.failed_in = trace.failed_in if trace.failed_in is not None else call.module
            elif call.may_lose_gradient:
                _look_at_output(call, output)
            call.inputs = []
            trace.calls.append(call)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        with _Watch(trace, stack):
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def _look_at_output(call: Call, output: Any) -> None:
    outputs = list(tensors_in(output))
    floating = [tensor for tensor in outputs if _is_differentiable(tensor)]
    call.is_integer = bool(outputs) and not floating
    given = {id(tensor) for tensor in call.inputs}
    call.lost = {
        place: tensor
        for place, tensor in enumerate(outputs)
        if not tensor.requires_grad and id(tensor) not in given and (call.is_integer or _is_differentiable(tensor))
    }


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)


def with_tensors(value: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """The same nest with other tensors. Args: change: (place in `tensors_in`'s order, tensor) -> tensor."""
    place = -1

    def rebuilt(part: Any) -> Any:
        nonlocal place
        if isinstance(part, Tensor):
            place += 1
            return change(place, part)
        if isinstance(part, tuple):
            parts = [rebuilt(each) for each in part]
            return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
        if isinstance(part, list):
            return [rebuilt(each) for each in part]
        if isinstance(part, Mapping):
            new = dict(part)
            for key, each in part.items():
                new[key] = rebuilt(each)
            return new if type(part) is dict else type(part)(**new)
        return part

    return rebuilt(value)


class _Watch(TorchFunctionMode):
    """Sees operations run from Python, with the module on top of the stack."""

    def __init__(self, trace: Trace, stack: list[Call]) -> None:
        super().__init__()
        self._trace, self._stack = trace, stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if _writes_in_place(name):
            self._note_write(name, args)
        output = func(*args, **kwargs)
        if _drops_gradient(name, args, kwargs, output):
            kind = _kind(name, output)
            operation = Operation(name=name, kind=kind, where=_line_outside_torch())
            (self._stack[-1].operations if self._stack else self._trace.outside).append(operation)
        return output

    def _note_write(self, name: str, args: Any) -> None:
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is not None and torch.is_grad_enabled() and _is_differentiable(target):
            write = InPlaceWrite(
                name=name,
                module=self._stack[-1].module if self._stack else None,
                where=_line_outside_torch(),
                shape=tuple(target.shape),
                made_by="" if target.grad_fn is None else target.grad_fn.name(),
            )
            self._trace.writes.append(write)


def _name_of(func: Any) -> str:
    """A property's getter is called __get__; what it gets is its owner's name."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _writes_in_place(name: str) -> bool:
    is_plain = name.endswith("_") and not name.endswith("__")
    is_operator = name == "__setitem__" or (name.startswith("__i") and name not in {"__init__", "__int__", "__index__"})
    return (is_plain or is_operator) and name not in {"detach_", "requires_grad_", "retain_grad_"}


def _drops_gradient(name: str, args: Any, kwargs: Any, output: Any) -> bool:
    outputs = list(tensors_in(output))
    if not outputs and name not in _LEAVES_TORCH:
        return False
    if name in {"grad", "grad_fn"} or any(tensor.requires_grad for tensor in outputs):
        return False
    return any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))


def _kind(name: str, output: Any) -> OperationKind:
    if name in _DETACHES:
        return "detach"
    if not torch.is_grad_enabled():
        return "custom forward" if _is_in_custom_function() else "no_grad"
    is_integer = not any(_is_differentiable(tensor) for tensor in tensors_in(output))
    return "integer cast" if is_integer and name in _CASTS else "other"


def _is_in_custom_function() -> bool:
    """Whether an autograd.Function's forward, which always runs with gradients off, is what runs in this module."""
    frame = sys._getframe(3)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        if frame.f_code.co_filename.endswith("torch/autograd/function.py"):
            return True
        frame = frame.f_back
    return False


def _line_outside_torch() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_TORCH_FOLDER) and name != __file__:
            return f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"
