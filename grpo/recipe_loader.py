"""A recipe's name or path, and overrides -> RunConfig. Every mistake becomes one clear ConfigError.

Imports no torch.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from grpo.config import (
    BetaConfig,
    EntropyConfig,
    FilePrompts,
    LossConfig,
    PartConfig,
    PromptsConfig,
    RunConfig,
    TrainableConfig,
    TruncatedConfig,
)
from grpo.errors import ConfigError


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the toolkit."""
    files = resources.files("grpo.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    *,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> RunConfig:
    """Read a recipe and apply `key=value` overrides.

    Args:
        name_or_path: a shipped recipe's name, or a YAML file. Relative paths inside a file are resolved against the
            file's folder; those in a shipped recipe, against the current directory.
        overrides: dotted keys with YAML values, such as `rollout.group_size=4`.
        complete: adds what the caller never reads and a recipe may leave out.
    Raises:
        ConfigError: no such recipe, unreadable YAML, or a key or value that is wrong.
    """
    values, base_dir = _read(name_or_path)
    for override in overrides:
        _apply(values, override)
    return parse_recipe(complete(values), base_dir=base_dir, source=name_or_path)


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
        values = read_yaml(path)
        return values, Path(str(values.pop("base_dir", path.absolute().parent)))  # a run's config.yaml knows its own
    if name_or_path not in recipe_names():
        close = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"no recipe is called {name_or_path!r}.{hint} Shipped recipes: {', '.join(recipe_names())}; "
            "or give the path of a YAML file."
        )
    with resources.as_file(resources.files("grpo.recipes") / f"{name_or_path}.yaml") as shipped:
        return read_yaml(shipped), Path.cwd()


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's keys and values. Raises ConfigError."""
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
        merge = "tag:yaml.org,2002:merge"  # "<<: *defaults" stands for keys that may be written again
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
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
    if key == "base_dir":
        raise ConfigError(f"{override!r}: base_dir is the recipe's folder and cannot be set; write absolute paths")
    place = values
    *parents, last = key.split(".")
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}  # absent, or written without anything behind it
        place = place[parent]
        if not isinstance(place, dict):
            kind = "a list; give the whole list" if isinstance(place, list) else "a value, not keys"
            raise ConfigError(f"{override!r}: {parent} holds {kind}")
    place[last] = value


def _explain(error: ValidationError, source: str) -> str:
    items = [item for item in error.errors() if not _is_echo(item, error.errors())]
    lines = list(dict.fromkeys(_explain_one(item) for item in items))
    return f"recipe {source}:" + (f" {lines[0]}" if len(lines) == 1 else "\n  - " + "\n  - ".join(lines))


def _is_echo(item: ErrorDetails, items: Sequence[ErrorDetails]) -> bool:
    """A list whose entries are wrong is also called too short: pydantic counts only the entries that are right."""
    location = item["loc"]
    is_above_another = any(len(o["loc"]) > len(location) and o["loc"][: len(location)] == location for o in items)
    return item["type"] == "too_short" and is_above_another


def _explain_one(item: ErrorDetails) -> str:
    location = [str(part) for part in item["loc"]]
    path = _without_tags(location)
    key = ".".join(path)
    match item["type"]:
        case "extra_forbidden" | "invalid_key":  # the latter is no text: 1, or true, which YAML also reads from `on`
            near = _nearest_key(location)
            return f"unknown key {key}" + (f"; did you mean {near}?" if near else "")
        case "missing":
            return f"{key} is missing"
        case "value_error":
            message = item["msg"].removeprefix("Value error, ")
            return f"{key}: {message}" if key else message
        case "union_tag_not_found":
            return f"{key}.type is missing; expected {_or(_tags_of(item))}"
        case "union_tag_invalid":
            tag, known = item.get("ctx", {}).get("tag"), _tags_of(item)
            return f"{key}.type is {tag!r}; expected {_or(known)}" + _did_you_mean(tag, known)
    why = _REASONS.get(path[-1], "") if path and item["type"] in _BOUNDS else ""
    return f"{key} is {item['input']!r}; expected {_expected(item, path)}" + (f". {why}" if why else "")


_UNIONS = {
    "prompts": PromptsConfig,
    "beta": BetaConfig,
    "trainable": TrainableConfig,
    "parts": PartConfig,
    "loss": LossConfig,
    "entropy": EntropyConfig,
    "truncated": TruncatedConfig,
}
"""Keys that are tagged unions: in an error's location pydantic puts the value of `type` behind them, which is no key
to a reader of the recipe."""

_BOUNDS = {
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
}

_REASONS = {
    "group_size": "Advantages are relative to the group, so at least 2 completions per prompt are needed.",
    "temperature": "A greedy policy has no policy gradient; set it above 0, 1.0 is usual.",
}

_KINDS = {  # the part of pydantic's error type before its "_"
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a text",
    "path": "a path",
    "tuple": "a list, such as [a, b]",
    "dict": "keys and values",
    "model": "keys and values",
}


def _expected(item: ErrorDetails, path: Sequence[str]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if path[-1] == "modules" and "parts" not in path:
        return "'all-linear', or a list of module names"
    if len(path) > 1 and path[-2] == "end_tokens":
        return "a token's id or text"
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**context)
    if kind == "string_too_short":
        return "a text that is not empty"
    if kind == "string_pattern_mismatch":
        return "package.module:name"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        return _or(known) + _did_you_mean(item["input"], known)
    return _KINDS.get(kind.partition("_")[0], item["msg"])


def _tags_of(item: ErrorDetails) -> list[str]:
    parents = [str(part) for part in item["loc"]]
    return [tag for model in _models_at(RunConfig, parents) for tag in _tags(model)]


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    return typing.get_args(model.model_fields["type"].annotation) if "type" in model.model_fields else ()


def _or(values: Sequence[str]) -> str:
    *others, last = (repr(value) for value in values)
    return f"{', '.join(others)} or {last}" if others else last


def _did_you_mean(value: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _without_tags(location: Sequence[str]) -> list[str]:
    """The keys as the recipe has them: without a union's tag, and without the types of a plain union."""
    untagged = [part for part, is_tag in _with_kinds(location) if not is_tag]
    return [part for part in untagged if not re.fullmatch(r"str|int|(literal|tuple)\[.*\]", part)]


def _with_kinds(location: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each part of a location, and whether it is a union's tag: it stands behind the union's key or, of a list of them,
    behind the number in it."""
    key = ""
    for part in location:
        is_tag = key in _UNIONS and part in _TAGS
        yield part, is_tag
        if is_tag or not part.isdecimal():
            key = "" if is_tag else part


def _nearest_key(location: Sequence[str]) -> str:
    """The known key most like an unknown one: among its siblings, else anywhere in the recipe."""
    *parents, name = location
    path = _without_tags(parents)
    siblings = _keys(_models_at(RunConfig, parents))
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.51)
    if close:
        return ".".join([*path, close[0]])
    *union, tag = _with_kinds(parents) if parents else [("", False)]
    beside = _models_at(RunConfig, [part for part, _ in union]) if tag[1] else []
    if others := [m for m in beside if name in m.model_fields]:
        return f"{'.'.join(path)}.type={_tags(others[0])[0]}, which has it"
    every = {key.split(".")[-1]: key for key in reversed(_all_keys(RunConfig))}  # of keys of one name the first
    close = difflib.get_close_matches(name, list(every), n=1, cutoff=0.6)
    return every[close[0]] if close else ""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in {typing.Union, types.UnionType, typing.Annotated, tuple, dict}:
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []


_TAGS = {tag for union in _UNIONS.values() for model in _models_in(union) for tag in _tags(model)}


def _models_at(model: type[BaseModel], parents: Sequence[str]) -> list[type[BaseModel]]:
    """The records that may stand at a place, narrowed by the union tags in it."""
    models = [model]
    for parent, is_tag in _with_kinds(parents):
        if is_tag:
            models = [m for m in models if parent in _tags(m)]
        elif any(parent in m.model_fields for m in models):
            fields = [m.model_fields[parent] for m in models if parent in m.model_fields]
            models = [inner for field in fields for inner in _models_in(field.annotation)]
        # else a list index or an objective's name: the models below stay
    return models


def _keys(models: Sequence[type[BaseModel]]) -> list[str]:
    return [name for model in models for name in model.model_fields if name != "base_dir"]


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
    if config.warmup is not None:
        changes["warmup"] = config.warmup.model_copy(update={"path": absolute(config.warmup.path)})
    if config.scoring.replay is not None:
        changes["scoring"] = config.scoring.model_copy(update={"replay": absolute(config.scoring.replay)})
    return config.model_copy(update=changes)
