"""Two objectives, and what went wrong with them: each failure is made, found by a check, and gone with the fix."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import allocated_at_most
from beta_controllers import closed_loop
from page_snippets import PageReader
from run_builders import metrics_of
from scenarios.few_words import save_few_words_llama
from torch import Tensor
from virtual_clock import run_virtually

from grpo.alarms import Alarms
from grpo.batching import TrainBatch, build_batch
from grpo.bench.cases import LLAMA, MemoryCase
from grpo.bench.memory import predict
from grpo.bench.stages import make_model_folder, random_groups
from grpo.config import RunConfig
from grpo.recipe_loader import load_recipe, parse_recipe
from grpo.rollout.base import SamplingParams
from grpo.runtime.memory import plan
from grpo.runtime.memory_hardware import hardware_named
from grpo.runtime.models import load_model
from grpo.runtime.policy import Policy
from grpo.trainer import Trainer
from grpo.update.beta import BandBeta, FixedBeta
from grpo.update.gradients import GradientWindow
from grpo.update.kl import kl_penalty
from grpo.update.step import Updater
from judges import EndpointConfig, JudgeConfig, JudgePool, JudgeRequest
from judges.clients.scripted import stub_client
from judges.types import Judgement

PAGE = Path(__file__).with_name("dual_objective.md")
PROMPTS = {"fairness": "why was it the bus", "grounding": "where"}
SMOLLM2_360M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the models and the prompts that the page's recipes name."""
    folder = tmp_path.resolve()
    save_few_words_llama(folder / "model")
    (folder / "large").mkdir()
    (folder / "large" / "config.json").write_text(json.dumps(SMOLLM2_360M))
    rows = [
        {"id": f"{name}-{number}", "prompt": prompt, "objectives": [name]}
        for number in range(4)
        for name, prompt in PROMPTS.items()
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def reader(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> PageReader:
    return PageReader(page=PAGE, folder=project, monkeypatch=monkeypatch, capsys=capsys)


def recipe(project: Path, *overrides: str) -> RunConfig:
    """The page's, after its files have been written."""
    blocks = PAGE.read_text(encoding="utf-8").split("```")
    for block in blocks[1:4:2]:
        _, _, text = block.partition("\n")
        (project / text.split("\n")[0].removeprefix("# ")).write_text(text)
    return load_recipe(str(project / "recipe.yaml"), list(overrides))


# --- a. gradients that are zeroed or overwritten


class ZeroedBeforeTheStep(GradientWindow):
    """zero_grad() in the mu loop, between the last backward pass and the optimizer."""

    def clip(self, max_norm: float) -> float:
        self.start_window()
        return super().clip(max_norm)


class Overwriting(GradientWindow):
    """The page's MyWindow."""

    def add(self, loss: Tensor, **_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        parameters = list(self._parameters.values())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient


@dataclass(slots=True, kw_only=True)
class Saboteur:
    """An observer that gives the run another gradient window before its first step, and keeps what it is warned of."""

    window: type[GradientWindow] | None
    trainer: Trainer | None = None
    warnings: list[str] = field(default_factory=list)

    def start(self, title_rows: list[tuple[str, str]]) -> None:
        assert self.trainer is not None
        updater = self.trainer.parts.updater
        if self.window is not None:
            updater.gradients = self.window(updater.policy.trainable_parameters())

    def step(self, row: Mapping[str, Any], *, total_steps: int, seconds_left: float | None) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def train_with(window: type[GradientWindow] | None, config: RunConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """What the run warned of, and the rows of metrics.jsonl."""
    saboteur = Saboteur(window=window)
    saboteur.trainer = Trainer(config, observer=saboteur)
    saboteur.trainer.run()
    return saboteur.warnings, metrics_of(config.output_dir)


def quoted_alarms() -> list[str]:
    """Of the page, unfolded."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    kept = [line[2:] if line.startswith("> ") else "" for line in lines]
    return [" ".join(text.split("\n")) for text in "\n".join(kept).strip().split("\n\n") if text.strip()]


def test_a_gradients_that_overwrite_each_other_fail_verify_by_name_and_the_shipped_loop_passes(
    reader: PageReader,
) -> None:
    assert reader.follow("a.") == 3


def test_a_zeroed_gradients_keep_the_kl_at_zero_and_the_alarm_on_the_page_says_so(project: Path) -> None:
    alarms, rows = train_with(ZeroedBeforeTheStep, recipe(project, "steps=5"))
    assert [row["kl/fairness"] for row in rows] == [0.0] * 5
    assert quoted_alarms()[0] in alarms
    assert any(text.startswith("no gradient, step 3") for text in alarms)


def test_a_completions_of_one_token_of_one_objective_alone_are_told_as_on_the_page() -> None:
    alarms = Alarms(["fairness", "grounding"])
    row = {"kl/fairness": 0.1, "completion/fairness/length_mean": 1.0, "completion/grounding/length_mean": 8.0}
    told = [alarm.text for step in (1, 2, 3) for alarm in alarms.observe({"step": step, **row})]
    assert told == [quoted_alarms()[1]]


@pytest.mark.slow
def test_a_overwritten_gradients_end_in_one_token_of_the_objective_that_likes_long_answers_and_added_ones_do_not(
    project: Path,
) -> None:
    """Groups go through the model by length, the longest first: what is left is the short prompts' objective. Without
    a KL penalty, which would pull it back from one token."""
    changes = ["steps=26", "optim.learning_rate=1.0e-2", "seed=1"]
    changes += [f"objectives.{name}.beta.value=0.0" for name in PROMPTS]
    alarms, rows = train_with(Overwriting, recipe(project, *changes, "output_dir=overwriting"))
    assert any(text.startswith("one-token completions of fairness") for text in alarms)
    assert min(row["completion/fairness/length_mean"] for row in rows) <= 1.5
    alarms, rows = train_with(None, recipe(project, *changes, "output_dir=shipped"))
    assert not [text for text in alarms if "one-token completions of fairness" in text]
    assert rows[-1]["completion/fairness/length_mean"] > 6


def test_a_the_shipped_loop_trains_without_these_alarms(project: Path) -> None:
    alarms, rows = train_with(None, recipe(project, "steps=3"))
    assert not [text for text in alarms if text.startswith(("no gradient", "no KL"))]
    assert rows[-1]["kl/fairness"] > 0


# --- b. the KL


def test_b_one_token_makes_a_mean_of_0_318_by_k3_and_of_0_003_by_the_clamped_penalty() -> None:
    logprobs = torch.zeros(1, 2000)
    logprobs[0, 7] = -math.log(644)  # one token with 1/644 of the reference's probability
    means = {
        name: float(kl_penalty(logprobs, torch.zeros(1, 2000), estimator=name).mean()) for name in ("k3", "clamped")
    }
    assert means["k3"] == pytest.approx((644 - math.log(644) - 1) / 2000)  # 636.5 nats / 2000
    assert round(means["k3"], 3) == 0.318
    assert means["clamped"] == pytest.approx(math.log(644) / 2000)  # 6.47 nats / 2000


@pytest.mark.slow
def test_b_a_fixed_beta_lets_the_kl_climb_to_an_alarm_and_a_band_brings_it_down_again(reader: PageReader) -> None:
    assert reader.follow("b.") == 6
    climbing, held = ([row["kl/fairness"] for row in metrics_of(reader.folder / run)] for run in ("climbs", "held"))
    assert min(climbing[-6:]) > 0.2
    assert max(held) > 0.2  # it began to climb too
    assert max(held[-4:]) < 0.15
    assert [row["update/skipped"] for row in metrics_of(reader.folder / "held")] == [0] * 20


def test_b_a_fixed_beta_ends_at_0_318_where_a_band_holds_and_no_spike_moves_it() -> None:
    drifting = {"gain": 7.95, "delay": 1, "windows": 500}  # 0.04 nats * 7.95 at a beta of 0.02
    fixed = closed_loop(FixedBeta(value=0.02), noise=0.0, **drifting)
    assert fixed.kl[-1] == pytest.approx(0.318, abs=1e-3)
    band = closed_loop(BandBeta(initial=0.02, low=0.02, high=0.06), **drifting)
    assert all(0.02 <= kl <= 0.06 for kl in band.smoothed[-100:])

    def beta_after(spike: float) -> float:
        controller = BandBeta(initial=0.02, low=0.02, high=0.06)
        for kl in [0.04] * 30 + [0.04 + spike] + [0.04] * 30:
            controller.observe(kl)
        return controller.value

    assert beta_after(10 / 2000) == 0.02  # a token counts 10 nats at most
    assert beta_after(636.5 / 2000) > 0.03  # as the formula has it: five windows above the band


# --- c. the temperature


def test_c_an_engine_that_drops_the_temperature_fails_verify_and_one_that_keeps_it_passes_and_trains(
    reader: PageReader,
) -> None:
    assert reader.follow("c.") == 4
    for run in ("cool", "warm"):
        rows = metrics_of(reader.folder / run)
        assert [row["sampler/ratio_p99"] for row in rows] == pytest.approx([1.0] * 3, abs=1e-3)
        assert [row["update/skipped"] for row in rows] == [0, 0, 0]


# --- d. memory


def test_d_the_three_changes_fit_the_40_gb_card_with_60_percent_less(reader: PageReader) -> None:
    assert reader.follow("d.") == 4
    card = hardware_named("a100-40g")
    before, after = (
        plan(load_recipe(str(reader.folder / "large.yaml"), changes), card, prompt_tokens=64)
        for changes in (
            [],
            ["update.micro_batch_tokens=12416", "rollout.max_new_tokens=96", "trainable.rank=8"],
        )
    )
    assert (before.fits, after.fits) == (False, True)
    assert 1 - after.peak_bytes / before.peak_bytes == pytest.approx(0.60, abs=0.01)


SMALL = {
    **LLAMA,
    "vocab_size": 2048,
    "hidden_size": 144,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 18,  # so many that a CPU takes the fused attention for both batches, as a card does
    "num_key_value_heads": 6,
}
TINY = {**SMALL, "vocab_size": 256, "intermediate_size": 176, "num_hidden_layers": 2}
BEFORE = MemoryCase(
    name="4 at once, 128 tokens, rank 16",
    model=SMALL,
    prompts=4,
    group_size=64,
    prompt_tokens=64,
    max_new_tokens=128,
    micro_batch_tokens=33024,
)
AFTER = replace(
    BEFORE,
    name="2 at once, 96 tokens, rank 8",
    max_new_tokens=96,
    micro_batch_tokens=12416,
    trainable={"type": "lora", "rank": 8},
)


def updater_and_batch(case: MemoryCase, folder: Path) -> tuple[Updater, TrainBatch]:
    """Of a case, on its own model."""
    make_model_folder(folder, case.model, case.dtype)
    config = parse_recipe(case.recipe(folder, device="cpu"), base_dir=folder.parent, source=case.name)
    policy = Policy(load_model(config.model, dtype=torch.float32, base_dir=folder.parent), config.trainable, seed=0)
    (name,) = config.objectives
    updater = Updater(
        policy,
        {name: FixedBeta(value=0.02)},
        observed={name: "k3"},
        params=SamplingParams(end_token_ids=(2,), max_new_tokens=case.max_new_tokens),
        update=config.update,
        optim=config.optim,
    )
    batch = build_batch(
        random_groups(config, prompt_tokens=case.prompt_tokens, vocabulary=case.model["vocab_size"]),
        {name: 1.0},
        combine="decoupled",
        scale="group",
        micro_batch_tokens=case.micro_batch_tokens,
        max_new_tokens=case.max_new_tokens,
    )
    return updater, batch


def gradient_of(updater: Updater, batch: TrainBatch) -> Tensor:
    """[D] what reaches the optimizer in one window."""
    seen: list[Tensor] = []
    parameters = updater.policy.trainable_parameters().values()

    def look(*_: Any) -> None:
        seen.append(torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]))

    handle = updater.optimizer.register_step_pre_hook(look)
    updater.step(batch)
    handle.remove()
    return seen[0]


def test_d_batch_2_with_accumulation_2_has_the_gradient_of_batch_4(tmp_path: Path) -> None:
    """4 x (16 + 8 * 32) tokens, then half of them."""
    whole = replace(BEFORE, model=TINY, group_size=8, max_new_tokens=32, prompt_tokens=16, micro_batch_tokens=1088)
    halves = replace(whole, micro_batch_tokens=544)
    found = {}
    for case in (whole, halves):
        updater, batch = updater_and_batch(case, tmp_path / str(case.micro_batch_tokens))
        gradient = gradient_of(updater, batch)
        found[case.micro_batch_tokens] = (len(batch.micro_batches), batch.num_rows, gradient)
    assert [each[:2] for each in found.values()] == [(1, 32), (2, 32)]
    torch.testing.assert_close(found[544][2], found[1088][2], rtol=1e-3, atol=1e-7)


def test_d_the_three_changes_save_what_the_plan_says_by_torchs_own_count(tmp_path: Path) -> None:
    """On a tinier model, with an eighth of the completions, so that it takes a moment."""
    peaks: list[int] = []
    planned: list[int] = []
    for number, case in enumerate((BEFORE, AFTER)):
        budget = (4, 2)[number] * (8 + 8 * case.max_new_tokens)
        fewer = replace(case, model=TINY, group_size=8, prompt_tokens=8, micro_batch_tokens=budget)
        updater, batch = updater_and_batch(fewer, tmp_path / str(number))
        assert (len(batch.micro_batches), batch.num_rows) == (number + 1, 32)
        peaks.append(allocated_at_most(lambda updater=updater, batch=batch: updater.step(batch)))
        phases = {phase.name: phase for phase in predict(fewer, device="cpu").phases}
        planned.append(phases["update"].transient_bytes)
    saved = 1 - peaks[1] / peaks[0]
    assert saved >= 0.6
    assert saved == pytest.approx(1 - planned[1] / planned[0], abs=0.03)


@pytest.mark.slow
def test_d_the_same_share_is_saved_of_a_processs_own_memory(reader: PageReader) -> None:
    assert reader.follow("Measured") == 1
    saved, planned = (int(share) for share in re.findall(r"(\d+)% less", reader.printed[-1]))
    assert saved == pytest.approx(62, abs=5)
    assert planned == pytest.approx(saved, abs=5)


# --- e. the judge's time


def test_e_the_plan_tells_what_one_call_at_a_time_costs(reader: PageReader) -> None:
    assert reader.follow("e.") == 3


def judged(concurrency: int) -> tuple[float, list[Judgement]]:
    """Seconds, on a virtual clock, and verdicts on 64 completions by a judge that takes two seconds for each."""
    requests = [
        JudgeRequest(id=str(k), question="Who has the ticket?", completion=f"It was {k}.", criterion="fairness")
        for k in range(64)
    ]
    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="judge")
    config = JudgeConfig(endpoints=(endpoint,), rubric="fairness", concurrency=concurrency, deadline_s=1000.0)

    async def run() -> tuple[float, list[Judgement]]:
        pool = JudgePool(client=stub_client(latency_s=lambda request: 2.0), config=config)
        clock = asyncio.get_running_loop().time
        started = clock()
        judgements = await pool.judge(requests)
        return clock() - started, judgements

    return run_virtually(run())


def test_e_concurrency_alone_cuts_the_time_to_a_sixteenth_with_the_same_verdicts() -> None:
    one_by_one, first = judged(1)
    side_by_side, second = judged(16)
    assert one_by_one == pytest.approx(128, rel=0.01)  # 64 calls of 2 s
    assert side_by_side == pytest.approx(8, rel=0.01)
    assert [judgement.value for judgement in second] == [judgement.value for judgement in first]  # pyright: ignore[reportAttributeAccessIssue]
