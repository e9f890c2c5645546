"""Which attention a run uses, and what it is told where the one it asks for cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo.errors import ConfigError
from grpo.runtime.devices import choose_attention, choose_dtype
from grpo.runtime.memory_hardware import hardware_named
from grpo.runtime.models import has_flash_attention, load_model

CPU = torch.device("cpu")


def test_auto_leaves_the_choice_to_transformers_where_flash_attention_cannot_run() -> None:
    assert choose_attention("auto", CPU, torch.bfloat16, model_has_flash=True) is None


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_named_attention_is_taken_as_it_is(name: str) -> None:
    assert choose_attention(name, CPU, torch.float32, model_has_flash=False) == name


def test_flash_attention_on_a_cpu_is_refused_and_the_message_says_why() -> None:
    with pytest.raises(ConfigError, match=r"runs on CUDA only, and the device is cpu\. Set attention=auto"):
        choose_attention("flash_attention_2", CPU, torch.bfloat16, model_has_flash=True)


def test_the_named_attention_reaches_the_model(tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), dtype=torch.float32, base_dir=tiny_model_dir, attention="eager")
    assert model.config._attn_implementation == "eager"
    by_itself = load_model(str(tiny_model_dir), dtype=torch.float32, base_dir=tiny_model_dir)
    assert by_itself.config._attn_implementation == "sdpa"


def test_the_tiny_llama_can_call_flash_attention(tiny_model_dir: Path) -> None:
    assert has_flash_attention(str(tiny_model_dir), base_dir=tiny_model_dir)


@pytest.mark.gpu
def test_auto_is_flash_attention_on_a_card_that_can_and_where_it_is_installed() -> None:
    pytest.importorskip("flash_attn")
    assert choose_attention("auto", torch.device("cuda", 0), torch.bfloat16, model_has_flash=True) == (
        "flash_attention_2"
    )
    with pytest.raises(ConfigError, match="16-bit numbers only"):
        choose_attention("flash_attention_2", torch.device("cuda", 0), torch.float32, model_has_flash=True)


def test_auto_is_float32_on_a_cpu_that_knows_bfloat16_but_has_no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    # its bfloat16 products are the slower ones
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for has_amx, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert choose_dtype("auto", CPU) == dtype
        assert choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_the_plan_and_the_run_choose_the_same_dtype_on_this_machine() -> None:
    assert hardware_named("cpu:8").has_bfloat16 == (choose_dtype("auto", CPU) == torch.bfloat16)
