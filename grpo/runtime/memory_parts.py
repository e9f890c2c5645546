"""A decoder's sizes and `trainable.parts` -> what learns of it, by the names that its modules have. Imports no torch.

The selection is the one of `grpo.runtime.trainable`, on names alone: a test compares the two on every known family.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from grpo.config import LoraPart, PartConfig
from grpo.config.module_patterns import matching, nearest
from grpo.errors import ConfigError
from grpo.runtime.memory_model import Linear, ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningParts:
    """What learns, in numbers, and of which layers the backward pass needs the inputs."""

    adapters: int
    """Numbers of adapters."""
    full: int
    """Numbers that learn in full."""
    linears: tuple[Linear, ...]
    """Of a block: with an adapter or learning in full, in any block."""
    rank: int
    """Sum of the ranks in a block, the largest of any block."""
    layers: int
    """Blocks that gradient goes through: from the first that holds something that learns, or all behind the
    embeddings."""
    has_norms: bool
    """A block's norm learns."""
    has_head: bool


@functools.lru_cache(maxsize=8)  # a plan asks for the same hundreds of times
def learning_parts(shape: ModelShape, entries: tuple[PartConfig, ...]) -> LearningParts:
    """Raises ConfigError where a pattern matches no module of such a model."""
    leaves = dict(_leaves(shape))
    ends = {_names(shape)["embedding"], "lm_head"}
    paths = list(dict.fromkeys(above for leaf in leaves for above in _above(leaf)))
    ranks: dict[str, int] = {}
    full: set[str] = set()
    for number, entry in enumerate(entries):
        for pattern in entry.modules:
            hits = set(matching(pattern, paths))
            if not hits:
                raise ConfigError(
                    f"trainable.parts[{number}].modules {pattern!r} matches no module of a {shape.model_type}; "
                    f"{nearest(pattern, paths)}. Of a model with images the plan knows the language model alone."
                )
            within = [leaf for leaf in leaves if not hits.isdisjoint(_above(leaf))]
            free = [_tied(leaf, shape) for leaf in within if _tied(leaf, shape) not in ranks.keys() | full]
            if isinstance(entry, LoraPart):
                ranks |= {leaf: entry.rank for leaf in free if leaves[leaf][1] is not None and leaf not in ends}
            else:
                full |= set(free)
    blocks = [int(part) for leaf in ranks.keys() | full for part in leaf.split(".") if part.isdecimal()]
    begins = 0 if _names(shape)["embedding"] in full else min(blocks, default=shape.layers)
    linears = [linear for leaf in ranks.keys() | full if (linear := leaves[leaf][1]) is not None]
    by_block: dict[str, int] = {}
    for leaf, rank in ranks.items():
        block = leaf.removeprefix(_names(shape)["layers"]).split(".")[1]
        by_block[block] = by_block.get(block, 0) + rank
    return LearningParts(
        adapters=sum(rank * _ends(leaves[leaf][1]) for leaf, rank in ranks.items()),
        full=sum(leaves[leaf][0] for leaf in full),
        linears=tuple(linear for linear in shape.linears if linear in linears),
        rank=max(by_block.values(), default=0),
        layers=shape.layers - begins,
        has_norms=any(leaves[leaf][1] is None and leaf.startswith(_names(shape)["layers"]) for leaf in full),
        has_head=bool(full & ends) and ("lm_head" in full or shape.is_tied),
    )


def _ends(linear: Linear | None) -> int:
    assert linear is not None, "only linear layers get adapters"
    return linear.inputs + linear.outputs


def _tied(leaf: str, shape: ModelShape) -> str:
    return _names(shape)["embedding"] if leaf == "lm_head" and shape.is_tied else leaf


def _above(path: str) -> Iterator[str]:
    yield path
    while path := path.rpartition(".")[0]:
        yield path


def _names(shape: ModelShape) -> dict[str, str]:
    if shape.model_type == "gpt2":
        return {"layers": "transformer.h", "embedding": "transformer.wte", "norm": "transformer.ln_f"}
    return {"layers": "model.layers", "embedding": "model.embed_tokens", "norm": "model.norm"}


def _leaves(shape: ModelShape) -> Iterator[tuple[str, tuple[int, Linear | None]]]:
    """Path of a module with parameters of its own -> (numbers, the linear layer that it is), in the model's order."""
    names, norm = _names(shape), shape.hidden * (2 if shape.has_layer_norm else 1)
    yield names["embedding"], (shape.head_parameters, None)
    if shape.positions:
        yield "transformer.wpe", (shape.positions * shape.hidden, None)
    for number in range(shape.layers):
        for linear in shape.linears:
            yield f"{names['layers']}.{number}.{linear.name}", (linear.parameters, linear)
        for name in _norms(shape):
            yield f"{names['layers']}.{number}.{name}", (norm, None)
        if shape.has_qk_norm:
            is_wide = shape.model_type == "olmo2"
            for name, size in (("q_norm", shape.query_size), ("k_norm", shape.kv_size)):
                yield f"{names['layers']}.{number}.self_attn.{name}", (size if is_wide else shape.head_size, None)
    yield names["norm"], (norm, None)
    yield "lm_head", (shape.head_parameters, None)


def _norms(shape: ModelShape) -> tuple[str, ...]:
    if shape.model_type == "gpt2":
        return ("ln_1", "ln_2")
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    if shape.model_type == "olmo2":
        return after
    if shape.norms == 4:
        return (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
    return ("input_layernorm", "post_attention_layernorm")
