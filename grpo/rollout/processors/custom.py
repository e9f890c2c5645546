"""Processors of one's own: loaded by name, and tried out before anything is sampled."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from typing import Any, cast

import torch
from torch import Tensor

from grpo.errors import ConfigError
from grpo.rollout.base import SamplingParams
from grpo.rollout.processors.base import Prefix, Processor


@functools.lru_cache(maxsize=64)  # the updater asks for every micro-batch
def load_processor(path: str, parameters: str = "{}") -> Processor:
    """A processor of one's own, built once a process.

    Args:
        path: package.module:name of a class, or of a function that returns a processor.
        parameters: its keyword arguments, a JSON object.
    Raises:
        ConfigError: the path has another form, its module cannot be imported or holds no such name, the parameters
            are no JSON object or do not fit, or what is built cannot be called.
    """
    build = _named(path)
    arguments = _json_object(path, parameters)
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as exc:
        raise ConfigError(f"the parameters of processor {path!r} do not fit it: {exc}. Got {arguments}.") from exc
    except ValueError:  # some C callables have no signature
        pass
    try:
        processor = build(**arguments)
    except Exception as exc:  # whatever a constructor of the user's does
        raise ConfigError(f"processor {path!r} cannot be built from {arguments}: {type(exc).__name__}: {exc}") from exc
    if not callable(processor):
        raise ConfigError(
            f"processor {path!r} builds a {type(processor).__name__}, which cannot be called. Expected an object "
            "with __call__(logits [N, V], prefix) -> [N, V]."
        )
    return cast(Processor, processor)


def _named(path: str) -> Any:
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")]):
        raise ConfigError(f"the processor {path!r} is not of the form package.module:name.")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as exc:  # whatever a module of the user's does when it is run
        raise ConfigError(
            f"the processor {path!r} cannot be loaded, for importing its module ends in {type(exc).__name__}: {exc}. "
            "Put the module beside the recipe, or install it."
        ) from exc
    for part in name.split("."):
        if not hasattr(target, part):
            raise ConfigError(f"the processor {path!r} cannot be loaded: {module_name} holds nothing named {name}.")
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(
            f"the processor {path!r} is a {type(target).__name__}; expected a class, or a function that returns a "
            "processor."
        )
    return target


def _json_object(path: str, text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f"the parameters of processor {path!r} are no JSON: {exc}. Got {text!r}.") from exc
    if not isinstance(arguments, dict):
        raise ConfigError(f"the parameters of processor {path!r} must be a JSON object, got {text!r}.")
    return arguments


def check_custom_processors(params: SamplingParams, *, vocab_size: int) -> None:
    """Load the processors of one's own and try each on a few rows, so that a mistake stops no run half-way.

    Raises:
        ConfigError: one cannot be loaded, raises, or breaks a rule of `Processor`; says which.
    """
    for path, parameters in params.custom:
        processor = load_processor(path, parameters)
        try:
            fault = _fault(processor, vocab_size)
        except Exception as exc:  # whatever a processor of the user's does
            raise ConfigError(
                f"processor {path!r} fails on {_ROWS} rows of {vocab_size} logits: {type(exc).__name__}: {exc}"
            ) from exc
        if fault is not None:
            raise ConfigError(f"processor {path!r} {fault}.")


_ROWS = 4


def _fault(processor: Processor, vocab_size: int) -> str | None:
    """What a processor does that the law cannot be sampled from and replayed with."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(_ROWS, vocab_size, generator=generator, requires_grad=True)
    text = torch.randint(vocab_size, (2, _ROWS, 6), generator=generator)
    prefix = Prefix(
        prompt_ids=text[0],
        prompt_lengths=torch.tensor([6, 1, 3, 2]),
        token_ids=text[1],
        lengths=torch.tensor([0, 1, 3, 6]),
    )
    before = logits.detach().clone()
    given = logits.clone()  # a leaf could not be changed in place, but what is replayed can
    result: object = processor(given, prefix)
    if not isinstance(result, Tensor) or (result.shape, result.dtype) != (logits.shape, logits.dtype):
        shown = f"{list(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        return f"gives back {shown} for logits {list(logits.shape)} {logits.dtype}; it must keep shape and dtype"
    if not torch.equal(given.detach(), before):
        return "changes the logits it is given; it must give back new ones"
    if bool(result.isnan().any()) or bool(result.isposinf().any()):
        return "gives back NaN or infinity; only -inf, for a token that it rules out, is allowed"
    if bool(result.isneginf().all(dim=-1).any()):
        return "rules out every token"
    if not result.requires_grad:
        return "gives back logits without gradient; the trainer differentiates through it, so use torch operations only"
    with torch.no_grad():
        if not _agree(processor(before, prefix), result):
            return "gives another result when called again; it must depend on logits and prefix alone"
        for row in range(_ROWS):
            lone = _lone(prefix, row)
            if not _agree(processor(before[row : row + 1], lone), result[row : row + 1]):
                return (
                    "gives a row another result alone than in a batch, or looks at tokens behind the prefix's lengths"
                )
    return None


def _lone(prefix: Prefix, row: int) -> Prefix:
    """One row, cut to its length."""
    prompt_length, length = int(prefix.prompt_lengths[row]), int(prefix.lengths[row])
    return Prefix.of(
        [prefix.prompt_ids[row, :prompt_length].tolist()],
        [prefix.token_ids[row, :length].tolist()],
    )


def _agree(given: Tensor, expected: Tensor) -> bool:
    return given.shape == expected.shape and torch.allclose(given, expected, rtol=1e-4, atol=1e-4)
