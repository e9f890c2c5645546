"""OptimConfig -> the optimizer, and the learning rate of a step. Knows names and parameters; nothing of losses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from grpo.config import OptimConfig
from grpo.errors import ConfigError

_NAMES_SHOWN = 4
EmptyOnHost: TypeAlias = Callable[[Tensor], Tensor]
"""A tensor -> an uninitialised one of its shape and dtype in host memory."""


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with one parameter group for each distinct learning-rate factor.

    Groups come in the order of their first parameter, parameters within a group in the order given, so that the same
    model and recipe always number them alike. A group carries its `factor`, and its parameters' `names` in order.

    Args:
        parameters: name -> float32 parameter that learns.
    Raises:
        ConfigError: a rule is no regular expression or holds for no parameter; a parameter is not float32; bitsandbytes
            is not installed.
    """
    factors = learning_rate_factors(list(parameters), config)
    _check_float32(parameters)
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        factor = factors[name]
        group = groups.setdefault(
            factor, {"params": [], "names": [], "factor": factor, "lr": config.learning_rate * factor}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.type == "adamw_8bit":
        return _adamw_8bit()(list(groups.values()), **common)
    # fused on a CPU too: a LoRA model has hundreds of small tensors, and one kernel for each beats a dozen. Measured
    # on 420 of them, one step on one core: 14 ms fused, 40 ms as a loop (torch's choice there), 50 ms foreach
    return torch.optim.AdamW(list(groups.values()), fused=True, **common)


def learning_rate_factors(names: list[str], config: OptimConfig) -> dict[str, float]:
    """Name -> what the learning rate is multiplied by: the factor of the first rule that matches, else 1.

    Raises:
        ConfigError: a rule is no regular expression, or holds for no parameter.
    """
    factors: dict[str, float] = {}
    for number, rule in enumerate(config.rules):
        place = f"optim.rules[{number}].pattern {rule.pattern!r}"
        try:
            matching = [name for name in names if re.search(rule.pattern, name)]
        except re.error as exc:
            raise ConfigError(f"{place} is no regular expression: {exc}. A dot or bracket is escaped by \\.") from exc
        if not matching:
            shown = ", ".join(names[:: max(len(names) // _NAMES_SHOWN, 1)][:_NAMES_SHOWN])
            raise ConfigError(
                f"{place} matches none of the {len(names)} parameters that learn, such as {shown}. "
                "Write a pattern that is found in such a name, or drop the rule."
            )
        free = [name for name in matching if name not in factors]
        if not free:
            raise ConfigError(
                f"{place} holds for no parameter: earlier rules take all {len(matching)} that it matches, such as "
                f"{matching[0]}, and the first that matches holds. Put the narrower pattern first."
            )
        factors |= dict.fromkeys(free, rule.factor)
    return {name: factors.get(name, 1.0) for name in names}


def learning_rate_at(config: OptimConfig, *, step: int, steps: int) -> float:
    """The learning rate of a step, before per-module factors; a function of it alone, so a resumed run goes on.

    Rises linearly over the first `warmup_steps`, the first of which has learning_rate / warmup_steps already; then
    constant, or falling so that it would be 0 in step `steps`, the first that is not taken.

    Args:
        step: counted from 0.
        steps: of the whole run, at least 1.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share_done = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    if config.schedule == "linear":
        return config.learning_rate * (1 - share_done)
    return config.learning_rate * (1 + math.cos(math.pi * share_done)) / 2


def offload_states(optimizer: torch.optim.Optimizer, *, empty_on_host: EmptyOnHost | None = None) -> None:
    """Keep what the optimizer remembers in host memory, but for the while of its steps.

    The buffers on the host are made once, and are the state's own values between steps: what `named_state` reads and
    `load_named_state` fills. A parameter's scalars, such as its count of steps, stay where they are.

    Args:
        optimizer: of `build_optimizer`.
        empty_on_host: makes a buffer like a tensor; None: page-locked memory.
    """
    empty = empty_on_host or _empty_pinned
    buffers: dict[tuple[Tensor, str], Tensor] = {}

    def bring(*_: Any) -> None:
        for parameter, key, value in _large_states(optimizer):
            optimizer.state[parameter][key] = value.to(parameter.device, non_blocking=True)

    def leave(*_: Any) -> None:
        for parameter, key, value in _large_states(optimizer):
            place = (parameter, key)
            if place not in buffers or buffers[place].shape != value.shape or buffers[place].dtype != value.dtype:
                buffers[place] = empty(value)
            optimizer.state[parameter][key] = buffers[place].copy_(value)  # waits: the host may read it at any time

    optimizer.register_step_pre_hook(bring)
    optimizer.register_step_post_hook(leave)
    optimizer.register_load_state_dict_post_hook(leave)


def _large_states(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, str, Tensor]]:
    return [
        (parameter, key, value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.numel() > 1
    ]


def _empty_pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group of an optimizer of `build_optimizer` this learning rate times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]


def named_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor | float]:
    """What an optimizer of `build_optimizer` remembers, on the CPU: "<parameter's name>/<what>" -> value.

    By name, not by number: numbers change with the recipe's rules. What bitsandbytes nests has more parts to its key.
    Tensors share no memory, which safetensors would refuse.
    """
    names = _parameter_names(optimizer)
    flat: dict[str, Tensor | float] = {}
    for index, values in optimizer.state_dict()["state"].items():
        _flatten(values, names[index], flat)
    seen: set[int] = set()
    for key, value in flat.items():
        if isinstance(value, Tensor):
            moved = value.detach().cpu().contiguous()
            flat[key] = moved.clone() if moved.data_ptr() in seen else moved  # bitsandbytes shares its code books
            seen.add(moved.data_ptr())
    return flat


def load_named_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor | float]) -> None:
    """Take back what `named_state` gave. Raises KeyError for a parameter that the optimizer does not have."""
    numbers = {name: number for number, name in enumerate(_parameter_names(optimizer))}
    nested: dict[int, dict[str, Any]] = {}
    for key, value in state.items():
        name, *folders, last = key.split("/")
        place = nested.setdefault(numbers[name], {})
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": nested})


def _parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names at the index by which `state_dict()["state"]` calls them."""
    return [name for group in optimizer.param_groups for name in group["names"]]


def _flatten(values: Mapping[str, Any], prefix: str, flat: dict[str, Tensor | float]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _flatten(value, f"{prefix}/{key}", flat)
        else:
            flat[f"{prefix}/{key}"] = value


def _check_float32(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"the parameter {name} is {parameter.dtype}, but what learns must be float32: 16-bit weights lose "
                "updates below their resolution (bfloat16: 0.4% of the weight). Convert it with .float()."
            )


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # an extra; slow to import
    except ImportError as exc:
        raise ConfigError(
            "optim.type is adamw_8bit, but bitsandbytes is not installed. Install it with "
            "pip install 'grpo-toolkit[8bit]', or set optim.type=adamw."
        ) from exc
    return AdamW8bit
