"""The model that learns: which of its parameters do, its reference, its head, its weights for the engine."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo.config import FullTrainable, TrainableConfig
from grpo.errors import CheckpointError
from grpo.runtime.packaged_model import quiet_transformers
from grpo.runtime.quantization import is_packed, num_entries, written_out
from grpo.runtime.rounding import dithered
from grpo.runtime.trainable import adapter_parameters, lora_layers, make_trainable, plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


ANCHOR = "reference.safetensors"
"""Beside the weights: the trainable parameters as they were when they were taken as reference."""
PARTS, ADAPTER = "parts.safetensors", "adapter"
"""Of a policy that trains parts: its fully trained parameters under the plain model's names; peft's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelHead:
    """How the last hidden state becomes logits: softcap(scale * (W h + b))."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    logit_scale: float
    softcap: float | None


class Policy:
    """A language model, alone or as a part of a larger model, with what of it learns and its frozen reference.

    Owns the training copy of the weights. Frozen weights keep the model's dtype; trainable parameters are float32,
    because bfloat16 weights lose updates smaller than their resolution.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: TrainableConfig,
        *,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ) -> None:
        """Start from a model as it was loaded.

        Args:
            model: loaded weights, taken over.
            seed: of the adapter's random part.
            tokenizer: or processor; written beside the weights by `save`, so that the folder can be used alone.
        Raises:
            ConfigError: modules that cannot be trained.
        """
        self.shares_prompts: bool | None = None
        """Whether a pass computes a prompt once for its completions; None: not tried out yet (`update.forward`)."""
        self._tokenizer = tokenizer
        self._anchor: dict[str, Tensor] | None = None
        self._compute_dtype = model.dtype
        self._reference: PreTrainedModel | None = None
        if isinstance(trainable, FullTrainable):
            # eval mode for good: it takes no gradient, so nothing is lost, and no caller can forget its dropout;
            # float32 as the policy is: other arithmetic in the two passes would be taken for a KL
            self._reference = copy.deepcopy(model).requires_grad_(False).eval()
            _to_float32(self._reference.parameters())
        learner = make_trainable(model, trainable, seed=seed)
        self.model: PreTrainedModel | PeftModel = learner.model
        self.learner = learner
        self._adapters = adapter_parameters(self.causal_lm)
        _to_float32(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        self.model.train()

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The language model itself, adapter layers inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model  # pyright: ignore[reportReturnType]

    @property
    def trains_all_weights(self) -> bool:
        """No adapter: every parameter learns, and the reference is a copy."""
        return self._reference is not None

    @property
    def learns_one_adapter(self) -> bool:
        """A single LoRA adapter of one rank and alpha, and nothing besides: what an engine can take as such."""
        if not isinstance(self.model, PeftModel) or self.learner.start:
            return False
        if any(is_packed(parameter) for parameter in self.model.parameters()):
            return False  # the engine's own weights are not what it was trained on
        return not any(config.rank_pattern or config.alpha_pattern for config in self.model.peft_config.values())  # pyright: ignore[reportAttributeAccessIssue]

    def is_adapters_own(self, name: str) -> bool:
        """Whether an adapter brought a parameter of `causal_lm` with it."""
        return name in self._adapters

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the matrix products: that of the weights as they were loaded."""
        return self._compute_dtype

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(num_entries(p) for p in self.model.parameters())

    @contextlib.contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The frozen reference, without gradient. The adapter is on again afterwards, on an exception too."""
        with torch.no_grad():
            if self._reference is not None:
                yield self._reference
            elif self._anchor is not None:
                with self._swapped(self._anchor):
                    yield self.causal_lm
            else:
                with self._swapped(self.learner.start), self._adapters_off():
                    yield self.causal_lm

    def _adapters_off(self) -> contextlib.AbstractContextManager[None]:
        return self.model.disable_adapter() if isinstance(self.model, PeftModel) else contextlib.nullcontext()

    def take_as_reference(self) -> None:
        """The policy as it is now is the reference from here on: after a supervised stage, KL starts at 0 again."""
        self._set_anchor({name: p.detach().clone() for name, p in self.trainable_parameters().items()})

    def _set_anchor(self, anchor: dict[str, Tensor]) -> None:
        self._anchor = anchor
        if self._reference is not None:
            own = dict(self._reference.named_parameters())
            with torch.no_grad():
                for name, value in anchor.items():
                    own[name].copy_(value)

    @contextlib.contextmanager
    def _swapped(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values in these parameters, for the while; in their own dtype, for the arithmetic must be the same."""
        parameters = self.trainable_parameters()
        kept = {name: parameters[name].data for name in values}
        try:
            for name, value in values.items():
                parameters[name].data = value.to(kept[name])
            yield
        finally:
            for name, value in kept.items():
                parameters[name].data = value

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the plain model, weight) of every parameter that training changes, in the model's order; adapters
        are added in float32, one layer at a time, and rounded so that bfloat16 does not swallow them."""
        layers = lora_layers(self.causal_lm)
        for name, parameter in self.causal_lm.named_parameters():
            layer = layers.get(name.removesuffix(".base_layer.weight"))
            if layer is not None:
                delta = layer.get_delta_weight(layer.active_adapters[0])  # pyright: ignore[reportAttributeAccessIssue]
                base = written_out(parameter)
                merged = (base.float() + delta.float()).detach().contiguous()
                yield plain_name(name), dithered(merged) if base.dtype == torch.bfloat16 else merged
            elif is_packed(parameter):  # training does not change it, but packing did
                yield plain_name(name), written_out(parameter)
            elif parameter.requires_grad and not self.is_adapters_own(name):
                yield plain_name(name), parameter.detach()

    def save(self, folder: Path) -> None:
        """Write what learns as safetensors, and the tokenizer beside it.

        LoRA: an adapter that peft loads. All weights: a model that transformers loads. Parts: `PARTS` with the fully
        trained parameters, and the adapters in `ADAPTER`; `load_parts` puts both on a model. Parts that are all
        adapters are an adapter as LoRA is.
        """
        parts = self._fully_trained()
        if isinstance(self.model, PeftModel):
            # embeddings are never resized here; "auto" would find that out by asking the hub for the base model
            self.model.save_pretrained(str(_adapter_folder(folder, parts)), save_embedding_layers=False)
        elif not parts:
            with quiet_transformers():
                self.model.save_pretrained(str(folder))
        if parts:
            folder.mkdir(parents=True, exist_ok=True)
            values = {plain_name(name): parameter.detach().cpu().contiguous() for name, parameter in parts.items()}
            save_file(values, folder / PARTS, metadata={"format": "pt"})
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(str(folder))
        if self._anchor is not None:
            save_file({name: value.cpu().contiguous() for name, value in self._anchor.items()}, folder / ANCHOR)

    def load(self, folder: Path) -> None:
        """Take back the trainable parameters that `save` wrote. Raises CheckpointError where they do not fit."""
        parts = self._fully_trained()
        adapters = {name: one for name, one in self.trainable_parameters().items() if name not in parts}
        if parts:
            _take_back(folder / PARTS, {plain_name(name): parameter for name, parameter in parts.items()})
        if isinstance(self.model, PeftModel):
            file = _adapter_folder(folder, parts) / "adapter_model.safetensors"
            _take_back(file, {_saved_name(name): parameter for name, parameter in adapters.items()})
        elif not parts:
            _take_back(folder / "model.safetensors", adapters)
        if (folder / ANCHOR).is_file():
            self._set_anchor({key: value.to(self.device) for key, value in load_file(folder / ANCHOR).items()})

    def _fully_trained(self) -> dict[str, nn.Parameter]:
        """Those of `trainable.parts`; none where an adapter or all weights learn."""
        own = self.trainable_parameters()
        return {name: own[name] for name in self.learner.start}


def load_parts(model: PreTrainedModel, folder: Path) -> PreTrainedModel | PeftModel:
    """A model as it was loaded, and a `policy` folder of a run with `trainable.parts` -> the trained model.

    The same by hand: `model.load_state_dict(load_file(folder / "parts.safetensors"), strict=False)`, then, where there
    is a folder `adapter`, `PeftModel.from_pretrained(model, folder / "adapter")`.

    Raises:
        CheckpointError: the folder holds parameters that the model does not have.
    """
    if (folder / PARTS).is_file():
        own = dict(model.named_parameters())
        saved = load_file(folder / PARTS)
        if strange := sorted(set(saved) - set(own)):
            raise CheckpointError(f"{folder / PARTS} holds {strange[0]}, which the model does not have")
        _take_back(folder / PARTS, {name: own[name] for name in saved})
    adapter = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    return PeftModel.from_pretrained(model, str(adapter)) if (adapter / "adapter_config.json").is_file() else model


def _adapter_folder(folder: Path, parts: Mapping[str, object]) -> Path:
    """Beside other parts in a folder of its own: peft, given the folder itself, must not load half of the policy."""
    return folder / ADAPTER if parts else folder


def _take_back(file: Path, own: Mapping[str, nn.Parameter]) -> None:
    """Saved values into parameters, by the names of the file."""
    saved = load_file(file)
    missing = sorted(set(own) - set(saved))
    if missing or any(saved[name].shape != own[name].shape for name in own):
        raise CheckpointError(f"{file} does not hold this model's parameters (first missing: {missing[:1]})")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _to_float32(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.float()


def _saved_name(name: str) -> str:
    """peft leaves the adapter's own name out of the file: lora_A.default.weight is saved as lora_A.weight."""
    return name.replace(".default.", ".")


def language_model_head(model: PreTrainedModel) -> LanguageModelHead:
    """The head's weights and the scalings that model families put after it."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    return LanguageModelHead(
        weight=head.weight,  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
        bias=getattr(head, "bias", None),
        logit_scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@contextlib.contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Every dropout at p = 0 while the model stays in train mode; restored afterwards.

    Eval mode would do it too, but silently turns gradient checkpointing off. Two passes with dropout differ, and
    their difference would be taken for a KL.
    """
    layers = [(m, m.p) for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    rates = [
        (m, name, value)
        for m in model.modules()
        for name, value in vars(m).items()
        if "drop" in name and isinstance(value, float)  # attention_dropout, attn_pdrop, layerdrop
    ]
    try:
        for layer, _ in layers:
            layer.p = 0.0
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for layer, rate in layers:
            layer.p = rate
        for module, name, rate in rates:
            setattr(module, name, rate)
