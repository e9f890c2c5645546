"""The vLLM servers of a run: which are there, which gets what, and what happens when one of them dies.

Lives in an event loop; knows HTTP's answers, and nothing of policies or tokenizers.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from grpo.config import VllmServerConfig
from grpo.errors import ConfigError, EngineError
from grpo.rollout.vllm_engine import MINIMUM_VERSION
from grpo.rollout.vllm_facts import ServerFacts, server_url
from grpo.rollout.vllm_http import NoAnswer, Refused, Server, ServerClient, check_address
from grpo.rollout.vllm_sync import Deadline
from grpo.rollout.vllm_take import check_held_version, take
from grpo.rollout.vllm_transfer import Transfer

logger = logging.getLogger(__name__)

START = "Start one: python -m grpo.rollout.vllm_serve MODEL --port PORT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One row's answer."""

    server: Server
    """Who gave it."""
    body: Any
    """JSON of /v1/completions."""


class Fleet:
    """The servers of a run. `await fleet.aclose()` closes the connections, and leaves the servers as they are.

    A server that does not answer is left out with a warning, as long as another one is there; every sync asks it again.
    """

    def __init__(self, config: VllmServerConfig, client: ServerClient | None = None) -> None:
        """Connects to nothing yet.

        Raises:
            ConfigError: a URL is none, or would be used in the clear; the key's variable is not set.
        """
        urls = list(dict.fromkeys(server_url(url) for url in config.urls))
        for url in urls:
            check_address(url)
        self._client = client or ServerClient(config)
        self._max_connections, self._request_timeout_s = config.max_connections, config.request_timeout_s
        self._freed = asyncio.Event()
        self.servers = [Server(url, self._client, max_connections=config.max_connections) for url in urls]

    @property
    def alive(self) -> list[Server]:
        """Those that are not left out."""
        return [server for server in self.servers if not server.is_lost]

    async def aclose(self) -> None:
        """Close the connections. May be called twice."""
        await self._client.aclose()

    async def ask_facts(self) -> list[ServerFacts]:
        """Of each server. Raises ConfigError for one that is not there or was started for something else."""
        return await asyncio.gather(*(_facts_of(server) for server in self.servers))

    async def probe(self, body: Mapping[str, Any]) -> list[Reply]:
        """What each makes of this request. Raises ConfigError where one does not take it."""
        return [Reply(server=server, body=await _probed(server, body)) for server in self.alive]

    async def sample(
        self, groups: Iterable[Sequence[Mapping[str, Any]]], put: Callable[[tuple[int, list[Reply]]], None]
    ) -> None:
        """Ask for all rows of all groups; `put` gets each group's place and answers, in order, once it is complete.

        Args:
            groups: requests of one prompt each, which go to one server, for it keeps the prompt's cache; they are
                taken as servers get free.
        Raises:
            EngineError: a server refused a row or took too long, or no server is left.
        """
        async with asyncio.TaskGroup() as tasks:
            for place, bodies in enumerate(groups):
                server = await self._reserve(len(bodies))
                rows = [tasks.create_task(self._row(server, body)) for body in bodies]
                for row in rows:
                    row.add_done_callback(lambda _, server=server: self._free(server))
                tasks.create_task(_collected(place, rows, put))

    async def check_version(self, version: int) -> None:
        """Raises EngineError where a server holds other weights than the last sync's, or none is left."""
        servers = self.alive
        outcomes = await asyncio.gather(*(_versions(server) for server in servers), return_exceptions=True)
        for server, outcome in zip(servers, outcomes, strict=True):
            if isinstance(outcome, NoAnswer):
                self._lose(server, outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                check_held_version(server, outcome, version)

    async def take(self, transfer: Transfer, deadline: Deadline) -> list[str]:
        """Every server that can be reached takes the weights, side by side. Those left out are asked again.

        Returns:
            The URLs of those that have them.
        Raises:
            EngineError: one did not take them; the others have them.
        """
        takings = (take(server, transfer, copy.copy(deadline)) for server in self.servers)
        outcomes = await asyncio.gather(*takings, return_exceptions=True)
        told = list(zip(self.servers, outcomes, strict=True))
        for server, outcome in told:
            may_be_left_out = isinstance(outcome, NoAnswer) or (isinstance(outcome, EngineError) and server.is_lost)
            if isinstance(outcome, BaseException) and not may_be_left_out:
                raise outcome
        for server, outcome in told:
            if outcome is None and server.is_lost:
                logger.warning("%s is back, and has the policy's weights", server.url)
                server.is_lost = False
        for server, outcome in told:
            if isinstance(outcome, EngineError):
                self._lose(server, outcome)
        return [server.url for server in self.alive]

    def keep(self, urls: Sequence[str]) -> None:
        """Leave out all but these: what another rank's sync has found."""
        for server in self.servers:
            server.is_lost = server.url not in urls

    def _lose(self, server: Server, cause: EngineError) -> None:
        """Leave it out. Raises EngineError where it was the last."""
        server.has_adapter = False  # it may come back as another
        if not server.is_lost:
            server.is_lost = True
            if self.alive:
                logger.warning("%s is left out until the next weight sync: %s", server.url, cause)
        self._freed.set()
        if not self.alive:
            raise EngineError(f"no vLLM server is left to sample from: {cause}") from cause

    async def _reserve(self, num_rows: int) -> Server:
        """The server with the fewest rows outstanding, once it has a free connection."""
        while True:
            # where none is alive the rows' error is on its way, and ends this
            server = min(self.alive or self.servers, key=lambda server: server.outstanding)
            if server.outstanding < self._max_connections:
                server.outstanding += num_rows
                return server
            self._freed.clear()
            await self._freed.wait()

    def _free(self, server: Server) -> None:
        server.outstanding -= 1
        self._freed.set()

    async def _row(self, server: Server, body: Mapping[str, Any]) -> Reply:
        """A server that dies leaves its rows to the others: with its seed a row becomes what it would have been."""
        while True:
            try:
                async with server.slots:
                    limit_s = self._request_timeout_s
                    answer = await server.exchange("POST", "/v1/completions", body, limit_s=limit_s)
                return Reply(server=server, body=answer)
            except (NoAnswer, Refused) as exc:
                if isinstance(exc, Refused) and exc.status < 500:
                    raise
                self._lose(server, exc)
                server = min(self.alive, key=lambda server: server.outstanding)


async def _collected(
    place: int, rows: Sequence[asyncio.Task[Reply]], put: Callable[[tuple[int, list[Reply]]], None]
) -> None:
    put((place, [await row for row in rows]))


async def _versions(server: Server) -> list[Any]:
    return await server.rpc("grpo_weight_version")


async def _probed(server: Server, body: Mapping[str, Any]) -> Any:
    try:
        return await server.exchange("POST", "/v1/completions", body)
    except Refused as exc:
        raise ConfigError(
            f"the server cannot sample as the recipe asks: {exc}. A processor of your own must be named when it is "
            "started (python -m grpo.rollout.vllm_serve MODEL --processor PACKAGE.MODULE:NAME)."
        ) from exc


async def _facts_of(server: Server) -> ServerFacts:
    found = await _version_of(server)
    if found < Version(MINIMUM_VERSION):
        raise ConfigError(f"{server.url} runs vLLM {found}, but {MINIMUM_VERSION} or newer is needed. Upgrade it.")
    unfit = f"it was not started by this version's grpo.rollout.vllm_serve. {START}"
    try:
        facts = await server.rpc("grpo_facts")
    except EngineError as exc:
        raise ConfigError(f"{server.url} cannot take weights ({exc}): {unfit}") from exc
    try:
        return ServerFacts(**facts[0])
    except TypeError:
        raise ConfigError(f"{server.url} says {server.quoted(facts)} of itself: {unfit}") from None


async def _version_of(server: Server) -> Version:
    """vLLM's. Raises ConfigError where there is no vLLM, or one that does not let us in."""
    try:
        version = await server.exchange("GET", "/version")
        models = await server.exchange("GET", "/v1/models")  # this one asks for the key
    except NoAnswer as exc:
        raise ConfigError(f"no vLLM server answers at {server.url} ({exc}). {START}") from exc
    except Refused as exc:
        if exc.status in (401, 403):
            raise ConfigError(
                f"{server.url} does not take our key ({exc}). Name the one that it was started with (--api-key) in "
                "rollout.engine.api_key."
            ) from exc
        raise ConfigError(f"{server.url} is no vLLM server ({exc}). {START}") from exc
    except EngineError as exc:
        raise ConfigError(f"{server.url} is no vLLM server ({exc}). {START}") from exc
    try:
        found, _ = Version(version["version"]), models["data"]
    except (InvalidVersion, KeyError, TypeError):
        raise ConfigError(
            f"{server.url} is no vLLM server: it says {server.quoted(version)} of its version. {START}"
        ) from None
    return found
