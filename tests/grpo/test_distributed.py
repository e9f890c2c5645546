"""Two processes are one run: what they share out, add up and tell each other, and the gradient they come to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from builders import make_batch, make_group, make_policy, make_updater
from rank_processes import RankPair

from grpo.config import ClippedLossConfig, GradientsConfig, UpdateConfig
from grpo.errors import ConfigError, RunStopped, TooFewVerdicts
from grpo.runtime.distributed import Ranks
from grpo.runtime.launch import count_asked_for, is_alone_of_several
from grpo.types import ScoredGroup
from grpo.update.statistics import WindowStatistics
from grpo.update.step import UpdateStats


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPair]:
    with RankPair(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


# --- sharing out, adding up, telling


def facts() -> dict[str, Any]:
    ranks = Ranks(use_cpu=True)
    reduce = ranks.all_reduce
    assert reduce is not None
    mine = torch.tensor([1.0, 10.0]) * (ranks.index + 1)
    return {
        "own": ranks.own("abcde"),
        "own of one": ranks.own("a"),
        "gathered": ranks.gather([f"{ranks.index}.{n}" for n in range(ranks.index + 1)]),
        "sum": ranks.sum(ranks.index + 0.5),
        "any": (ranks.any(ranks.index == 1), ranks.any(False)),
        "reduced": reduce(mine).tolist(),
        "not changed": mine.tolist(),
        "main": ranks.on_main(lambda: ranks.index + 7),
        "is main": ranks.is_main,
    }


def test_items_are_shared_out_and_come_together_in_rank_order_on_both(two: RankPair) -> None:
    first, second = two.run(facts)
    assert (first.pop("own"), second.pop("own")) == (["a", "c", "e"], ["b", "d"])
    assert (first.pop("own of one"), second.pop("own of one")) == (["a"], [])
    assert (first.pop("is main"), second.pop("is main")) == (True, False)
    assert (first.pop("not changed"), second.pop("not changed")) == ([1, 10], [2, 20])
    assert first == second
    assert first == {
        "gathered": ["0.0", "1.0", "1.1"],
        "sum": 2.0,  # 0.5 + 1.5
        "any": (True, False),
        "reduced": [3.0, 30.0],  # 1 + 2, 10 + 20
        "main": 7,
    }


class Unreadable(Exception):
    """Is pickled without complaint and cannot be read: its arguments are not those that it was made of."""

    def __init__(self, *, status: int) -> None:
        super().__init__(f"status {status}")


def fail(where: Literal["on_main", "gather_from", "together"], rank: int, kind: str) -> str:
    ranks = Ranks(use_cpu=True)

    def do() -> list[int]:
        if ranks.index == rank:
            error = Unreadable(status=503) if kind == "unreadable" else TooFewVerdicts("silence")
            error.add_note("ask again")
            raise error
        return [ranks.index]

    try:
        getattr(ranks, where)(do)
    except (Unreadable, TooFewVerdicts, RuntimeError) as exc:
        # whoever goes on after an error can still talk to the others: nothing of it is left on the way
        return f"{type(exc).__name__}: {exc} {exc.__notes__ if kind == 'plain' else ''} {ranks.sum(1)}"
    return "no error"


@pytest.mark.parametrize(("where", "rank"), [("on_main", 0), ("gather_from", 0), ("gather_from", 1), ("together", 1)])
def test_what_one_rank_raises_is_raised_on_both(two: RankPair, where: str, rank: int) -> None:
    assert two.run(fail, where, rank, "plain") == ["TooFewVerdicts: silence ['ask again'] 2.0"] * 2


@pytest.mark.parametrize(("where", "rank"), [("on_main", 0), ("gather_from", 1)])
def test_an_error_that_cannot_be_read_elsewhere_is_told_in_words(two: RankPair, where: str, rank: int) -> None:
    answers = two.run(fail, where, rank, "unreadable")
    assert answers[rank] == "Unreadable: status 503  2.0"
    assert answers[1 - rank] == f"RuntimeError: rank {rank} failed: Unreadable: status 503  2.0"


def compare(differs: bool) -> None:
    ranks = Ranks(use_cpu=True)
    second = torch.zeros(3, dtype=torch.bfloat16)
    if differs and ranks.index == 1:
        second[2] = 1e-30
    ranks.check_equal({"first": torch.ones(()), "second": second})


def test_parameters_that_differ_in_one_bit_are_named_on_both_ranks(two: RankPair) -> None:
    assert two.run(compare, False) == [None, None]
    for answer in two.run(compare, True):
        assert isinstance(answer, RunStopped)
        assert "copies of second differ: rank 1" in str(answer)


def test_statistics_of_two_ranks_are_those_of_all_micro_batches(two: RankPair) -> None:
    first, second = two.run(merge)
    assert first == second
    assert first == {
        "means": {"entropy": (3.0 + 4.0) / (2 + 5), "only": 6.0},  # never the mean of the means 1.5 and 0.8
        "observed": {"a": 0.25},
        "rows": {"a": 3, "b": 4},
        "kl_max": {"a": 2.0, "b": 1.0},
        "forced": 3,
        "median": pytest.approx(torch.tensor(0.3).exp().item()),  # of 0.1, 0.3, 0.5
    }


def merge() -> dict[str, Any]:
    ranks = Ranks(use_cpu=True)
    window = WindowStatistics()
    if ranks.index == 0:
        window.means.add("entropy", 3.0, 2)
        window.observed.add("a", 1.0, 4)
        window.num_scored_rows, window.kl_max, window.num_forced = {"a": 3}, {"a": 2.0}, 1
        window.sampler_gaps = [torch.tensor([0.5, 0.1])]
    else:
        window.means.add("entropy", 4.0, 5)
        window.means.add("only", 6.0, 1)
        window.num_scored_rows, window.kl_max, window.num_forced = {"b": 4}, {"a": 0.5, "b": 1.0}, 2
        window.sampler_gaps = [torch.tensor([0.3])]
    whole = window.merged(ranks)
    return {
        "means": whole.means.means(),
        "observed": whole.observed.means(),
        "rows": whole.num_scored_rows,
        "kl_max": whole.kl_max,
        "forced": whole.num_forced,
        "median": whole.sampler_ratio(0.5),
    }


# --- one process


def test_one_process_sends_nothing_and_may_be_asked_for_twice_with_another_device() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranks = Ranks(use_cpu=True)
        again = Ranks()
    for each in (ranks, again):
        assert (each.index, each.count, each.is_main, each.all_reduce) == (0, 1, True, None)
        assert (each.own([1, 2]), each.gather([1, 2]), each.gather_from(lambda: [3])) == ([1, 2], [1, 2], [3])
        assert (each.sum(2.5), each.any(True), each.on_main(lambda: 4), each.together(lambda: 5)) == (2.5, True, 4, 5)


def test_a_rank_that_has_not_found_the_others_is_no_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    Ranks(use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match="started 2 processes, but this one has joined 1"):
        Ranks(use_cpu=True)


# --- the launcher that starts one process of several


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"ACCELERATE_USE_CPU": "True"}, False),  # asked for one
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}, False),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "PMI_SIZE": "2"}, False),  # mpirun
        ({"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1"}, False),
        ({"MASTER_ADDR": "node7"}, False),
        ({}, False),
    ],
)
def test_a_process_that_was_to_be_one_of_several_sees_that_it_is_alone(
    environment: dict[str, str], expected: bool
) -> None:
    assert is_alone_of_several(environment) is expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 2 -m grpo train quickstart", 2),
        ("python -m accelerate.commands.launch --cpu --num-processes=3 -m grpo train quickstart", 3),
        ("python /bin/accelerate launch --cpu --num_processes 4 --num_machines 1 -m grpo train r", 4),
        ("python /bin/accelerate launch --cpu --num_processes 4 --num_machines 2 -m grpo train r", None),
        ("python /bin/accelerate launch --cpu -m grpo train r --num_processes 2", None),  # not the launcher's
        ("bash", None),
        ("", None),
    ],
)
def test_how_many_were_asked_for_is_read_off_the_launchers_command(command: str, expected: int | None) -> None:
    assert count_asked_for(command.split()) == expected


# --- the gradient


def groups_of(case: str) -> list[ScoredGroup]:
    """Three, of which the first rank has two, or one. Each has rows of its own lengths."""
    groups = [
        make_group([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.3}, {"a": 0.5, "b": 1.0}], lengths=[2, 7, 4], seed=1),
        make_group([{"a": 0.2}, {"a": 0.9}, {"a": None}], lengths=[9, 1, 3], prompt_length=11, seed=2),
        make_group([{"b": 0.0}, {"b": 1.0}, {"b": 1.0}], lengths=[5, 6, 2], prompt_length=3, seed=3),
    ]
    return groups if case == "uneven" else groups[:1]


def updated(
    model_dir: str, case: str, update: UpdateConfig, own: list[int] | None, spoilt: int | None
) -> tuple[UpdateStats, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The step's figures, its gradient, and the parameters after it."""
    policy = make_policy(Path(model_dir))
    updater = make_updater(policy, objectives=("a", "b"), update=update, max_grad_norm=1e6)
    groups = groups_of(case)
    batch = make_batch(groups, weights={"a": 1.0, "b": 0.5}, budget=30, own=own)
    if spoilt is not None and int(os.environ["RANK"]) == spoilt:
        batch.micro_batches[0].advantages[0] = torch.nan
        batch.micro_batches[0].shares[0] = torch.nan
    stats = updater.step(batch)
    learning = policy.trainable_parameters()
    gradients = {name: p.grad.clone() for name, p in learning.items() if p.grad is not None}
    return stats, gradients, {name: p.detach().clone() for name, p in learning.items()}


def updated_here(model_dir: str, case: str, update: UpdateConfig, spoilt: int | None = None) -> Any:
    """This rank's share of the step: every second group."""
    return updated(model_dir, case, update, Ranks(use_cpu=True).own(range(len(groups_of(case)))), spoilt)


@pytest.mark.parametrize("case", ["uneven", "one rank has nothing"])
@pytest.mark.parametrize(
    "update",
    [
        *(UpdateConfig(loss=ClippedLossConfig(type=name)) for name in ("dapo", "grpo", "dr_grpo", "bnpo")),
        UpdateConfig(gradients=GradientsConfig(method="pcgrad")),
        UpdateConfig(gradients=GradientsConfig(method="cagrad"), iterations=2),
    ],
    ids=["dapo", "grpo", "dr_grpo", "bnpo", "pcgrad", "cagrad, two windows"],
)
def test_two_ranks_come_to_the_gradient_of_one(
    update: UpdateConfig, case: str, two: RankPair, tiny_model_dir: Path
) -> None:
    (first_stats, first, first_after), (second_stats, second, second_after) = two.run(
        updated_here, str(tiny_model_dir), case, update
    )
    stats, alone, _ = updated(str(tiny_model_dir), case, update, None, None)
    scale = max(float(gradient.abs().max()) for gradient in alone.values())
    assert scale > 1e-4
    for name, gradient in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first_after[name], second_after[name]), name
        torch.testing.assert_close(first[name], gradient, rtol=0, atol=1e-5 * scale)
    assert first_stats == second_stats
    assert first_stats.means == pytest.approx(dict(stats.means), rel=1e-5, abs=1e-7)
    assert first_stats.grad_norm == pytest.approx(stats.grad_norm, rel=1e-5)
    assert first_stats.kl_max == pytest.approx(dict(stats.kl_max), rel=1e-4, abs=1e-7)
    assert first_stats.cosines == pytest.approx(dict(stats.cosines), rel=1e-4)
    assert first_stats.num_tokens == stats.num_tokens


def updated_without_kl(model_dir: str, flat: int | None, skips: bool) -> tuple[UpdateStats, dict[str, torch.Tensor]]:
    """This rank's share of a step without a KL term, where the groups of rank `flat` teach nothing."""
    ranks = Ranks(use_cpu=True)
    groups = [
        make_group([{"a": 0.5}, {"a": 0.5 if number % 2 == flat else 0.0}], lengths=[3 + number, 5], seed=number)
        for number in range(4)
    ]
    policy = make_policy(Path(model_dir))
    updater = make_updater(policy, beta=0.0)
    idle = updater.idle_when_flat if skips else ()
    stats = updater.step(make_batch(groups, budget=18, own=ranks.own(range(4)), idle_when_flat=idle))
    return stats, {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}


@pytest.mark.parametrize("flat", [0, 1])
def test_a_rank_that_has_groups_without_a_pass_alone_takes_the_step_with_the_other(
    flat: int, two: RankPair, tiny_model_dir: Path
) -> None:
    (first, first_after), (second, second_after) = two.run(updated_without_kl, str(tiny_model_dir), flat, True)
    (expected, expected_after), _ = two.run(updated_without_kl, str(tiny_model_dir), flat, False)
    assert first == second
    assert (first.num_idle_tokens, first.num_tokens) == (
        18 + 2 * flat,
        38,
    )  # rows of 3 + 5 and 5 + 5; of 4 + 5 and 6 + 5
    assert first.grad_norm == expected.grad_norm
    assert first.means["loss/policy"] == pytest.approx(expected.means["loss/policy"], rel=1e-6, abs=1e-9)
    for name, value in expected_after.items():
        assert torch.equal(first_after[name], second_after[name]), name
        assert torch.equal(first_after[name], value), name


@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_both(
    spoilt: int, two: RankPair, tiny_model_dir: Path
) -> None:
    answers = two.run(updated_here, str(tiny_model_dir), "uneven", UpdateConfig(), spoilt)
    before = make_policy(tiny_model_dir).trainable_parameters()
    for rank, (stats, _, after) in enumerate(answers):
        assert stats.skipped.in_a_row == 1
        assert stats.skipped.micro_batch == (0 if rank == spoilt else None)
        assert all(torch.equal(after[name], parameter) for name, parameter in before.items())
    assert answers[0][0].skipped.cause == answers[1][0].skipped.cause


def short_of_memory_here(model_dir: str, failing: int | None) -> tuple[UpdateStats, dict[str, torch.Tensor]]:
    """This rank's share of a step; on one rank, nothing is left for the way back of more than one row."""
    policy = make_policy(Path(model_dir))

    def after(module: torch.nn.Module, arguments: object, named: dict[str, Any], output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad and len(named["packed_row"].predicting) > 1:
            states.register_hook(lambda gradient: torch.empty(2**56, dtype=torch.uint8) and None)

    if failing == int(os.environ["RANK"]):
        policy.causal_lm.get_decoder().layers[0].register_forward_hook(after, with_kwargs=True)
    updater = make_updater(policy, objectives=("a", "b"), max_grad_norm=1e6)
    groups = groups_of("uneven")
    stats = updater.step(make_batch(groups, own=Ranks(use_cpu=True).own(range(len(groups)))))
    return stats, {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}


@pytest.mark.parametrize("failing", [0, 1])
def test_both_ranks_halve_their_micro_batches_where_one_runs_out_of_memory(
    failing: int, two: RankPair, tiny_model_dir: Path
) -> None:
    (first, first_after), (second, second_after) = two.run(short_of_memory_here, str(tiny_model_dir), failing)
    (_, expected), _ = two.run(short_of_memory_here, str(tiny_model_dir), None)
    assert first.num_halvings > 0
    assert first == second  # the budget too
    for name, value in expected.items():
        assert torch.equal(first_after[name], second_after[name]), name
        torch.testing.assert_close(first_after[name], value, rtol=0, atol=1e-4)
