"""Claims about processors of one's own: what can be wrong with one is said before anything is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.errors import ConfigError
from grpo.rollout.base import SamplingParams
from grpo.rollout.processors import (
    MinNewTokens,
    NoRepeatNgram,
    OccurrencePenalties,
    Prefix,
    RepetitionPenalty,
    check_custom_processors,
    load_processor,
)

V = 11


def check(name: str, parameters: str = "{}") -> None:
    path = name if ":" in name else f"{__name__}:{name}"
    check_custom_processors(SamplingParams(end_token_ids=(0,), custom=((path, parameters),)), vocab_size=V)


class Bias:
    """Right in every way."""

    def __init__(self, *, token: int = 0, by: float = 1.0) -> None:
        if token < 0:
            raise ValueError("token must not be negative")
        self._token, self._by = token, by

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits + self._by * (torch.arange(logits.shape[1], device=logits.device) == self._token)


def no_repeats(size: int) -> NoRepeatNgram:
    """A function that returns a processor."""
    return NoRepeatNgram(size=size)


class Outer:
    Inner = Bias


def returns_a_number() -> int:
    return 3


number = 3


# Loading


def test_a_class_a_function_and_a_nested_name_are_loaded_with_their_parameters() -> None:
    biased = load_processor(f"{__name__}:Outer.Inner", '{"token": 2, "by": 0.5}')
    got = biased(torch.zeros(1, 3), Prefix.of([[]], [[]]))
    assert got.tolist() == [[0.0, 0.0, 0.5]]
    assert load_processor(f"{__name__}:no_repeats", '{"size": 3}') == NoRepeatNgram(size=3)


def test_a_processor_is_built_once() -> None:
    assert load_processor(f"{__name__}:Bias") is load_processor(f"{__name__}:Bias")


@pytest.mark.parametrize(
    ("path", "parameters", "says"),
    [
        ("no colon", "{}", "not of the form package.module:name"),
        ("package.module:", "{}", "not of the form package.module:name"),
        ("no_such_package.module:Name", "{}", "ModuleNotFoundError: No module named 'no_such_package'"),
        (f"{__name__}:Missing", "{}", "holds nothing named Missing"),
        (f"{__name__}:Outer.Missing", "{}", "holds nothing named Outer.Missing"),
        (f"{__name__}:number", "{}", "is a int; expected a class"),
        (f"{__name__}:Bias", '{"tokens": 1}', "unexpected keyword argument 'tokens'"),
        (f"{__name__}:no_repeats", "{}", "missing a required argument: 'size'"),
        (f"{__name__}:Bias", '{"token": -1}', "ValueError: token must not be negative"),
        (f"{__name__}:Bias", "[1]", "must be a JSON object"),
        (f"{__name__}:Bias", "{token: 1}", "are no JSON"),
        (f"{__name__}:returns_a_number", "{}", "builds a int, which cannot be called"),
    ],
)
def test_what_cannot_be_loaded_is_said_with_its_path(path: str, parameters: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_processor(path, parameters)
    assert says in str(caught.value)
    assert path in str(caught.value)


def test_a_module_that_cannot_be_run_is_the_recipes_fault_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_processor_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing its module ends in ZeroDivisionError"):
        load_processor("broken_processor_module:Name")


# The trial


class Raises:
    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        raise KeyError("no table for token 7")


class WrongShape:
    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits[:, 1:]


class NoTensor:
    def __call__(self, logits: Tensor, prefix: Prefix) -> Any:
        return logits.tolist()


class HalfPrecision:
    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits.half()


class InPlace:
    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits.add_(1.0)


class NotANumber:
    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits * torch.nan


class AllOut:
    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits.masked_fill((prefix.lengths > 2)[:, None], -torch.inf)


class Detached:
    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits.detach() + 1


class Counting:
    """Keeps state between its calls."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        self._calls += 1
        return logits * self._calls


class LooksAhead:
    """At tokens that are not sampled yet."""

    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits - torch.zeros_like(logits).scatter_add(1, prefix.token_ids, torch.ones_like(logits))


class MixesRows:
    def __call__(self, logits: Tensor, prefix: Prefix) -> Tensor:
        return logits - logits.mean(dim=0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Raises", "fails on 4 rows of 11 logits: KeyError: 'no table for token 7'"),
        ("WrongShape", "[4, 10] torch.float32 for logits [4, 11] torch.float32; it must keep shape and dtype"),
        ("NoTensor", "gives back list for logits"),
        ("HalfPrecision", "torch.float16"),
        ("InPlace", "changes the logits it is given"),
        ("NotANumber", "gives back NaN or infinity"),
        ("AllOut", "rules out every token"),
        ("Detached", "without gradient"),
        ("Counting", "another result when called again"),
        ("LooksAhead", "looks at tokens behind the prefix's lengths"),
        ("MixesRows", "another result alone than in a batch"),
    ],
)
def test_a_processor_that_breaks_a_rule_is_named_before_anything_is_sampled(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(name)
    assert says in str(caught.value)
    assert f"{__name__}:{name}" in str(caught.value)


def test_processors_that_keep_the_rules_pass_the_trial() -> None:
    check("Bias", '{"token": 4, "by": -100.0}')
    check("no_repeats", '{"size": 2}')


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (MinNewTokens, '{"count": 3, "end_token_ids": [1, 2]}'),
        (RepetitionPenalty, '{"penalty": 1.3, "over": "both"}'),
        (OccurrencePenalties, '{"presence": 1.0, "frequency": -0.5, "over": "prompt"}'),
    ],
)
def test_the_built_in_processors_keep_the_rules_too(kind: type, parameters: str) -> None:
    check(f"grpo.rollout.processors:{kind.__name__}", parameters)
