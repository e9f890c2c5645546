"""The doctor, on machines that are presented to it: what does not fit together is named, with what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from presented_machine import A100, GIB, HEALTHY, SITE, PresentedMachine, presented

from grpo.diagnostics.doctor.examination import examine
from grpo.diagnostics.findings import Finding, findings_as_json
from grpo.runtime.machine import Package, ThisMachine, cgroup_memory
from judges.demo_server import serve


def faults(machine: PresentedMachine, **options: Any) -> list[Finding]:
    findings = examine(machine, None, working_dir=Path.cwd(), **options)
    return [finding for finding in findings if finding.status != "ok"]


def test_a_healthy_machine_has_no_fault() -> None:
    assert faults(PresentedMachine()) == []


@pytest.mark.parametrize(
    ("machine", "check", "status", "said"),
    [
        (presented(python="3.10.14"), "python", "failed", "grpo-toolkit needs >=3.11"),
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


def test_an_extra_that_was_made_for_another_torch_is_told_though_it_can_be_imported() -> None:
    def with_vllm(torch: str) -> PresentedMachine:
        vllm = Package(version="0.18.0", folder=SITE / "vllm", home=SITE / "vllm", torch=torch)
        return presented(packages={**HEALTHY.packages, "vllm": vllm})

    (finding,) = faults(with_vllm("==2.9.0"))
    assert (finding.check, finding.status) == ("extras", "warning")
    assert "vllm 0.18.0 is importable, but says that it needs torch==2.9.0; 2.13.0+cu124 is installed" in finding.what
    assert faults(with_vllm("==2.13.0")) == faults(with_vllm(">=2.4")) == faults(with_vllm("")) == []


def test_the_port_where_ranks_meet_is_the_one_that_the_environment_names() -> None:
    def told(port: str, *taken: int) -> list[str]:
        machine = PresentedMachine(variables={"MASTER_PORT": port}, taken_ports=taken)
        return [f"{one.status}: {one.what}" for one in faults(machine, ranks=2)]

    assert told("29511", 29_500) == []
    assert told("29511", 29_511) == ["warning: 29511, where ranks meet (MASTER_PORT), is taken"]
    assert told("here") == ["failed: MASTER_PORT is 'here', which is no port"]


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


def test_this_machine_says_who_listens() -> None:
    machine = ThisMachine()
    with serve() as server:
        port = urlsplit(server.url).port or 0
        assert machine.is_listening("127.0.0.1", port)
        assert not machine.is_port_free(port)
    assert not machine.is_listening("127.0.0.1", port)
