"""A judge's settings -> a pool with all that they name, open for as long as a block runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from judges.budget import MoneyBudget
from judges.cache import SqliteCache
from judges.config import JudgeConfig
from judges.dialects import build_client
from judges.pool import JudgePool
from judges.prompts import Rubric


@asynccontextmanager
async def open_pool(config: JudgeConfig, rubric: Rubric) -> AsyncIterator[JudgePool]:
    """Build clients, cache and budget; close them at the end. To the budget, every block is a run of its own.

    Raises:
        JudgeConfigError: a client cannot be built.
        JudgeError: a client finds, by its `check()`, that its judge cannot be had.
    """
    async with AsyncExitStack() as stack:
        clients = [build_client(endpoint, timeout_s=config.timeout_s) for endpoint in config.endpoints]
        for client in clients:
            stack.push_async_callback(client.aclose)
            check = getattr(client, "check", None)
            if check is not None:  # a client of somebody's own need not have one
                await check()
        cache = None
        if config.cache is not None:
            cache = SqliteCache(Path(config.cache))
            stack.push_async_callback(cache.aclose)
        budget = MoneyBudget(config.budget, judge="calibration") if config.budget else None
        yield JudgePool(client=clients, config=config, rubric=rubric, cache=cache, budget=budget)
