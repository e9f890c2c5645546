"""Weight sync inside a vLLM worker: takes weights or an adapter, and reads them back through its own kernels.

vLLM makes `WeightSync` a base of its worker class (`--worker-extension-cls`, see `vllm_law.WORKER_EXTENSION`); its
methods are called by `collective_rpc`, in process with tensors, from another process with a safetensors file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA  # pyright: ignore[reportMissingImports]
from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from grpo.errors import EngineError
from grpo.rollout.vllm_sync import Checksum, SyncReport, read_back_columns
from grpo.rollout.vllm_tables import check_rotary_tables
from grpo.runtime.vector_functions import settle_vector_functions

settle_vector_functions()  # here, for vLLM imports this before it builds the model, whose rotary table depends on it

ADAPTER_ID = 1
"""Of the one adapter there is: every request has it, or none has."""


class WeightSync:
    """Methods that a vLLM worker gains. Each answers a `SyncReport` as a dict, which survives any transport."""

    model_runner: Any  # the worker's own
    _grpo_version: int | None = None

    def grpo_load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> dict[str, Any]:
        """Take all weights of the plain model, in the checkpoint's names and the engine's dtype.

        Raises:
            EngineError: some of them read back as others, or the rotary table is wrong.
        """
        self._grpo_version = None  # until it is done, no one knows what the weights are
        checksum = Checksum()
        samples: dict[str, Tensor] = {}
        self.model_runner.reload_weights(weights_iterator=_sampled(checksum.counted(weights), samples))
        model = self.model_runner.get_model()
        repack_head(model)
        num_checked = check_weights(model, samples)
        check_rotary_tables(model)
        self._grpo_version = version
        return _report(version=version, checksum=checksum.value(), num_checked=num_checked)

    def grpo_load_weights_file(self, path: str, *, version: int) -> dict[str, Any]:
        """As `grpo_load_weights`, from a safetensors file that the worker can read."""
        return self.grpo_load_weights(_tensors_of(Path(path)), version=version)

    def grpo_load_adapter(
        self, tensors: Mapping[str, Tensor], *, rank: int, alpha: float, version: int
    ) -> dict[str, Any]:
        """Replace the adapter by these tensors, in peft's names. See `Adapter`.

        Raises:
            EngineError: the worker's adapter reads back as another, or the rotary table is wrong.
        """
        self._grpo_version = None
        checksum = Checksum()
        for name, tensor in tensors.items():
            checksum.add(name, tensor)
        worker_manager = self.model_runner.lora_manager
        manager = worker_manager._adapter_manager
        mapper: Any = getattr(manager.model, "hf_to_vllm_mapper", None)
        adapter = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            # copies: vLLM multiplies B by alpha / rank in place, and these may be the very parameters that learn
            {name: tensor.clone() for name, tensor in tensors.items()},
            PEFTHelper.from_dict({"r": rank, "lora_alpha": alpha, "target_modules": []}),
            device="cpu",
            dtype=worker_manager.lora_config.lora_dtype,
            weights_mapper=mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper,
        )
        manager.remove_adapter(ADAPTER_ID)  # an id that is known already would keep its old tensors
        manager.add_adapter(adapter)
        manager.activate_adapter(ADAPTER_ID)
        num_checked = check_adapter(manager, tensors, scaling=alpha / rank, dtype=worker_manager.lora_config.lora_dtype)
        check_rotary_tables(manager.model)
        self._grpo_version = version
        return _report(version=version, checksum=checksum.value(), num_checked=num_checked)

    def grpo_load_adapter_file(self, path: str, *, rank: int, alpha: float, version: int) -> dict[str, Any]:
        """As `grpo_load_adapter`, from a safetensors file that the worker can read."""
        return self.grpo_load_adapter(load_file(path), rank=rank, alpha=alpha, version=version)

    def grpo_weight_version(self) -> int | None:
        """The last sync that was taken whole; None before the first and after one that failed."""
        return self._grpo_version


def repack_head(model: nn.Module) -> None:
    """Make the head's kernel see the head's weight again.

    On the CPU vLLM multiplies by a packed copy. A reload packs the layers that it loads; a head tied to the token
    embeddings is not among them, and would go on with the old weights.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            method: Any = module.quant_method
            method.process_weights_after_loading(module)


def check_weights(model: nn.Module, samples: Mapping[str, Tensor]) -> int:
    """How many parameters were compared with what was sent: all that are not sharded, quantised or renamed.

    A matrix is read through the product that samples with it: W e_j is its column j, exact in any dtype.

    Args:
        samples: parameter name -> columns [out, C] of a matrix at `read_back_columns`, or a whole vector.
    Raises:
        EngineError: one differs.
    """
    num_checked = 0
    own = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    for name, module, sources in _kernels(model, samples):
        sent = torch.cat([samples[source] for source in sources])  # [out, C]
        read = _read_columns(module)[: len(sent)]  # the head is padded
        _check_equal(name, read, sent)
        num_checked += len(sources)
    for name, sent in samples.items():
        parameter = own.get(name)
        if sent.dim() == 1 and parameter is not None and parameter.shape == sent.shape:
            _check_equal(name, parameter, sent)
            num_checked += 1
    return num_checked


def check_adapter(manager: Any, tensors: Mapping[str, Tensor], *, scaling: float, dtype: torch.dtype) -> int:
    """How many of the adapter's tensors lie in the slot that vLLM multiplies by.

    Raises:
        EngineError: one differs from what was sent.
    """
    slot = manager.lora_index_to_id.index(ADAPTER_ID)
    packed = manager.packed_modules_mapping
    num_checked = 0
    for name, module in manager.modules.items():
        parent, _, last = name.rpartition(".")
        parts = packed.get(last, [last])
        if len(parts) != len(getattr(module, "lora_a_stacked", ())) or getattr(module, "tp_size", 1) > 1:
            continue
        for index, part in enumerate(parts):
            prefix = f"base_model.model.{parent}.{part}".replace("..", ".")
            if f"{prefix}.lora_A.weight" not in tensors:
                continue
            sent_a = tensors[f"{prefix}.lora_A.weight"].to(dtype)  # [rank, in]
            sent_b = tensors[f"{prefix}.lora_B.weight"].to(dtype) * scaling  # [out, rank]
            own_a, own_b = module.lora_a_stacked[index][slot, 0], module.lora_b_stacked[index][slot, 0]
            _check_equal(f"{prefix}.lora_A", own_a[: sent_a.shape[0], : sent_a.shape[1]], sent_a)
            _check_equal(f"{prefix}.lora_B", own_b[: sent_b.shape[0], : sent_b.shape[1]], sent_b)
            num_checked += 2
    return num_checked


def _kernels(model: nn.Module, samples: Mapping[str, Tensor]) -> Iterator[tuple[str, nn.Module, Sequence[str]]]:
    """(name, module, the sent matrices that it holds one after another) of every matrix that can be read back."""
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    embeddings = ""
    for name, module in model.named_modules():
        if isinstance(module, BaseLayerWithLoRA) or getattr(module, "tp_size", 1) > 1:
            continue  # the layer inside a LoRA layer comes by itself; of a sharded one a worker holds a part
        plain = name.removesuffix(".base_layer")
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod):
            parent, _, last = plain.rpartition(".")
            sources = [f"{parent}.{part}.weight" for part in packed.get(last, [last])]
        elif isinstance(method, UnquantizedEmbeddingMethod):
            sources = [f"{plain}.weight"]
            if isinstance(module, ParallelLMHead) and sources[0] not in samples:
                sources = [embeddings]  # tied: sent once, as the embeddings
            elif isinstance(module, VocabParallelEmbedding):
                embeddings = sources[0]
        else:
            continue
        if all(source in samples for source in sources):
            yield plain, module, sources


def _read_columns(module: nn.Module) -> Tensor:
    """[out, C] what the module's kernel makes of one-hot inputs."""
    method: Any = module.quant_method
    width: int = getattr(module, "input_size_per_partition", None) or module.embedding_dim  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
    dtype: Any = getattr(module, "params_dtype", None) or next(module.parameters()).dtype
    device = next(module.parameters()).device
    one_hot = torch.eye(width, dtype=dtype, device=device)[read_back_columns(width)]  # [C, in]
    return method.apply(module, one_hot).T


def _sampled(weights: Iterable[tuple[str, Tensor]], samples: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same weights; of each, what `check_weights` needs is kept."""
    for name, tensor in weights:
        if tensor.dim() == 2:
            samples[name] = tensor[:, read_back_columns(tensor.shape[1])].clone()
        elif tensor.dim() == 1:
            samples[name] = tensor.clone()
        yield name, tensor


def _check_equal(name: str, read: Tensor, sent: Tensor) -> None:
    if not torch.equal(read.cpu(), sent.to(read.dtype).cpu()):
        raise EngineError(
            f"the engine's {name} is not what the weight sync sent: read back, it differs by up to "
            f"{float((read.cpu() - sent.cpu()).abs().max()):.3g}. It would sample from other weights than the policy's."
        )


def _tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            yield name, file.get_tensor(name)


def _report(**fields: Any) -> dict[str, Any]:
    return dataclasses.asdict(SyncReport(**fields))
