"""Ports: where ranks meet must be free, and where the recipe's servers are somebody must listen."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from grpo.config import RunConfig, VllmServerConfig
from grpo.diagnostics.findings import Finding
from grpo.errors import InputError
from grpo.judge_runs import judges_of
from grpo.runtime.machine import Machine

LAUNCH_PORT = 29_500
"""On which accelerate's and torch's launchers meet, unless told otherwise."""


def check_ports(machine: Machine, config: RunConfig | None, *, ranks: int) -> Iterator[Finding]:
    """Every finding about ports. Args: ranks: processes that are going to be launched."""
    if ranks > 1:
        yield _meeting(machine)
    if config is not None and isinstance(config.rollout.engine, VllmServerConfig):
        judges = _judges(config)
        for url in config.rollout.engine.urls:
            yield _server(machine, url, judges)


def _meeting(machine: Machine) -> Finding:
    named = machine.environment("MASTER_PORT")
    if named is not None and not (named.isdigit() and 0 < int(named) < 1 << 16):
        return Finding(
            check="ports",
            status="failed",
            what=f"MASTER_PORT is {named!r}, which is no port",
            meaning="ranks could not meet, and the launch would end",
            remedy="unset MASTER_PORT, or set it to a free port from 1024 to 65535",
        )
    port = LAUNCH_PORT if named is None else int(named)
    what = f"{port}, where ranks meet{'' if named is None else ' (MASTER_PORT)'}"
    if machine.is_port_free(port):
        return Finding(check="ports", status="ok", what=f"{what}, is free")
    return Finding(
        check="ports",
        status="warning",
        what=f"{what}, is taken",
        meaning="the launcher waits or ends there: another launched run most likely has it",
        remedy="accelerate launch --main_process_port 0 (a free one)"
        + ("" if named is None else ", with MASTER_PORT unset"),
    )


def _server(machine: Machine, url: str, judges: dict[tuple[str, int], str]) -> Finding:
    """Whether anybody is there; the row `engine` says whether it is the server that is meant."""
    host, port = _place(url)
    if not machine.is_listening(host, port):
        return Finding(
            check="ports",
            status="failed",
            what=f"nobody listens at {url}, which rollout.engine.urls names",
            meaning="nothing could be sampled",
            remedy=f"start the server: python -m grpo.rollout.vllm_serve MODEL --port {port}; for one on another "
            "machine, --host 0.0.0.0 and an open firewall",
        )
    if (host, port) in judges:
        return Finding(
            check="ports",
            status="warning",
            what=f"{url} is the rollout engine, and the judge of objective {judges[host, port]} as well",
            meaning="its weights change with every step, so that the policy would judge itself",
            remedy="start the judge's model on a port of its own",
        )
    return Finding(check="ports", status="ok", what=f"{url}: somebody listens")


def _judges(config: RunConfig) -> dict[tuple[str, int], str]:
    """Host and port -> the objective that is judged there."""
    try:
        found = judges_of(config)
    except InputError:
        return {}  # told in the row `judges`
    return {_place(endpoint.url): one.objective for one in found for endpoint in one.config.endpoints}


def _place(url: str) -> tuple[str, int]:
    """Host and port; names of this machine are one."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    is_here = host in ("localhost", "127.0.0.1", "::1", "0.0.0.0")
    return "localhost" if is_here else host, parts.port or (443 if parts.scheme == "https" else 80)
