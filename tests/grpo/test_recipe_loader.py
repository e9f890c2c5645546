"""A recipe's file and overrides become a config; every mistake becomes one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grpo.config import FilePrompts, OptimConfig, RunConfig
from grpo.errors import ConfigError
from grpo.recipe_loader import dump_config, load_recipe, load_run_config, recipe_names

RECIPE = """
model: m
steps: 2
output_dir: runs/first
prompts: {type: file, path: data/train.jsonl, held_out_path: data/test.jsonl}
objectives:
  brevity:
    rewards: [{name: length, params: {target_tokens: 4, limit_tokens: 8}}]
    beta: {type: band, low: 0.01, high: 0.1}
optim:
  learning_rate: 2e-4
trainable: {type: lora, rank: 4}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str) -> RunConfig:
    return load_recipe(str(write_recipe(folder)), overrides)


def error_of(folder: Path, *overrides: str, text: str = RECIPE) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(write_recipe(folder, text)), overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_parses(name: str) -> None:
    config = load_recipe(name)
    assert config.steps >= 1
    assert config.output_dir == Path.cwd() / "runs" / name


def test_the_quickstart_is_shipped() -> None:
    assert "quickstart" in recipe_names()


def test_an_unknown_recipe_is_answered_with_the_nearest_shipped_one() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quikstart")
    assert "no recipe is called 'quikstart'. Did you mean 'quickstart'?" in str(caught.value)


def test_a_recipe_file_that_is_not_there_is_shown_with_its_absolute_path() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("missing/recipe.yaml")
    assert f"no recipe at {Path.cwd() / 'missing' / 'recipe.yaml'}" in str(caught.value)


NEAREST = [
    ("stepz=3", "stepz", "steps"),
    ("rollout.group_sze=4", "rollout.group_sze", "rollout.group_size"),
    ("update.kl.estimater=k3", "update.kl.estimater", "update.kl.estimator"),
    ("objectives.brevity.wieght=1", "objectives.brevity.wieght", "objectives.brevity.weight"),
    ("objectives.brevity.beta.hgih=1", "objectives.brevity.beta.hgih", "objectives.brevity.beta.high"),
    (
        "objectives.brevity.rewards=[{name: length, wieght: 1}]",
        "objectives.brevity.rewards.0.wieght",
        "objectives.brevity.rewards.0.weight",
    ),
    ("trainable.rnak=3", "trainable.rnak", "trainable.rank"),
    ("prompts.promt_column=q", "prompts.promt_column", "prompts.prompt_column"),
    ("temperature=1.0", "temperature", "rollout.temperature"),
    ("lr.learning_rate=1", "lr", None),
    ("trainable={type: full, rank: 3}", "trainable.rank", "trainable.type=lora, which has it"),
    (
        "objectives.brevity.beta={type: fixed, low: 0.1}",
        "objectives.brevity.beta.low",
        "objectives.brevity.beta.type=band, which has it",
    ),
    (
        "objectives.brevity.beta={type: dual, target: 0.1, horizon: 3}",
        "objectives.brevity.beta.horizon",
        "objectives.brevity.beta.type=proportional, which has it",
    ),
    ("update.loss={type: gspo, clip_lo: 0.1}", "update.loss.clip_lo", "update.loss.clip_low"),
    ("update.loss={type: cispo, clip_low: 0.1}", "update.loss.clip_low", "update.loss.type=dapo, which has it"),
    (
        "update.loss={type: sapo, temprature_positive: 1}",
        "update.loss.temprature_positive",
        "update.loss.temperature_positive",
    ),
    (
        "update.entropy={type: fixed, coefficient: 1, target: 1}",
        "update.entropy.target",
        "update.entropy.type=adaptive, which has it",
    ),
    ("update.entropy={type: adaptive, target: 1, stepp: 1}", "update.entropy.stepp", "update.entropy.step"),
    ("update.truncated={type: mask, in_base: true}", "update.truncated.in_base", "update.truncated.in_baseline"),
    (
        "update.truncated={type: mask, buffer_tokens: 3}",
        "update.truncated.buffer_tokens",
        "update.truncated.type=penalty, which has it",
    ),
    ("update.correction={levle: token}", "update.correction.levle", "update.correction.level"),
    ("update.gradients.cosine_evry=1", "update.gradients.cosine_evry", "update.gradients.cosine_every"),
    ("optim.rules=[{pattern: a, factor: 1, fcator: 1}]", "optim.rules.0.fcator", "optim.rules.0.factor"),
    (
        "warmup={path: w, steps: 1, learning_rate: 1, batchsize: 1}",
        "warmup.batchsize",
        "warmup.batch_size",
    ),
    ("rollout.learning_rate=1", "rollout.learning_rate", "optim.learning_rate"),  # and not warmup's
]


@pytest.mark.parametrize(("override", "key", "near"), NEAREST, ids=[key for _, key, _ in NEAREST])
def test_an_unknown_key_is_answered_with_the_nearest_known_one(
    override: str, key: str, near: str | None, tmp_path: Path
) -> None:
    hint = f"; did you mean {near}?" if near else ""
    assert error_of(tmp_path, override) == f"recipe {tmp_path / 'recipe.yaml'}: unknown key {key}{hint}"


def test_an_unknown_key_far_from_all_known_ones_gets_no_guess(tmp_path: Path) -> None:
    assert error_of(tmp_path, "zzz=1").endswith("unknown key zzz")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainable={rank: 8}", "trainable.type is missing; expected 'lora', 'full' or 'parts'"),
        (
            "trainable={type: lorra}",
            "trainable.type is 'lorra'; expected 'lora', 'full' or 'parts'; did you mean 'lora'?",
        ),
        ("prompts={type: flie}", "prompts.type is 'flie'; expected 'tasks', 'file' or 'hub'; did you mean 'file'?"),
        (
            "objectives.brevity.beta={low: 0.1, high: 0.2}",
            "objectives.brevity.beta.type is missing; expected 'fixed', 'band', 'proportional' or 'dual'",
        ),
        (
            "update.loss={type: spao}",
            "update.loss.type is 'spao'; expected 'dapo', 'grpo', 'bnpo', 'dr_grpo', 'gspo', 'cispo', 'sapo' or "
            "'custom'; did you mean 'sapo'?",
        ),
        (
            "update.loss.delta=3",
            "update.loss.type is missing; expected 'dapo', 'grpo', 'bnpo', 'dr_grpo', 'gspo', "
            "'cispo', 'sapo' or 'custom'",
        ),
        ("update.entropy={coefficient: 1}", "update.entropy.type is missing; expected 'fixed' or 'adaptive'"),
        ("update.truncated={type: drop}", "update.truncated.type is 'drop'; expected 'keep', 'mask' or 'penalty'"),
    ],
)
def test_a_choice_without_a_known_type_is_answered_with_the_types(override: str, expected: str, tmp_path: Path) -> None:
    assert error_of(tmp_path, override).endswith(expected)


def test_a_wrong_entry_of_a_list_is_one_mistake_and_not_also_an_empty_list(tmp_path: Path) -> None:
    message = error_of(tmp_path, "objectives.brevity.rewards=[{name: 3}]")
    assert message.endswith("recipe.yaml: objectives.brevity.rewards.0.name is 3; expected a text")


def test_an_objective_named_like_a_type_is_still_shown(tmp_path: Path) -> None:
    message = error_of(tmp_path, text=RECIPE.replace("brevity:", "full:").replace("high: 0.1", "high: 0.1, lwo: 1"))
    assert "unknown key objectives.full.beta.lwo; did you mean objectives.full.beta.low?" in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = error_of(tmp_path, "steps=0", "rollout.group_size=1", "sead=3")
    lines = message.splitlines()[1:]
    assert [line.split(";")[0] for line in lines] == [
        "  - steps is 0",
        "  - rollout.group_size is 1",
        "  - unknown key sead",
    ]


def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path) -> None:
    assert load(tmp_path).optim == OptimConfig(learning_rate=2e-4)
    for text, value in {"3e-5": 3e-5, "1E-3": 1e-3, "1.e-2": 1e-2, "2e+0": 2.0}.items():
        assert load(tmp_path, f"optim.learning_rate={text}").optim.learning_rate == value


def test_a_text_that_looks_a_little_like_a_number_stays_a_text(tmp_path: Path) -> None:
    assert load(tmp_path, "model=2e-4b").model == "2e-4b"


@pytest.mark.parametrize("text", ["steps: 3\n" + RECIPE, RECIPE.replace("rank: 4", "rank: 4, rank: 8")])
def test_a_key_written_twice_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    message = error_of(tmp_path, text=text)
    assert "is there twice" in message
    assert str(tmp_path / "recipe.yaml") in message
    assert "line " in message


def test_yaml_anchors_and_merges_work(tmp_path: Path) -> None:
    text = RECIPE.replace("rewards: [{", "rewards: [&reward {").replace(
        "optim:", "  short: {rewards: [{<<: *reward, weight: 2.0}], beta: {type: fixed}}\noptim:"
    )
    short = load_recipe(str(write_recipe(tmp_path, text))).objectives["short"].rewards[0]
    assert (short.name, short.weight) == ("length", 2.0)


@pytest.mark.parametrize(
    ("text", "words"), [("[1, 2]", "holds list"), ("", "holds NoneType"), ("a: [", "not readable")]
)
def test_a_file_that_holds_no_keys_is_refused_with_its_path(text: str, words: str, tmp_path: Path) -> None:
    message = error_of(tmp_path, text=text)
    assert words in message
    assert str(tmp_path / "recipe.yaml") in message


def test_overrides_reach_dotted_keys_and_the_last_one_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path, "rollout.group_size=4", "objectives.brevity.beta.high=0.5", "trainable.rank=2", "steps=7", "steps=9"
    )
    assert (config.rollout.group_size, config.steps) == (4, 9)
    assert config.objectives["brevity"].beta.model_dump()["high"] == 0.5
    assert config.trainable.model_dump() == {"type": "lora", "rank": 2, "alpha": 32.0, "modules": "all-linear"}


def test_an_override_reaches_into_a_section_that_is_written_but_empty(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE + "rollout:\n")
    assert load_recipe(str(path), ["rollout.group_size=4"]).rollout.group_size == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.group_size", "'rollout.group_size' is no override; write key=value, such as rollout.group_size=4"),
        ("=4", "'=4' is no override"),
        ("steps=[1", "the value is not readable as YAML"),
        ("steps.x=3", "steps holds a value, not keys"),
        ("objectives.brevity.rewards.0.weight=3", "rewards holds a list; give the whole list"),
        ("base_dir=/elsewhere", "base_dir is the recipe's folder and cannot be set"),
    ],
)
def test_a_bad_override_is_quoted_and_answered(override: str, words: str, tmp_path: Path) -> None:
    message = error_of(tmp_path, override)
    assert repr(override) in message
    assert words in message


def test_relative_paths_start_at_the_recipes_folder_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    write_recipe(folder)
    monkeypatch.chdir(elsewhere)
    config = load_recipe("../recipes/recipe.yaml")
    assert config.output_dir.resolve() == folder / "runs" / "first"
    assert config.output_dir.is_absolute()
    assert isinstance(config.prompts, FilePrompts)
    assert config.prompts.path.resolve() == folder / "data" / "train.jsonl"
    assert config.prompts.held_out_path is not None
    assert config.prompts.held_out_path.resolve() == folder / "data" / "test.jsonl"


def test_absolute_paths_stay_as_they_are(tmp_path: Path) -> None:
    config = load(tmp_path, "output_dir=/runs/a", "prompts.path=/data/x.jsonl")
    assert config.output_dir == Path("/runs/a")
    assert isinstance(config.prompts, FilePrompts)
    assert config.prompts.path == Path("/data/x.jsonl")


@pytest.mark.parametrize(
    "prompts", ["{type: tasks, names: [fairness]}", "{type: hub, name: a/b}", "{type: file, path: d}"]
)
@pytest.mark.parametrize(
    "others",
    [
        ["trainable={type: full}", "update.entropy={type: fixed, coefficient: 0.1}", "update.truncated={type: mask}"],
        [
            "trainable={type: lora, modules: [q_proj]}",
            "objectives.brevity.beta={type: dual, target: 0.1}",
            "update.loss={type: custom, path: 'a:b', params: {x: [1, {y: z}]}}",
            "optim.rules=[{pattern: lora_B, factor: 16}]",
            "warmup={path: w.jsonl, steps: 3, learning_rate: 1e-3}",
        ],
    ],
    ids=["full", "lora"],
)
def test_a_dumped_config_loads_as_the_same_config(prompts: str, others: list[str], tmp_path: Path) -> None:
    config = load(tmp_path, f"prompts={prompts}", *others, "rollout.end_tokens=[7, '<end>']")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_run_config(run_dir) == config


def test_a_dumped_config_is_plain_yaml_with_every_default_written_out(tmp_path: Path) -> None:
    values = yaml.safe_load(dump_config(load(tmp_path)))
    assert values["rollout"]["group_size"] == 8
    assert values["optim"]["learning_rate"] == 2e-4
    assert values["output_dir"] == str(tmp_path / "runs" / "first")


def test_a_folder_without_config_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path)
    assert f"{tmp_path} is no run directory: it has no config.yaml" in str(caught.value)
