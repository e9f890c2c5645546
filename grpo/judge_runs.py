"""A recipe's judges, found, planned for and calibrated. No model is needed. Imports no torch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from grpo.config import RunConfig
from grpo.errors import ConfigError
from grpo.recipe_loader import load_recipe, read_yaml
from grpo.types import Prompt
from judges.calibrate import GoldFormat, read_gold, run_calibration
from judges.config import JudgeConfig
from judges.errors import JudgeConfigError, JudgeError
from judges.identity import rubric_sha256
from judges.plan import Load, plan_batches
from judges.prompts import Rubric, load_rubric
from judges.types import JudgeRequest
from rewards.errors import RewardConfigError
from rewards.judged import read_judge_config

SAMPLED_STEPS = 4
"""Steps whose prompts are rendered; a run's are taken to be alike."""
CHARS_PER_COMPLETION_TOKEN = 4

Purpose = Literal["train", "eval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundJudge:
    """A judge that a recipe, or a file of its own, describes."""

    objective: str
    """Whose reward it is; "" in a file of its own."""
    purpose: Purpose
    """Whether it scores in training or in evaluation."""
    config: JudgeConfig
    rubric: Rubric


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What cannot be known before anything is sampled or asked."""

    latency_s: float
    """Of one judge call."""
    reply_tokens: int
    """That a judge writes about one completion."""
    completion_tokens: int
    """Of a completion to be judged."""


def find_judge(source: str, overrides: Sequence[str], *, objective: str | None) -> FoundJudge:
    """The judge of a recipe, or of a YAML file that has a judge's keys and no others.

    Args:
        source: a recipe's name, or a YAML file.
        objective: which one, where a recipe has several.
    Raises:
        ConfigError: there is none, or more than one.
    """
    path = Path(source).expanduser()
    values = read_yaml(path) if path.is_file() else {}
    if "rubric" in values and "objectives" not in values:
        if overrides or objective:
            raise ConfigError(f"{source} is a judge's file: overrides and --objective are for recipes.")
        return _found(values, path.absolute().parent, objective="", purpose="train", place=source)
    judges = judges_of(load_recipe(source, overrides))
    own = {one.objective: one for one in reversed(judges) if objective in (None, one.objective)}
    if not own:
        whose = f"objective {objective}" if objective else "no objective"
        raise ConfigError(
            f"{source}: {whose} has {'no' if objective else 'a'} reward 'judged'. Add one to calibrate it."
        )
    distinct = {one.config: one for one in own.values()}
    if len(distinct) > 1:
        raise ConfigError(f"{source} has several judges, of {', '.join(sorted(own))}. Choose one with --objective.")
    return next(iter(distinct.values()))


def judges_of(config: RunConfig) -> list[FoundJudge]:
    """Every judged reward of a recipe: those of training, then those of evaluation.

    Raises:
        ConfigError: a judge's settings are wrong.
    """
    found: list[FoundJudge] = []
    for purpose in ("train", "eval"):
        for name, objective in config.objectives.items():
            specs = objective.rewards if purpose == "train" else objective.eval_rewards or objective.rewards
            for spec in specs:
                if spec.name == "judged":
                    place = f"objectives.{name}"
                    found.append(_found(spec.params, config.base_dir, objective=name, purpose=purpose, place=place))
    return found


def plan_judges(config: RunConfig, assumed: Assumptions) -> dict[str, Any]:
    """What a recipe's judges will take. Renders prompts of a few steps; asks nobody.

    Returns:
        {"judges": [one entry per judge and endpoint, per step (or per evaluation)], "run": totals, "assumptions",
        "warnings"}.
    Raises:
        InputError: the recipe, its prompts or a judge's settings are wrong, or there is no judge in it.
    """
    from grpo.prompts import open_prompts  # late: it imports transformers

    judges = judges_of(config)
    if not judges:
        raise ConfigError("no objective of this recipe has a reward 'judged': there is nothing to plan.")
    prompts = open_prompts(config.prompts, seed=config.seed, objectives=list(config.objectives))
    num_steps = min(SAMPLED_STEPS, config.steps)
    steps = [prompts.batch(step) for step in range(1, num_steps + 1)]
    num_evaluations = config.eval.count(config.steps)
    held_out = prompts.held_out(config.eval.num_prompts) if num_evaluations else []
    group_size = config.rollout.group_size
    entries: list[dict[str, Any]] = []
    warnings: list[str] = []
    for one in judges:
        is_eval = one.purpose == "eval"
        times = num_evaluations if is_eval else config.steps
        if is_eval:
            loads = _plan(one, held_out, 1, assumed)
        else:
            loads = _mean([_plan(one, step, group_size, assumed) for step in steps])
        loads = [load for load in loads if load.calls]
        entries += [_entry(one, load, times=times) for load in loads]
        if not is_eval:
            warnings += _warnings(one, loads)
    for one in {judge.objective: judge for judge in judges if judge.config.budget}.values():
        warnings += _run_warnings(one, entries)
    return {
        "judges": entries,
        "run": _totals(entries),
        "assumptions": {
            **asdict(assumed),
            "steps": config.steps,
            "sampled_steps": num_steps,
            "evaluations": num_evaluations,
            "resample_rounds": config.rollout.resample_rounds,
        },
        "warnings": warnings,
    }


def calibrate_judge(
    found: FoundJudge,
    gold: Path,
    *,
    format: GoldFormat,
    threshold: float | None,
    repeats: int,
    limit: int | None,
    seed: int,
) -> dict[str, Any]:
    """Ask the judge about gold rows. Returns the calibration, with what was judged by whom.

    Raises:
        ConfigError: the file, the threshold or the judge's settings are wrong, or the judge cannot be reached.
    """
    try:
        rows = read_gold(gold, format=format)
        if limit is not None and limit < len(rows):
            rows = [rows[place] for place in sorted(random.Random(seed).sample(range(len(rows)), limit))]
        result = run_calibration(found.config, found.rubric, rows, threshold=threshold, repeats=repeats, seed=seed)
    except JudgeError as exc:
        raise ConfigError(f"the judge cannot be calibrated: {exc}") from exc
    return {
        "gold": str(gold),
        "format": format,
        "rubric": found.rubric.name,
        "rubric_sha256": rubric_sha256(found.rubric),
        "mode": found.config.mode.type,
        "models": [endpoint.model for endpoint in found.config.endpoints],
        "seed": seed,
        **result.as_json(),
    }


def _found(values: Mapping[str, Any], base_dir: Path, *, objective: str, purpose: Purpose, place: str) -> FoundJudge:
    try:
        config = read_judge_config(values, base_dir)
        return FoundJudge(objective=objective, purpose=purpose, config=config, rubric=load_rubric(config.rubric))
    except (RewardConfigError, JudgeConfigError) as exc:
        raise ConfigError(f"{place}: {exc}") from exc


def _plan(one: FoundJudge, prompts: Sequence[Prompt], group_size: int, assumed: Assumptions) -> list[Load]:
    batches = [
        [_request(one, prompt, number, assumed) for number in range(group_size)]
        for prompt in prompts
        if one.objective in prompt.objectives
    ]
    try:
        return plan_batches(
            one.config, one.rubric, batches, latency_s=assumed.latency_s, reply_tokens=assumed.reply_tokens
        )
    except JudgeConfigError as exc:
        raise ConfigError(f"objectives.{one.objective}: {exc}") from exc


def _request(one: FoundJudge, prompt: Prompt, number: int, assumed: Assumptions) -> JudgeRequest:
    """About a completion that nobody has sampled yet; no two of a group are equal."""
    words = f"{number} " + "word " * assumed.completion_tokens
    return JudgeRequest(
        id=f"{prompt.id}#{number}",
        question=prompt.messages[-1].content,
        completion=words[: assumed.completion_tokens * CHARS_PER_COMPLETION_TOKEN],
        reference=prompt.reference,
        criterion=one.rubric.name,
    )


def _mean(steps: Sequence[Sequence[Load]]) -> list[Load]:
    """Per endpoint, over the steps."""
    return [
        replace(
            same[0],
            calls=_average([load.calls for load in same]),
            prompt_tokens=_average([load.prompt_tokens for load in same]),
            reply_tokens=_average([load.reply_tokens for load in same]),
            cost=None if same[0].cost is None else _average([load.cost or 0.0 for load in same]),
            cost_at_most=None if same[0].cost is None else _average([load.cost_at_most or 0.0 for load in same]),
            seconds=_average([load.seconds for load in same]),
            busy_seconds=_average([load.busy_seconds for load in same]),
            bound_by=max(same, key=lambda load: load.seconds).bound_by,
        )
        for same in zip(*steps, strict=True)
    ]


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _entry(one: FoundJudge, load: Load, *, times: int) -> dict[str, Any]:
    return {
        "objective": one.objective,
        "purpose": one.purpose,
        "rubric": one.rubric.name,
        "mode": one.config.mode.type,
        "endpoint": load.endpoint.label,
        "times": times,
        "calls": load.calls,
        "prompt_tokens": load.prompt_tokens,
        "reply_tokens": load.reply_tokens,
        "cost": load.cost,
        "cost_at_most": load.cost_at_most,
        "seconds": load.seconds,
        "busy_seconds": load.busy_seconds,
        "bound_by": load.bound_by,
    }


def _totals(entries: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Over the whole run. Endpoints work side by side, and judges at one endpoint share what it allows: of each step
    and each evaluation the slowest endpoint counts."""

    def total(key: str) -> float:
        return math.fsum(entry[key] * entry["times"] for entry in entries)

    has_prices = all(entry["cost"] is not None for entry in entries)
    seconds: dict[tuple[str, str], float] = {}
    busy: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        where = entry["purpose"], entry["endpoint"]
        seconds[where] = max(seconds.get(where, 0.0), entry["seconds"] * entry["times"])
        busy[where] += entry["busy_seconds"] * entry["times"]
    slowest = {
        purpose: max((max(seconds[where], busy[where]) for where in seconds if where[0] == purpose), default=0.0)
        for purpose in ("train", "eval")
    }
    return {
        "calls": total("calls"),
        "prompt_tokens": total("prompt_tokens"),
        "reply_tokens": total("reply_tokens"),
        "cost": total("cost") if has_prices else None,
        "cost_at_most": total("cost_at_most") if has_prices else None,
        "minutes": math.fsum(slowest.values()) / 60,
    }


def _warnings(one: FoundJudge, loads: Sequence[Load]) -> list[str]:
    warnings: list[str] = []
    for load in loads:
        where = f"objective {one.objective}, {load.endpoint.label}"
        if load.seconds > one.config.deadline_s:
            warnings.append(
                f"{where}: a step's calls take {load.seconds:.0f} s, but what is not judged within deadline_s = "
                f"{one.config.deadline_s:g} has no verdict. The limit is {load.bound_by}."
            )
    cap = one.config.budget.per_step if one.config.budget else None
    cost = math.fsum(load.cost or 0.0 for load in loads)
    if cap is not None and cost > cap:
        warnings.append(f"objective {one.objective}: a step costs about {cost:.4g}, but budget.per_step is {cap:g}.")
    return warnings


def _run_warnings(one: FoundJudge, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    cap = one.config.budget.per_run if one.config.budget else None
    cost = math.fsum(
        (entry["cost"] or 0.0) * entry["times"] for entry in entries if entry["objective"] == one.objective
    )
    if cap is None or cost <= cap:
        return []
    return [f"objective {one.objective}: the run costs about {cost:.4g}, but budget.per_run is {cap:g}."]
