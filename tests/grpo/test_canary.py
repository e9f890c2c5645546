"""An engine that does not sample from the policy's weights is found before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import END, encoded, make_policy
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo.config import FullTrainable, LoraTrainable, TrainableConfig
from grpo.errors import EngineError
from grpo.rollout.base import SamplingParams
from grpo.rollout.canary import check_engine_follows
from grpo.rollout.transformers_engine import TransformersEngine
from grpo.runtime.policy import Policy

PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=12)


class StaleEngine(TransformersEngine):
    """Its syncs do nothing: it samples from the first weights for ever."""

    def load_weights(self, policy: Policy) -> None:
        pass


class StickyEngine(TransformersEngine):
    """Takes two syncs and no more, as an engine that goes on reading a cache made with other weights."""

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        self._num_syncs = 0
        super().__init__(policy, tokenizer)

    def load_weights(self, policy: Policy) -> None:
        self._num_syncs += 1
        if self._num_syncs <= 2:  # the true weights, the disturbed ones
            super().load_weights(policy)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize("trainable", [LoraTrainable(rank=4, alpha=8), FullTrainable(type="full")])
def test_an_engine_that_takes_every_sync_passes_and_the_policy_is_untouched(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase, trainable: TrainableConfig
) -> None:
    policy = make_policy(tiny_model_dir, trainable=trainable)
    before = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}
    check_engine_follows(TransformersEngine(policy, tokenizer), policy, encoded(1)[0], PARAMS)
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(parameter, before[name]), name


def test_an_engine_whose_load_weights_does_nothing_is_refused(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = make_policy(tiny_model_dir)
    with pytest.raises(EngineError, match="StaleEngine does not follow the policy"):
        check_engine_follows(StaleEngine(policy, tokenizer), policy, encoded(1)[0], PARAMS)


def test_an_engine_that_keeps_something_of_the_old_weights_is_refused(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = make_policy(tiny_model_dir)
    with pytest.raises(EngineError, match="does not come back to the policy's weights"):
        check_engine_follows(StickyEngine(policy, tokenizer), policy, encoded(1)[0], PARAMS)


def test_the_policy_is_restored_where_the_engine_fails(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = make_policy(tiny_model_dir)
    engine = TransformersEngine(policy, tokenizer)
    before = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}

    class Failing(TransformersEngine):
        def __init__(self) -> None:
            self._num_syncs = 0

        def load_weights(self, policy: Policy) -> None:
            self._num_syncs += 1
            if self._num_syncs == 2:
                raise RuntimeError("the server is gone")

        sample = engine.sample

    with pytest.raises(RuntimeError, match="the server is gone"):
        check_engine_follows(Failing(), policy, encoded(1)[0], PARAMS)
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(parameter, before[name]), name
