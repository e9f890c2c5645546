"""`python -m grpo.rollout.vllm_serve MODEL [vLLM's flags]`: vLLM's OpenAI server, as the engine `vllm_server` needs it.

Sets what a run depends on: processed log-probabilities, our logits processors, the worker extension that takes weights,
the endpoints to control it, a prefix cache, and no sampling defaults of the model's. All other flags are vLLM's own and
are passed on (--port, --dtype, --max-model-len, --tensor-parallel-size, --enable-lora --max-lora-rank 16, ...).

Whoever reaches the server can replace its weights: it listens on this machine alone unless --host says otherwise; give
it the address of a private network, never a public one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from grpo.errors import ConfigError
from grpo.rollout.vllm_facts import SERVER_EXTENSION
from grpo.rollout.vllm_law import PROCESSOR, PROCESSORS_VARIABLE
from grpo.runtime.torch_environment import waiting

SERVER_MODULE = "vllm.entrypoints.openai.api_server"  # the command `vllm` does not work with every wheel
_FIXED = {
    "--worker-extension-cls": SERVER_EXTENSION,
    "--logits-processors": PROCESSOR,
    "--logprobs-mode": "processed_logprobs",
    "--generation-config": "vllm",
}
_DEFAULTS = {"--host": "127.0.0.1", "--port": "8000"}
PROMPTS_WHOLE = "--no-enable-chunked-prefill"
"""On a CPU. A prompt in pieces has vLLM 0.32 take back the draw that it made too early, and a CPU's random numbers
cannot be wound back: the server would end as soon as prompts with seeds outgrow one step."""


def command(model: str, flags: Sequence[str], *, is_cpu: bool) -> list[str]:
    """The command line of vLLM's server.

    Args:
        model: folder or hub name.
        flags: vLLM's own, passed on.
        is_cpu: it will run on one.
    Raises:
        ConfigError: one of them is set here.
    """
    named = {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    fixed = {*_FIXED, "--no-enable-prefix-caching", "--model", *(["--enable-chunked-prefill"] if is_cpu else [])}
    if taken := sorted(named & fixed):
        raise ConfigError(f"{', '.join(taken)}: set by grpo.rollout.vllm_serve, and no other value fits. Leave it out.")
    defaults = {flag: value for flag, value in _DEFAULTS.items() if flag not in named}
    options = [part for flag, value in {**_FIXED, **defaults}.items() for part in (flag, value)]
    if is_cpu:
        options.append(PROMPTS_WHOLE)
    return [sys.executable, "-m", SERVER_MODULE, "--model", model, "--enable-prefix-caching", *options, *flags]


def environment(inherited: Mapping[str, str], processors: Sequence[str]) -> dict[str, str]:
    """The server's environment.

    Args:
        inherited: its own settings win, but for those that weight sync depends on.
        processors: logits processors of one's own that requests may name.
    """
    defaults = {"VLLM_NO_USAGE_STATS": "1", **waiting(inherited)}  # its idle threads would starve the trainer
    fixed = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    allowed = [*filter(None, inherited.get(PROCESSORS_VARIABLE, "").split(",")), *processors]
    return {**defaults, **inherited, **fixed, PROCESSORS_VARIABLE: ",".join(dict.fromkeys(allowed))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Become the server: this process is replaced by vLLM's, so that its signals and its exit code are vLLM's."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo.rollout.vllm_serve",
        description="Start vLLM's OpenAI server for rollout.engine.type = vllm_server. Further flags are vLLM's.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder, hub name, or package:NAME, as in the recipe")
    parser.add_argument(
        "--processor",
        action="append",
        default=[],
        metavar="PACKAGE.MODULE:NAME",
        help="a logits processor of your own that the recipe names; it is imported here, so only what you trust",
    )
    known, flags = parser.parse_known_args(arguments)
    from pathlib import Path

    import torch

    from grpo.errors import InputError
    from grpo.rollout.vllm_engine import check_installed
    from grpo.runtime.models import resolve_model

    try:
        check_installed()
        model = str(resolve_model(known.model, Path.cwd()))
        line = command(model, flags, is_cpu=not torch.cuda.is_available())
    except InputError as exc:
        parser.error(str(exc))
    os.execve(line[0], line, environment(os.environ, known.processor))


if __name__ == "__main__":
    sys.exit(main())
