"""What several commands take, and how it is checked. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change, such as rollout.group_size=4."),
]


def recipe_of(name: str) -> str:
    """A run directory stands for the config it was started with."""
    saved = Path(name).expanduser() / "config.yaml"
    return str(saved) if saved.is_file() else name


def check_writable(option: str, path: Path | None) -> None:
    """Before anything is computed: an hour's figures must have where to go."""
    if path is None:
        return
    from grpo.errors import ConfigError

    if path.is_dir():
        raise ConfigError(f"{option} {path.absolute()} is a folder. Name a file.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path.absolute()}: its folder does not exist. Make it, or name another file.")
