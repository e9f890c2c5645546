"""The whole update, from token ids and scores to the gradient, against TRL's GRPOTrainer on the same completions."""

from __future__ import annotations

from pathlib import Path

import torch
from update_cost.whole_step import distance, flat, whole_step


def test_the_gradient_of_a_step_is_that_of_trls_trainer(tiny_model_dir: Path) -> None:
    # two micro-batches, a reference pass, k3 times the ratio, dapo's denominator: everything between ids and gradient
    ours, theirs = (
        flat(
            whole_step(
                case,
                groups=2,
                prompt_tokens=7,
                dtype=torch.float32,
                model=str(tiny_model_dir),
                vocabulary=300,
                max_grad_norm=1e9,
                spread=0.05,  # 5 times less, and the KL's share of the gradient would drown in rounding
            )()
        )
        for case in ("ours", "TRL")
    )
    assert float(theirs.norm()) > 0
    assert distance(ours, theirs)["relative_error"] < 1e-5
