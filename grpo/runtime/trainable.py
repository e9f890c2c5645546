"""Which parameters learn, and how: a model as it was loaded -> the same model with adapters on, the rest frozen.

Knows modules and patterns; nothing of losses, references or folders. Works on any model of transformers, one with
several parts or an encoder-decoder among them, and on a module of one's own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1D  # pyright: ignore[reportPrivateImportUsage]  # transformers' own
from torch import Tensor, nn

from grpo.config import FullPart, LoraPart, LoraTrainable, PartConfig, PartsTrainable, TrainableConfig
from grpo.config.module_patterns import alike, matching, nearest
from grpo.errors import ConfigError
from grpo.runtime.adapted_product import round_once
from grpo.runtime.model_parts import ModelParts, is_encoder_decoder, model_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES_PER_PARAMETER = 20
"""Of what learns, in float32: the weight, its gradient, a micro-batch's own gradient, and AdamW's two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What one entry of `trainable.parts` makes learn."""

    entry: PartConfig
    sizes: Mapping[str, int]
    """A linear layer that gets an adapter, or a parameter that learns in full -> numbers that learn in it. Names are
    those of the model as it was loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """A model of which some parameters learn, and no other has requires_grad."""

    model: PreTrainedModel | PeftModel
    """peft's, where there are adapters."""
    names: frozenset[str]
    """Of all parameters that learn, as `model` calls them."""
    start: Mapping[str, Tensor]
    """Fully trained parameters of `trainable.parts`: name in `model` -> a copy of what it was, in its own dtype."""
    taken: tuple[Taken, ...]
    """By entry of `trainable.parts`; () for the other kinds."""


def make_trainable(model: PreTrainedModel, trainable: TrainableConfig, *, seed: int) -> Learner:
    """Put adapters on, and set requires_grad.

    Args:
        model: as it was loaded; changed in place.
        seed: of the adapters' random half.
    Raises:
        ConfigError: a pattern matches nothing, or what cannot learn, or modules in several parts by mistake.
    """
    if isinstance(trainable, LoraTrainable):
        return _learner(_with_adapter(model, _plain_config(model, trainable), seed=seed, key="trainable.modules"))
    if not isinstance(trainable, PartsTrainable):
        return _learner(model.requires_grad_(True))
    taken = select_parts(model, trainable)
    layers = {name: one.entry for one in taken if isinstance(one.entry, LoraPart) for name in one.sizes}
    own = dict(model.named_parameters())
    full = {name: own[name] for one in taken if isinstance(one.entry, FullPart) for name in one.sizes}
    learning: PreTrainedModel | PeftModel = model.requires_grad_(False)
    if layers:
        learning = _with_adapter(model, _parts_config(model, layers), seed=seed, key="trainable.parts")
    for parameter in full.values():
        parameter.requires_grad_(True)
    names = {id(parameter): name for name, parameter in learning.named_parameters()}
    start = {names[id(parameter)]: parameter.detach().clone() for parameter in full.values()}
    return _learner(learning, start=start, taken=taken)


def _learner(
    model: PreTrainedModel | PeftModel, *, start: Mapping[str, Tensor] | None = None, taken: tuple[Taken, ...] = ()
) -> Learner:
    names = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return Learner(model=model, names=names, start=start or {}, taken=taken)


def plain_name(name: str) -> str:
    """A parameter's name in the model as it was loaded, of its name in a model with adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def adapter_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that adapters brought with them."""
    return frozenset(
        f"{path}.{name}".lstrip(".")
        for path, module in lora_layers(model).items()
        for name, _ in module.named_parameters()  # pyright: ignore[reportAttributeAccessIssue]
        if not name.startswith("base_layer.")
    )


# --- selection


def select_parts(model: nn.Module, trainable: PartsTrainable) -> tuple[Taken, ...]:
    """What each entry takes of a model without adapters. Changes nothing.

    Raises:
        ConfigError: a pattern matches no module or takes nothing that can learn; it matches in several parts of the
            model and the entry does not say that it may; it names the head or the token embeddings for an adapter.
    """
    selection = _Selection(model)
    return tuple(selection.take(number, entry) for number, entry in enumerate(trainable.parts))


class _Selection:
    """Goes through the entries in their order; what one has taken, no later one gets."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: module for name, module in model.named_modules() if name}
        self._parts = model_parts(model)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}  # tied ones once
        self._ends = model_ends(model)
        self._taken: set[int] = set()  # parameters

    def take(self, number: int, entry: PartConfig) -> Taken:
        sizes: dict[str, int] = {}
        for pattern in entry.modules:
            place = f"trainable.parts[{number}].modules {pattern!r}"
            modules = matching(pattern, self._modules)
            if not modules:
                raise ConfigError(f"{place} matches no module of the model; {nearest(pattern, list(self._modules))}.")
            found = (
                self._layers(place, modules, entry) if isinstance(entry, LoraPart) else self._parameters(place, modules)
            )
            self._check_reach(place, pattern, found, entry)
            sizes |= found
        return Taken(entry=entry, sizes=sizes)

    def _layers(self, place: str, modules: Sequence[str], entry: LoraPart) -> dict[str, int]:
        """Linear layer -> size of its adapter."""
        for name in modules:
            if what := self._ends.get(id(self._modules[name])):
                raise ConfigError(f"{place} matches {what}")
        tops = set(modules)
        linears = {
            name: module
            for name, module in self._modules.items()
            if isinstance(module, nn.Linear | Conv1D)
            and id(module) not in self._ends
            and not tops.isdisjoint(_itself_and_above(name))
        }
        if not linears:
            kinds = ", ".join(dict.fromkeys(type(self._modules[name]).__name__ for name in modules[:3]))
            raise ConfigError(
                f"{place} matches {len(modules)} modules ({kinds}), but there is no linear layer among or in them that "
                "could get an adapter. Name linear layers or what holds some, or train the modules with type: full."
            )
        free = {name: module for name, module in linears.items() if self._claim(module.parameters())}
        if not free:
            raise ConfigError(
                f"{place} is left nothing: earlier entries have all {len(linears)} layers of it. {_FIRST}"
            )
        return {name: entry.rank * _inputs_and_outputs(module) for name, module in free.items()}

    def _parameters(self, place: str, modules: Sequence[str]) -> dict[str, int]:
        """Parameter -> its size."""
        inside = {
            self._names[id(parameter)]: parameter for name in modules for parameter in self._modules[name].parameters()
        }
        if not inside:
            kinds = ", ".join(dict.fromkeys(type(self._modules[name]).__name__ for name in modules[:3]))
            raise ConfigError(f"{place} matches {len(modules)} modules ({kinds}), but they have no parameters.")
        for name, parameter in inside.items():
            if not parameter.is_floating_point():
                raise ConfigError(
                    f"{place} matches {name}, which is {parameter.dtype} and cannot learn. Use type: lora."
                )
        free = {name: one.numel() for name, one in inside.items() if self._claim([one])}
        if not free:
            raise ConfigError(
                f"{place} is left nothing: earlier entries have all {len(inside)} tensors of it. {_FIRST}"
            )
        return free

    def _claim(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether they were free, all of them."""
        marks = {id(parameter) for parameter in parameters}
        if marks & self._taken:
            return False
        self._taken |= marks
        return True

    def _check_reach(self, place: str, pattern: str, found: Mapping[str, int], entry: PartConfig) -> None:
        by_part = sizes_by_part(found, self._parts)
        if len(by_part) > 1 and not entry.across_parts:
            part, last = next(iter(by_part)), pattern.rpartition(".")[2]
            raise ConfigError(
                f"{place} matches in {len(by_part)} parts of the model: {told_by_part(by_part)}, with gradients and "
                "AdamW's moments; what the backward pass keeps because of each comes on top. Write the path of the "
                f"part that is meant, such as {part if last == '**' else f'{part}.**.{last}'}, or set across_parts: "
                "true if all of them should learn."
            )


_FIRST = "The first entry that matches has it: put the narrower one first."


def _itself_and_above(name: str) -> Iterator[str]:
    """The path of a module and those of all that it is in."""
    yield name
    while name := name.rpartition(".")[0]:
        yield name


def sizes_by_part(sizes: Mapping[str, int], parts: ModelParts) -> dict[str, tuple[int, int]]:
    """Part -> (modules or tensors, numbers that learn in them)."""
    found: dict[str, tuple[int, int]] = {}
    for name, size in sizes.items():
        part = parts.of(name)
        count, total = found.get(part, (0, 0))
        found[part] = (count + 1, total + size)
    return found


def told_by_part(by_part: Mapping[str, tuple[int, int]]) -> str:
    """Such as "4 in qformer (1 MiB), 96 in language_model (35 MiB)"."""
    return ", ".join(
        f"{count} in {part or 'the model'} ({told_bytes(size * BYTES_PER_PARAMETER)})"
        for part, (count, size) in by_part.items()
    )


def told_bytes(number: float) -> str:
    """In GiB, MiB or KiB."""
    if number >= 2**30:
        return f"{number / 2**30:.1f} GiB"
    return f"{number / 2**20:.0f} MiB" if number >= 2**20 else f"{number / 2**10:.0f} KiB"


# --- adapters


def model_ends(model: nn.Module) -> dict[int, str]:
    """id of the head and of the token embeddings -> why an adapter cannot be on it."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)() if hasattr(model, "config") else None
    found: dict[int, str] = {}
    if embeddings is not None:
        found[id(embeddings)] = (
            "the token embeddings, which many models share with the head: merged there, the adapter would change the "
            "head too. Leave them out; all-linear does."
        )
    if head is not None:
        found[id(head)] = (
            "the language-model head, whose log-probabilities are computed from its weight alone. Leave the head out; "
            "all-linear does."
        )
    return found


def _inputs_and_outputs(layer: nn.Linear | Conv1D) -> int:
    """Their sum, whichever way round the weight is kept."""
    return sum(layer.weight.shape)


def _plain_config(model: nn.Module, trainable: LoraTrainable) -> LoraConfig:
    modules = trainable.modules if isinstance(trainable.modules, str) else list(trainable.modules)
    parts, ends = model_parts(model), model_ends(model)
    if modules == "all-linear" and parts.are_several and parts.language:
        modules = _exactly(
            name
            for name, module in model.named_modules()
            if parts.of(name) == parts.language and isinstance(module, nn.Linear | Conv1D) and id(module) not in ends
        )
    return _lora_config(model, modules, rank=trainable.rank, alpha=trainable.alpha)


def _parts_config(model: nn.Module, layers: Mapping[str, LoraPart]) -> LoraConfig:
    first = next(iter(layers.values()))
    groups: dict[tuple[int, float], list[str]] = {}
    for name, entry in layers.items():
        groups.setdefault((entry.rank, entry.alpha), []).append(name)
    others = {f"^{_exactly(names)}": sizes for sizes, names in groups.items() if sizes != (first.rank, first.alpha)}
    config = _lora_config(model, _exactly(layers), rank=first.rank, alpha=first.alpha)
    config.rank_pattern = {pattern: rank for pattern, (rank, _) in others.items()}
    config.alpha_pattern = {pattern: alpha for pattern, (_, alpha) in others.items()}  # pyright: ignore[reportAttributeAccessIssue]
    return config


def _exactly(names: Iterable[str]) -> str:
    """A regular expression of these module names and no other: a list would match by their ends."""
    return "(?:" + "|".join(re.escape(name) for name in names) + ")"


def _lora_config(model: nn.Module, modules: str | list[str], *, rank: int, alpha: float) -> LoraConfig:
    kind = None if model_parts(model).are_several else "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # a float scales as well
        target_modules=modules,
        lora_dropout=0.0,
        bias="none",
        task_type=kind if hasattr(model, "prepare_inputs_for_generation") else None,
    )


def _with_adapter(model: PreTrainedModel, config: LoraConfig, *, seed: int, key: str) -> PeftModel:
    ends = model_ends(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # peft sets it right, layer by layer
        # peft draws the A matrices on the CPU, from the global generator; torch.manual_seed would reseed the GPUs too
        torch.default_generator.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as exc:
            wanted = config.target_modules
            told = sorted(wanted) if isinstance(wanted, set) else wanted
            linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
            hint = f" The nearest are {alike(told[0], linears)}." if isinstance(told, list) and told else ""
            raise ConfigError(f"{key} {told} do not fit this model: {exc}{hint}") from exc
    assert isinstance(adapted, PeftModel)
    for layer in lora_layers(adapted.get_base_model()).values():
        if what := ends.get(id(layer.get_base_layer())):
            raise ConfigError(f"{key} matches {what}")
    round_once(adapted)
    return adapted


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Path -> layer with an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
