"""A recipe's paths, columns, tokenizer, judges and secrets on this machine. Reads no weights."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.config import FilePrompts, RunConfig
from grpo.diagnostics.findings import Finding
from grpo.errors import InputError
from grpo.judge_runs import Assumptions, FoundJudge, judges_of, plan_judges
from grpo.objectives import check_objectives_of_prompts
from grpo.prompts import open_prompts
from grpo.rollout.engines import check_engine
from grpo.runtime.machine import Machine, MachineFacts
from grpo.runtime.models import check_model, end_token_ids, load_generation_config, load_tokenizer
from judges.errors import JudgeError
from judges.opening import open_pool
from judges.probes import ProbeReport, probe_judge

FLASH_CAPABILITY = (8, 0)
ASSUMED = Assumptions(latency_s=2.0, reply_tokens=100, completion_tokens=0)


def check_recipe(
    machine: Machine, facts: MachineFacts, config: RunConfig, *, asks_judges: bool, working_dir: Path
) -> Iterator[Finding]:
    """Every finding about a recipe.

    Args:
        asks_judges: a dozen calls for each judge, which may cost money.
        working_dir: where the command was started, in which people expect relative paths to begin.
    """
    yield from _paths(config, working_dir)
    yield from _prompts(config)
    yield from _model(config)
    yield from _attention(facts, config)
    yield from _engine(config)
    yield from _secrets(machine, config)
    yield from _judges(config, asks=asks_judges)


def _paths(config: RunConfig, working_dir: Path) -> Iterator[Finding]:
    """Where each relative path leads; a file of that name where the command was started is not the one that is read."""
    named: dict[str, Path] = {"output_dir": config.output_dir}
    if isinstance(config.prompts, FilePrompts):
        named |= {"prompts.path": config.prompts.path}
        if config.prompts.held_out_path is not None:
            named |= {"prompts.held_out_path": config.prompts.held_out_path}
    if config.warmup is not None:
        named |= {"warmup.path": config.warmup.path}
    for key, path in named.items():
        is_read = key != "output_dir"
        other = _namesake(path, config.base_dir, working_dir)
        if is_read and not path.exists():
            where = f"; {other} exists, but paths of a recipe begin at its own folder" if other else ""
            yield Finding(
                check="paths",
                status="failed",
                what=f"{key} is {path}, which does not exist{where}",
                meaning="the run would end before its first step",
                remedy=f"write it relative to {config.base_dir}, or as an absolute path",
            )
        elif is_read and other:
            yield Finding(
                check="paths",
                status="warning",
                what=f"{key} is {path}; {other} exists too and is not read",
                meaning="paths of a recipe begin at its own folder, wherever the command is started",
                remedy="write the absolute path of the one that is meant",
            )
        else:
            yield Finding(check="paths", status="ok", what=f"{key} is {path}")


def _namesake(path: Path, base_dir: Path, working_dir: Path) -> Path | None:
    """The file that the same relative path would mean in the working directory."""
    if not path.is_relative_to(base_dir) or working_dir.resolve() == base_dir.resolve():
        return None
    other = working_dir / path.relative_to(base_dir)
    return other if other.exists() else None


def _prompts(config: RunConfig) -> Iterator[Finding]:
    try:
        prompts = open_prompts(config.prompts, seed=config.seed, objectives=list(config.objectives))
        check_objectives_of_prompts(prompts.objective_sets(), config.objectives, source="the prompts")
        batch = prompts.batch(1)
        held_out = prompts.held_out(config.eval.num_prompts)
    except InputError as exc:
        yield Finding(
            check="prompts",
            status="failed",
            what=str(exc),
            meaning="the run would end before its first step",
            remedy="put the rows, or the keys under prompts: and objectives:, right",
        )
        return
    longest = max((len(message.content) for prompt in batch for message in prompt.messages), default=0)
    yield Finding(
        check="prompts",
        status="ok",
        what=f"{len(batch)} in the first step (the longest message has {longest} characters), {len(held_out)} held out",
    )


def _model(config: RunConfig) -> Iterator[Finding]:
    """Files, config, tokenizer, chat template, end tokens."""
    try:
        check_model(config.model, config.base_dir)
        tokenizer = load_tokenizer(config.model, base_dir=config.base_dir)
        generation = load_generation_config(config.model, base_dir=config.base_dir)
        ends = end_token_ids(tokenizer, generation, config.rollout.end_tokens)
    except InputError as exc:
        yield Finding(
            check="model",
            status="failed",
            what=str(exc),
            meaning="the run would end before its first step",
            remedy="what the message says; a hub name needs the network or the hub's cache",
        )
        return
    yield Finding(check="model", status="ok", what=f"{config.model}: files, config and tokenizer are there")
    if not tokenizer.chat_template:
        yield Finding(
            check="chat template",
            status="warning",
            what="the tokenizer has no chat template",
            meaning="prompts go to the model as plain text, without turns; a model trained on turns answers badly",
            remedy="take the instruct model's tokenizer, or set its chat_template in tokenizer_config.json",
        )
    names = ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)}" for token in ends)
    yield Finding(
        check="end tokens",
        status="ok",
        what=f"a completion ends at any of {names} (tokenizer, generation config, chat template, recipe)",
        figures={"ids": list(ends)},
    )


def _attention(facts: MachineFacts, config: RunConfig) -> Iterator[Finding]:
    """What `grpo.runtime.devices.choose_attention` would refuse when the model is loaded; auto takes what it can."""
    if config.attention != "flash_attention_2":
        return
    obstacles: list[str] = []
    if config.device == "cpu" or not facts.gpus or facts.torch_cuda is None:
        obstacles.append("it runs on CUDA only, and the run would be on the CPU")
    elif old := [gpu.name for gpu in facts.gpus if gpu.capability < FLASH_CAPABILITY]:
        obstacles.append(f"it needs compute capability 8.0, which {', '.join(old)} has not")
    if config.dtype == "float32":
        obstacles.append("it multiplies 16-bit numbers only, and dtype is float32")
    if "flash-attn" not in facts.packages:
        obstacles.append("the package flash-attn is not installed")
    if not obstacles:
        yield Finding(check="attention", status="ok", what="flash_attention_2, and flash-attn is installed")
        return
    yield Finding(
        check="attention",
        status="failed",
        what=f"attention is flash_attention_2, but {'; '.join(obstacles)}",
        meaning="the run would end before its first step",
        remedy="bash scripts/install_flash_attn.sh where only the package is missing; else attention=auto, which takes "
        "flash-attn where it can run, or attention=sdpa",
    )


def _engine(config: RunConfig) -> Iterator[Finding]:
    try:
        check_engine(config)
    except InputError as exc:
        yield Finding(
            check="engine",
            status="failed",
            what=str(exc),
            meaning="nothing could be sampled",
            remedy="what the message says, or rollout.engine.type=transformers",
        )
    else:
        yield Finding(check="engine", status="ok", what=config.rollout.engine.type)


def _secrets(machine: Machine, config: RunConfig) -> Iterator[Finding]:
    """Whether each env:NAME is set. Values are never read further, nor printed."""
    for name in sorted(set(_environment_names(config.model_dump(mode="json")))):
        if machine.environment(name):
            yield Finding(check="secrets", status="ok", what=f"{name} is set")
        else:
            yield Finding(
                check="secrets",
                status="failed",
                what=f"the recipe names env:{name}, which is not set",
                meaning="the judge or server that needs it would refuse every call",
                remedy=f"export {name}=... in the shell that starts the run, not in a file",
            )


def _environment_names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _environment_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _environment_names(inner)
    elif isinstance(value, str) and value.startswith("env:") and value.removeprefix("env:").isidentifier():
        yield value.removeprefix("env:")


def _judges(config: RunConfig, *, asks: bool) -> Iterator[Finding]:
    try:
        judges = judges_of(config)
    except InputError as exc:
        yield Finding(
            check="judges",
            status="failed",
            what=str(exc),
            meaning="the run would end before its first step",
            remedy="put the judge's settings right",
        )
        return
    distinct: dict[Any, FoundJudge] = {}
    for one in judges:
        distinct.setdefault(one.config, one)
    if not distinct:
        return
    yield from _cost(config)
    for one in distinct.values():
        yield _probed(one) if asks else Finding(check="judges", status="ok", what=f"{_name_of(one)}: not asked")


def _cost(config: RunConfig) -> Iterator[Finding]:
    try:
        plan = plan_judges(config, _with_length(ASSUMED, config.rollout.max_new_tokens))
    except InputError as exc:
        yield Finding(
            check="judge cost",
            status="warning",
            what=f"not known: {exc}",
            meaning="what a step's judging costs cannot be told",
            remedy="put right what is said above; then: grpo judge plan RECIPE",
        )
        return
    run, num_evaluations = plan["run"], plan["assumptions"]["evaluations"]
    has_prices = run["cost"] is not None
    figures: dict[str, float | None] = {**run, "evaluations": num_evaluations}
    for kind, purpose in (("step", "train"), ("evaluation", "eval")):
        own = [entry for entry in plan["judges"] if entry["purpose"] == purpose]
        figures[f"{kind}_calls"] = math.fsum(entry["calls"] for entry in own)
        figures[f"{kind}_cost"] = math.fsum(entry["cost"] for entry in own) if has_prices else None
    per_evaluation = f"{figures['evaluation_calls']:,.0f} in each of {num_evaluations} evaluations, "
    what = f"{figures['step_calls']:,.0f} calls a step, {per_evaluation if num_evaluations else ''}"
    what = f"{what}{run['calls']:,.0f} over the run"
    if not has_prices:
        what = f"{what}; no prices are given"
    else:
        per_evaluation = f"{figures['evaluation_cost']:.4g} an evaluation, " if num_evaluations else ""
        what = f"{what}; about {figures['step_cost']:.4g} a step, {per_evaluation}{run['cost']:.4g} in all"
    what = f"{what}; {run['minutes']:.0f} minutes if nothing hides them"
    if plan["warnings"]:
        yield Finding(
            check="judge cost",
            status="warning",
            what=f"{what}; {'; '.join(plan['warnings'])}",
            meaning="some verdicts would be missing",
            remedy="grpo judge plan RECIPE shows which limit it is",
        )
    else:
        yield Finding(check="judge cost", status="ok", what=what, figures=figures)


def _with_length(assumed: Assumptions, completion_tokens: int) -> Assumptions:
    return Assumptions(
        latency_s=assumed.latency_s, reply_tokens=assumed.reply_tokens, completion_tokens=completion_tokens
    )


def _probed(one: FoundJudge) -> Finding:
    """Two real answers and the master keys, through the judge's own pool; what fails is asked once more."""
    try:
        reports = [asyncio.run(_probe(one))]
        if not reports[0].is_trustworthy:
            reports.append(asyncio.run(_probe(one)))
    except JudgeError as exc:
        return Finding(
            check="judges",
            status="failed",
            what=f"{_name_of(one)}: {exc}",
            meaning="every verdict of this judge would be missing",
            remedy="start the judge, or put url, model and key right",
        )
    first, last = reports[0], reports[-1]
    if first.is_trustworthy:
        return Finding(
            check="judges",
            status="ok",
            what=f"{_name_of(one)}: reachable, answers in its schema, and none of {len(first.findings) - 2} texts "
            "without an answer passes",
        )
    fooled = [a for a, b in zip(first.findings, last.findings, strict=True) if a.result == b.result == "fooled"]
    if fooled:
        texts = ", ".join(repr(finding.completion[:60]) for finding in fooled)
        return Finding(
            check="judges",
            status="failed",
            what=f"{_name_of(one)}: asked twice, it takes {texts} for a right answer",
            meaning="a policy finds such texts within hours, and learns to write nothing else",
            remedy="a stronger judge model, or a rubric that asks for the reason before the score; a rubric of your "
            "own may not fit the probe's question, which is about a short scene",
        )
    return Finding(
        check="judges",
        status="warning",
        what=f"{_name_of(one)}: {'; '.join(first.problems)}",
        meaning="this judge errs, or does not answer, now and then; the advantages get that much noisier",
        remedy="grpo judge calibrate RECIPE gold.jsonl says how often, against verdicts of people",
    )


async def _probe(one: FoundJudge) -> ProbeReport:
    async with open_pool(one.config, one.rubric) as pool:
        scale = one.config.scale
        return await probe_judge(pool, criterion=one.rubric.name, low=scale.low, high=scale.high)


def _name_of(one: FoundJudge) -> str:
    models = ", ".join(dict.fromkeys(endpoint.label for endpoint in one.config.endpoints))
    return f"objective {one.objective}, rubric {one.rubric.name}, {models}"
