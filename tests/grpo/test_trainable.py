"""Parts of a model that learn: what patterns take, what gradient reaches, the reference, weights and folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_updater
from part_models import LANGUAGE, PROJECTOR, VISION, llava_logits, llava_loss, make_llava, make_qwen_vl, make_t5
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from scenarios.instruct_blip import loss_of as blip_loss
from scenarios.instruct_blip import make_instruct_blip

from grpo.batching import TrainBatch
from grpo.config import FullPart, FullTrainable, LoraPart, LoraTrainable, PartConfig, PartsTrainable
from grpo.diagnostics.gradflow import gradient_flow
from grpo.errors import CheckpointError, ConfigError
from grpo.rollout.model_copy import engine_model, take_weights
from grpo.rollout.vllm_sync import choose_sync, whole_weights
from grpo.runtime.model_parts import is_encoder_decoder, model_parts
from grpo.runtime.models import load_model
from grpo.runtime.policy import Policy, load_parts
from grpo.runtime.trainable import make_trainable, select_parts

IDS = torch.tensor([[5, 9, 17, 3, 40]])


def lora(*modules: str, rank: int = 2, alpha: float = 4.0, across_parts: bool = False) -> LoraPart:
    return LoraPart(type="lora", modules=modules, rank=rank, alpha=alpha, across_parts=across_parts)


def full(*modules: str, across_parts: bool = False) -> FullPart:
    return FullPart(type="full", modules=modules, across_parts=across_parts)


def parts(*entries: PartConfig) -> PartsTrainable:
    return PartsTrainable(type="parts", parts=entries)


MIXED = parts(full("model.norm", "model.layers.1.mlp"), lora("model.layers.*.self_attn", rank=2))
"""Of the tiny Llama: 1 + 3 tensors in full, 2 layers x 4 projections with adapters of two tensors each."""
PROJECTOR_AND_LANGUAGE = parts(full(PROJECTOR), lora(LANGUAGE))


def one_batch() -> TrainBatch:
    return make_batch([make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.5}], lengths=[3, 5, 4], seed=1)])


def stepped(policy: Policy, *, steps: int = 2) -> Policy:
    updater = make_updater(policy)
    for _ in range(steps):
        updater.step(one_batch())
    return policy


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def nudged_by_gradient(policy: Policy, loss: Any, *, rate: float = 0.1) -> None:
    """One step of plain descent."""
    loss().backward()
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            assert parameter.grad is not None
            parameter -= rate * parameter.grad
            parameter.grad = None


# --- patterns


def test_a_module_stands_for_all_that_is_in_it_and_the_rest_is_frozen(tiny_model_dir: Path) -> None:
    learning = make_policy(tiny_model_dir, trainable=MIXED).trainable_parameters()
    plain = {name.removeprefix("base_model.model.") for name in learning}
    mlp = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    adapters = {
        f"model.layers.{layer}.self_attn.{part}_proj.lora_{half}.default.weight"
        for layer in (0, 1)
        for part in "qkvo"
        for half in "AB"
    }
    assert plain == {"model.norm.weight"} | mlp | adapters


def test_the_first_entry_that_matches_has_a_layer_and_each_keeps_its_own_rank_and_alpha(tiny_model_dir: Path) -> None:
    trainable = parts(lora("model.layers.1", rank=3, alpha=9), full("model.layers.1"), lora("**.q_proj", rank=2))
    policy = make_policy(tiny_model_dir, trainable=trainable)
    layers = {name: module for name, module in policy.causal_lm.named_modules() if isinstance(module, LoraLayer)}
    ranks = {name: (module.r["default"], module.scaling["default"]) for name, module in layers.items()}
    assert ranks.pop("model.layers.0.self_attn.q_proj") == (2, 2.0)  # 4 / 2
    assert len(ranks) == 7  # attention's four projections and the feed-forward part's three, of layer 1
    assert set(ranks.values()) == {(3, 3.0)}  # 9 / 3
    in_full = [name for name in policy.trainable_parameters() if ".lora_" not in name]
    assert [name.rpartition("layers.")[2] for name in in_full] == [
        "1.input_layernorm.weight",  # what the adapters leave of the layer
        "1.post_attention_layernorm.weight",
    ]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([lora("q_proj")], r"parts\[0\].modules 'q_proj' matches no module.*'\*\*.q_proj' matches 2 modules, such as"),
        ([lora("model.layer.*.q_prj")], r"matches no module.*nearest are model.layers.0.self_attn.q_proj"),
        ([full("model.norm"), full("model.layers.7")], r"parts\[1\].modules 'model.layers.7' matches no module"),
        ([lora("model.norm")], r"1 modules \(LlamaRMSNorm\), but there is no linear layer among or in them"),
        ([full("model.rotary_emb")], r"\(LlamaRotaryEmbedding\), but they have no parameters"),
        ([full("model.layers"), lora("**.q_proj")], r"parts\[1\].*left nothing: earlier entries have all 2 layers"),
        ([lora("model.layers"), full("**.q_proj")], r"parts\[1\].*left nothing: earlier entries have all 2 tensors"),
        ([lora("lm_head")], r"matches the language-model head.*Leave the head out"),
        ([lora("model.embed_tokens")], r"matches the token embeddings.*Leave them out"),
    ],
)
def test_a_pattern_that_takes_nothing_is_refused_with_what_would(
    entries: list[PartConfig], words: str, tiny_model_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_policy(tiny_model_dir, trainable=parts(*entries))


def test_tied_weights_learn_once_whichever_name_is_given() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    (taken,) = select_parts(LlamaForCausalLM(config), parts(full("lm_head")))
    assert dict(taken.sizes) == {"model.embed_tokens.weight": 32 * 8}


# --- the parts of a model


@pytest.mark.parametrize(
    ("build", "names", "language"),
    [
        (make_llava, (VISION, PROJECTOR, LANGUAGE), LANGUAGE),
        (make_qwen_vl, ("model.visual", "model.language_model"), "model.language_model"),
        (
            lambda: make_instruct_blip("t5"),
            ("vision_model", "qformer", "language_projection", "language_model"),
            "language_model",
        ),
        (make_t5, (), ""),
    ],
    ids=["llava", "qwen", "blip", "t5"],
)
def test_the_parts_are_found_through_the_models_own_accessors(
    build: Any, names: tuple[str, ...], language: str
) -> None:
    found = model_parts(build())
    assert (found.names, found.language) == (names, language)


def test_the_head_belongs_to_the_language_model_and_a_parameter_beside_the_parts_is_one_of_its_own() -> None:
    assert model_parts(make_llava()).of("lm_head.weight") == LANGUAGE
    blip = model_parts(make_instruct_blip("t5"))
    assert blip.of("query_tokens") == "query_tokens"
    assert blip.of("qformer.encoder.layer.0.attention.attention.query.weight") == "qformer"


def test_an_encoder_decoder_is_known_inside_of_another_model_too() -> None:
    assert [is_encoder_decoder(one) for one in (make_t5(), make_instruct_blip("t5"), make_instruct_blip("opt"))] == [
        True,
        True,
        False,
    ]


def test_all_linear_means_the_language_model_alone_where_there_are_several_parts() -> None:
    policy = Policy(make_llava(), LoraTrainable(rank=2), seed=0)
    places = {
        name.removeprefix("base_model.model.").rpartition(".layers.")[0] for name in policy.trainable_parameters()
    }
    assert places == {LANGUAGE}
    assert len(policy.trainable_parameters()) == 2 * 7 * 2


def test_a_suffix_that_hits_several_parts_is_refused_with_counts_and_cost_until_it_is_meant() -> None:
    """q_proj: an image tower's as well as the language model's; a rank of 2 on 16 -> 16 has 2 x 32 numbers."""
    with pytest.raises(ConfigError, match=r"in 2 parts of the model: 2 in model.vision_tower \(2 KiB\), 2 in"):
        select_parts(make_llava(), parts(lora("**.q_proj")))
    (taken,) = select_parts(make_llava(), parts(lora("**.q_proj", across_parts=True)))
    assert sorted(set(taken.sizes.values())) == [64]
    assert len(taken.sizes) == 4
    (narrow,) = select_parts(make_llava(), parts(lora(f"{LANGUAGE}.**.q_proj")))
    assert len(narrow.sizes) == 2


@pytest.mark.parametrize("language_model", ["t5", "opt"])
def test_an_adapter_meant_for_the_q_former_is_on_the_q_former_alone(language_model: Any) -> None:
    learner = make_trainable(
        make_instruct_blip(language_model), parts(lora("qformer.**.query", "qformer.**.value")), seed=0
    )
    assert all(".qformer." in name for name in learner.names)
    flow = gradient_flow(learner.model, blip_loss(learner.model))
    assert (set(flow.norms), flow.unreached, flow.cuts) == (set(learner.names), (), ())


def test_an_encoder_decoder_takes_parts_too_and_its_reference_stays_the_untouched_model() -> None:
    """For verify and for supervised training; GRPO on one is refused where a recipe names it."""
    trainable = parts(lora("decoder.**.q", "decoder.**.v"), full("encoder.final_layer_norm"))
    policy = Policy(make_t5(), trainable, seed=0)
    ids = torch.tensor([[5, 9, 17, 3]])

    def loss() -> torch.Tensor:
        return policy.model(input_ids=ids, labels=ids).loss

    flow = gradient_flow(policy.model, loss)
    # 2 blocks with self- and cross-attention: q and v of each, A and B; and the norm
    assert (len(flow.norms), flow.unreached, flow.cuts) == (2 * 2 * 2 * 2 + 1, (), ())
    nudged_by_gradient(policy, loss)
    with torch.no_grad(), policy.reference() as reference:
        untouched = make_t5()
        assert torch.equal(reference(input_ids=ids, labels=ids).logits, untouched(input_ids=ids, labels=ids).logits)
        before = loss()
    assert not torch.equal(before, loss())  # the policy is itself again


# --- gradient, reference, frozen parts: a projector in full and adapters on the language model


def test_gradient_reaches_the_projector_and_the_adapters_and_nothing_else_through_frozen_parts() -> None:
    policy = Policy(make_llava(), PROJECTOR_AND_LANGUAGE, seed=0)
    flow = gradient_flow(policy.model, llava_loss(policy.model))
    assert set(flow.norms) == set(policy.trainable_parameters()) == set(policy.learner.names)
    assert (flow.unreached, flow.cuts, flow.zero_always) == ((), (), ())
    assert sum(PROJECTOR in name for name in flow.norms) == 4
    llava_loss(policy.model)().backward()
    assert {name for name, one in policy.model.named_parameters() if one.grad is not None} == set(flow.norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kl_is_exactly_0_at_the_start_and_above_it_after_a_step(tiny_model_dir: Path, dtype: torch.dtype) -> None:
    updater = make_updater(make_policy(tiny_model_dir, trainable=MIXED, dtype=dtype))
    first, second = updater.step(one_batch()), updater.step(one_batch())
    assert (first.means["kl/a"], first.kl_max["a"]) == (0.0, 0.0)
    assert second.means["kl/a"] > 0.0


def test_the_reference_stays_the_untouched_model_and_frozen_parts_keep_their_bits() -> None:
    untouched = make_llava()
    policy = Policy(make_llava(), PROJECTOR_AND_LANGUAGE, seed=0)
    before = bits(policy.model)
    for _ in range(2):
        nudged_by_gradient(policy, llava_loss(policy.model))
    moved = {name for name, value in bits(policy.model).items() if not torch.equal(value, before[name])}
    b_and_full = {name for name in policy.learner.names if "lora_A" not in name}  # A moves from the second step on
    assert b_and_full < moved <= policy.learner.names
    assert not torch.allclose(llava_logits(policy.model), llava_logits(untouched), atol=1e-4)
    with policy.reference() as reference:
        assert torch.equal(llava_logits(reference), llava_logits(untouched).detach())
    after = {name: one for name, one in bits(policy.model).items() if name in moved}
    assert not any(torch.equal(value, before[name]) for name, value in after.items())  # the policy is itself again


def test_the_start_is_kept_of_the_fully_trained_parameters_alone_and_in_their_own_dtype(tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir, trainable=MIXED, dtype=torch.bfloat16)
    kept = policy.learner.start
    assert sum(value.numel() for value in kept.values()) == 32 + 3 * 32 * 64  # the norm, and an MLP of 32 -> 64 -> 32
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    assert {one.dtype for one in policy.trainable_parameters().values()} == {torch.float32}


def test_after_a_warm_up_the_reference_is_where_it_ended(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy = stepped(make_policy(tiny_model_dir, trainable=MIXED))
    anchored = logits_of(policy.causal_lm)
    policy.take_as_reference()
    stepped(policy, steps=1)
    policy.save(tmp_path)
    fresh = make_policy(tiny_model_dir, trainable=MIXED, seed=9)
    fresh.load(tmp_path)
    for one in (policy, fresh):
        with one.reference() as reference:
            assert torch.equal(logits_of(reference), anchored)


# --- weights for the engine, and the folder


@pytest.mark.parametrize(
    "trainable",
    [MIXED, parts(full("model.norm")), parts(lora("**.q_proj", rank=2), lora("**.mlp", rank=3))],
    ids=["mixed", "full", "ranks"],
)
def test_merged_weights_answer_as_the_policy_does(trainable: PartsTrainable, tiny_model_dir: Path) -> None:
    policy = make_policy(tiny_model_dir, trainable=trainable)
    plain = engine_model(policy)
    stepped(policy)
    assert not torch.allclose(logits_of(plain), logits_of(policy.causal_lm), atol=1e-4)
    take_weights(plain, policy)
    assert torch.allclose(logits_of(plain), logits_of(policy.causal_lm), atol=1e-5)
    other = load_model(str(tiny_model_dir), dtype=torch.float32, base_dir=tiny_model_dir)
    missing, strange = other.load_state_dict(dict(whole_weights(policy, torch.float32)), strict=False)
    assert (missing, strange) == ([], [])
    assert torch.allclose(logits_of(other), logits_of(policy.causal_lm), atol=1e-5)


def test_merged_weights_of_a_projector_and_adapters_answer_as_the_policy_does() -> None:
    policy = Policy(make_llava(), PROJECTOR_AND_LANGUAGE, seed=0)
    plain = engine_model(policy)
    for _ in range(2):
        nudged_by_gradient(policy, llava_loss(policy.model))
    assert not torch.allclose(llava_logits(plain), llava_logits(policy.causal_lm), atol=1e-4)
    take_weights(plain, policy)
    assert torch.allclose(llava_logits(plain), llava_logits(policy.causal_lm), atol=1e-5)
    assert {name for name, _ in policy.merged_weights()} == {
        *(f"{PROJECTOR}.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")),
        *(f"{name}.weight" for one in policy.learner.taken[1:] for name in one.sizes),
    }


def test_parts_of_a_model_with_images_are_taken_back_to_the_bit(tmp_path: Path) -> None:
    policy = Policy(make_llava(), PROJECTOR_AND_LANGUAGE, seed=0)
    for _ in range(2):
        nudged_by_gradient(policy, llava_loss(policy.model))
    policy.save(tmp_path)
    fresh = Policy(make_llava(), PROJECTOR_AND_LANGUAGE, seed=9)
    fresh.load(tmp_path)
    assert torch.equal(llava_logits(fresh.model), llava_logits(policy.model))
    assert torch.equal(llava_logits(load_parts(make_llava(), tmp_path)), llava_logits(policy.model))


def test_an_engine_is_offered_an_adapter_only_where_that_is_all_that_learns(tiny_model_dir: Path) -> None:
    mixed, ranks = MIXED, parts(lora("**.q_proj", rank=2), lora("**.mlp", rank=3))
    one = parts(lora("**.q_proj", "**.mlp"))
    found = [
        choose_sync("auto", make_policy(tiny_model_dir, trainable=which), is_cpu=False) for which in (mixed, ranks, one)
    ]
    assert found == ["merged", "merged", "adapter"]
    with pytest.raises(ConfigError, match="not one adapter of one rank"):
        choose_sync("adapter", make_policy(tiny_model_dir, trainable=mixed), is_cpu=False)


@pytest.mark.parametrize(
    ("trainable", "files"),
    [
        (MIXED, {"parts.safetensors", "adapter/adapter_model.safetensors"}),
        (parts(full("model.norm")), {"parts.safetensors"}),
        (parts(lora("**.q_proj", rank=2), lora("**.mlp", rank=3)), {"adapter_model.safetensors"}),
    ],
    ids=["mixed", "full", "ranks"],
)
def test_a_saved_policy_is_taken_back_to_the_bit_and_loads_without_the_toolkit(
    trainable: PartsTrainable, files: set[str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    policy = stepped(make_policy(tiny_model_dir, trainable=trainable))
    policy.save(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")} == files
    fresh = make_policy(tiny_model_dir, trainable=trainable, seed=9)
    fresh.load(tmp_path)
    ours, theirs = policy.trainable_parameters(), fresh.trainable_parameters()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = load_parts(load_model(str(tiny_model_dir), dtype=torch.float32, base_dir=tiny_model_dir), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(policy.causal_lm))


def test_a_folder_with_parts_is_not_taken_for_an_adapter_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_policy(tiny_model_dir, trainable=MIXED).save(tmp_path)
    plain = load_model(str(tiny_model_dir), dtype=torch.float32, base_dir=tiny_model_dir)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(plain, str(tmp_path))


def test_a_folder_of_other_parts_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_policy(tiny_model_dir, trainable=parts(full("model.norm"))).save(tmp_path)
    with pytest.raises(CheckpointError, match="does not hold this model's parameters"):
        make_policy(tiny_model_dir, trainable=parts(full("model.layers.1.mlp"))).load(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds model\.norm\.weight, which the model does not have"):
        load_parts(make_llava(), tmp_path)


def test_full_training_of_a_part_equals_full_training_where_the_rest_has_no_gradient(tiny_model_dir: Path) -> None:
    """The slow twin: all parameters learn, but the optimizer's step is taken back for all but the part."""
    part = make_policy(tiny_model_dir, trainable=parts(full("model.norm")))
    whole = make_policy(tiny_model_dir, trainable=FullTrainable(type="full"))
    start = copy.deepcopy(whole.causal_lm.state_dict())
    make_updater(part, max_grad_norm=1e9).step(one_batch())
    make_updater(whole, max_grad_norm=1e9).step(one_batch())
    ours, theirs = part.causal_lm.state_dict(), whole.causal_lm.state_dict()
    assert not torch.equal(theirs["model.norm.weight"], start["model.norm.weight"])
    assert torch.allclose(ours["model.norm.weight"], theirs["model.norm.weight"], atol=1e-6)
    assert all(torch.equal(ours[name], start[name]) for name in start if name != "model.norm.weight")
