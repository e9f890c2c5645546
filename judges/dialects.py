"""EndpointConfig -> the client that speaks its dialect. Imports a client only when it is asked for."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from judges.clients.base import JudgeClient
from judges.config import EndpointConfig
from judges.errors import JudgeConfigError, JudgeError

ENTRY_POINT_GROUP = "grpo.judges"

BUILTIN_DIALECTS: Mapping[str, str] = {
    "anthropic_messages": "judges.clients.anthropic_messages:AnthropicMessagesClient",
    "openai_chat": "judges.clients.openai_chat:OpenAIChatClient",
}


def build_client(endpoint: EndpointConfig, *, timeout_s: float) -> JudgeClient:
    """The client for an endpoint. It needs no network and no secret yet.

    A client of your own is named by an entry point or by `package.module:name`. The name leads to a class or a function
    that takes `(endpoint, *, timeout_s)`, or no arguments; or to a client that is ready.

    Raises:
        JudgeConfigError: the name leads nowhere, or to something that has no `complete`.
    """
    target: Any = _find(endpoint.dialect)
    if not inspect.isclass(target) and isinstance(target, JudgeClient):
        return target
    if not callable(target):
        raise JudgeConfigError(
            f"dialect {endpoint.dialect!r} is a {type(target).__name__}; expected a client, or what builds one"
        )
    try:
        takes_endpoint = bool(inspect.signature(target).parameters)
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((endpoint,), {"timeout_s": timeout_s})
        positional, named = arguments if takes_endpoint else ((), {})
        client = target(*positional, **named)
    except JudgeError:
        raise
    except Exception as exc:
        raise JudgeConfigError(f"dialect {endpoint.dialect!r} cannot be built ({type(exc).__name__}: {exc})") from exc
    if not isinstance(client, JudgeClient):
        raise JudgeConfigError(
            f"dialect {endpoint.dialect!r} makes a {type(client).__name__}, which has no complete() and aclose()"
        )
    return client


def _find(name: str) -> Any:
    path = BUILTIN_DIALECTS.get(name, name)
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    try:
        if name not in BUILTIN_DIALECTS and name in installed:
            return installed[name].load()
        if ":" in path:
            module_name, _, attribute = path.partition(":")
            return functools.reduce(getattr, attribute.split("."), importlib.import_module(module_name))
    except Exception as exc:
        raise JudgeConfigError(f"dialect {name!r} cannot be imported ({type(exc).__name__}: {exc})") from exc
    raise JudgeConfigError(
        f"there is no dialect {name!r}. Built in: {', '.join(BUILTIN_DIALECTS)}. "
        f"Installed: {', '.join(sorted(installed)) or 'none'}. Your own is named package.module:name."
    )
