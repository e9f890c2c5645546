"""The optimizer: which learning rate which parameter gets and when, and a state that goes by name."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo.config import LearningRateRule, OptimConfig
from grpo.errors import ConfigError
from grpo.runtime.optim import (
    build_optimizer,
    learning_rate_at,
    learning_rate_factors,
    load_named_state,
    named_state,
    offload_states,
    set_learning_rate,
)

LORA = ["0.q.lora_A", "0.q.lora_B", "0.v.lora_A", "0.v.lora_B"]
LORA_PLUS = (LearningRateRule(pattern="lora_B", factor=16.0),)


def make_parameters(names: list[str] = LORA, *, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(3, 4, generator=generator)) for name in names}


def set_gradients(parameters: dict[str, nn.Parameter], *, step: int) -> None:
    """Gradients that depend on the parameter's name and the step alone."""
    for name in sorted(parameters):
        generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
        parameters[name].grad = torch.randn(parameters[name].shape, generator=generator)


def test_adamw_takes_the_steps_of_the_papers_algorithm() -> None:
    # Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2, one entry at a time in Python's float64
    config = OptimConfig(learning_rate=0.1, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.01, rules=LORA_PLUS)
    parameters = make_parameters()
    optimizer = build_optimizer(parameters, config)
    expected = {name: p.detach().flatten().tolist() for name, p in parameters.items()}
    moments = {name: [(0.0, 0.0)] * 12 for name in parameters}
    for step in range(1, 4):
        set_gradients(parameters, step=step)
        optimizer.step()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            rate = 0.1 * (16.0 if "lora_B" in name else 1.0)
            for place, gradient in enumerate(parameter.grad.flatten().tolist()):
                first, second = moments[name][place]
                first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
                moments[name][place] = (first, second)
                unbiased, unbiased_square = first / (1 - 0.9**step), second / (1 - 0.95**step)
                shrunk = expected[name][place] * (1 - rate * 0.01)
                expected[name][place] = shrunk - rate * unbiased / (math.sqrt(unbiased_square) + 1e-6)
    for name, parameter in parameters.items():
        assert parameter.detach().flatten().tolist() == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_there_is_one_group_per_factor_in_the_models_order() -> None:
    optimizer = build_optimizer(make_parameters(), OptimConfig(learning_rate=1e-3, rules=LORA_PLUS))
    assert [(group["factor"], group["names"]) for group in optimizer.param_groups] == [
        (1.0, ["0.q.lora_A", "0.v.lora_A"]),
        (16.0, ["0.q.lora_B", "0.v.lora_B"]),
    ]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1.6e-2])


def test_the_first_rule_that_matches_holds() -> None:
    rules = (
        LearningRateRule(pattern=r"q\.lora_B$", factor=4.0),
        LearningRateRule(pattern="lora_B", factor=2.0),
        LearningRateRule(pattern="^0.v", factor=0.5),
    )
    factors = learning_rate_factors(LORA, OptimConfig(learning_rate=1.0, rules=rules))
    assert factors == {"0.q.lora_A": 1.0, "0.q.lora_B": 4.0, "0.v.lora_A": 0.5, "0.v.lora_B": 2.0}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["lora_E"], r"optim.rules\[0\].pattern 'lora_E' matches none of the 4 parameters.*0.q.lora_A, 0.q.lora_B"),
        (["lora", "lora_B"], r"optim.rules\[1\].pattern 'lora_B' holds for no parameter: earlier rules take all 2"),
        (["lora_[AB"], r"optim.rules\[0\].pattern 'lora_\[AB' is no regular expression: unterminated"),
    ],
)
def test_a_rule_without_effect_is_refused_with_the_names_there_are(patterns: list[str], message: str) -> None:
    rules = tuple(LearningRateRule(pattern=pattern, factor=2.0) for pattern in patterns)
    with pytest.raises(ConfigError, match=message):
        build_optimizer(make_parameters(), OptimConfig(learning_rate=1e-3, rules=rules))


@pytest.mark.parametrize("type_", ["adamw", "adamw_8bit"])
def test_a_parameter_that_would_lose_updates_is_refused(type_: str) -> None:
    parameters = {**make_parameters(), "half": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}
    with pytest.raises(ConfigError, match=r"half is torch\.bfloat16, but what learns must be float32"):
        build_optimizer(parameters, OptimConfig.model_validate({"type": type_, "learning_rate": 1e-3}))


def test_eight_bits_without_bitsandbytes_name_the_extra() -> None:
    if find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ConfigError, match=r"pip install 'grpo-toolkit\[8bit\]'"):
        build_optimizer(make_parameters(), OptimConfig(type="adamw_8bit", learning_rate=1e-3))


# --- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 2 steps of warm-up: 4 * 1/2, 4 * 2/2; then 4 steps at shares 0, 1/4, 1/2, 3/4 of the fall
        ("constant", [2.0, 4.0, 4.0, 4.0, 4.0, 4.0]),
        ("linear", [2.0, 4.0, 4.0, 3.0, 2.0, 1.0]),
        # (1 + cos(pi * share)) / 2 = 1, (1 + sqrt(1/2)) / 2, 1/2, (1 - sqrt(1/2)) / 2
        ("cosine", [2.0, 4.0, 4.0, 2 + math.sqrt(2), 2.0, 2 - math.sqrt(2)]),
    ],
)
def test_the_learning_rate_rises_and_then_falls_towards_zero_after_the_last_step(
    schedule: str, expected: list[float]
) -> None:
    config = OptimConfig.model_validate({"learning_rate": 4.0, "schedule": schedule, "warmup_steps": 2})
    assert [learning_rate_at(config, step=step, steps=6) for step in range(6)] == pytest.approx(expected, rel=1e-12)
    if schedule != "constant":
        assert learning_rate_at(config, step=6, steps=6) == pytest.approx(0.0, abs=1e-12)
        assert learning_rate_at(config, step=9, steps=6) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_only_rises(schedule: str) -> None:
    config = OptimConfig.model_validate({"learning_rate": 8.0, "schedule": schedule, "warmup_steps": 8})
    assert [learning_rate_at(config, step=step, steps=3) for step in range(3)] == [1.0, 2.0, 3.0]


def test_a_new_learning_rate_keeps_every_groups_factor() -> None:
    optimizer = build_optimizer(make_parameters(), OptimConfig(learning_rate=1e-3, rules=LORA_PLUS))
    set_learning_rate(optimizer, 0.25)
    set_learning_rate(optimizer, 0.5)  # not compounded
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 8.0]


# --- the state goes by name


def through_files(state: dict[str, Tensor | float], folder: Path) -> dict[str, Tensor | float]:
    """As a checkpoint keeps it: tensors in safetensors, numbers in JSON."""
    save_file({key: value for key, value in state.items() if isinstance(value, Tensor)}, folder / "state.safetensors")
    numbers = json.dumps({key: value for key, value in state.items() if not isinstance(value, Tensor)})
    return {**load_file(folder / "state.safetensors"), **json.loads(numbers)}


@pytest.mark.parametrize("type_", ["adamw", "adamw_8bit"])
def test_a_run_goes_on_bit_for_bit_from_the_saved_state_though_the_parameters_come_in_another_order(
    type_: str, tmp_path: Path
) -> None:
    if type_ == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
    config = OptimConfig.model_validate({"type": type_, "learning_rate": 1e-2, "rules": LORA_PLUS})
    unbroken = make_parameters()
    optimizer = build_optimizer(unbroken, config)
    for step in range(3):
        set_gradients(unbroken, step=step)
        optimizer.step()
    state = through_files(named_state(optimizer), tmp_path)
    resumed = {name: nn.Parameter(unbroken[name].detach().clone()) for name in reversed(LORA)}
    # without rules there is one group and so another numbering; only the names tell which is whose
    plain = config.model_copy(update={"rules": ()})
    other_numbers = build_optimizer(resumed, plain)
    load_named_state(other_numbers, state)
    second = build_optimizer(resumed, config)
    load_named_state(second, named_state(other_numbers))
    for step in range(3, 6):
        for parameters, own in ((unbroken, optimizer), (resumed, second)):
            set_gradients(parameters, step=step)
            own.step()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in LORA)


def test_a_fresh_optimizer_remembers_nothing() -> None:
    assert named_state(build_optimizer(make_parameters(), OptimConfig(learning_rate=1e-3))) == {}


def test_a_state_of_another_model_is_refused() -> None:
    optimizer = build_optimizer(make_parameters(), OptimConfig(learning_rate=1e-3))
    with pytest.raises(KeyError, match=r"1\.q\.lora_A"):
        load_named_state(optimizer, {"1.q.lora_A/exp_avg": torch.zeros(3, 4)})


def ordinary_memory(like: Tensor) -> Tensor:
    """What a host without a card has in place of page-locked memory."""
    return torch.empty_like(like)


def test_states_that_wait_elsewhere_between_steps_give_the_same_steps() -> None:
    config = OptimConfig(learning_rate=1e-2)
    ends = []
    for is_away in (False, True):
        parameters = make_parameters()
        optimizer = build_optimizer(parameters, config)
        buffers: list[Tensor] = []
        if is_away:

            def made(like: Tensor, buffers: list[Tensor] = buffers) -> Tensor:
                buffers.append(ordinary_memory(like))
                return buffers[-1]

            offload_states(optimizer, empty_on_host=made)
        for number in range(3):
            for parameter in parameters.values():
                parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
            optimizer.step()
        state = named_state(optimizer)
        ends.append(([p.detach().clone() for p in parameters.values()], state))
        if is_away:  # two moments of each parameter, made once, and what the state is between steps
            assert len(buffers) == 2 * len(parameters)
            held = {v.data_ptr() for s in optimizer.state.values() for v in s.values() if v.numel() > 1}
            assert held == {buffer.data_ptr() for buffer in buffers}
    (plain, plain_state), (away, away_state) = ends
    assert all(torch.equal(mine, given) for mine, given in zip(away, plain, strict=True))
    assert plain_state.keys() == away_state.keys()
    assert all(torch.equal(torch.as_tensor(away_state[k]), torch.as_tensor(plain_state[k])) for k in plain_state)


def test_states_that_are_loaded_go_elsewhere_at_once() -> None:
    config = OptimConfig(learning_rate=1e-2)
    parameters = make_parameters()
    first = build_optimizer(parameters, config)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second = build_optimizer(make_parameters(), config)
    buffers: list[Tensor] = []

    def made(like: Tensor) -> Tensor:
        buffers.append(ordinary_memory(like))
        return buffers[-1]

    offload_states(second, empty_on_host=made)
    load_named_state(second, named_state(first))
    held = {v.data_ptr() for s in second.state.values() for v in s.values() if v.numel() > 1}
    assert held == {buffer.data_ptr() for buffer in buffers}
    taken_back = named_state(second)
    for key, value in named_state(first).items():
        assert torch.equal(torch.as_tensor(taken_back[key]), torch.as_tensor(value))
