"""The doctor, on machines that are presented to it: what does not fit together is named, with what to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.diagnostics.doctor.examination import examine
from grpo.diagnostics.findings import Finding, findings_as_json
from grpo.recipe_loader import load_recipe
from grpo.runtime.machine import Gpu, MachineFacts, Package, ThisMachine, cgroup_memory
from judges.demo_server import serve

GIB = 1 << 30
SITE = Path("/env/site-packages")
A100 = Gpu(name="NVIDIA A100-PCIE-40GB", capability=(8, 0), total_bytes=40 * GIB, free_bytes=40 * GIB)
HEALTHY = MachineFacts(
    python="3.11.7",
    platform="Linux",
    cores=16,
    host_bytes=128 * GIB,
    available_bytes=120 * GIB,
    shared_memory_bytes=64 * GIB,
    packages={
        "torch": Package(version="2.13.0+cu124", folder=SITE / "torch", home=SITE / "torch"),
        "transformers": Package(version="5.18.0", folder=SITE / "transformers", home=SITE / "transformers"),
    },
    own_folders={name: SITE / name for name in ("grpo", "rewards", "judges")},
    torch_cuda="12.4",
    torch_archs=("sm_80", "sm_90"),
    driver_version="550.54",
    driver_cuda="12.4",
    gpus=(A100,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PresentedMachine:
    """Any machine one likes."""

    given: MachineFacts = HEALTHY
    free_disk: int = 100 * GIB
    variables: dict[str, str] = field(default_factory=dict)
    broken_imports: dict[str, str] = field(default_factory=dict)
    taken_ports: tuple[int, ...] = ()

    def facts(self) -> MachineFacts:
        return self.given

    def free_disk_bytes(self, path: Path) -> int:
        return self.free_disk

    def environment(self, name: str) -> str | None:
        return self.variables.get(name)

    def import_problem(self, module: str) -> str:
        return self.broken_imports.get(module, "")

    def is_port_free(self, port: int) -> bool:
        return port not in self.taken_ports


def faults(machine: PresentedMachine, **options: Any) -> list[Finding]:
    findings = examine(machine, None, working_dir=Path.cwd(), **options)
    return [finding for finding in findings if finding.status != "ok"]


def presented(**changes: Any) -> PresentedMachine:
    return PresentedMachine(given=replace(HEALTHY, **changes))


def test_a_healthy_machine_has_no_fault() -> None:
    assert faults(PresentedMachine()) == []


@pytest.mark.parametrize(
    ("machine", "check", "status", "said"),
    [
        (presented(torch_cuda=None, torch_archs=()), "torch", "failed", "leave the NVIDIA A100-PCIE-40GB idle"),
        (presented(driver_cuda="11.4"), "torch", "failed", "the driver is too old"),
        (presented(driver_version=None, driver_cuda=None, gpus=()), "torch", "warning", "trains on the CPU"),
        (presented(toolkit_cuda="11.5"), "toolkit", "failed", "CUDA toolkit 11.5 on the path, torch built for 12.4"),
        (presented(torch_archs=("sm_90",)), "card", "failed", "code for sm_90 only"),
        (presented(gpus=(replace(A100, capability=(7, 5)),), torch_archs=("sm_75",)), "card", "warning", "bfloat16"),
        (presented(gpus=(replace(A100, free_bytes=10 * GIB),)), "card", "warning", "another process holds memory"),
        (presented(limit_bytes=8 * GIB, limit_used_bytes=GIB), "host memory", "warning", "signal 9"),
        (PresentedMachine(free_disk=100 << 20), "disk", "failed", "may not fit"),
    ],
)
def test_each_misfit_of_a_machine_is_one_finding(machine: PresentedMachine, check: str, status: str, said: str) -> None:
    (finding,) = faults(machine)
    assert (finding.check, finding.status) == (check, status)
    assert said in f"{finding.what}; {finding.meaning}"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (("sm_80",), (8, 6), True),  # a later minor of the same major
        (("sm_86",), (8, 0), False),
        (("sm_80",), (9, 0), False),
        (("sm_80", "compute_80"), (9, 0), True),  # PTX is compiled on the card
        (("sm_90a",), (9, 0), True),
        (("sm_120",), (12, 0), True),
    ],
)
def test_code_for_a_card_is_judged_by_its_compute_capability(
    archs: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    machine = presented(torch_archs=archs, gpus=(replace(A100, capability=capability),))
    assert [finding.check for finding in faults(machine)] == ([] if runs else ["card"])


def test_a_package_that_stands_before_one_of_ours_or_of_theirs_is_named() -> None:
    here = Path("/home/me/project")
    (ours,) = faults(presented(own_folders={**HEALTHY.own_folders, "rewards": here / "rewards"}))
    assert ours.check == "origins"
    assert "rewards from /home/me/project/rewards" in ours.what
    shadowed = Package(version="2.13.0", folder=here / "torch.py", home=SITE / "torch")
    (theirs,) = faults(presented(packages={**HEALTHY.packages, "torch": shadowed}))
    assert "torch would be imported from /home/me/project/torch.py" in theirs.what


def test_a_version_outside_of_the_tested_range_and_an_extra_that_does_not_load_are_told() -> None:
    old = Package(version="4.40.0", folder=SITE / "transformers", home=SITE / "transformers")
    (finding,) = faults(presented(packages={**HEALTHY.packages, "transformers": old}))
    assert "transformers 4.40.0 (tested: " in finding.what
    compiled = Package(version="2.8.0", folder=SITE / "flash_attn", home=SITE / "flash_attn")
    machine = PresentedMachine(
        given=replace(HEALTHY, packages={**HEALTHY.packages, "flash-attn": compiled}),
        broken_imports={"flash_attn": "ImportError: undefined symbol"},
    )
    (finding,) = faults(machine)
    assert finding.status == "failed"
    assert "cannot be imported: ImportError: undefined symbol" in finding.what


def test_what_only_several_ranks_need_is_asked_for_several_ranks_only() -> None:
    machine = PresentedMachine(given=replace(HEALTHY, shared_memory_bytes=64 << 20), taken_ports=(29_500,))
    assert faults(machine) == []
    assert [finding.check for finding in faults(machine, ranks=2)] == ["shared memory", "ports"]


def test_the_containers_limit_is_read_in_both_versions_of_cgroups(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path) == (None, None)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_memory(tmp_path) == (None, None)  # what version 1 writes for "none"
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1073741824\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000\n")
    assert cgroup_memory(tmp_path) == (1 << 30, 1000)
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_memory(tmp_path) == (1 << 30, 1000)
    (tmp_path / "memory.max").write_text("2147483648\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert cgroup_memory(tmp_path) == (2 << 30, 5)


@pytest.mark.parametrize(
    ("mount", "membership", "limit_name", "used_name"),
    [
        (".", "0::/system.slice/slurmd.service/job_7/step_0\n", "memory.max", "memory.current"),
        (
            "memory",
            "9:cpu,cpuacct:/elsewhere\n4:memory:/system.slice/slurmd.service/job_7/step_0\n0::/\n",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    ],
)
def test_the_tightest_limit_on_the_way_to_the_root_is_the_one_that_ends_a_job(
    tmp_path: Path, mount: str, membership: str, limit_name: str, used_name: str
) -> None:
    limits = {  # group -> (limit, used)
        "system.slice": ("64000", "50000"),
        "system.slice/slurmd.service": ("max", "40000"),
        "system.slice/slurmd.service/job_7": ("16000", "9000"),
        "system.slice/slurmd.service/job_7/step_0": ("32000", "8000"),
        "system.slice/slurmd.service/job_8": ("1000", "1000"),  # another's
    }
    for group, (limit, used) in limits.items():
        folder = tmp_path / mount / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_name).write_text(f"{limit}\n")
        (folder / used_name).write_text(f"{used}\n")
    assert cgroup_memory(tmp_path, membership) == (16_000, 9_000)
    (tmp_path / mount / limit_name).write_text("4000\n")
    assert cgroup_memory(tmp_path, membership) == (4_000, None)  # the root has no use of its own written


def test_a_group_whose_path_leads_out_of_the_container_is_read_at_its_mount(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("10\n")
    assert cgroup_memory(tmp_path, "0::/../../docker/c0ffee\n") == (5_000, 10)
    assert cgroup_memory(tmp_path, "0::/kubepods/pod1/c0ffee\n") == (5_000, 10)


def test_this_machine_can_run_its_own_tests() -> None:
    findings = examine(ThisMachine(), None, working_dir=Path.cwd())
    assert [finding for finding in findings if finding.check in ("python", "origins") and finding.status != "ok"] == []
    assert findings_as_json(findings)["findings"][0]["check"] == "python"


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
