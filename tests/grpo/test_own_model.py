"""Checks of a module and a loss that no recipe names: what is meant to learn, what does, and what steps make of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from grpo.diagnostics.checks.kept_memory import KeptMemory
from grpo.diagnostics.findings import Finding, worst_status
from grpo.diagnostics.own_model import verify_model


class Pair(nn.Module):
    """An encoder and a head; both learn unless frozen."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
            self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.linspace(-1, 1, 12).view(3, 4)
    return lambda: (model(x) - 1).square().mean()


def head_alone() -> Pair:
    model = Pair().requires_grad_(False)
    model.head.requires_grad_(True)
    return model.train()


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def of(findings: list[Finding], check: str) -> Finding:
    (finding,) = [one for one in findings if one.check == check]
    return finding


def test_a_sound_model_passes_every_check_and_is_left_as_it_was_to_the_bit() -> None:
    model = head_alone()
    before = {name: value.clone() for name, value in model.state_dict().items()}  # with the batch norm's statistics
    findings = verify_model(model, loss_of(model), trainable="head", optimizer=adam)
    assert [(one.check, one.status) for one in findings] == [
        ("gradient flow", "ok"),
        ("scope", "ok"),
        ("numbers", "ok"),
        ("steps", "ok"),
    ]
    # encoder 4 * 4 + 4, batch norm 4 + 4; head 4 * 4 + 4 and 4 + 1: 25 of 53
    assert "trainable 25 = 47.2%; base frozen: yes; head: gradient in 4 of 4 tensors" in findings[0].what
    assert "4 in head" in findings[1].what
    assert "4 of 4 tensors moved" in findings[3].what
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.encoder[2].p == 0.5  # pyright: ignore[reportAttributeAccessIssue]


def test_what_learns_beside_what_was_meant_fails_with_its_part_and_its_bytes() -> None:
    model = Pair().train()
    scope = of(verify_model(model, loss_of(model), trainable=["head"]), "scope")
    assert scope.status == "failed"
    assert "meant to learn: head; 4 tensors learn besides: 4 in encoder" in scope.what
    assert scope.figures["strays"][0] == "encoder.0.weight"
    assert "28 parameters more" in scope.meaning  # 20 and the norm's 8
    assert "this batch keeps 0 KiB more for its backward pass" in scope.meaning
    # of [3, 4] in float32: the linear layer's input, the norm's, and dropout's factors; the norm's two statistics
    assert scope.figures["kept_because_of_strays"] == 3 * 48 + 2 * 16


def test_what_a_pass_keeps_is_counted_once_and_told_apart_by_what_learns() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.ones(3, 4)
    kept = KeptMemory(model=model, loss=lambda: model(x).sum())
    assert kept.total() == 2 * 3 * 4 * 4  # the input of each layer, in float32
    assert kept.because_of(["1.weight", "1.bias"]) == 48  # the second one's
    assert kept.because_of(["1.bias"]) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    model[1].requires_grad_(False)
    assert kept.total() == 48  # gradient goes through the frozen layer by its weight alone


def test_a_part_that_was_meant_to_learn_and_is_frozen_or_is_not_there_fails() -> None:
    model = head_alone()
    findings = verify_model(model, loss_of(model), trainable=["head", "encoder", "projector"])
    told = [one.what for one in findings if one.check == "scope" and one.status == "failed"]
    assert told == ["'encoder' holds nothing that learns", "'projector' matches no module"]


def test_a_part_of_which_only_a_half_learns_is_told() -> None:
    model = head_alone()
    model.head[1].requires_grad_(False)
    scope = of(verify_model(model, loss_of(model), trainable=["head"]), "scope")
    assert (scope.status, "2 of 4 tensors" in scope.what) == ("failed", True)
    assert "head.1.weight" in scope.what


def test_an_adapters_base_is_not_missed_among_what_learns() -> None:
    model = Pair()
    config = LoraConfig(r=2, target_modules=["head.0"], modules_to_save=["encoder"])
    adapted = get_peft_model(model, config).train()  # pyright: ignore[reportArgumentType]
    findings = verify_model(adapted, loss_of(adapted), trainable=["encoder", "head"])
    assert worst_status(findings) == "ok"
    assert "4 in encoder" in of(findings, "scope").what  # the copy that peft trains, in full
    assert "2 in head" in of(findings, "scope").what  # A and B of the first layer


def test_a_model_in_which_nothing_learns_is_told_before_any_pass() -> None:
    model = Pair().requires_grad_(False)

    def never() -> Tensor:
        raise AssertionError("no pass is needed")

    (finding,) = verify_model(model, never)
    assert (finding.status, finding.what) == ("failed", "no parameter has requires_grad")


def test_steps_that_ruin_the_weights_name_the_first_module_and_leave_them_sound() -> None:
    model = head_alone()
    loss = loss_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    findings = verify_model(model, loss, optimizer=lambda own: torch.optim.SGD(own, lr=1e30))
    steps = of(findings, "steps")
    assert (steps.status, "not finite after 1 of the optimizer's steps" in steps.what) == ("failed", True)
    assert steps.figures["place"].startswith("head.")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_optimizer_of_other_parameters_fails() -> None:
    model = head_alone()
    findings = verify_model(model, loss_of(model), optimizer=lambda _: adam([nn.Parameter(torch.ones(1))]))
    assert "0 of 4 tensors moved" in of(findings, "steps").what
    assert of(findings, "steps").status == "failed"


def test_sixteen_bit_weights_that_learn_are_a_fault() -> None:
    model = head_alone().bfloat16()
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    findings = verify_model(model, lambda: model(x).float().mean())
    assert [one.what.split(",")[0] for one in findings if one.status == "failed"] == ["4 tensors that learn are 16-bit"]


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="no pattern of module names"):
        verify_model(Pair(), lambda: torch.zeros(()), trainable="head.(a|b)")
