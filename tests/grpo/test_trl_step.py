"""The whole update, from token ids and scores to the gradient, against TRL's GRPOTrainer on the same completions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from update_cost.whole_step import CASES, distance, flat, whole_step


def test_the_gradient_of_a_step_is_that_of_trls_trainer(tiny_model_dir: Path) -> None:
    # two micro-batches, a reference pass, k3 times the ratio, dapo's denominator: everything between ids and gradient
    def gradient(case: str) -> Tensor:
        step = whole_step(
            case,
            groups=2,
            prompt_tokens=7,
            dtype=torch.float32,
            model=str(tiny_model_dir),
            vocabulary=300,
            max_grad_norm=1e9,
            spread=0.05,  # with 0.01, the KL's share of the gradient would drown in rounding
        )
        return flat(step())

    ours, *theirs = [gradient(case) for case in CASES]
    for other in theirs:  # however TRL is set up
        assert float(other.norm()) > 0
        assert distance(ours, other)["relative_error"] < 1e-5
