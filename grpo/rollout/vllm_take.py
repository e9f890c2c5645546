"""One vLLM server takes one sync: pause, take, verify, forget, resume. Every phase is under the sync's deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grpo.errors import EngineError
from grpo.rollout.vllm_http import Refused, Server
from grpo.rollout.vllm_sync import Deadline, SyncReport, check_report
from grpo.rollout.vllm_transfer import Transfer

Item = TypeVar("Item")

ADAPTER_NAME = "grpo-policy"
"""Under which the servers know the adapter."""
RESUME_TIMEOUT_S = 5.0
"""For a server that failed, to go on for others."""


class OtherBaseModel(EngineError):
    """The adapter belongs to another model than the one that the server holds."""


async def take(server: Server, transfer: Transfer, deadline: Deadline) -> None:
    """Give the server the weights, see that it has them, and have it drop what it computed with the old.

    Raises:
        NoAnswer: it cannot be reached.
        OtherBaseModel: an adapter would be added to other weights than the trainer's.
        EngineError: it did not take them, or not in time; it may be left paused, which the next sync does not mind.
    """
    await _phase(server, deadline, "pause", server.exchange("POST", "/pause?mode=wait&clear_cache=false", limit_s=None))
    try:
        await _take_paused(server, transfer, deadline)
    except BaseException as exc:
        try:  # others may use the server
            await server.exchange("POST", "/resume", limit_s=RESUME_TIMEOUT_S)
        except EngineError as second:
            exc.add_note(f"The server is still paused: {second}")
        raise
    await _phase(server, deadline, "resume", server.exchange("POST", "/resume", limit_s=None))


def check_held_version(server: Server, versions: Sequence[Any], version: int) -> None:
    """Raises EngineError where a worker holds other weights than the last sync's."""
    if any(str(each) != str(version) for each in versions):  # numbers come as text
        raise EngineError(
            f"{server.url} holds weights of version {server.quoted(versions)}, not {version}: another run has synced "
            "its own, or the server was started anew. One run has its servers to itself; go on with --resume."
        )


async def _take_paused(server: Server, transfer: Transfer, deadline: Deadline) -> None:
    registers = transfer.base_path is not None and not server.has_adapter
    if registers:
        await _phase(server, deadline, "compare its base model", _check_base(server, transfer))
        await _phase(server, deadline, "make room for the adapter", _register_adapter(server, transfer.folder))
    taking = server.rpc(transfer.method, transfer.arguments, limit_s=None)
    for answer in await _phase(server, deadline, "take the weights", taking):
        check_report(_report(answer, server), version=transfer.version, checksum=transfer.checksum)
    if registers:
        held = await _phase(server, deadline, "list its adapters", server.rpc("list_loras", limit_s=None))
        if any(each not in ([1], "{1}") for each in held):  # a worker's set, as a list or text; 1 is its ADAPTER_ID
            raise EngineError(f"{server.url} holds other adapters than the run's ({server.quoted(held)}): restart it.")
        server.has_adapter = True
    # a prompt's keys and values of the old weights are as wrong as the old weights
    dropping = server.exchange("POST", "/reset_prefix_cache", limit_s=None)
    if (await _phase(server, deadline, "drop its prefix cache", dropping)) != {"success": True}:
        raise EngineError(f"{server.url} kept its prefix cache of the old weights: requests are still running.")
    asking = server.rpc("grpo_weight_version", limit_s=None)
    check_held_version(server, await _phase(server, deadline, "tell its version", asking), transfer.version)


async def _phase(server: Server, deadline: Deadline, what: str, answer: Awaitable[Item]) -> Item:
    """The answer, unless the time is up. Raises EngineError that says what the server was to do."""
    with deadline.phase(f"{server.url} to {what}"):
        try:
            async with asyncio.timeout(deadline.left_s + 0.01):  # past the end, so that check() agrees
                return await answer
        except TimeoutError:
            deadline.check()
            raise


async def _check_base(server: Server, transfer: Transfer) -> None:
    """Raises OtherBaseModel where the adapter would be added to another model than the trainer's."""
    try:
        answers = await server.rpc("grpo_check_base_file", {"path": str(transfer.base_path)}, limit_s=None)
    except Refused as exc:
        raise OtherBaseModel(f"{server.url} does not hold the weights of the recipe's model: {exc}") from exc
    if any(not str(each).isdigit() or int(each) == 0 for each in answers):
        raise OtherBaseModel(
            f"{server.url} could not compare its base model with the recipe's ({server.quoted(answers)}): an adapter "
            "might be added to other weights."
        )


async def _register_adapter(server: Server, folder: Path) -> None:
    """Make the adapter's name known, so that requests can ask for it."""
    body = {"lora_name": ADAPTER_NAME, "lora_path": str(folder), "load_inplace": False}
    try:
        await server.exchange("POST", "/v1/load_lora_adapter", body, limit_s=None, is_json=False)
    except Refused as exc:
        if exc.status != 400 or "already" not in str(exc):  # by an earlier run
            raise


def _report(answer: Any, server: Server) -> SyncReport:
    try:
        return SyncReport(**answer)
    except TypeError:
        raise EngineError(f"{server.url} answered the weight sync with {server.quoted(answer)}.") from None
