"""What can be said about the vLLM engine without vLLM: its law as text, what a sync carries, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import END, full_training, make_policy
from transformers import AutoModelForCausalLM

from grpo.config import LoraTrainable
from grpo.errors import ConfigError, EngineError
from grpo.rollout.base import SamplingParams
from grpo.rollout.vllm_engine import check_installed, check_version
from grpo.rollout.vllm_law import LAW_KEY, check_law, extra_arguments, law_of, law_text, native_arguments
from grpo.rollout.vllm_sync import (
    Checksum,
    Deadline,
    SyncReport,
    adapter_of,
    check_report,
    choose_sync,
    whole_weights,
)
from grpo.runtime.policy import Policy

PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=12)


def disturbed(policy: Policy) -> Policy:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in policy.trainable_parameters().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return policy


def test_a_missing_vllm_is_named_with_its_extra_and_its_script() -> None:
    with pytest.raises(ConfigError, match=r"grpo-toolkit\[vllm\].*install_vllm_cpu\.sh"):
        check_installed(["no-such-distribution"])


def test_a_vllm_before_0_18_is_refused() -> None:
    check_version("0.18.0")
    check_version("0.32.0+cpu")
    with pytest.raises(ConfigError, match=r"0\.17\.1 is installed.*0\.18"):
        check_version("0.17.1")


def test_a_law_survives_its_text() -> None:
    law = replace(
        PARAMS, top_p=0.9, banned=((3,), (4, 5)), custom=(("a.b:C", "{}"),), penalties_over="both", min_new_tokens=2
    )
    assert law_of(law_text(law)) == law
    with pytest.raises(ValueError, match="no sampling law"):
        law_of(json.dumps({"temprature": 1.0}))
    with pytest.raises(ValueError, match="no sampling law"):
        law_of("[]")


def test_the_filters_go_to_vllm_unless_its_order_is_another() -> None:
    filtered = native_arguments(replace(PARAMS, top_p=0.9, top_k=7), seed=1)
    assert (filtered["top_p"], filtered["top_k"], filtered["min_p"]) == (0.9, 7, 0.0)
    assert extra_arguments(replace(PARAMS, top_p=0.9, top_k=7)) == {}
    both = replace(PARAMS, top_p=0.9, min_p=0.1)
    assert native_arguments(both, seed=1) == {**native_arguments(PARAMS, seed=1)}
    assert law_of(extra_arguments(both)[LAW_KEY]) == both


def test_the_end_tokens_are_the_laws_and_not_the_models() -> None:
    arguments = native_arguments(replace(PARAMS, end_token_ids=(5, 9)), seed=1)
    assert arguments["stop_token_ids"] == [5, 9]
    assert arguments["ignore_eos"] is True


def test_a_temperature_that_vllm_would_change_is_refused() -> None:
    check_law(replace(PARAMS, temperature=0.0))
    check_law(replace(PARAMS, temperature=0.01))
    with pytest.raises(ConfigError, match=r"0\.005.*0\.01"):
        check_law(replace(PARAMS, temperature=0.005))


def test_auto_syncs_merged_weights_on_a_cpu_and_the_adapter_on_a_gpu(tiny_model_dir: Path) -> None:
    with_adapter, full = make_policy(tiny_model_dir), make_policy(tiny_model_dir, trainable=full_training())
    assert choose_sync("auto", with_adapter, is_cpu=True) == "merged"
    assert choose_sync("auto", with_adapter, is_cpu=False) == "adapter"
    assert choose_sync("adapter", with_adapter, is_cpu=True) == "adapter"
    assert choose_sync("auto", full, is_cpu=False) == "merged"
    with pytest.raises(ConfigError, match="not one adapter of one rank"):
        choose_sync("adapter", full, is_cpu=False)


@pytest.mark.parametrize("trainable", [LoraTrainable(rank=4, alpha=8), full_training()])
def test_a_merged_sync_carries_every_weight_of_the_plain_model(tiny_model_dir: Path, trainable: LoraTrainable) -> None:
    policy = disturbed(make_policy(tiny_model_dir, trainable=trainable))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    sent = dict(whole_weights(policy, torch.float32))
    assert list(sent) == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict(sent, strict=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(plain(ids).logits, policy.causal_lm(ids).logits, atol=1e-5)


def test_an_adapter_is_named_as_peft_saves_it(tiny_model_dir: Path) -> None:
    adapter = adapter_of(make_policy(tiny_model_dir))
    assert (adapter.rank, adapter.alpha) == (4, 8.0)
    assert adapter.tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape == (4, 32)
    assert len(adapter.tensors) == 2 * 7 * 2  # layers, linear modules, A and B


def test_a_checksum_knows_values_names_and_dtypes_but_no_order() -> None:
    def of(*weights: tuple[str, torch.Tensor]) -> str:
        checksum = Checksum()
        assert list(checksum.counted(weights)) == list(weights)
        return checksum.value()

    a, b = ("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([3.0]))
    assert of(a, b) == of(b, a)
    smallest_change = ("a", torch.nextafter(a[1], torch.tensor(9.0)))
    others = [of(a), of(smallest_change, b), of(("c", a[1]), b), of(("a", a[1].bfloat16()), b)]
    assert len({of(a, b), *others}) == 5


def test_a_deadline_names_what_it_waited_for() -> None:
    deadline = Deadline(0.0)
    late = pytest.raises(EngineError, match="sync_timeout_s = 0 s; it waited for the engine to wake")
    with late, deadline.phase("the engine to wake"):
        pass
    with pytest.raises(EngineError, match="waited for"):
        list(deadline.watched([("a", torch.zeros(1))]))
    with Deadline(60.0).phase("nothing"):
        pass


def test_a_report_of_other_weights_or_of_none_read_back_stops_the_run() -> None:
    good = SyncReport(version=2, checksum="ab", num_checked=5)
    check_report(good, version=2, checksum="ab")
    for bad in (replace(good, version=1), replace(good, checksum="cd")):
        with pytest.raises(EngineError, match="not the policy's"):
            check_report(bad, version=2, checksum="ab")
    with pytest.raises(EngineError, match="none of them could be read back"):
        check_report(replace(good, num_checked=0), version=2, checksum="ab")
