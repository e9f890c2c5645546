"""RewardSpec -> a reward ready to score. Knows names and parameters; imports a reward only when it is asked for."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rewards.base import AnyReward, RewardContext
from rewards.config import RewardSpec
from rewards.errors import RewardConfigError, RewardError

ENTRY_POINT_GROUP = "grpo.rewards"
TRL_PREFIX = "trl:"
"""Before `package.module:function`: a reward function as TRL's trainers take it; see `rewards.trl_functions`."""

BUILTIN_REWARDS: Mapping[str, str] = {
    "abstention_penalty": "rewards.abstention_penalty:AbstentionPenalty",
    "choice": "rewards.choice:Choice",
    "code_tests": "rewards.code_tests:CodeTests",
    "exact_match": "rewards.exact_match:ExactMatch",
    "format": "rewards.format:Format",
    "grounding": "rewards.grounding:Grounding",
    "judged": "rewards.judged:Judged",
    "length": "rewards.length:Length",
    "math_answer": "rewards.math_answer:MathAnswer",
    "regions": "rewards.regions:Regions",
    "reward_model": "rewards.reward_model:RewardModel",
}

Model = TypeVar("Model", bound=BaseModel)


def reward_names() -> tuple[str, ...]:
    """Built-in and installed names, sorted; `package.module:name` works besides."""
    return tuple(sorted({*BUILTIN_REWARDS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def build_reward(spec: RewardSpec, context: RewardContext) -> AnyReward:
    """Find the reward a spec names and give it its parameters.

    The name may lead to a class with `from_params(params, context)`, a pydantic model (parameters are its fields),
    another class (parameters are its constructor's arguments), or a function over one group (parameters are bound as
    keyword arguments).

    Raises:
        RewardConfigError: the name leads nowhere, or a parameter is unknown, missing or of the wrong kind.
    """
    if spec.name.startswith(TRL_PREFIX):
        return _import(spec.name, "rewards.trl_functions:TrlReward").from_spec(spec, context)
    target = _find(spec.name, context)
    if hasattr(target, "from_params"):
        return _built(spec, lambda: target.from_params(spec.params, context))
    if inspect.isclass(target) and issubclass(target, BaseModel):
        return parse_params(target, spec.params, reward_name=spec.name)  # pyright: ignore[reportReturnType]
    if inspect.isclass(target):
        return _constructed(target, spec)
    if callable(getattr(target, "score", None)) and not spec.params:
        return target
    if not callable(target):
        raise RewardConfigError(
            f"reward {spec.name!r} is a {type(target).__name__}; expected a class, or a function over one group "
            "(list[RewardInput] -> list[Score])."
        )
    return _bound(target, spec)


def parse_params(model: type[Model], params: Mapping[str, Any], *, reward_name: str) -> Model:
    """Read a reward's parameters into its record.

    Raises:
        RewardConfigError: one line per problem; an unknown parameter is answered with the nearest known one.
    """
    try:
        return model.model_validate(dict(params))
    except ValidationError as exc:
        problems = "; ".join(_describe(error, model.model_fields) for error in exc.errors())
        raise RewardConfigError(f"reward {reward_name!r}: {problems}.") from exc


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x' or 'y'?)" with the nearest known names; empty where none is near."""
    matches = get_close_matches(name.lower(), sorted(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""


def _find(name: str, context: RewardContext) -> Any:
    if name in BUILTIN_REWARDS:
        return _import(name, BUILTIN_REWARDS[name])
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in installed:
        return _load(installed[name])
    if ":" in name:
        return find_by_path(name, context)
    raise RewardConfigError(
        f"there is no reward {name!r}{nearest(name, {*BUILTIN_REWARDS, *installed})}. "
        f"Built in: {', '.join(BUILTIN_REWARDS)}. Installed: {', '.join(sorted(installed)) or 'none'}. "
        "Your own is named package.module:name, one made for TRL trl:package.module:name."
    )


def find_by_path(path: str, context: RewardContext, *, shown_as: str = "") -> Any:
    """What `package.module:name` leads to; the module may lie beside the recipe.

    Args:
        shown_as: the name as the recipe has it, for messages; `path` where empty.
    Raises:
        RewardConfigError: it leads nowhere.
    """
    make_local_module_importable(path.partition(":")[0], context.base_dir)
    return _import(shown_as or path, path)


def _import(name: str, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        prefix = TRL_PREFIX if name.startswith(TRL_PREFIX) else ""
        raise RewardConfigError(f"reward {name!r} must read {prefix}package.module:name.")
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:
        raise RewardConfigError(
            f"reward {name!r}: module {module_name!r} cannot be imported ({type(exc).__name__}: {exc}). "
            "It must be installed, on PYTHONPATH, or lie beside the recipe."
        ) from exc
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as exc:
        public = [known for known in vars(module) if not known.startswith("_")]
        hint = nearest(attribute, public)
        raise RewardConfigError(f"reward {name!r}: {module_name} has no {attribute!r}{hint}.") from exc


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as exc:
        raise RewardConfigError(
            f"reward {point.name!r}: its entry point {point.value!r} cannot be imported ({type(exc).__name__}: {exc})."
        ) from exc


def make_local_module_importable(module_name: str, base_dir: Path) -> None:
    """A module that lies beside the recipe is found, from whatever folder the run is started."""
    top = module_name.partition(".")[0]
    is_local = (base_dir / f"{top}.py").is_file() or (base_dir / top).is_dir()
    folder = str(base_dir.resolve())
    if top and is_local and folder not in sys.path:
        sys.path.append(folder)  # last, so that it never shadows an installed package
        importlib.invalidate_caches()


def _constructed(target: Callable[..., Any], spec: RewardSpec) -> AnyReward:
    _check_arguments(target, spec, positional=())
    return _built(spec, lambda: target(**spec.params))


def _built(spec: RewardSpec, build: Callable[[], AnyReward]) -> AnyReward:
    try:
        return build()
    except RewardError:
        raise
    except Exception as exc:
        raise RewardConfigError(
            f"reward {spec.name!r} cannot be built from its params ({type(exc).__name__}: {exc})."
        ) from exc


def _bound(target: Callable[..., Any], spec: RewardSpec) -> AnyReward:
    _check_arguments(target, spec, positional=([],))
    return functools.partial(target, **spec.params) if spec.params else target


def _check_arguments(target: Callable[..., Any], spec: RewardSpec, *, positional: tuple[Any, ...]) -> None:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some C callables have none
        return
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    if len(named) == len(signature.parameters):
        known = [parameter.name for parameter in named][len(positional) :]
        for name in spec.params:
            if name not in known:
                raise RewardConfigError(f"reward {spec.name!r}: {_unknown_param(name, known)}.")
    try:
        signature.bind(*positional, **spec.params)
    except TypeError as exc:
        raise RewardConfigError(f"reward {spec.name!r}: its params do not fit {signature}: {exc}.") from exc


def _describe(error: ErrorDetails, fields: Iterable[str]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        return _unknown_param(where, list(fields))
    if error["type"] == "missing":
        return f"param {where!r} is required"
    message = error["msg"].removeprefix("Value error, ")
    return f"param {where!r} is {error['input']!r}: {message}" if where else message


def _unknown_param(name: str, known: list[str]) -> str:
    return f"there is no param {name!r}{nearest(name, known)}; it has: {', '.join(known) or 'none'}"
