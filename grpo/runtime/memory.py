"""Recipe and hardware -> the memory of every phase, before a weight is loaded. Imports no torch.

`plan(config, hardware)` is the whole of it; `grpo plan` prints what it returns, `grpo bench memory` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from grpo.config import RunConfig, VllmEngineConfig
from grpo.runtime.memory_changes import candidate_changes
from grpo.runtime.memory_hardware import GIB, Hardware
from grpo.runtime.memory_model import ModelShape, read_shape
from grpo.runtime.memory_rows import largest_micro_batch
from grpo.runtime.memory_search import Change, Limit, Need, changes_of, limits_of, packing_of
from grpo.runtime.memory_terms import FULL, MIB, Terms
from grpo.runtime.memory_update import UpdateTerms

CONTEXT_BYTES = 768 * MIB
"""Of a card: CUDA's context and its libraries' workspaces, which torch does not count. Not measured here."""
PROCESS_BYTES = 700 * MIB
"""Of the host: Python, torch and transformers before a model is loaded."""
DEFAULT_PROMPT_TOKENS = 512
"""Of the longest prompt, where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stage of the run."""

    name: str
    held: dict[str, int]
    """What is there throughout, by name, in bytes."""
    transient_bytes: int
    """The most that comes on top."""
    host_bytes: int
    """Of the process's own memory, where the device is another; else what `peak_bytes` says."""
    on_top: dict[str, int] = field(default_factory=dict)
    """What `transient_bytes` is made of, by name, where that is known."""

    @property
    def peak_bytes(self) -> int:
        """On the device."""
        return sum(self.held.values()) + self.transient_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a recipe will take."""

    hardware: Hardware
    shape: ModelShape
    dtype: str
    prompt_tokens: int
    """Of the longest prompt, as it was given."""
    completion_tokens: int
    """Of every completion: rollout.max_new_tokens."""
    phases: tuple[Phase, ...]
    reserve_bytes: int
    """What the run does not count: CUDA's context, or the process without a model."""
    micro_batch_tokens: int
    """Of the largest micro-batch, padding included."""
    packing: str = ""
    """How a step's completions are cut into micro-batches, as `grpo.runtime.memory_search.packing_of` says it."""
    limits: tuple[Limit, ...] = ()
    changes: tuple[Change, ...] = ()
    """What helps where it does not fit, the best first."""

    @property
    def peak_bytes(self) -> int:
        """The largest phase's."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def host_peak_bytes(self) -> int:
        """Of the process's own memory, the process without a model included."""
        return max(phase.host_bytes for phase in self.phases) + PROCESS_BYTES

    @property
    def fits(self) -> bool:
        """Whether the largest phase and the reserve are within the hardware's memory."""
        return self.peak_bytes + self.reserve_bytes <= self.hardware.device_bytes


def plan(
    config: RunConfig,
    hardware: Hardware,
    *,
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
    shape: ModelShape | None = None,
) -> MemoryPlan:
    """Memory of every phase, the largest batch, K and length that fit, and what to change where nothing does.

    Args:
        prompt_tokens: of the longest prompt, as `grpo.runtime.prompt_lengths` reads it; completions are taken at
            rollout.max_new_tokens.
        shape: of the model; read from its config where None.
    Raises:
        ModelError: the model's config cannot be had, or its blocks are not known.
        ConfigError: trainable.modules match nothing in it.
    """
    shape = shape or read_shape(config.model, config.base_dir)

    def need_of(other: RunConfig) -> Need:
        needed = _phases_of(other, hardware, prompt_tokens, shape)
        return Need(peak_bytes=needed.peak_bytes, fits=needed.fits)

    found = _phases_of(config, hardware, prompt_tokens, shape)
    limits = tuple(limits_of(config, need_of, prompt_tokens=prompt_tokens, context_tokens=shape.context))
    changes: tuple[Change, ...] = ()
    if not found.fits:
        candidates = candidate_changes(
            config,
            is_cpu=hardware.is_cpu,
            gains_bfloat16=found.dtype == "float32" and hardware.has_bfloat16,
            micro_batch_tokens=found.micro_batch_tokens,
            largest_budget=limits[0].largest,
            prompt_tokens=prompt_tokens,
        )
        changes = changes_of(config, candidates, need_of, prompt_tokens=prompt_tokens)
    return replace(found, packing=packing_of(config, prompt_tokens), limits=limits, changes=changes)


def _phases_of(config: RunConfig, hardware: Hardware, prompt_tokens: int, shape: ModelShape) -> MemoryPlan:
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if hardware.has_bfloat16 else "float32"
    terms = Terms(
        shape=shape,
        config=config,
        rows=largest_micro_batch(config, prompt_tokens),
        width=2 if dtype == "bfloat16" else FULL,
        is_cpu=hardware.is_cpu,
        threads=hardware.threads,
    )
    return MemoryPlan(
        hardware=hardware,
        shape=shape,
        dtype=dtype,
        prompt_tokens=prompt_tokens,
        completion_tokens=terms.rows.completion_tokens,
        phases=_phases(terms, hardware),
        reserve_bytes=PROCESS_BYTES if hardware.is_cpu else CONTEXT_BYTES,
        micro_batch_tokens=terms.rows.padded_tokens,
    )


def _phases(terms: Terms, hardware: Hardware) -> tuple[Phase, ...]:
    passes = UpdateTerms(terms)
    weights = {"policy": terms.weights() + terms.anchor()}
    if terms.is_full:
        weights["reference"] = terms.reference_copy()
    if hardware.is_cpu and terms.packed:  # embeddings and norms keep the files mapped, and packing has read all of them
        weights["files"] = terms.shape.stored_bytes * terms.packed
    is_away = terms.config.optim.offload == "states" and not hardware.is_cpu
    optimizer = (
        {"gradients": terms.gradients()} if is_away else {"gradients and moments": terms.gradients() + terms.moments()}
    )
    library = {"libraries": terms.library()} if hardware.is_cpu else {}
    engine, asleep, sampling = _engine(terms, hardware)
    running = {**weights, **optimizer, **library}
    stays = sum(weights.values()) + sum(engine.values())
    files = 0 if hardware.is_cpu else terms.load_host()
    saved = 0 if hardware.is_cpu else 3 * FULL * terms.learning
    moments_away = terms.moments() if is_away else 0
    on_top = passes.update_pass()
    if moments_away > sum(on_top.values()):  # they come back for the optimizer's step, after the pass
        on_top = {"moments, back from the host": moments_away}
    update = sum(on_top.values())
    waiting = passes.saved() - passes.saved_on_device()

    def phase(name: str, held: dict[str, int], transient: int, host: int = 0) -> Phase:
        peak = sum(held.values()) + transient
        host = peak if hardware.is_cpu else host + (moments_away if name != "load" else 0)
        return Phase(name=name, held=held, transient_bytes=transient, host_bytes=host)

    # a CPU's weights are mapped from the files, and are read for the first time when the engine copies them; packed
    # ones are read before that, and there is no more than the engine's copy will be
    loading = phase("load", {**weights, **engine}, terms.merging(), files)
    assert loading.peak_bytes >= stays
    return (
        loading,
        phase("sampling", {**running, **engine}, sampling),
        phase("reference", {**running, **asleep}, passes.reference_pass()),
        replace(phase("update", {**running, **asleep}, update, waiting), on_top=on_top),
        phase("sync", {**running, **engine}, terms.merging()),
        phase("checkpoint", {**running, **asleep}, 0, saved),
    )


def _engine(terms: Terms, hardware: Hardware) -> tuple[dict[str, int], dict[str, int], int]:
    """What the engine holds while it samples and while it does not, and what comes on top while it samples."""
    engine = terms.config.rollout.engine
    if not isinstance(engine, VllmEngineConfig):
        copy = {"engine": terms.engine_copy()} if terms.engine_copy() else {}
        return copy, copy, terms.sampling()
    if hardware.is_cpu:
        taken = {"engine": terms.engine_copy() + int(engine.kv_cache_gib * GIB)}
        return taken, taken, 0
    taken = {"engine": int(engine.memory_fraction * hardware.device_bytes)}
    return taken, {} if engine.sleep else taken, 0
