"""The rows scope and gradient flow of models of several parts, and of parts that learn. Sizes worked by hand."""

from __future__ import annotations

from pathlib import Path

from part_models import LANGUAGE, PROJECTOR, VISION, make_llava
from verify_subjects import open_subject

from grpo.config import FullPart, LoraPart, LoraTrainable, PartsTrainable
from grpo.diagnostics.checks.gradient import check_gradient_flow
from grpo.diagnostics.checks.scope import check_scope, judge_scope, judge_taken
from grpo.runtime.model_parts import ModelParts, model_parts
from grpo.runtime.policy import Policy, dropout_off
from grpo.runtime.trainable import lora_layers, make_trainable, select_parts

BLIP = ModelParts(names=("qformer", "language_model"), language="language_model", container="")
QFORMER = {f"qformer.encoder.layer.{n}.attention.query": 100 for n in range(2)}
DECODER = {f"language_model.decoder.{n}.query": 1000 for n in range(3)}


def test_a_suffix_that_hits_several_parts_of_the_model_fails_with_counts_cost_and_the_entry_to_write() -> None:
    (finding,) = judge_scope({**QFORMER, **DECODER}, ["query"], cost="", parts=BLIP)
    assert finding.status == "failed"
    # 200 and 3,000 numbers at 20 bytes
    assert "2 parts of the model: modules 2 in qformer (4 KiB), 3 in language_model (59 KiB)" in finding.what
    assert "parts: [{type: lora, modules: qformer.**.query}]" in finding.remedy


def test_what_the_backward_pass_keeps_because_of_each_part_is_told_beside_its_parameters() -> None:
    (finding,) = judge_scope(
        {**QFORMER, **DECODER}, ["query"], cost="", parts=BLIP, kept_for=lambda modules: len(modules) * 2**20
    )
    told = (
        "; of a micro-batch, kept only because these learn: 2 MiB because of qformer, 3 MiB because of language_model"
    )
    assert finding.what.endswith(told)


def test_stacks_within_one_part_are_a_warning_only() -> None:
    encoder = {f"language_model.encoder.{n}.query": 1000 for n in range(3)}
    (finding,) = judge_scope({**encoder, **DECODER}, ["query"], cost="", parts=BLIP)
    assert finding.status == "warning"


def test_pefts_suffixes_hit_the_image_tower_too_and_all_linear_says_what_it_leaves() -> None:
    def judged(trainable: LoraTrainable, patterns: list[str]) -> list[str]:
        model = Policy(make_llava(), trainable, seed=0).causal_lm
        sizes = dict.fromkeys(lora_layers(model), 64)
        return [f"{one.status} {one.what}" for one in judge_scope(sizes, patterns, cost="", parts=model_parts(model))]

    (wide,) = judged(LoraTrainable(rank=2, modules=("q_proj",)), ["q_proj"])
    assert wide.startswith("failed")
    assert f"2 in {VISION}" in wide
    (narrow,) = judged(LoraTrainable(rank=2), ["all-linear"])
    assert narrow.startswith("ok modules: all-linear 14, in model.language_model.layers; ")
    assert f"{VISION}, {PROJECTOR} stay frozen" in narrow


def test_entries_are_told_with_what_each_took_where_and_what_stays_frozen() -> None:
    entries = (FullPart(type="full", modules=(PROJECTOR,)), LoraPart(type="lora", rank=2, modules=(LANGUAGE,)))
    model = make_llava()
    taken = select_parts(model, PartsTrainable(type="parts", parts=entries))
    finding = judge_taken(taken, model_parts(model), cost="N parameters")
    # the projector: two layers of 16 x 16 + 16 = 544 numbers, at 20 bytes
    assert finding.what.startswith(f"full for {PROJECTOR}: tensors 4 in {PROJECTOR} (11 KiB); ")
    assert f"LoRA of rank 2 for {LANGUAGE}: modules 14 in {LANGUAGE}" in finding.what
    assert f"; {VISION} stay frozen; together N parameters" in finding.what
    assert finding.figures["entries"][0]["parts"] == {PROJECTOR: {"count": 4, "parameters": 544}}
    learner = make_trainable(model, PartsTrainable(type="parts", parts=entries), seed=0)
    own = dict(learner.model.named_parameters())
    assert sum(own[name].numel() for name in learner.names) == sum(sum(one.sizes.values()) for one in taken)


def test_a_recipe_that_trains_parts_has_sound_rows_and_a_stray_parameter_is_named(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    entries = [{"type": "full", "modules": "model.norm"}, {"type": "lora", "rank": 2, "modules": "model.layers.1.mlp"}]
    with open_subject(tiny_model_dir, tmp_path, trainable={"type": "parts", "parts": entries}) as subject:
        model = subject.parts.policy
        with dropout_off(model.model):
            (flow,) = check_gradient_flow(subject)
            (scope,) = check_scope(subject)
            stray = model.causal_lm.get_parameter("model.layers.0.input_layernorm.weight").requires_grad_(True)
            failed = [one.what for one in check_gradient_flow(subject) if one.status == "failed"]
            stray.requires_grad_(False)
    # a norm of 32; gate, up and down with 2 x (32 + 64) each
    assert flow.status == scope.status == "ok"
    assert flow.what.startswith("trainable 608 = ")
    assert "together 608 parameters" in scope.what
    assert scope.figures["kept_bytes"] > 0
    assert f"kept of a micro-batch of {scope.figures['kept_of_tokens']} tokens" in scope.what
    assert [text for text in failed if "model.layers.0.input_layernorm.weight learns" in text]
