"""The pages on rewards and judges are so: every snippet runs, in order, and prints what is shown below it."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from grpo.cli import main
from judges.config import EndpointConfig, JudgeConfig
from judges.demo_server import serve
from judges.types import FailureKind
from rewards.registry import BUILTIN_REWARDS, parse_params
from rewards.reward_model import RewardModelConfig
from rewards.trl_functions import TrlRewardParams

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name / "README.md").read_text() for name in ("rewards", "judges")}
DEMO_ADDRESS = "127.0.0.1:8008"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def demo_address() -> Iterator[str]:
    """Where a demo judge answers, for the one that a page has started in another terminal."""
    with serve() as server:
        yield server.url.removeprefix("http://").removesuffix("/v1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Does in an empty folder what a page says, in this interpreter: a new one for each command takes long."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def run(self, command: str) -> str:
        """Shell lines; those that call grpo are the command line's own function."""
        printed = ""
        for is_grpo, lines in itertools.groupby(command.splitlines(), key=lambda line: line.startswith("grpo ")):
            if not is_grpo:
                subprocess.run(["bash", "-euc", "\n".join(lines)], cwd=self.folder, check=True, timeout=60)
                continue
            for line in lines:
                self.monkeypatch.setattr(sys, "argv", shlex.split(line))
                with pytest.raises(SystemExit) as exit_:
                    main()
                captured = self.capsys.readouterr()
                assert (exit_.value.code or 0, captured.err) == (0, ""), line
                printed += captured.out
        return printed

    def execute(self, code: str) -> str:
        """Python that is no file."""
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
        return self.capsys.readouterr().out


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield Reader(folder=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_runs_and_prints_what_is_shown(page: str, reader: Reader, demo_address: str) -> None:
    printed, num_run = "", 0
    for kind, shown in BLOCK.findall(PAGES[page]):
        text = shown.replace(DEMO_ADDRESS, demo_address)
        named = re.match(r"# ([\w.-]+\.(?:py|yaml|txt))\n", text)
        if named:
            (reader.folder / named[1]).write_text(text)
        elif kind == "python":
            printed = reader.execute(text)
        elif kind == "bash":
            own = [line for line in text.splitlines() if not line.endswith("# in another terminal")]
            printed = reader.run("\n".join(own))
        elif kind == "text":
            missing = [line for line in squeezed(text) if line not in squeezed(printed)]
            assert missing == [], printed
        else:
            assert kind == "toml"
            tomllib.loads(text)
        num_run += kind in ("python", "bash")
    assert num_run >= 8


def params_of(name: str) -> set[str]:
    if name == "reward_model":
        return set(RewardModelConfig.model_fields)
    module, _, attribute = BUILTIN_REWARDS[name].partition(":")
    return set(getattr(importlib.import_module(module), attribute).model_fields)


@pytest.mark.parametrize("name", sorted(set(BUILTIN_REWARDS) - {"judged"}))
def test_the_table_of_rewards_has_each_with_all_its_params(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \| .* \|(.*)\|$", PAGES["rewards"], flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == params_of(name)


def test_the_params_of_a_trl_function_are_all_named() -> None:
    assert parse_params(TrlRewardParams, {}, reward_name="trl").form == "messages"
    assert all(f"`{name}" in PAGES["rewards"] for name in TrlRewardParams.model_fields)


@pytest.mark.parametrize("config", [JudgeConfig, EndpointConfig])
def test_every_key_of_a_judge_is_on_its_page(config: type[JudgeConfig | EndpointConfig]) -> None:
    assert [name for name in config.model_fields if f"`{name}" not in PAGES["judges"]] == []


def test_every_kind_of_failure_is_on_the_judges_page() -> None:
    assert [kind for kind in FailureKind.__args__ if f"`{kind}`" not in PAGES["judges"]] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)", PAGES[page])
    named = re.findall(r"`((?:tests|benchmarks|grpo|judges|rewards)/[\w/.-]+\.\w+)`", PAGES[page])
    missing = [path for path in linked if not (ROOT / page / path).exists()]
    assert missing + [path for path in named if not (ROOT / path).exists()] == []
