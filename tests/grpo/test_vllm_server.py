"""The vLLM server engine against loopback servers without vLLM: what goes over, and what comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import END, encoded, full_training, make_policy
from vllm_double import ADAPTER, Exchange, VllmDouble, completion
from vllm_server_builders import PARAMS, Bench, Open, sample

from grpo.errors import EngineError
from grpo.rollout.canary import check_engine_follows
from grpo.rollout.vllm_law import LAW_KEY, law_of
from grpo.runtime.seeding import derived_seed


@pytest.fixture(scope="module")
def bench(tiny_model_dir: Path) -> Bench:
    return Bench.of(tiny_model_dir)


@pytest.fixture
def server(bench: Bench) -> Iterator[VllmDouble]:
    with VllmDouble(bench.facts) as server:
        yield server


@pytest.fixture
def pair(bench: Bench) -> Iterator[tuple[VllmDouble, VllmDouble]]:
    with VllmDouble(bench.facts, delay_s=0.01) as one, VllmDouble(bench.facts, delay_s=0.01) as other:
        yield one, other


@pytest.fixture
def open_engine(bench: Bench) -> Iterator[Open]:
    with bench.engines() as build:
        yield build


# --- sampling


def test_token_ids_go_over_and_come_back_each_row_with_its_seed(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    server.asked.clear()
    prompts = encoded(3)
    groups = sample(engine, prompts, k=2)
    seeds = {(prompt.prompt.id, k): derived_seed(7, prompt.prompt.id, k) for prompt in prompts for k in (0, 1)}
    sent = {body["seed"]: body for body in server.rows()}
    assert len(server.rows()) == len(sent) == 6
    for group, prompt in zip(groups, prompts, strict=True):
        assert group.prompt_token_ids == prompt.token_ids
        for k, row in enumerate(group.completions):
            body = sent[seeds[prompt.prompt.id, k]]
            assert body["prompt"] == list(prompt.token_ids)
            assert (body["n"], body["max_tokens"], body["stop_token_ids"], body["logprobs"]) == (1, 12, [END], 0)
            (choice,) = completion(body, sampled_from=server.sampled_from)["choices"]
            assert list(row.token_ids) == choice["token_ids"]
            assert list(row.sampler_logprobs) == choice["logprobs"]["token_logprobs"]
            assert row.finish_reason == choice["finish_reason"]
    assert {c.finish_reason for group in groups for c in group.completions} == {"stop", "length"}


def test_the_law_goes_over_with_every_row(server: VllmDouble, open_engine: Open) -> None:
    law = replace(PARAMS, temperature=0.7, top_p=0.9, presence_penalty=0.5)
    sample(open_engine(server), encoded(1), params=law)
    for body in server.rows()[1:]:  # the first is the probe
        assert (body["temperature"], body["top_p"]) == (0.7, 0.9)
        assert law_of(body["vllm_xargs"][LAW_KEY]) == law


def test_groups_leave_while_others_are_sampled(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    first, second = encoded(2)
    may_go = threading.Event()

    def held(exchange: Exchange) -> None:
        if exchange.asked.body["prompt"] == list(second.token_ids):
            assert may_go.wait(10)
        exchange.usual()

    server.instead["/v1/completions"] = held
    groups = engine.sample([second, first], 2, params=PARAMS, seed=0)
    assert next(groups).prompt == first.prompt
    may_go.set()
    assert [group.prompt for group in groups] == [second.prompt]


def test_rows_are_spread_over_two_servers_and_a_group_stays_on_one(
    pair: tuple[VllmDouble, VllmDouble], open_engine: Open, server: VllmDouble
) -> None:
    engine = open_engine(*pair)
    for each in pair:
        each.asked.clear()
    prompts = encoded(12)
    groups = sample(engine, prompts)
    counts = [len(each.rows()) for each in pair]
    assert sum(counts) == 48
    assert min(counts) >= 16
    prompts_of = [{tuple(body["prompt"]) for body in each.rows()} for each in pair]
    assert not prompts_of[0] & prompts_of[1]
    assert groups == sample(open_engine(server), prompts)  # whoever answers


def test_no_server_has_more_rows_at_once_than_it_may(pair: tuple[VllmDouble, VllmDouble], open_engine: Open) -> None:
    sample(open_engine(*pair, max_connections=3), encoded(8))
    assert [each.most_running for each in pair] == [3, 3]


def test_closing_the_iterator_ends_what_the_servers_do_for_it(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    first, *others = encoded(4)

    def slow(exchange: Exchange) -> None:
        server.delay_s = 0.0 if exchange.asked.body["prompt"] == list(first.token_ids) else 30.0
        exchange.usual()

    server.instead["/v1/completions"] = slow
    groups = engine.sample([first, *others], 2, params=PARAMS, seed=0)
    assert next(groups).prompt == first.prompt
    groups.close()  # pyright: ignore[reportAttributeAccessIssue]
    end = threading.Event()
    for _ in range(400):
        if server.num_running == 0:
            break
        end.wait(0.01)
    assert server.num_running == 0
    assert server.num_left == 6
    server.instead.clear()
    server.delay_s = 0.0
    assert len(sample(engine, others)) == 3


# --- weights


def test_a_merged_sync_pauses_verifies_forgets_and_resumes_on_every_server(
    pair: tuple[VllmDouble, VllmDouble], open_engine: Open, bench: Bench, tmp_path: Path
) -> None:
    engine = open_engine(*pair, transfer_dir=tmp_path)
    assert engine.sync == "merged"
    for each in pair:
        each.asked.clear()
    engine.load_weights(bench.policy)
    for each in pair:
        assert each.paths() == [
            "/pause", "grpo_load_weights_file", "/reset_prefix_cache", "grpo_weight_version", "/resume",
        ]  # fmt: skip
        assert "mode=wait" in each.asked[0].query
        assert not each.is_paused
    assert pair[0].weights == pair[1].weights
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_sent_alone_under_one_name_that_every_row_asks_for(
    server: VllmDouble, open_engine: Open, bench: Bench
) -> None:
    engine = open_engine(server, sync="auto")
    assert engine.sync == "adapter"
    assert server.paths().count("grpo_check_base_file") == server.paths().count("/v1/load_lora_adapter") == 1
    engine.load_weights(bench.policy)
    sample(engine, encoded(1))
    assert server.paths().count("grpo_load_adapter_file") == 2
    assert server.paths().count("/v1/load_lora_adapter") == 1
    assert "grpo_load_weights_file" not in server.paths()
    assert {body["model"] for body in server.rows()} == {ADAPTER}


def test_an_adapter_that_an_earlier_run_has_made_known_is_taken_over(server: VllmDouble, open_engine: Open) -> None:
    server.has_adapter = True
    assert open_engine(server, sync="adapter").sync == "adapter"


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"max_lora_rank": None},
        {"max_lora_rank": 2},
        {"num_shards": 2},
        {"has_base_weights": False},
    ],
)
def test_auto_syncs_merged_weights_where_an_adapter_is_slow_or_impossible(
    server: VllmDouble, open_engine: Open, change: dict[str, Any]
) -> None:
    server.facts |= change
    assert open_engine(server, sync="auto").sync == "merged"


def test_a_policy_whose_weights_all_learn_is_synced_whole(
    server: VllmDouble, open_engine: Open, tiny_model_dir: Path
) -> None:
    assert open_engine(server, of=make_policy(tiny_model_dir, trainable=full_training()), sync="auto").sync == "merged"


def test_the_canary_passes_servers_that_take_every_sync_and_finds_the_one_that_does_not(
    pair: tuple[VllmDouble, VllmDouble], open_engine: Open, bench: Bench
) -> None:
    check_engine_follows(open_engine(*pair), bench.policy, encoded(1)[0], PARAMS)
    stale, _ = pair
    stale.ignores_weights = True
    with pytest.raises(EngineError, match="VllmServerEngine does not follow the policy"):
        check_engine_follows(open_engine(stale), bench.policy, encoded(1)[0], PARAMS)
