"""benchmarks/results_file.py: a file of results says where its figures come from, and takes no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from results_file import circumstances, held_figures, write_results


def test_a_file_names_command_machine_device_and_versions(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "figures.json"
    write_results(target, {**circumstances("torch", device="auto"), "cases": [1]})
    document = json.loads(target.read_text())
    assert document["command"].startswith("python ")
    assert {"cores", "platform", "threads", "device"} <= set(document["machine"])
    assert document["machine"]["dtype"] in ("float32", "bfloat16")
    assert {"python", "grpo-toolkit", "torch"} == set(document["versions"])
    assert document["cases"] == [1]


def test_figures_are_added_to_those_of_the_same_machine_only(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    begun = {**circumstances(), "cases": []}
    assert held_figures(target, begun, "machine") == begun
    write_results(target, {**begun, "command": "python another.py", "cases": [1]})
    assert held_figures(target, begun, "machine", "versions")["cases"] == [1]
    before = target.read_text()
    with pytest.raises(SystemExit, match="another machine") as refused:
        held_figures(target, {**begun, "machine": {"cores": -1}}, "machine", "versions")
    assert "Name another file" in str(refused.value)
    assert target.read_text() == before
