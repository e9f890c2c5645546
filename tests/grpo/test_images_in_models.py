"""Engine and update with images, against the model's own passes over prompt and completion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_batch
from image_builders import VisionModel, image_prompt, load_vision_model, mixed_prompts, save_image
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLModel

from grpo.errors import ModelError
from grpo.rollout.base import SamplingParams
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.image_inputs import prompt_inputs
from grpo.types import RolloutGroup, ScoredGroup, Verdict
from grpo.update.forward import policy_pass, reference_logprobs

END = 2
PARAMS = SamplingParams(max_new_tokens=10, end_token_ids=(END,))
TOLERANCE = 1e-4
"""Nats, in float32."""


FAMILIES = ["tiny_llava_dir", "tiny_qwen_vl_dir", pytest.param("tiny_qwen2_5_vl_dir", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> VisionModel:
    return load_vision_model(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def engine(model: VisionModel) -> TransformersEngine:
    """With room for two groups of four: prompts join while others are under way."""
    return TransformersEngine(model.policy, model.tokenizer, max_rows=8, image_prompt=model.made_up_prompt())


@pytest.fixture
def groups(model: VisionModel, engine: TransformersEngine, tmp_path: Path) -> list[RolloutGroup]:
    """Four completions of each of the prompts; ragged, for some end early."""
    prompts = model.encoded(mixed_prompts(tmp_path))
    ends = tuple(range(END, 320, 8))  # so many that some completions end before their limit
    sampled = engine.sample(prompts, 4, params=SamplingParams(max_new_tokens=10, end_token_ids=ends), seed=1)
    groups = sorted(sampled, key=lambda group: [prompt.prompt.id for prompt in prompts].index(group.prompt.id))
    assert len({len(one.token_ids) for group in groups for one in group.completions}) > 3
    return groups


def scored(groups: list[RolloutGroup]) -> list[ScoredGroup]:
    return [
        ScoredGroup(
            rollout=group,
            verdicts=tuple({"a": Verdict(value=float(k), parts={})} for k in range(len(group.completions))),
        )
        for group in groups
    ]


@torch.no_grad()
def test_the_sampler_reports_the_models_own_logprobs(
    model: VisionModel, groups: list[RolloutGroup], tmp_path: Path
) -> None:
    num_compared = 0
    for prompt, group in zip(model.encoded(mixed_prompts(tmp_path)), groups, strict=True):
        for completion in group.completions:
            if model.processor.image_token_id in completion.token_ids:
                continue  # the model's own pass would look for another image
            num_compared += 1
            logits = model.policy.causal_lm(**model.own_inputs(prompt, completion.token_ids)).logits[0]
            tokens = torch.tensor(completion.token_ids)
            law = logits[len(prompt.token_ids) - 1 : -1].log_softmax(dim=-1)
            own = law.gather(1, tokens[:, None])[:, 0]
            assert (own - torch.tensor(completion.sampler_logprobs)).abs().max() < TOLERANCE
    assert num_compared >= 15


def test_greedy_answers_are_those_of_the_models_own_generate(
    model: VisionModel, engine: TransformersEngine, tmp_path: Path
) -> None:
    prompts = model.encoded(mixed_prompts(tmp_path))
    greedy = SamplingParams(temperature=0.0, max_new_tokens=10, end_token_ids=(END,))
    found = {
        group.prompt.id: group.completions[0].token_ids for group in engine.sample(prompts, 1, params=greedy, seed=0)
    }
    for prompt in prompts:
        inputs = model.own_inputs(prompt)
        own = model.policy.causal_lm.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=END)
        assert found[prompt.prompt.id] == tuple(own[0, len(prompt.token_ids) :].tolist())


@pytest.mark.parametrize("budget", [60, 8192])
def test_the_update_sees_the_logprobs_that_the_sampler_saw(
    model: VisionModel, groups: list[RolloutGroup], tmp_path: Path, budget: int
) -> None:
    """In micro-batches of one row, and of all prompts with none, one and two images together."""
    images = {one.prompt.id: one.images for one in model.encoded(mixed_prompts(tmp_path)) if one.images}
    batch = make_batch(scored(groups), budget=budget, images=images)
    assert (len(batch.micro_batches) == 1) == (budget == 8192)
    moved = 0.0
    for part in batch.micro_batches:
        gap = (policy_pass(model.policy, part, PARAMS).logprobs - part.sampler_logprobs)[part.completion_mask]
        assert gap.abs().max() < TOLERANCE
        off = (reference_logprobs(model.policy, part, PARAMS) - part.sampler_logprobs)[part.completion_mask]
        moved = max(moved, float(off.abs().max()))
    assert moved > 0.1  # the adapter says something, or the agreement above would say little


def test_images_teach_the_part_that_reads_them(model: VisionModel, groups: list[RolloutGroup], tmp_path: Path) -> None:
    images = {one.prompt.id: one.images for one in model.encoded(mixed_prompts(tmp_path)) if one.images}
    (part,) = make_batch(scored(groups), images=images).micro_batches
    model.policy.model.zero_grad()
    policy_pass(model.policy, part, PARAMS).logprobs.sum().backward()
    grads = {name: p.grad for name, p in model.policy.trainable_parameters().items()}
    seeing = [name for name in grads if "vision_tower" in name or "visual" in name]
    assert seeing
    # the tower's last layers are not read: LLaVA takes the features of the one before
    taught = [name for name in seeing if grads[name] is not None and bool(grads[name].any())]
    assert len(taught) >= len(seeing) // 2


def test_rows_keep_their_prompts_images(model: VisionModel, groups: list[RolloutGroup], tmp_path: Path) -> None:
    """Parts of a micro-batch, as when memory ran out: rows 12 to 19 of 20 are those of the shorter prompts."""
    images = {one.prompt.id: one.images for one in model.encoded(mixed_prompts(tmp_path)) if one.images}
    (whole,) = make_batch(scored(groups), images=images).micro_batches
    rows = torch.arange(12, 20)
    part = whole.rows(rows)
    with torch.no_grad():
        of_part = policy_pass(model.policy, part, PARAMS).logprobs
        of_whole = policy_pass(model.policy, whole, PARAMS).logprobs[rows, : of_part.shape[1]]
    assert (of_part - of_whole)[part.completion_mask].abs().max() < TOLERANCE


def test_positions_after_a_wide_image_go_on_from_its_longer_side(tiny_qwen_vl_dir: Path, tmp_path: Path) -> None:
    """A 32 x 8 image is 4 x 1 patches of 8 pixels once merged, but at least 16 x 16 pixels in all: 32 x 8 = 256 fits.

    Its 4 tokens take the positions p ... p + 3 in width and p alone in height, so that text goes on at p + 4: as many
    as it has tokens. One of 16 x 16 takes 4 tokens as well, in 2 x 2, and text goes on at p + 2.
    """
    model = load_vision_model(tiny_qwen_vl_dir)
    wide, square = save_image(tmp_path / "wide.png", 32, 8), save_image(tmp_path / "square.png", 16, 16)
    for path, fewer in ((wide, 0), (square, 2)):
        (prompt,) = model.encoded([image_prompt("p", "<image>Who?", path)])
        ids = torch.tensor([prompt.token_ids])
        given = prompt_inputs(model.policy.causal_lm, ids, torch.ones_like(ids), [prompt.images])
        assert sum(prompt.images.token_types if prompt.images else ()) == 4
        assert given.next_position.tolist() == [len(prompt.token_ids) - fewer]
        assert given.position_ids[:, 0, -1].tolist() == [len(prompt.token_ids) - fewer - 1] * 3


def test_padding_on_either_side_gives_the_same_positions(tiny_qwen_vl_dir: Path, tmp_path: Path) -> None:
    model = load_vision_model(tiny_qwen_vl_dir)
    (prompt,) = model.encoded([image_prompt("p", "<image>Who?", save_image(tmp_path / "a.png", 24, 16))])
    length = len(prompt.token_ids)
    found = []
    for left, right in ((3, 0), (0, 3)):
        ids = torch.tensor([[0] * left + list(prompt.token_ids) + [0] * right])
        mask = torch.tensor([[0] * left + [1] * length + [0] * right])
        given = prompt_inputs(model.policy.causal_lm, ids, mask, [prompt.images])
        found.append((given.position_ids[:, 0, left : left + length].tolist(), given.next_position.tolist()))
    assert found[0] == found[1]


def test_an_image_token_that_is_sampled_is_a_token_like_any_other(
    model: VisionModel, engine: TransformersEngine, tmp_path: Path
) -> None:
    """Completions that hold it, after a prompt with an image: nothing looks for a second image."""
    (prompt,) = model.encoded([image_prompt("p", "<image>Who?", save_image(tmp_path / "a.png", 20, 20))])
    (group,) = engine.sample([prompt], 2, params=PARAMS, seed=3)
    first = group.completions[0]
    forced = replace(first, token_ids=(first.token_ids[0], model.processor.image_token_id, *first.token_ids[2:]))
    assert prompt.images is not None
    changed = scored([replace(group, completions=(forced, first))])
    (part,) = make_batch(changed, images={"p": prompt.images}).micro_batches
    with torch.no_grad():
        logprobs = policy_pass(model.policy, part, PARAMS).logprobs
    assert torch.isfinite(logprobs).all()
    assert torch.allclose(logprobs[0, 0], logprobs[1, 0], atol=1e-5)  # what comes before it is as it was


def test_a_model_that_cannot_share_prompts_is_refused_for_images(tiny_llava_dir: Path) -> None:
    model = load_vision_model(tiny_llava_dir)
    model.policy.causal_lm.config.text_config.model_type = "mistral"
    model.policy.causal_lm.config.text_config.sliding_window = 8
    model.policy.causal_lm.config.text_config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="cannot be sampled from with images"):
        TransformersEngine(model.policy, model.tokenizer, image_prompt=model.made_up_prompt())


class FarAway(Qwen2VLForConditionalGeneration):
    """Says that what follows a prompt is a hundred positions farther than its own passes have it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = _FarAway(config)


class _FarAway(Qwen2VLModel):
    def get_rope_index(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positions, deltas = super().get_rope_index(*arguments, **named)
        return positions, deltas + 100


def test_a_model_whose_positions_are_others_than_it_says_is_refused(tiny_qwen_vl_dir: Path) -> None:
    """What is sampled after images is compared with the model's own pass over all of it, before any run begins."""
    model = load_vision_model(tiny_qwen_vl_dir)
    model.policy.causal_lm.__class__ = FarAway  # the engine's copy is made from it
    with pytest.raises(ModelError, match=r"with images: with shared prompts its log-probabilities differ by"):
        TransformersEngine(model.policy, model.tokenizer, image_prompt=model.made_up_prompt())
