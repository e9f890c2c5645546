"""The vLLM server engine against loopback servers without vLLM: what goes over, what is refused, what breaks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import END, encoded, full_training, make_policy
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm_double import ADAPTER, Exchange, VllmDouble, completion

from grpo.config import VllmServerConfig
from grpo.errors import ConfigError, EngineError
from grpo.prompts import EncodedPrompt
from grpo.rollout.base import SamplingParams
from grpo.rollout.canary import check_engine_follows
from grpo.rollout.vllm_facts import ServerFacts, shape_of
from grpo.rollout.vllm_fleet import Fleet
from grpo.rollout.vllm_http import ServerClient
from grpo.rollout.vllm_law import LAW_KEY, PROCESSOR, law_of
from grpo.rollout.vllm_loop import LoopThread
from grpo.rollout.vllm_server import VllmServerEngine, check_servers
from grpo.runtime.distributed import Ranks
from grpo.runtime.policy import Policy
from grpo.runtime.seeding import derived_seed
from grpo.types import RolloutGroup

PARAMS = SamplingParams(end_token_ids=(END,), max_new_tokens=12)
KEY = "sk-a-secret-key-of-ours"


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return make_policy(tiny_model_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def facts(policy: Policy) -> ServerFacts:
    """Of a server on a GPU, with room for the policy's adapter (rank 4)."""
    return ServerFacts(
        shape=shape_of(policy.causal_lm.config),
        dtype="float32",
        device="cuda",
        max_model_len=256,
        logprobs_mode="processed_logprobs",
        logits_processors=[PROCESSOR],
        max_lora_rank=8,
        num_shards=1,
        has_base_weights=True,
    )


@pytest.fixture
def server(facts: ServerFacts) -> Iterator[VllmDouble]:
    with VllmDouble(facts) as server:
        yield server


@pytest.fixture
def pair(facts: ServerFacts) -> Iterator[tuple[VllmDouble, VllmDouble]]:
    with VllmDouble(facts, delay_s=0.01) as one, VllmDouble(facts, delay_s=0.01) as other:
        yield one, other


Open = Callable[..., VllmServerEngine]


@pytest.fixture
def open_engine(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[Open]:
    """Opens engines, and closes them at the end."""
    engines: list[VllmServerEngine] = []

    def build(
        *servers: VllmDouble,
        of: Policy = policy,
        params: SamplingParams = PARAMS,
        longest_prompt: int = 1,
        **options: Any,
    ) -> VllmServerEngine:
        config = make_config(*servers, **{"sync": "merged", **options})
        arguments: Any = {"params": params, "ranks": Ranks(use_cpu=True), "longest_prompt": longest_prompt}
        engines.append(VllmServerEngine(of, tokenizer, config, **arguments))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def make_config(*servers: VllmDouble, **options: Any) -> VllmServerConfig:
    return VllmServerConfig(**{"type": "vllm_server", "urls": tuple(server.url for server in servers), **options})


def sample(
    engine: VllmServerEngine, prompts: Sequence[EncodedPrompt], *, k: int = 4, params: SamplingParams = PARAMS
) -> list[RolloutGroup]:
    groups = {group.prompt.id: group for group in engine.sample(prompts, k, params=params, seed=7)}
    return [groups[prompt.prompt.id] for prompt in prompts]


def told(error: BaseException) -> str:
    """The error, its notes and everything that it came from, as a traceback would show it."""
    texts: list[str] = []
    link: BaseException | None = error
    while link is not None:
        texts += [str(link), *getattr(link, "__notes__", [])]
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n".join(texts)


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
    pair: tuple[VllmDouble, VllmDouble], open_engine: Open, policy: Policy, tmp_path: Path
) -> None:
    engine = open_engine(*pair, transfer_dir=tmp_path)
    assert engine.sync == "merged"
    for each in pair:
        each.asked.clear()
    engine.load_weights(policy)
    for each in pair:
        assert each.paths() == [
            "/pause", "grpo_load_weights_file", "/reset_prefix_cache", "grpo_weight_version", "/resume",
        ]  # fmt: skip
        assert "mode=wait" in each.asked[0].query
        assert not each.is_paused
    assert pair[0].weights == pair[1].weights
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_sent_alone_under_one_name_that_every_row_asks_for(
    server: VllmDouble, open_engine: Open, policy: Policy
) -> None:
    engine = open_engine(server, sync="auto")
    assert engine.sync == "adapter"
    assert server.paths().count("grpo_check_base_file") == server.paths().count("/v1/load_lora_adapter") == 1
    engine.load_weights(policy)
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
    pair: tuple[VllmDouble, VllmDouble], open_engine: Open, policy: Policy
) -> None:
    check_engine_follows(open_engine(*pair), policy, encoded(1)[0], PARAMS)
    stale, _ = pair
    stale.ignores_weights = True
    with pytest.raises(EngineError, match="VllmServerEngine does not follow the policy"):
        check_engine_follows(open_engine(stale), policy, encoded(1)[0], PARAMS)


def wrong_checksum(exchange: Exchange) -> None:
    version = exchange.asked.body["kwargs"]["version"]
    exchange.reply(200, {"results": [{"version": version, "checksum": "00", "num_checked": 3}]})


def wrong_on_one_worker(exchange: Exchange) -> None:
    usual = exchange.server._rpc("grpo_load_weights_file", exchange.asked.body["kwargs"])
    exchange.reply(200, {"results": [usual, usual | {"version": 1}]})


def says(status: int, body: Any) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.reply(status, body)


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("grpo_load_weights_file", wrong_checksum, "not the policy's"),
        ("grpo_load_weights_file", wrong_on_one_worker, "not the policy's"),
        ("grpo_load_weights_file", says(500, {"error": "no space left"}), "no space left"),
        ("grpo_load_weights_file", says(200, {"results": []}), "no results of its workers"),
        ("grpo_load_weights_file", says(200, {"results": ["fine"]}), "weight sync with fine"),
        ("/reset_prefix_cache", says(200, {"success": False}), "kept its prefix cache"),
        ("grpo_weight_version", says(200, {"results": ["1"]}), "holds weights of version"),
    ],
)
def test_a_sync_that_is_not_taken_whole_stops_the_run_and_nothing_is_sampled_after_it(
    server: VllmDouble, open_engine: Open, policy: Policy, path: str, answer: Callable[[Exchange], None], words: str
) -> None:
    engine = open_engine(server)
    server.instead[path] = answer
    with pytest.raises(EngineError, match=words):
        engine.load_weights(policy)
    assert not server.is_paused  # others may use it
    server.instead.clear()
    with pytest.raises(EngineError, match="last weight sync failed"):
        sample(engine, encoded(1))
    engine.load_weights(policy)
    assert len(sample(engine, encoded(1))) == 1


@pytest.mark.parametrize(
    ("path", "waited_for"),
    [("/pause", "pause"), ("grpo_load_weights_file", "take the weights"), ("/resume", "resume")],
)
def test_a_sync_that_is_late_names_the_server_and_what_it_waited_for(
    server: VllmDouble, open_engine: Open, policy: Policy, path: str, waited_for: str
) -> None:
    engine = open_engine(server, sync_timeout_s=0.3)
    server.instead[path] = lambda exchange: exchange.wait(30.0) and None
    with pytest.raises(EngineError, match=rf"sync_timeout_s = 0\.3 s; it waited for {server.url} to {waited_for}"):
        engine.load_weights(policy)


def test_weights_that_cannot_be_written_stop_the_run_and_name_the_folder(
    server: VllmDouble, open_engine: Open, policy: Policy, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    engine = open_engine(server, transfer_dir=folder)
    folder.rmdir()
    with pytest.raises(EngineError, match=r"could not be written to .*shared.*transfer_dir"):
        engine.load_weights(policy)


# --- servers that change under the run


def test_a_server_that_another_run_has_synced_is_not_sampled_from(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    open_engine(server)
    with pytest.raises(EngineError, match="another run has synced its own"):
        sample(engine, encoded(1))


def test_a_server_started_anew_while_it_is_sampled_from_is_found(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    groups = engine.sample(encoded(2), 2, params=PARAMS, seed=0)
    next(groups)
    server.weights = {"version": None, "checksum": ""}
    with pytest.raises(EngineError, match=r"holds weights of version \[None\]"):
        list(groups)


def test_the_rows_of_a_killed_server_are_sampled_by_another(
    pair: tuple[VllmDouble, VllmDouble], open_engine: Open, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(*pair)
    prompts = encoded(6)
    expected = sample(engine, prompts)
    dying, _ = pair
    dying.delay_s = 30.0
    threading.Timer(0.1, dying.kill).start()
    with caplog.at_level(logging.WARNING):
        assert sample(engine, prompts) == expected
    assert f"{dying.url} is left out until the next weight sync" in caplog.text
    engine.load_weights(policy)  # it is still away
    assert len(sample(engine, prompts)) == 6
    dying.start_anew()
    dying.delay_s = 0.01
    engine.load_weights(policy)
    assert f"{dying.url} is back" in caplog.text
    dying.asked.clear()
    assert sample(engine, prompts) == expected
    assert dying.rows()


def test_the_last_server_that_dies_stops_the_run_and_is_named(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    server.delay_s = 30.0
    threading.Timer(0.1, server.kill).start()
    with pytest.raises(EngineError, match=rf"no vLLM server is left to sample from: {server.url}"):
        sample(engine, encoded(2))


def test_a_connection_that_breaks_once_is_made_again(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server)
    expected = sample(engine, encoded(1))
    seen: set[int] = set()

    def once(exchange: Exchange) -> None:
        seed = exchange.asked.body["seed"]
        (exchange.usual if seed in seen else exchange.half)()
        seen.add(seed)

    server.instead["/v1/completions"] = once
    assert sample(engine, encoded(1)) == expected


def changed(**fields: Any) -> Callable[[Exchange], None]:
    """A good answer but for these fields of its one choice; a function is given the good value."""

    def answer(exchange: Exchange) -> None:
        body = completion(exchange.asked.body)
        choice = body["choices"][0]
        for name, value in fields.items():
            choice[name] = value(choice[name]) if callable(value) else value
        exchange.reply(200, body)

    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Exchange.half, "broke the connection"),
        (Exchange.reset, "broke the connection"),
        (says(500, {"error": "EngineDeadError"}), "answered 500: .*EngineDeadError"),
        (says(400, {"error": "too long"}), "answered 400: .*too long"),
        (says(200, b"<html>"), "answered no JSON: <html>"),
        (says(200, {"choices": []}), "without token ids"),
        (says(200, [1]), "without token ids"),
        (changed(token_ids=None), "without token ids"),
        (changed(logprobs=None), "without token ids"),
        (changed(logprobs={"token_logprobs": [None]}), "without token ids"),
        (changed(logprobs={"token_logprobs": [-1.0]}), "no log-probabilities"),
        (changed(logprobs=lambda good: {"token_logprobs": [-9999.0 for _ in good["token_logprobs"]]}), "no log-prob"),
        (changed(logprobs=lambda good: {"token_logprobs": [0.5 for _ in good["token_logprobs"]]}), "no log-prob"),
        (changed(prompt_token_ids=[1]), "another prompt"),
        (changed(finish_reason="abort"), "gave up a completion after .* tokens: abort"),
        (changed(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="length"), "gave up .* after 1 tok"),
    ],
)
def test_what_is_not_a_whole_completion_stops_the_run(
    server: VllmDouble, open_engine: Open, answer: Callable[[Exchange], None], words: str
) -> None:
    engine = open_engine(server)
    server.instead["/v1/completions"] = answer
    with pytest.raises(EngineError, match=words):
        sample(engine, encoded(1))
    server.instead.clear()
    engine.close()
    engine.close()


def test_a_completion_that_takes_too_long_stops_the_run(server: VllmDouble, open_engine: Open) -> None:
    engine = open_engine(server, request_timeout_s=0.2)
    server.delay_s = 30.0
    with pytest.raises(EngineError, match=rf"{server.url}/v1/completions did not answer within 0\.2 s"):
        sample(engine, encoded(1))


def test_an_endless_answer_is_cut_off(server: VllmDouble) -> None:
    loop, config = LoopThread(), make_config(server)
    fleet = Fleet(config, ServerClient(config, max_reply_bytes=1000))
    server.instead["/version"] = says(200, b" " * 1001)
    try:
        with pytest.raises(ConfigError, match="answered more than 1000 bytes"):
            loop.run(fleet.ask_facts())
    finally:
        loop.run(fleet.aclose())
        loop.close()


def test_closing_ends_the_thread_and_a_closed_engine_samples_nothing(server: VllmDouble, open_engine: Open) -> None:
    threads = threading.active_count()
    engine = open_engine(server)
    engine.close()
    assert "vllm-server-engine" not in {thread.name for thread in threading.enumerate()}, threads
    with pytest.raises(EngineError):
        sample(engine, encoded(1))


# --- refused before the first step


def no_rpc(exchange: Exchange) -> None:
    exchange.reply(404, {"detail": "Not Found"})


Spoil = Callable[[VllmDouble], None]


def fact(**changes: Any) -> Spoil:
    return lambda server: server.facts.update(changes)


def instead(path: str, answer: Callable[[Exchange], None]) -> Spoil:
    return lambda server: server.instead.update({path: answer})


def old(server: VllmDouble) -> None:
    server.vllm_version = "0.17.3"


def without_model(server: VllmDouble) -> None:
    server.facts["shape"] = server.facts["shape"] | {"vocab_size": 49152}


def keyed(server: VllmDouble) -> None:
    server.key = "another key altogether"


REFUSED: dict[str, tuple[Spoil, dict[str, Any], str]] = {
    "nobody there": (VllmDouble.kill, {}, "no vLLM server answers at .*vllm_serve"),
    "no vLLM": (instead("/version", no_rpc), {}, "is no vLLM server .*404"),
    "another service": (instead("/version", says(200, {"version": [1]})), {}, "is no vLLM server"),
    "no version": (instead("/version", says(200, {"version": "latest"})), {}, "is no vLLM server"),
    "elsewhere": (instead("/version", lambda x: x.reply(307, b"", Location="http://a/")), {}, "answered 307"),
    "too old": (old, {}, r"runs vLLM 0\.17\.3, but 0\.18 or newer"),
    "plain vllm serve": (instead("grpo_facts", no_rpc), {}, "cannot take weights"),
    "without our worker": (instead("grpo_facts", says(500, {"error": "no attribute"})), {}, "cannot take weights"),
    "an older version of ours": (instead("grpo_facts", says(200, {"results": [{"a": 1}]})), {}, "not started by this"),
    "another key": (keyed, {}, "does not take our key .*rollout.engine.api_key"),
    "another model": (without_model, {}, "serves another model.*vocab_size 49152 where the recipe's has"),
    "another dtype": (fact(dtype="bfloat16"), {}, "computes in bfloat16, the trainer in float32"),
    "raw log-probabilities": (fact(logprobs_mode="raw_logprobs"), {}, "answers raw_logprobs.*vllm_serve"),
    "no processors": (fact(logits_processors=[]), {}, "vllm_serve"),
    "no room for a completion": (fact(max_model_len=12), {}, "room for 12 tokens.*max_new_tokens"),
    "no room for a prompt": (fact(max_model_len=30), {"longest_prompt": 19}, "prompt of 19 tokens .* 30 tokens"),
    "no LoRA": (fact(max_lora_rank=None), {"sync": "adapter"}, "sync is adapter, but .*--max-lora-rank"),
    "a small LoRA": (fact(max_lora_rank=2), {"sync": "adapter"}, "no room for one of rank 4"),
    "shards": (fact(num_shards=2), {"sync": "adapter"}, "split over"),
    "no base": (fact(has_base_weights=False), {"sync": "adapter"}, "base model's weights"),
    "a law that it does not take": (
        instead("/v1/completions", says(400, {"error": "'mine:Own' is not among those"})),
        {},
        "cannot sample as the recipe asks.*mine:Own.*--processor",
    ),
    "no token ids": (instead("/v1/completions", changed(token_ids=None)), {}, "without token ids.*vllm_serve"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_that_does_not_fit_is_bad_input(server: VllmDouble, open_engine: Open, case: str) -> None:
    spoil, options, words = REFUSED[case]
    spoil(server)
    with pytest.raises(ConfigError, match=words):
        open_engine(server, **options)
    assert "vllm-server-engine" not in {thread.name for thread in threading.enumerate()}


def test_one_of_two_servers_that_does_not_fit_is_named(pair: tuple[VllmDouble, VllmDouble], open_engine: Open) -> None:
    _, unfit = pair
    unfit.facts["dtype"] = "float16"
    with pytest.raises(ConfigError, match=f"{unfit.url} computes in float16"):
        open_engine(*pair)


def test_an_adapter_for_another_base_model_is_refused(server: VllmDouble, open_engine: Open) -> None:
    server.instead["grpo_check_base_file"] = says(500, {"error": "the engine's o_proj is not what was sent"})
    with pytest.raises(EngineError, match=r"does not hold the weights of the recipe's model.*o_proj"):
        open_engine(server, sync="adapter")
    server.instead["grpo_check_base_file"] = says(200, {"results": ["0"]})
    with pytest.raises(EngineError, match="could not compare its base model"):
        open_engine(server, sync="adapter")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"urls": ("ftp://127.0.0.1:1",)}, "must look like"),
        ({"urls": ("http://user:pw@127.0.0.1:1",)}, "must look like"),
        ({"urls": ("http://10.0.0.5:8000",), "transfer_dir": Path("/")}, "another machine, and no https"),
        ({"urls": ("https://gpu.example:8000",)}, "transfer_dir"),
        ({"transfer_dir": Path("/nowhere/at/all")}, "no folder that can be written to"),
        ({"api_key": "env:GRPO_TEST_NO_SUCH_KEY"}, "GRPO_TEST_NO_SUCH_KEY, which is not set"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anyone_is_asked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_servers(
            VllmServerConfig(**{"type": "vllm_server", "urls": ("http://127.0.0.1:9",), **options}), max_new_tokens=4
        )


def test_servers_are_checked_before_a_model_is_read(server: VllmDouble) -> None:
    check_servers(make_config(server), max_new_tokens=255)
    with pytest.raises(ConfigError, match="room for 256 tokens"):
        check_servers(make_config(server), max_new_tokens=256)
    assert server.rows() == []


# --- the key


def test_the_key_goes_over_and_into_no_error(
    server: VllmDouble, open_engine: Open, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    monkeypatch.setenv("GRPO_TEST_KEY", KEY)
    server.key = KEY
    engine = open_engine(server, api_key="env:GRPO_TEST_KEY")
    assert {asked.headers["authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    assert len(sample(engine, encoded(1))) == 1
    echoes: list[Callable[[Exchange], None]] = [
        says(500, {"seen": KEY}),
        says(400, {"seen": KEY}),
        says(200, KEY.encode()),
        says(200, {"choices": [{"token_ids": [KEY]}]}),
        changed(finish_reason=KEY),
    ]
    for echo in echoes:
        server.instead["/v1/completions"] = echo
        with pytest.raises(EngineError) as caught:
            sample(engine, encoded(1))
        assert KEY not in told(caught.value)
        assert "[key]" in told(caught.value)
        engine.load_weights(policy)
    server.instead = {"grpo_load_weights_file": says(200, {"results": [{KEY: KEY}]})}
    with pytest.raises(EngineError) as caught:
        engine.load_weights(policy)
    assert KEY not in told(caught.value)
    server.instead = {"grpo_facts": says(200, {"results": [{KEY: KEY}]})}
    with pytest.raises(ConfigError) as refused:
        open_engine(server, api_key="env:GRPO_TEST_KEY")
    assert KEY not in told(refused.value)


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    server: VllmDouble, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_TEST_KEY", "two words\n")
    with pytest.raises(ConfigError, match="GRPO_TEST_KEY") as refused:
        open_engine(server, api_key="env:GRPO_TEST_KEY")
    assert "two words" not in told(refused.value)
