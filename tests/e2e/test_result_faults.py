"""A disk that refuses what a command was asked to leave in a file: told with path and bytes; figures are shown, and the
file that was there stays."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from kill_harness.file_faults import FAULTS
from kill_harness.file_operations import Operation, watched
from run_builders import Runs, completions_of

from grpo.durable_files import write_result
from grpo.errors import StorageError


@pytest.fixture
def runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Runs:
    place = Runs(model_dir=tiny_model_dir, folder=tmp_path.resolve(), monkeypatch=monkeypatch, capsys=capsys)
    place.prepare()
    return place


def refused(runs: Runs, file: Path, *arguments: str) -> tuple[int, str, str]:
    """The command on a disk that is full in the middle of this file."""

    def full(operation: Operation, call: Any, arguments: tuple[Any, ...]) -> Any:
        is_here = operation.name == "write" and file.name in operation.path.name
        return FAULTS["a short write, then ENOSPC"](operation, call, arguments) if is_here else call(*arguments)

    with watched(file.parent, full):
        return runs.command(*arguments)


def check_told(stderr: str, file: Path) -> None:
    words = " ".join(stderr.split())
    assert "Traceback" not in stderr
    assert re.search(rf"error: .*{re.escape(str(file))} cannot be written: .*No space left on device", words), stderr
    assert re.search(r"\d+ bytes were to be written, \d+ are free there", words), stderr


def test_figures_that_a_full_disk_refuses_are_shown_and_the_old_file_stays(runs: Runs) -> None:
    run_dir = runs.run("run")
    file = runs.folder / "figures.json"
    file.write_text("older")
    recipe = str(runs.write_recipe("run"))
    some = runs.folder / "some.jsonl"
    some.write_text("".join(json.dumps(row) + "\n" for row in completions_of(run_dir)))
    commands = {
        ("score", recipe, str(some), "--json", str(file)): "short",
        ("score", recipe, str(some), "--out", str(file)): "short",
        ("eval", str(run_dir), "--json", str(file)): "short",
        ("plan", recipe, "--json", str(file)): "",
        ("doctor", recipe, "--json", str(file)): "Doctor",
    }
    for command, shown in commands.items():
        code, stdout, stderr = refused(runs, file, *command)
        assert code == 1, (command, stderr)
        check_told(stderr, file)
        assert "Make room, or name another file." in " ".join(stderr.split()), command
        assert shown in stdout + stderr.partition("error: ")[0], command
        assert file.read_text() == "older", command
    assert [path.name for path in runs.folder.glob(".*.new")] == []


def test_a_report_that_a_full_disk_refuses_is_told_and_the_old_one_stays(runs: Runs) -> None:
    recipe, run_dir = str(runs.write_recipe("run")), runs.folder / "run"
    code, _, stderr = refused(runs, run_dir / "report.html", "train", recipe)
    assert code == 1
    assert "the report was not written: " in stderr
    check_told(stderr, run_dir / "report.html")
    assert runs.command("report", str(run_dir))[0] == 0
    before = (run_dir / "report.html").read_bytes()
    code, _, stderr = refused(runs, run_dir / "report.html", "report", str(run_dir))
    assert code == 1
    check_told(stderr, run_dir / "report.html")
    assert (run_dir / "report.html").read_bytes() == before


def test_what_is_no_plain_file_is_written_into_and_not_replaced(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    write_result(link, "figures")
    assert (link.is_symlink(), target.read_text()) == (True, "figures")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_result(pipe, "figures")
    assert os.read(reader, 100) == b"figures"
    os.close(reader)
    with pytest.raises(StorageError, match=r"/dev/full cannot be written: .*No space left on device.* 7 bytes were to"):
        write_result(Path("/dev/full"), "figures")
