"""The doctor, with a recipe on a machine that is presented to it: paths, prompts, model, room, servers and judges."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from presented_machine import A100, HEALTHY, SITE, PresentedMachine, presented

from grpo.diagnostics.doctor.examination import examine
from grpo.diagnostics.findings import Finding, findings_as_json
from grpo.recipe_loader import load_recipe
from grpo.runtime.machine import Package
from judges.demo_server import serve


def write(folder: Path, model: Path, **changes: Any) -> Path:
    """A recipe whose prompts lie in data/train.jsonl beside it."""
    recipe = {
        "model": str(model),
        "steps": 1,
        "output_dir": "run",
        "prompts": {"type": "file", "path": "data/train.jsonl", "per_step": 1},
        "objectives": {"short": {"rewards": [{"name": "exact_match"}], "beta": {"type": "fixed", "value": 0.1}}},
        "optim": {"learning_rate": 1e-4},
        "eval": {"before": False, "after": False},
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def look(path: Path, working_dir: Path, machine: PresentedMachine | None = None) -> list[Finding]:
    """The faults of a recipe on a healthy machine."""
    findings = examine(machine or PresentedMachine(), load_recipe(str(path), []), working_dir=working_dir)
    return [finding for finding in findings if finding.status != "ok"]


def test_a_relative_path_that_leads_elsewhere_is_told_with_both_places(tmp_path: Path, tiny_model_dir: Path) -> None:
    home, started = tmp_path / "recipes", tmp_path / "started_here"
    (started / "data").mkdir(parents=True)
    home.mkdir()
    (started / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')
    path = write(home, tiny_model_dir)
    missing, prompts = look(path, started)
    assert (missing.check, missing.status) == ("paths", "failed")
    assert f"prompts.path is {home}/data/train.jsonl, which does not exist" in missing.what
    assert f"{started}/data/train.jsonl exists, but paths of a recipe begin at its own folder" in missing.what
    assert prompts.check == "prompts"
    (home / "data").mkdir()
    (home / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Omar"}\n')
    (both,) = look(path, started)
    assert (both.check, both.status) == ("paths", "warning")
    assert look(path, home) == []


def test_a_column_that_is_not_there_a_model_that_is_not_there_and_a_secret_that_is_not_set(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"question": "Who?"}\n')
    (finding,) = look(write(tmp_path, tiny_model_dir), tmp_path)
    assert finding.check == "prompts"
    assert "prompt" in finding.what
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')
    findings = look(write(tmp_path, tmp_path / "nowhere"), tmp_path)
    assert [(one.check, one.status) for one in findings] == [("memory plan", "warning"), ("model", "failed")]
    endpoint = {"url": "https://judge.example/v1", "model": "m", "api_key": "env:ABSENT_KEY"}
    judged = {"name": "judged", "params": {"endpoint": endpoint, "rubric": "fairness"}}
    path = write(
        tmp_path,
        tiny_model_dir,
        objectives={"short": {"rewards": [judged], "beta": {"type": "fixed", "value": 0.1}}},
    )
    config = load_recipe(str(path), [])
    findings = examine(PresentedMachine(), config, asks_judges=False, working_dir=tmp_path)
    assert [one.what for one in findings if one.status != "ok"] == ["the recipe names env:ABSENT_KEY, which is not set"]
    present = PresentedMachine(variables={"ABSENT_KEY": "s3cret-value"})
    findings = examine(present, config, asks_judges=False, working_dir=tmp_path)
    assert [one for one in findings if one.status != "ok"] == []
    assert "s3cret-value" not in str(findings_as_json(findings))


def test_a_judge_is_asked_about_texts_without_an_answer(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')

    def path_for(url: str) -> Path:
        params = {"endpoint": {"url": url, "model": "demo-judge"}, "rubric": "fairness", "attempts": 1}
        objective = {"rewards": [{"name": "judged", "params": params}], "beta": {"type": "fixed", "value": 0.1}}
        return write(tmp_path, tiny_model_dir, objectives={"short": objective})

    with serve() as honest:
        assert look(path_for(honest.url), tmp_path) == []
    with serve(error_rate=1.0) as dishonest:  # every verdict turned round
        (finding,) = look(path_for(dishonest.url), tmp_path)
    assert (finding.check, finding.status) == ("judges", "failed")
    assert "Thought process:" in finding.what
    (finding,) = look(path_for("http://127.0.0.1:9/v1"), tmp_path)  # nobody listens
    assert "no judge answers" in finding.what


def test_a_recipe_that_does_not_fit_this_card_or_this_container_is_refused_with_the_change_that_helps(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')
    wide = {"group_size": 64, "max_new_tokens": 128}
    path = write(tmp_path, tiny_model_dir, rollout=wide, update={"micro_batch_tokens": 1_000_000})
    assert look(path, tmp_path) == []
    plan_of = {one.check: one for one in examine(PresentedMachine(), load_recipe(str(path), []), working_dir=tmp_path)}
    needed = plan_of["memory plan"].figures["needed_bytes"]
    small = replace(A100, total_bytes=needed - (8 << 20), free_bytes=needed - (8 << 20))
    (finding,) = look(path, tmp_path, presented(gpus=(small,)))
    assert (finding.check, finding.status) == ("memory plan", "failed")
    assert "update.micro_batch_tokens=" in finding.remedy
    container = presented(limit_bytes=600 << 20, limit_used_bytes=0, host_bytes=1 << 30)
    (finding,) = look(path, tmp_path, container)
    assert "ended with signal 9" in finding.meaning


def test_the_disk_must_hold_the_checkpoints_that_are_kept_and_one_more(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')
    path = write(tmp_path, tiny_model_dir, trainable={"type": "lora", "rank": 16}, checkpoint={"keep": 4})
    # inputs and outputs of a layer's linear maps: 64 + 48 + 48 + 64 for attention, 3 x 96 for the rest; two layers
    adapter = 2 * 16 * (64 + 48 + 48 + 64 + 3 * 96)
    one = 3 * 4 * adapter + 256 * 320 + 2**18  # weights and both moments, tokenizer, the small files
    assert look(path, tmp_path, PresentedMachine(free_disk=5 * one)) == []
    (finding,) = look(path, tmp_path, PresentedMachine(free_disk=5 * one - 1))
    assert (finding.check, finding.status) == ("disk", "failed")
    assert "5 more checkpoints of 1 MiB" in finding.what
    assert "checkpoint.keep" in finding.remedy
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)  # one of them is there
    assert look(path, tmp_path, PresentedMachine(free_disk=4 * one)) == []


def test_the_judges_cost_is_told_for_a_step_and_for_the_run(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')

    def row(*, changes: dict[str, Any] | None = None, **endpoint: Any) -> Finding:
        params = {"endpoint": {"url": "https://judge.example/v1", "model": "m", **endpoint}, "rubric": "fairness"}
        objective = {"rewards": [{"name": "judged", "params": params}], "beta": {"type": "fixed", "value": 0.1}}
        settings: dict[str, Any] = {"objectives": {"short": objective}, "steps": 50, "rollout": {"group_size": 4}}
        path = write(tmp_path, tiny_model_dir, **settings, **(changes or {}))
        found = examine(PresentedMachine(), load_recipe(str(path), []), asks_judges=False, working_dir=tmp_path)
        return next(one for one in found if one.check == "judge cost")

    # four completions a step, each answered by the 100 tokens that are assumed, at 10 for a million: 0.001 a call
    assert row(price={"input": 0, "output": 10}).what.startswith(
        "4 calls a step, 200 over the run; about 0.004 a step, 0.2 in all; "
    )
    assert row().what.startswith("4 calls a step, 200 over the run; no prices are given; ")
    (tmp_path / "data" / "held_out.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n' * 8)
    prompts = {"type": "file", "path": "data/train.jsonl", "held_out_path": "data/held_out.jsonl", "per_step": 1}
    evaluated = {"prompts": prompts, "eval": {"before": True, "after": True, "every": 20, "num_prompts": 5}}
    # before, after steps 20 and 40, and after the last: four of five calls each
    assert row(changes=evaluated, price={"input": 0, "output": 10}).what.startswith(
        "4 calls a step, 5 in each of 4 evaluations, 220 over the run; about 0.004 a step, 0.005 an evaluation, 0.22 in"
    )


def test_somebody_listens_where_the_recipe_names_rollout_servers_and_it_is_not_the_judge(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')
    endpoint = {"url": "http://localhost:8001/v1", "model": "m"}
    judged = {"name": "judged", "params": {"endpoint": endpoint, "rubric": "fairness"}}
    servers = {"type": "vllm_server", "urls": ["http://127.0.0.1:8001", "http://gpu-2:9"]}
    path = write(
        tmp_path,
        tiny_model_dir,
        objectives={"short": {"rewards": [judged], "beta": {"type": "fixed", "value": 0.1}}},
        rollout={"engine": servers},
    )

    def told(*listening: tuple[str, int]) -> list[tuple[str, str]]:
        machine = PresentedMachine(listening=listening)
        found = examine(machine, load_recipe(str(path), []), asks_judges=False, working_dir=tmp_path)
        return [(one.status, one.what) for one in found if one.check == "ports"]

    assert told() == [
        ("failed", "nobody listens at http://127.0.0.1:8001, which rollout.engine.urls names"),
        ("failed", "nobody listens at http://gpu-2:9, which rollout.engine.urls names"),
    ]
    assert told(("localhost", 8001), ("gpu-2", 9)) == [
        ("warning", "http://127.0.0.1:8001 is the rollout engine, and the judge of objective short as well"),
        ("ok", "http://gpu-2:9: somebody listens"),
    ]


def test_an_engine_that_does_not_answer_as_one_and_a_tokenizer_without_a_chat_template_are_told(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')
    with serve() as judge:  # a server, but of another kind
        url = judge.url.removesuffix("/v1")
        path = write(tmp_path, tiny_model_dir, rollout={"engine": {"type": "vllm_server", "urls": [url]}})
        (engine,) = [one for one in look(path, tmp_path) if one.check == "engine"]
    assert (engine.status, engine.meaning) == ("failed", "nothing could be sampled")
    assert url in engine.what
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (template,) = look(write(tmp_path, model), tmp_path)
    assert (template.check, template.status) == ("chat template", "warning")


def test_flash_attention_that_a_recipe_asks_for_has_to_be_there(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')
    path = write(tmp_path, tiny_model_dir, attention="flash_attention_2")
    (finding,) = look(path, tmp_path)
    assert (finding.check, finding.status) == ("attention", "failed")
    assert "flash-attn is not installed" in finding.what
    assert "scripts/install_flash_attn.sh" in finding.remedy
    flash = Package(version="2.8.0", folder=SITE / "flash_attn", home=SITE / "flash_attn")
    packages = {**HEALTHY.packages, "flash-attn": flash}
    assert look(path, tmp_path, presented(packages=packages)) == []
    older = presented(packages=packages, gpus=(replace(A100, capability=(7, 5)),), torch_archs=("sm_75",))
    assert [one.what for one in look(path, tmp_path, older) if one.check == "attention"] == [
        "attention is flash_attention_2, but it needs compute capability 8.0, which NVIDIA A100-PCIE-40GB has not"
    ]
    write(tmp_path, tiny_model_dir, attention="auto")
    assert look(path, tmp_path) == []


def test_every_terminator_is_listed_wherever_it_is_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "Who?", "reference": "Anna"}\n')
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    # the tokenizer's end of sequence is 2, <|im_end|>, which the chat template writes after each turn, too
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    path = write(tmp_path, model, rollout={"end_tokens": ["<|im_start|>", 7]})
    found = examine(PresentedMachine(), load_recipe(str(path), []), working_dir=tmp_path)
    row = next(one for one in found if one.check == "end tokens")
    assert row.status == "ok"
    assert row.figures["ids"] == [0, 1, 2, 7]
    assert row.what.startswith("a completion ends at any of 0 <|pad|>, 1 <|im_start|>, 2 <|im_end|>, 7 ")
