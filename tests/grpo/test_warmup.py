"""The supervised stage: what it teaches, what it leaves alone, and what it puts back."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from builders import END, full_training, make_policy
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo.config import PartsTrainable, WarmupConfig
from grpo.errors import ConfigError, DatasetError, NonFiniteUpdate
from grpo.prompts import encode_prompt
from grpo.runtime.policy import Policy
from grpo.types import Message, Prompt
from grpo.warmup import WarmupExample, WarmupReport, load_examples, micro_batch_rows, warm_up

ROWS = [
    {"prompt": "capital of France?", "completion": "Paris."},
    {"prompt": "Add the numbers 1, 2 and 3", "completion": "the answer is 6."},
    {"prompt": "the quick brown?", "completion": "fox"},
]


def make_config(folder: Path, rows: Iterable[Mapping[str, Any]] = ROWS, **keys: Any) -> WarmupConfig:
    path = folder / "warmup.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"path": path, "steps": 3, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, **keys}
    return WarmupConfig(**given)


def tokenizer_of(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


def run(model_dir: Path, policy: Policy, config: WarmupConfig, *, seed: int = 0, **keys: Any) -> WarmupReport:
    ends = {"end_token_ids": (END,), "context_tokens": 256}
    return warm_up(policy, tokenizer_of(model_dir), config, seed=seed, **ends, **keys)


def examples_of(model_dir: Path, config: WarmupConfig, *, context_tokens: int | None = 256) -> list[WarmupExample]:
    return load_examples(config, tokenizer_of(model_dir), end_token_ids=(END,), context_tokens=context_tokens)


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def reference_logits(policy: Policy) -> torch.Tensor:
    with policy.reference() as reference:
        return reference(torch.tensor([[5, 9, 17, 3, 40]])).logits


# --- what it teaches


@pytest.mark.parametrize(
    ("is_full", "learned"),
    # the adapter meets a frozen random head of entries near 0.02: hidden states of norm sqrt(32) give logits up to
    # 32 * 0.02 = 0.64 or somewhat more, so that no loss is far below log 320 - 0.64 = 5.1
    [(True, 0.5), (False, 5.25)],
    ids=["full", "lora"],
)
def test_a_small_file_is_learned_by_heart(tiny_model_dir: Path, tmp_path: Path, is_full: bool, learned: float) -> None:
    policy = make_policy(tiny_model_dir, trainable=full_training() if is_full else None)
    report = run(tiny_model_dir, policy, make_config(tmp_path, steps=40, learning_rate=2e-2))
    assert report.steps == 40
    assert report.loss_last < learned < 5.5 < report.loss_first


@pytest.mark.parametrize("is_full", [False, True], ids=["lora", "full"])
def test_the_first_loss_is_the_mean_over_completion_tokens_before_any_step(
    tiny_model_dir: Path, tmp_path: Path, is_full: bool
) -> None:
    # one step over all three rows, in micro-batches of unequal token counts, against a plain loop over rows
    policy = make_policy(tiny_model_dir, trainable=full_training() if is_full else None)
    config = make_config(tmp_path, steps=1)
    total, count = 0.0, 0
    for example in examples_of(tiny_model_dir, config):
        with torch.no_grad():
            logits = policy.model(torch.tensor([example.token_ids])).logits[0].double()
        for place in range(example.num_prompt_tokens, len(example.token_ids)):
            total -= float(logits[place - 1].log_softmax(-1)[example.token_ids[place]])
            count += 1
    report = run(tiny_model_dir, policy, config)
    assert report.loss_first == pytest.approx(total / count, rel=1e-5)
    assert report.loss_last == report.loss_first
    assert (report.num_examples, report.num_tokens, report.num_cut) == (3, count, 0)


def test_prompt_ids_are_those_of_rollouts_and_completions_end_with_the_end_token(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(tiny_model_dir)
    for row, example in zip(ROWS, examples_of(tiny_model_dir, make_config(tmp_path)), strict=True):
        prompt = Prompt(id="p", messages=(Message(role="user", content=row["prompt"]),), objectives=("a",))
        rollout_ids = encode_prompt(prompt, tokenizer, max_tokens=None).token_ids
        assert example.token_ids[: example.num_prompt_tokens] == rollout_ids
        assert tokenizer.decode(example.token_ids[len(rollout_ids) :]) == row["completion"] + "<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        # the generation prompt opens a line that a finished turn does not have
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        # a finished turn is not ended at all
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    ],
    ids=["another-prompt", "no-end"],
)
def test_a_template_that_renders_a_finished_turn_otherwise_changes_no_prompt_id(
    tiny_model_dir: Path, tmp_path: Path, template: str
) -> None:
    tokenizer = tokenizer_of(tiny_model_dir)
    tokenizer.chat_template = template
    examples = load_examples(make_config(tmp_path), tokenizer, end_token_ids=(END,), context_tokens=None)
    for row, example in zip(ROWS, examples, strict=True):
        prompt = Prompt(id="p", messages=(Message(role="user", content=row["prompt"]),), objectives=("a",))
        rollout_ids = encode_prompt(prompt, tokenizer, max_tokens=None).token_ids
        assert example.token_ids[: example.num_prompt_tokens] == rollout_ids
        learned = tokenizer.decode(example.token_ids[example.num_prompt_tokens :])
        assert learned.startswith(row["completion"])
        assert example.token_ids[-1] == END


def test_prompt_tokens_are_not_learned(tiny_model_dir: Path, tmp_path: Path) -> None:
    # the loss of a completion of one sure token tends to 0, though the prompt's tokens stay as unlikely as ever
    policy = make_policy(tiny_model_dir, trainable=full_training())
    rows = [{"prompt": "Add the numbers 1, 2 and 3", "completion": "6"}]
    config = make_config(tmp_path, rows, steps=30, learning_rate=2e-2, batch_size=1, micro_batch_size=1)
    (example,) = examples_of(tiny_model_dir, config)
    assert run(tiny_model_dir, policy, config).loss_last < 0.3
    with torch.no_grad():
        logprobs = policy.model(torch.tensor([example.token_ids])).logits[0].log_softmax(-1)
    prompt_losses = [-float(logprobs[n - 1, example.token_ids[n]]) for n in range(1, example.num_prompt_tokens)]
    assert sum(prompt_losses) / len(prompt_losses) > 4.0  # log 320 = 5.77 is chance


def test_longer_rows_are_cut_and_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    lengths = [len(example.token_ids) for example in examples_of(tiny_model_dir, config)]
    limit = max(lengths) - 1  # one row is too long, by its end token
    cut = examples_of(tiny_model_dir, make_config(tmp_path, max_tokens=limit))
    assert [example.is_cut for example in cut] == [length > limit for length in lengths]
    assert [len(example.token_ids) for example in cut] == [min(length, limit) for length in lengths]
    assert examples_of(tiny_model_dir, config, context_tokens=limit) == cut
    report = run(tiny_model_dir, make_policy(tiny_model_dir), make_config(tmp_path, max_tokens=limit, steps=1))
    assert report.num_cut == 1


# --- what it leaves alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_only_the_adapter_moves_and_the_reference_stays_bit_for_bit(
    tiny_model_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    policy = make_policy(tiny_model_dir, dtype=dtype)
    before, reference = weights_of(policy), reference_logits(policy)
    learning = set(policy.trainable_parameters())
    report = run(tiny_model_dir, policy, make_config(tmp_path))
    after = weights_of(policy)
    assert {name for name in before if not torch.equal(before[name], after[name])} == learning
    assert {name: weight.dtype for name, weight in before.items()} == {n: w.dtype for n, w in after.items()}
    assert set(policy.trainable_parameters()) == learning
    assert torch.equal(reference_logits(policy), reference)
    assert report.loss_first == pytest.approx(5.8, abs=0.2)


def test_parts_move_and_nothing_else_and_the_reference_stays_bit_for_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    entries = [{"type": "full", "modules": "model.norm"}, {"type": "lora", "rank": 2, "modules": "model.layers.1"}]
    trainable = PartsTrainable.model_validate({"type": "parts", "parts": entries})
    policy = make_policy(tiny_model_dir, trainable=trainable, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):  # as every pass of a run is: a norm in float32 feeds bfloat16 layers
        before, reference = weights_of(policy), reference_logits(policy)
    run(tiny_model_dir, policy, make_config(tmp_path))
    after = weights_of(policy)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(policy.learner.names)
    assert {name: weight.dtype for name, weight in before.items()} == {n: w.dtype for n, w in after.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference_logits(policy), reference)


def test_full_training_moves_every_weight_but_the_reference(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy = make_policy(tiny_model_dir, trainable=full_training(), dtype=torch.bfloat16)
    before, reference = weights_of(policy), reference_logits(policy)
    run(tiny_model_dir, policy, make_config(tmp_path))
    after = weights_of(policy)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert torch.equal(reference_logits(policy), reference)


def test_equal_seeds_give_equal_weights_and_other_seeds_others(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Add {n}", "completion": str(n)} for n in range(9)]
    config, finals = make_config(tmp_path, rows), []
    for seed in (3, 3, 4):
        policy = make_policy(tiny_model_dir)
        torch.manual_seed(len(finals))  # the global generators do not decide
        run(tiny_model_dir, policy, config, seed=seed)
        finals.append(torch.cat([p.detach().flatten() for p in policy.trainable_parameters().values()]))
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


# --- what it puts back


def everything_on(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All attributes of all modules and configs, hooks by their number."""
    holders: dict[str, Any] = {
        **dict(policy.model.named_modules()),
        "config": policy.causal_lm.config,
        "generation_config": policy.causal_lm.generation_config,
        "tokenizer": tokenizer,
    }
    found: dict[str, Any] = {}
    for place, holder in holders.items():
        for name, value in vars(holder).items():
            found[f"{place}/{name}"] = len(value) if "hooks" in name else id(value)
    found |= {f"{name}.requires_grad": p.requires_grad for name, p in policy.model.named_parameters()}
    found |= {f"{name}.grad": p.grad for name, p in policy.model.named_parameters()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_model_tokenizer_environment_and_accelerate_are_as_before(
    tiny_model_dir: Path, tmp_path: Path, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    policy, tokenizer = make_policy(tiny_model_dir, dtype=dtype), tokenizer_of(tiny_model_dir)
    generation_config = policy.causal_lm.generation_config
    assert generation_config is not None
    generation_config.eos_token_id = [7, 8]  # the trainer would write the tokenizer's into it
    before, environment = everything_on(policy, tokenizer), dict(os.environ)
    accelerate_before = (dict(PartialState._shared_state), dict(AcceleratorState._shared_state))
    files = sorted(tmp_path.iterdir())
    config = make_config(tmp_path)
    warm_up(policy, tokenizer, config, seed=0, end_token_ids=(END,), context_tokens=None)
    assert everything_on(policy, tokenizer) == before
    assert policy.model.training
    assert dict(os.environ) == environment
    assert (dict(PartialState._shared_state), dict(AcceleratorState._shared_state)) == accelerate_before
    assert sorted(tmp_path.iterdir()) == sorted([*files, config.path])
    assert capfd.readouterr() == ("", "")


def test_global_random_generators_go_on_as_if_nothing_had_been(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy, config = make_policy(tiny_model_dir), make_config(tmp_path)
    draws = []
    for is_warmed_up in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if is_warmed_up:
            run(tiny_model_dir, policy, config)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]


def test_a_stop_is_asked_for_after_every_step_and_puts_everything_back(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy, tokenizer = make_policy(tiny_model_dir), tokenizer_of(tiny_model_dir)
    before, seen = everything_on(policy, tokenizer), []
    report = run(
        tiny_model_dir,
        policy,
        make_config(tmp_path, steps=9),
        on_step=lambda step, loss: seen.append((step, loss)),
        should_stop=lambda: len(seen) == 2,
    )
    assert [step for step, _ in seen] == [1, 2]
    assert (report.steps, report.loss_first, report.loss_last) == (2, seen[0][1], seen[1][1])
    assert everything_on(policy, tokenizer) == before


def test_a_loss_that_is_not_finite_stops_the_run_and_puts_everything_back(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy, tokenizer = make_policy(tiny_model_dir), tokenizer_of(tiny_model_dir)
    with torch.no_grad():
        next(iter(policy.trainable_parameters().values())).fill_(float("nan"))
    before = everything_on(policy, tokenizer)
    with pytest.raises(NonFiniteUpdate, match="warmup step 1: the loss is nan"):
        run(tiny_model_dir, policy, make_config(tmp_path))
    assert everything_on(policy, tokenizer) == before


# --- what it refuses


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([], {}, "is empty: it holds no example for warmup"),
        ([{"question": "a", "completion": "b"}], {}, "row 1 has no column 'prompt'.*warmup.prompt_column"),
        ([*ROWS, {"prompt": "a", "answer": "b"}], {}, "row 4 has no column 'completion'.*warmup.completion_column"),
        ([{"prompt": "a", "completion": " "}], {}, "row 1: the completion is ' '; expected a text"),
        ([{"prompt": "a", "completion": 3}], {}, "row 1: the completion is 3; expected a text"),
        ([{"prompt": "", "completion": "b"}], {}, "row 1: a prompt is a text that is not empty"),
        (ROWS, {"max_tokens": 4}, "row 1: the prompt has .* tokens, and a row may have 4"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    tiny_model_dir: Path, tmp_path: Path, rows: list[dict[str, Any]], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        examples_of(tiny_model_dir, make_config(tmp_path, rows, **keys))


def test_a_missing_file_is_an_error_of_the_dataset(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no dataset at"):
        examples_of(tiny_model_dir, make_config(tmp_path).model_copy(update={"path": tmp_path / "none.jsonl"}))


def test_a_batch_is_shared_out_among_the_ranks_or_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, batch_size=6, micro_batch_size=None)
    assert [micro_batch_rows(config, num_ranks=ranks) for ranks in (1, 2, 3)] == [6, 3, 2]
    with pytest.raises(ConfigError, match=r"4 processes with micro-batches of 1 .* multiple of 4"):
        micro_batch_rows(config, num_ranks=4)
    with pytest.raises(ConfigError, match=r"2 processes with micro-batches of 2 .* multiple of 4"):
        micro_batch_rows(make_config(tmp_path, batch_size=6, micro_batch_size=2), num_ranks=2)
