"""The model that learns: which of its parameters do, its reference, its head, its weights for the engine."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo.config import LoraTrainable, TrainableConfig
from grpo.errors import CheckpointError, ConfigError
from grpo.runtime.packaged_model import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ANCHOR = "reference.safetensors"
"""Beside the weights: the trainable parameters as they were when they were taken as reference."""


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
    """A causal language model with its trainable part and its frozen reference.

    Owns the training copy of the weights. Frozen weights keep the model's dtype; trainable parameters are float32,
    because bfloat16 weights lose updates smaller than their resolution.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trainable: TrainableConfig,
        *,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Start from a model as it was loaded.

        Args:
            model: loaded weights, taken over.
            seed: of the adapter's random part.
            tokenizer: written beside the weights by `save`, so that the folder can be used alone.
        Raises:
            ConfigError: modules that cannot be trained.
        """
        self._tokenizer = tokenizer
        self._anchor: dict[str, Tensor] | None = None
        self._compute_dtype = model.dtype
        if isinstance(trainable, LoraTrainable):
            self.model: PreTrainedModel | PeftModel = _with_adapter(model, trainable, seed=seed)
            self._reference: PreTrainedModel | None = None
        else:
            # eval mode for good: it takes no gradient, so nothing is lost, and no caller can forget its dropout;
            # float32 as the policy is: other arithmetic in the two passes would be taken for a KL
            self._reference = copy.deepcopy(model).requires_grad_(False).eval()
            _to_float32(self._reference.parameters())
            self.model = model.requires_grad_(True)
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
        return sum(p.numel() for p in self.model.parameters())

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
                assert isinstance(self.model, PeftModel)
                with self.model.disable_adapter():
                    yield self.causal_lm

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
    def _swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Other values in the trainable parameters, for the while."""
        parameters = self.trainable_parameters()
        kept = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = values[name].to(parameter.device)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = kept[name]

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the plain model, weight) of every parameter that training changes, adapters added in float32."""
        if not isinstance(self.model, PeftModel):
            yield from ((name, p.detach()) for name, p in self.causal_lm.named_parameters())
            return
        for name, module in self.causal_lm.named_modules():
            if isinstance(module, LoraLayer):
                layer = module.get_base_layer()
                delta = module.get_delta_weight(module.active_adapters[0])  # pyright: ignore[reportAttributeAccessIssue]
                yield f"{name}.weight", (layer.weight.float() + delta.float()).detach()  # pyright: ignore[reportOptionalMemberAccess]

    def save(self, folder: Path) -> None:
        """Write the adapter (LoRA) or the whole model as safetensors, loadable by peft or transformers; the tokenizer
        beside it."""
        if isinstance(self.model, PeftModel):
            # embeddings are never resized here; "auto" would find that out by asking the hub for the base model
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            with quiet_transformers():
                self.model.save_pretrained(str(folder))
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(str(folder))
        if self._anchor is not None:
            save_file({name: value.cpu().contiguous() for name, value in self._anchor.items()}, folder / ANCHOR)

    def load(self, folder: Path) -> None:
        """Take back the trainable parameters that `save` wrote. Raises CheckpointError where they do not fit."""
        name = "adapter_model.safetensors" if isinstance(self.model, PeftModel) else "model.safetensors"
        saved = load_file(folder / name)
        own = self.trainable_parameters()
        renamed = {_saved_name(key): parameter for key, parameter in own.items()}
        missing = sorted(set(renamed) - set(saved))
        if missing or any(saved[key].shape != renamed[key].shape for key in renamed):
            raise CheckpointError(
                f"{folder / name} does not hold this model's parameters (first missing: {missing[:1]})"
            )
        with torch.no_grad():
            for key, parameter in renamed.items():
                parameter.copy_(saved[key])
        if (folder / ANCHOR).is_file():
            self._set_anchor({key: value.to(self.device) for key, value in load_file(folder / ANCHOR).items()})


def _to_float32(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.float()


def _saved_name(name: str) -> str:
    """peft leaves the adapter's own name out of the file: lora_A.default.weight is saved as lora_A.weight."""
    return name.replace(".default.", ".")


def _with_adapter(model: PreTrainedModel, trainable: LoraTrainable, *, seed: int) -> PeftModel:
    modules = trainable.modules if isinstance(trainable.modules, str) else list(trainable.modules)
    head = model.get_output_embeddings()
    config = LoraConfig(
        r=trainable.rank,
        lora_alpha=trainable.alpha,  # pyright: ignore[reportArgumentType]  # a float scales as well
        target_modules=modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # peft sets it right, layer by layer
        # peft draws the A matrices on the CPU, from the global generator; torch.manual_seed would reseed the GPUs too
        torch.default_generator.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as exc:
            raise ConfigError(f"trainable.modules {modules} do not fit this model: {exc}") from exc
    assert isinstance(adapted, PeftModel)
    if isinstance(adapted.get_base_model().get_output_embeddings(), LoraLayer) or head is None:  # pyright: ignore[reportCallIssue]
        raise ConfigError(
            "trainable.modules matches the language-model head, whose log-probabilities are computed from its weight "
            "alone. Leave the head out; all-linear does."
        )
    if isinstance(adapted.get_base_model().get_input_embeddings(), LoraLayer):  # pyright: ignore[reportCallIssue]
        raise ConfigError(
            "trainable.modules matches the token embeddings, which many models share with the head: merged there, the "
            "adapter would change the head too. Leave them out; all-linear does."
        )
    return adapted


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
