"""What an adapter adds to bfloat16 weights is still there after the merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import make_policy
from torch import Tensor

from grpo.rollout.model_copy import engine_model, take_weights
from grpo.runtime.rounding import dithered
from grpo.runtime.trainable import lora_layers


def share_kept(before: Tensor, delta: Tensor, after: Tensor) -> float:
    """Of the delta, in what became of the weights: 1 if all of it is there, 0 if it is gone."""
    return float(((after.float() - before.float()) * delta).sum() / delta.square().sum())


def test_a_small_change_is_kept_on_average_where_the_nearest_value_would_drop_it() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = (0.05 * torch.randn(600, 700, generator=generator)).bfloat16()
    delta = 2e-5 * torch.randn(600, 700, generator=generator)  # a tenth of the grid's step, and less
    merged = weights.float() + delta
    assert share_kept(weights, delta, merged.bfloat16()) < 0.5
    assert share_kept(weights, delta, dithered(merged.clone())) == pytest.approx(1.0, abs=0.03)


def test_a_value_goes_to_a_neighbour_always_the_same_and_one_on_the_grid_stays() -> None:
    values = torch.randn(70_000, generator=torch.Generator().manual_seed(2))
    found = dithered(values.clone())
    assert found.dtype == torch.bfloat16
    step = 2.0 ** (values.abs().log2().floor() - 7)  # bfloat16 has 7 bits behind the leading one
    assert bool(((found.float() - values).abs() < step).all())
    assert torch.equal(found, dithered(values.clone()))
    assert torch.equal(dithered(found.float()), found)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    assert torch.equal(dithered(special.clone()).float(), special)
    assert bool(dithered(torch.tensor([torch.nan])).isnan())


def test_an_engines_model_has_the_adapter_of_one_small_step(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir, dtype=torch.bfloat16)
    engine = engine_model(policy)
    before = {name: weight.clone() for name, weight in engine.named_parameters()}
    shared = {name: weight.clone() for name, weight in policy.causal_lm.named_parameters() if not weight.requires_grad}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:  # what AdamW's first step at 2e-4 makes of zeros
                parameter.copy_(2e-4 * torch.randn(parameter.shape, generator=generator).sign())
    take_weights(engine, policy)
    assert all(torch.equal(policy.causal_lm.get_parameter(name), weight) for name, weight in shared.items())
    after = dict(engine.named_parameters())
    kept, whole = 0.0, 0.0
    for name, layer in lora_layers(policy.causal_lm).items():
        delta = layer.get_delta_weight("default").detach()  # pyright: ignore[reportAttributeAccessIssue]
        kept += float(((after[f"{name}.weight"].float() - before[f"{name}.weight"].float()) * delta).sum())
        whole += float(delta.square().sum())
    assert kept / whole == pytest.approx(1.0, abs=0.1)
