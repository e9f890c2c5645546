"""A recipe's name or path, and overrides -> RunConfig. Every mistake becomes one clear ConfigError.

Imports no torch.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from grpo.config import FilePrompts, RunConfig
from grpo.errors import ConfigError


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the toolkit."""
    files = resources.files("grpo.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `key=value` overrides.

    Args:
        name_or_path: a shipped recipe's name, or a YAML file. Relative paths inside a file are resolved against the
            file's folder; those in a shipped recipe, against the current directory.
        overrides: dotted keys with YAML values, such as `rollout.group_size=4`.
    Raises:
        ConfigError: no such recipe, unreadable YAML, or a key or value that is wrong.
    """
    values, base_dir = _read(name_or_path)
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, base_dir=base_dir, source=name_or_path)


def load_run_config(run_dir: Path) -> RunConfig:
    """The resolved config of a run directory. Raises ConfigError where it is missing or damaged."""
    path = run_dir.absolute() / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir.absolute()} is no run directory: it has no config.yaml. Name the folder of a run.")
    return load_recipe(str(path))


def parse_recipe(values: Mapping[str, Any], *, base_dir: Path, source: str) -> RunConfig:
    """Check a recipe's values and make its paths absolute. Raises ConfigError."""
    try:
        config = RunConfig.model_validate({**values, "base_dir": base_dir})
    except ValidationError as exc:
        raise ConfigError(_explain(exc, source)) from exc
    return _with_absolute_paths(config)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, readable by `load_run_config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(name_or_path: str) -> tuple[dict[str, Any], Path]:
    path = Path(name_or_path).expanduser()
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise ConfigError(
                f"no recipe at {path.absolute()}. Give an existing YAML file, or one of {recipe_names()}."
            )
        values = _parse_yaml(path)
        return values, Path(str(values.pop("base_dir", path.absolute().parent)))  # a run's config.yaml knows its own
    if name_or_path not in recipe_names():
        close = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"no recipe is called {name_or_path!r}.{hint} Shipped recipes: {', '.join(recipe_names())}; "
            "or give the path of a YAML file."
        )
    with resources.as_file(resources.files("grpo.recipes") / f"{name_or_path}.yaml") as shipped:
        return _parse_yaml(shipped), Path.cwd()


def _parse_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml)  # a SafeLoader, see _Yaml
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as exc:
        raise ConfigError(f"{path.absolute()} is not readable as YAML: {exc}") from exc
    if not isinstance(values, dict):
        raise ConfigError(f"{path.absolute()} holds {type(values).__name__}, expected keys and values")
    return values


class _Yaml(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number, and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_Yaml.add_implicit_resolver(  # YAML 1.1 takes 2e-4, without a dot, for a text
    "!exponent",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
_Yaml.add_constructor("!exponent", _construct_number)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is no override; write key=value, such as rollout.group_size=4")
    try:
        value = yaml.load(text, Loader=_Yaml)  # a SafeLoader, see _Yaml
    except yaml.YAMLError as exc:
        raise ConfigError(f"{override!r}: the value is not readable as YAML: {exc}") from exc
    place = values
    *parents, last = key.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{override!r}: {parent} holds a value, not keys")
    place[last] = value


def _explain(error: ValidationError, source: str) -> str:
    lines = [_explain_one(dict(item)) for item in error.errors()]
    return f"recipe {source}: " + ("; ".join(lines) if len(lines) == 1 else "\n  - " + "\n  - ".join(lines))


def _explain_one(item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(part for part in location if part not in _TAGS or part == location[-1])
    if item["type"] == "extra_forbidden":
        near = _nearest_key(location)
        return f"unknown key {key}" + (f"; did you mean {near}?" if near else "")
    if item["type"] == "missing":
        return f"{key} is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    why = _reason_of(location)
    return f"{key} is {item['input']!r}: {message[0].lower()}{message[1:]}" + (f". {why}" if why else "")


_TAGS = {"tasks", "file", "hub", "fixed", "band", "lora", "full"}
"""Values of `type`: pydantic puts them into an error's location, a reader of the recipe does not know them there."""

_REASONS = {
    "group_size": "Advantages are relative to the group, so at least 2 completions per prompt are needed.",
    "temperature": "A greedy policy has no policy gradient; set it above 0, 1.0 is usual.",
}


def _reason_of(location: Sequence[str]) -> str:
    return _REASONS.get(location[-1], "") if location else ""


def _nearest_key(location: Sequence[str]) -> str:
    """The known key most like an unknown one: among its siblings, else anywhere in the recipe."""
    *parents, name = location
    siblings = _keys_at(RunConfig, parents)
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    if close:
        return ".".join([*(part for part in parents if part not in _TAGS), close[0]])
    every = {path.split(".")[-1]: path for path in _all_keys(RunConfig)}
    close = difflib.get_close_matches(name, list(every), n=1, cutoff=0.6)
    return every[close[0]] if close else ""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in {typing.Union, types.UnionType, typing.Annotated, tuple, dict}:
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []


def _keys_at(model: type[BaseModel], parents: Sequence[str]) -> list[str]:
    models = [model]
    for parent in parents:
        if parent in _TAGS:
            models = [
                m for m in models if "type" in m.model_fields and parent in str(m.model_fields["type"].annotation)
            ]
        elif any(parent in m.model_fields for m in models):
            models = [
                n for m in models if parent in m.model_fields for n in _models_in(m.model_fields[parent].annotation)
            ]
        # else a list index or an objective's name: the models below stay
    return [name for m in models for name in m.model_fields if name != "base_dir"]


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, field in model.model_fields.items():
        if name == "base_dir":
            continue
        paths.append(prefix + name)
        inner = f"{prefix}{name}.<name>." if name == "objectives" and not prefix else f"{prefix}{name}."
        for part in _models_in(field.annotation):
            paths += _all_keys(part, inner)
    return paths


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    base_dir = config.base_dir.expanduser().absolute()

    def absolute(path: Path) -> Path:
        return Path(base_dir / path.expanduser())

    changes: dict[str, Any] = {"base_dir": base_dir, "output_dir": absolute(config.output_dir)}
    if isinstance(config.prompts, FilePrompts):
        held_out = config.prompts.held_out_path
        changes["prompts"] = config.prompts.model_copy(
            update={"path": absolute(config.prompts.path), "held_out_path": held_out and absolute(held_out)}
        )
    return config.model_copy(update=changes)
