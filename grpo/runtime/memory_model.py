"""A model's config -> what its memory is made of: sizes of its blocks and of its linear layers. Reads no weights."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import LoraTrainable
from grpo.errors import ConfigError, ModelError

_PACKAGE = "package:"
_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
_LAYER_NORM = ("gpt2",)
_QK_NORM = ("qwen3", "gemma3_text", "olmo2")
_FOUR_NORMS = ("gemma2", "gemma3_text")
_FUSED_QKV, _FUSED_GATE_UP = ("phi3",), ("phi3",)
_BIASED_QKV = ("qwen2",)
KNOWN = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3",
    "gpt2",
)  # fmt: skip
"""Values of `model_type` whose blocks are described here; a test compares their sizes with transformers'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer of a block."""

    name: str
    """As modules are matched by: its last part is what recipes name."""
    inputs: int
    outputs: int
    has_bias: bool
    reads: str
    """Which of the block's values it reads; layers that read the same one share what is kept for their gradients."""

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return self.outputs * (self.inputs + self.has_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder's sizes."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int
    """Learned position embeddings; 0 where positions are rotary."""
    is_tied: bool
    """The head is the embedding."""
    is_gated: bool
    """The feed-forward part multiplies two halves."""
    activation: str
    has_layer_norm: bool
    """Mean and variance, in the residual's dtype; else root mean square, in float32."""
    norms: int
    """Of a block, on the residual."""
    has_qk_norm: bool
    shares_prompts: bool
    """Every layer keeps plain keys and values: a group's prompt is computed once."""
    stored_bytes: int
    """Of a number in the weights' files."""
    linears: tuple[Linear, ...]
    """Of one block."""
    context: int | None = None
    """Tokens that it reads, prompt and completion together; None where its config names no end."""

    @property
    def query_size(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Of keys, and of values."""
        return self.kv_heads * self.head_size

    @property
    def head_parameters(self) -> int:
        """The vocabulary's matrix."""
        return self.vocabulary * self.hidden

    @property
    def linear_parameters(self) -> int:
        """Of all blocks' linear layers."""
        return self.layers * sum(linear.parameters for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All numbers of the model, tied ones once."""
        per_norm = self.hidden * (2 if self.has_layer_norm else 1)
        qk_norm = self.query_size + self.kv_size if self.model_type == "olmo2" else 2 * self.head_size
        of_norms = self.layers * (self.norms * per_norm + (qk_norm if self.has_qk_norm else 0)) + per_norm
        embeddings = (1 if self.is_tied else 2) * self.head_parameters + self.positions * self.hidden
        return self.linear_parameters + of_norms + embeddings

    def adapted(self, trainable: LoraTrainable) -> tuple[Linear, ...]:
        """The linear layers of a block that get an adapter. Raises ConfigError where none does."""
        if trainable.modules == "all-linear":
            return self.linears
        names = trainable.modules
        found = tuple(linear for linear in self.linears if any(_matches(linear.name, name) for name in names))
        if not found:
            known = ", ".join(linear.name.rpartition(".")[2] for linear in self.linears)
            raise ConfigError(
                f"trainable.modules {list(names)} match no linear layer of a {self.model_type} ({known})."
            )
        return found


def _matches(name: str, wanted: str) -> bool:
    """As peft matches: the name itself, or its end after a dot."""
    return name == wanted or name.endswith("." + wanted)


def read_shape(name: str, base_dir: Path) -> ModelShape:
    """The shape of the model `name`: a folder, `package:<import name>` or a hub name, of which config.json is fetched.

    Raises:
        ModelError: its config cannot be read, or describes blocks that are not known here.
    """
    if name.startswith(_PACKAGE):
        return shape_of(_packaged_config(name.removeprefix(_PACKAGE)), source=name)
    folder = (base_dir / Path(name).expanduser()).resolve()
    is_path = name.startswith(("./", "../", "/", "~", "."))
    path = folder / "config.json" if is_path or folder.is_dir() else _fetched(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"model {name!r}: {path} cannot be read as a model's config ({exc}).") from exc
    return shape_of(values, source=name)


def _fetched(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise ModelError(
            f"model {name!r} is no folder here, and its config.json cannot be had from the hub: "
            f"{str(exc).splitlines()[0]} Give a folder, or check the name (owner/name) and the network."
        ) from exc


def _packaged_config(import_name: str) -> dict[str, Any]:
    """What the package's GGUF file says of itself, under transformers' names."""
    from gguf import GGUFReader

    names = importlib.metadata.packages_distributions().get(import_name, [])
    found = [
        Path(str(file.locate()))
        for name in dict.fromkeys(names)
        for file in importlib.metadata.distribution(name).files or []
        if file.suffix == ".gguf"
    ]
    if len(found) != 1:
        raise ModelError(
            f"model '{_PACKAGE}{import_name}': {len(found)} GGUF files of an installed package found, expected one. "
            "`grpo train` says how to install it."
        )
    reader = GGUFReader(found[0])
    kind = _field(reader, "general.architecture")
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    return {
        "model_type": kind,
        "num_hidden_layers": _field(reader, f"{kind}.block_count"),
        "hidden_size": _field(reader, f"{kind}.embedding_length"),
        "intermediate_size": _field(reader, f"{kind}.feed_forward_length"),
        "num_attention_heads": _field(reader, f"{kind}.attention.head_count"),
        "num_key_value_heads": _field(reader, f"{kind}.attention.head_count_kv"),
        "vocab_size": int(embedding.shape[1]),
        "max_position_embeddings": _field(reader, f"{kind}.context_length"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "dtype": "float32",  # as it is converted
    }


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ModelError(f"{reader.data.filename}: its header does not say {name}; expected a language model's GGUF.")
    return field.contents()


def shape_of(values: Mapping[str, Any], *, source: str) -> ModelShape:
    """The shape that a config.json describes. Raises ModelError for a model type that is not among `KNOWN`."""
    values = {**values, **values["text_config"]} if "text_config" in values else dict(values)
    kind = "gemma3_text" if values.get("model_type") == "gemma3" else str(values.get("model_type"))
    if kind not in KNOWN:
        raise ModelError(
            f"model {source!r} is of type {kind!r}, whose memory is not known here. Known: {', '.join(KNOWN)}. "
            "`grpo verify RECIPE` takes one real step of it, and `grpo doctor --watch RUN` shows what a run takes."
        )
    try:
        return _gpt2(values) if kind == "gpt2" else _llama_like(kind, values)
    except (KeyError, TypeError, ValueError) as exc:
        raise ModelError(f"model {source!r}: its config lacks a size or has a wrong one ({exc!r}).") from exc


def _llama_like(kind: str, values: Mapping[str, Any]) -> ModelShape:
    hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    kv_heads = int(values.get("num_key_value_heads") or heads)
    head_size = int(values.get("head_dim") or (256 if kind.startswith("gemma") else hidden // heads))
    inner = int(values["intermediate_size"])
    biased = bool(values.get("attention_bias", False))
    qkv_bias = biased or kind in _BIASED_QKV
    query, kv = heads * head_size, kv_heads * head_size
    if kind in _FUSED_QKV:
        attention = [_linear("self_attn.qkv_proj", hidden, query + 2 * kv, "attention", qkv_bias)]
    else:
        attention = [
            _linear("self_attn.q_proj", hidden, query, "attention", qkv_bias),
            _linear("self_attn.k_proj", hidden, kv, "attention", qkv_bias),
            _linear("self_attn.v_proj", hidden, kv, "attention", qkv_bias),
        ]
    mlp_bias = bool(values.get("mlp_bias", False))
    if kind in _FUSED_GATE_UP:
        feed = [_linear("mlp.gate_up_proj", hidden, 2 * inner, "feed", mlp_bias)]
    else:
        feed = [_linear(f"mlp.{part}_proj", hidden, inner, "feed", mlp_bias) for part in ("gate", "up")]
    return ModelShape(
        model_type=kind,
        layers=int(values["num_hidden_layers"]),
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=int(values["vocab_size"]),
        positions=0,
        is_tied=bool(values.get("tie_word_embeddings", kind.startswith("gemma") or kind == "smollm3")),
        is_gated=True,
        activation=str(values.get("hidden_activation") or values.get("hidden_act", "silu")),
        has_layer_norm=False,
        norms=4 if kind in _FOUR_NORMS else 2,
        has_qk_norm=kind in _QK_NORM,
        shares_prompts=_has_plain_cache(kind, values),
        stored_bytes=_WIDTHS.get(str(values.get("dtype") or values.get("torch_dtype")), 4),
        linears=(
            *attention,
            _linear("self_attn.o_proj", query, hidden, "mixed", biased),
            *feed,
            _linear("mlp.down_proj", inner, hidden, "product", mlp_bias),
        ),
        context=int(values.get("max_position_embeddings") or 0) or None,
    )


def _has_plain_cache(kind: str, values: Mapping[str, Any]) -> bool:
    """No layer slides a window over the text."""
    if kinds := values.get("layer_types"):
        return set(kinds) == {"full_attention"}
    if kind in ("gemma2", "gemma3_text"):
        return False
    if kind in ("qwen2", "qwen3"):
        return not values.get("use_sliding_window", False)
    return values.get("sliding_window") is None


def _gpt2(values: Mapping[str, Any]) -> ModelShape:
    hidden, heads = int(values["n_embd"]), int(values["n_head"])
    inner, positions = int(values.get("n_inner") or 4 * hidden), int(values.get("n_positions", 1024))
    return ModelShape(
        model_type="gpt2",
        layers=int(values["n_layer"]),
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        vocabulary=int(values["vocab_size"]),
        positions=positions,
        is_tied=bool(values.get("tie_word_embeddings", True)),
        is_gated=False,
        activation=str(values.get("activation_function", "gelu_new")),
        has_layer_norm=True,
        norms=2,
        has_qk_norm=False,
        shares_prompts=True,
        stored_bytes=_WIDTHS.get(str(values.get("dtype") or values.get("torch_dtype")), 4),
        linears=(
            _linear("attn.c_attn", hidden, 3 * hidden, "attention", True),
            _linear("attn.c_proj", hidden, hidden, "mixed", True),
            _linear("mlp.c_fc", hidden, inner, "feed", True),
            _linear("mlp.c_proj", inner, hidden, "product", True),
        ),
        context=positions,
    )


def _linear(name: str, inputs: int, outputs: int, reads: str, has_bias: bool) -> Linear:
    return Linear(name=name, inputs=inputs, outputs=outputs, has_bias=has_bias, reads=reads)
