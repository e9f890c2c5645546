"""Names and parameters: what is wrong is said, with the nearest right one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from rewards import RewardConfigError, RewardContext, RewardInput, RewardSpec, build_reward, reward_names, score_group
from rewards.registry import BUILTIN_REWARDS

ONE = [RewardInput(prompt_id="p", prompt="q", completion="Anna", reference="anna", num_tokens=2)]

LOCAL_MODULE = """
def half(inputs):
    return [0.5 for _ in inputs]

async def constant(inputs, *, value=0.25):
    return [value for _ in inputs]

class Constant:
    def __init__(self, value=0.75):
        if value < 0:
            raise ValueError("value is below 0")
        self.value = value

    async def score(self, inputs):
        return [self.value for _ in inputs]

class FromParams:
    @classmethod
    def from_params(cls, params, context):
        return Constant(len(params) + len(context.base_dir.name))

ready = Constant(0.125)
number = 3
"""


def build(name: str, base_dir: Path = Path("."), **params):
    return build_reward(RewardSpec(name=name, params=params), RewardContext(base_dir=base_dir))


def value_of(reward) -> float | None:
    return asyncio.run(score_group(reward, ONE))[0].value


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A folder with a module of rewards beside the recipe; the import is undone afterwards."""
    (tmp_path / "local_rewards.py").write_text(LOCAL_MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "local_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("local_rewards", None)


def test_built_ins_are_listed_and_build():
    assert set(BUILTIN_REWARDS) <= set(reward_names())
    assert value_of(build("exact_match")) == 1.0
    assert value_of(build("exact_match", ignore_case=False)) == 0.0
    assert value_of(build("format", max_words=1)) == 1.0
    assert value_of(build("length", target_tokens=1, limit_tokens=3)) == -0.5  # (2 - 1) / (3 - 1)


def test_an_unknown_name_is_answered_with_the_nearest_and_all_built_ins():
    with pytest.raises(RewardConfigError, match="did you mean 'grounding'") as caught:
        build("groundng")
    for name in BUILTIN_REWARDS:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("length", {"target_tokens": 1, "limit_token": 3}, "no param 'limit_token' (did you mean 'limit_tokens'"),
        ("length", {"target_tokens": 1}, "param 'limit_tokens' is required"),
        (
            "length",
            {"target_tokens": "1", "limit_tokens": 3},
            "param 'target_tokens' is '1': Input should be a valid int",
        ),
        ("length", {"target_tokens": 3, "limit_tokens": 3}, "limit_tokens (3) must be above target_tokens (3)"),
        ("format", {}, "nothing is asked for"),
        ("format", {"pattern": "(("}, "not a regular expression"),
        ("choice", {"strict": True}, "no param 'strict'; it has: answer_tag, letters"),
        ("exact_match", {"ignore_case": 1}, "param 'ignore_case' is 1"),
        ("grounding", {"max_words": 0}, "greater than 0"),
    ],
)
def test_a_wrong_param_is_named_with_what_was_expected(name, params, message):
    with pytest.raises(RewardConfigError) as caught:
        build(name, **params)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("attribute", "params", "expected"),
    [
        ("half", {}, 0.5),
        ("constant", {}, 0.25),
        ("constant", {"value": 2.0}, 2.0),
        ("Constant", {}, 0.75),
        ("Constant", {"value": 3.0}, 3.0),
        ("ready", {}, 0.125),
    ],
)
def test_a_reward_beside_the_recipe_is_found_and_gets_its_params(local, attribute, params, expected):
    assert value_of(build(f"local_rewards:{attribute}", local, **params)) == expected


def test_from_params_gets_params_and_context(local):
    assert value_of(build("local_rewards:FromParams", local, a=1)) == 1 + len(local.name)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("local_rewards:haf", {}, "has no 'haf' (did you mean 'half'"),
        ("local_rewards:constant", {"valu": 1.0}, "no param 'valu' (did you mean 'value'"),
        ("local_rewards:half", {"value": 1.0}, "no param 'value'"),
        ("local_rewards:Constant", {"value": -1.0}, "ValueError: value is below 0"),
        ("local_rewards:number", {}, "is a int; expected a class, or a function"),
        ("local_rewards:", {}, "must read package.module:name"),
        ("no_such_module:half", {}, "module 'no_such_module' cannot be imported"),
    ],
)
def test_a_wrong_path_or_param_of_ones_own_reward_is_the_users_error(local, name, params, message):
    with pytest.raises(RewardConfigError) as caught:
        build(name, local, **params)
    assert message in str(caught.value)


def test_an_installed_reward_is_found_by_its_entry_point(local, monkeypatch):
    info = local / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[grpo.rewards]\nhalved = local_rewards:half\nlost = local_rewards:nothing\n"
    )
    monkeypatch.syspath_prepend(str(local))
    assert "halved" in reward_names()
    assert value_of(build("halved")) == 0.5
    with pytest.raises(RewardConfigError, match="did you mean 'halved'"):
        build("halvd")
    with pytest.raises(RewardConfigError, match="its entry point 'local_rewards:nothing' cannot be imported"):
        build("lost")


@pytest.mark.parametrize(
    "fields", [{"name": "choice", "wight": 1.0}, {"name": ""}, {"name": "choice", "weight": float("nan")}, {}]
)
def test_a_spec_with_an_unknown_or_wrong_key_is_refused(fields):
    with pytest.raises(ValidationError):
        RewardSpec(**fields)


def test_rewards_and_tasks_import_neither_torch_nor_upwards():
    code = (
        "import sys, rewards.choice, rewards.grounding, rewards.format, rewards.length, rewards.exact_match;"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'grpo')];"
        "import grpo.tasks; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
