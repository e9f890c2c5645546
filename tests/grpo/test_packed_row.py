"""A micro-batch as one row: what it holds, and three kernels that attend alike."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from builders import make_batch, make_group
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.batching import MicroBatch
from grpo.runtime.filling import filler
from grpo.update.packed_attention import packed_row_attention
from grpo.update.packed_row import Kernel, PackedRow, Sequences
from grpo.update.shared_prefix import kernel_for
from grpo.update.tiled_attention import PROMPT_TILE

RAGGED = [
    make_group([{"a": 1.0}, {"a": 0.0}, {"a": 0.5}], lengths=[4, 1, 3], prompt_length=2, seed=0),
    make_group([{"a": 1.0}, {"a": 0.0}], lengths=[2, 5], prompt_length=3, seed=1),
]
EVEN = [
    make_group([{"a": 1.0}, {"a": 0.0}], lengths=[4, 4], prompt_length=3, seed=2),
    make_group([{"a": 1.0}, {"a": 0.0}], lengths=[4, 4], prompt_length=3, seed=3),
]
END_TOKENS = [make_group([{"a": 1.0}, {"a": 0.0}], lengths=[1, 1], prompt_length=4, seed=4)]
LONG = [  # of several tiles, the last one of another size
    make_group([{"a": 1.0}, {"a": 0.0}], lengths=[3, 6], prompt_length=2 * PROMPT_TILE + 9, seed=5),
    make_group([{"a": 1.0}, {"a": 0.0}], lengths=[2, 4], prompt_length=PROMPT_TILE - 2, seed=6),
]
ROWS = {"ragged": RAGGED, "even": EVEN, "end tokens alone": END_TOKENS, "long": LONG}


def micro_of(rows: str) -> MicroBatch:
    (micro,) = make_batch(ROWS[rows]).micro_batches
    return micro


def tiny_model() -> LlamaForCausalLM:
    """Two queries for a key."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def flash_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    softcap: float,
) -> Tensor:
    """What flash-attn's kernel of this name is documented to compute, one query after another: a sequence's last query
    sees its last key."""
    assert causal
    assert (cu_seqlens_q.dtype, cu_seqlens_k.dtype) == (torch.int32, torch.int32)
    assert max_seqlen_q == max(cu_seqlens_q.diff().tolist())
    assert max_seqlen_k == max(cu_seqlens_k.diff().tolist())
    found = []
    repeat = query.shape[1] // key.shape[1]
    for q0, q1, k0, k1 in zip(
        cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:], strict=False
    ):
        for number, one in enumerate(query[q0:q1]):
            end = k1 - (q1 - q0) + number + 1
            keys, values = (kept[k0:end].repeat_interleave(repeat, dim=1) for kept in (key, value))  # [L, heads, D]
            scores = torch.einsum("hd,lhd->hl", one, keys) * softmax_scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            found.append(torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), values))
    return torch.stack(found)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, which itself needs a GPU."""
    package = ModuleType("flash_attn")
    vars(package)["flash_attn_varlen_func"] = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)


def slowly(micro: MicroBatch, query: Tensor, key: Tensor, value: Tensor, *, softcap: float | None) -> Tensor:
    """[N, heads, D] of [N, ...]: every token by itself over the tokens that it may see, one head at a time."""
    own = (micro.completion_mask.sum(dim=1) - 1).tolist()
    prompts = micro.prompt_mask.sum(dim=1).tolist()
    seen: list[list[int]] = []
    prompt_places: list[list[int]] = []
    for length in prompts:
        prompt_places.append(list(range(len(seen), len(seen) + length)))
        seen += [prompt_places[-1][: number + 1] for number in range(length)]
    for prompt, length in zip(micro.prompt_of_row.tolist(), own, strict=True):
        start = len(seen)
        seen += [prompt_places[prompt] + list(range(start, start + number + 1)) for number in range(length)]
    out = torch.zeros_like(query)
    repeat = query.shape[1] // key.shape[1]
    for place, sees in enumerate(seen):
        for head in range(query.shape[1]):
            scores = key[sees, head // repeat] @ query[place, head] / math.sqrt(query.shape[2])
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            out[place, head] = scores.softmax(dim=0) @ value[sees, head // repeat]
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kernel", ["plain", "fused", "varlen"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("flash_attn")
def test_a_token_sees_its_own_prompt_and_its_own_completion_up_to_itself(
    rows: str, kernel: Kernel, softcap: float | None
) -> None:
    micro = micro_of(rows)
    row = PackedRow.of(micro, kernel)
    num_tokens = row.token_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(num_tokens, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    states = (query, key, value)

    q, k, v = (one.transpose(0, 1)[None] for one in states)  # [1, heads, N, D], as transformers gives them
    (found,), _ = packed_row_attention(
        torch.nn.Identity(), q, k, v, None, packed_row=row, scaling=8**-0.5, softcap=softcap
    )
    expected = slowly(micro, query, key, value, softcap=softcap)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    mine, wanted = (torch.autograd.grad((weights * one).sum(), states) for one in (found, expected))
    torch.testing.assert_close(mine, wanted)


def test_a_row_holds_every_prompt_once_and_every_completion_but_its_last_token() -> None:
    micro = micro_of("ragged")
    row = PackedRow.of(micro, "plain")
    completions = [
        micro.completion_ids[number, : length - 1].tolist()
        for number, length in enumerate(micro.completion_mask.sum(dim=1).tolist())
    ]
    assert [len(tokens) for tokens in completions] == [4, 1, 3, 2, 0]  # the prompt of 3 tokens comes first
    assert row.token_ids[0].tolist() == [
        *micro.prompt_ids[0, :3].tolist(),
        *micro.prompt_ids[1, :2].tolist(),
        *(token for tokens in completions for token in tokens),
    ]
    # positions go on after the own prompt: of 3 tokens for two completions, of 2 for three
    assert row.position_ids[0].tolist() == [*(0, 1, 2), *(0, 1), *(3, 4, 5, 6), 3, *(2, 3, 4), *(2, 3)]
    # the first token of a completion is predicted by its prompt's last
    assert row.predicting[:, 0].tolist() == [2, 2, 4, 4, 4]
    assert row.predicting[0].tolist() == [2, 5, 6, 7, 8]


def test_a_long_row_is_filled_up_with_tokens_that_predict_nothing() -> None:
    row = PackedRow.of(micro_of("long"), "plain")
    assert row.token_ids.shape[1] == len(row.places) + filler(len(row.places)) > len(row.places)
    assert int(row.predicting.max()) < len(row.places)


def test_the_keys_of_a_sequence_are_its_prompts_and_its_own() -> None:
    """Prompts of 2 and 3 tokens, two slots each; in the first are 2 and 0 tokens, in the second 1. A completion without
    a token in the row is no sequence."""
    sequences = Sequences.of(torch.tensor([2, 3]), torch.tensor([2, 0, 1, 0]))
    assert sequences.query_starts.tolist() == [0, 2, 5, 7, 8]
    assert sequences.key_starts.tolist() == [0, 2, 5, 9, 13]
    assert sequences.key_places.tolist() == [*(0, 1), *(2, 3, 4), *(0, 1, 5, 6), *(2, 3, 4, 7)]
    assert sequences.longest == (3, 4)


def test_the_kernel_follows_from_the_models_attention_and_from_what_may_be_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, micro = tiny_model(), micro_of("ragged")
    assert kernel_for(model, micro) == "plain"
    monkeypatch.setattr("grpo.update.shared_prefix.PLAIN_ATTENTION_SCORES", 0)  # a CPU's short rows come first
    assert kernel_for(model, micro) == "fused"
    model.config._attn_implementation_internal = "flash_attention_2"  # the setter would look for the real package
    assert kernel_for(model, micro) == "varlen"


def test_the_varlen_kernel_alone_needs_sequences() -> None:
    """Of the prompts, then of the completions that have a token in the row."""
    micro = micro_of("ragged")
    assert PackedRow.of(micro, "fused").sequences is None
    sequences = PackedRow.of(micro, "varlen").sequences
    assert sequences is not None
    assert sequences.query_starts.tolist() == [0, 3, 5, 9, 10, 13, 15]
