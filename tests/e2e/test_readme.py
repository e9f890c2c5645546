"""What the README says about files, commands and recipes is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from grpo.recipe_loader import parse_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_it_opens_with_the_two_commands() -> None:
    assert README.index("bash scripts/quickstart.sh") < README.index("bash scripts/test.sh") < 1000


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README


@pytest.mark.parametrize("name", sorted(set(re.findall(r"[\w/.]+/[\w/.-]+\.(?:py|png|yaml|sh|json)", README))))
def test_every_file_it_names_exists(name: str) -> None:
    assert (ROOT / name).is_file()


def test_its_example_recipe_is_a_recipe() -> None:
    (recipe,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    config = parse_recipe(yaml.safe_load(recipe.replace("2e-4", "0.0002")), base_dir=ROOT, source="README.md")
    assert set(config.objectives) == {"accuracy", "style"}


def test_its_python_parses() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "README.md", "exec")
