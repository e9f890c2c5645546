"""Recipe and hardware -> the memory of every phase, before a weight is loaded. Imports no torch.

`plan(config, hardware)` is the whole of it; `grpo plan` prints what it returns, `grpo bench memory` measures it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo.config import RunConfig, VllmEngineConfig
from grpo.errors import ConfigError
from grpo.runtime.memory_changes import candidate_changes, changed
from grpo.runtime.memory_model import ModelShape, read_shape
from grpo.runtime.memory_rows import count_micro_batches, largest_micro_batch
from grpo.runtime.memory_terms import FULL, MIB, Terms
from grpo.runtime.memory_update import UpdateTerms

GIB = 2**30
CONTEXT_BYTES = 768 * MIB
"""Of a card: CUDA's context and its libraries' workspaces, which torch does not count. Not measured here."""
PROCESS_BYTES = 700 * MIB
"""Of the host: Python, torch and transformers before a model is loaded."""
DEFAULT_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What there is room on."""

    name: str
    device_bytes: int
    """Of the card, or of the host where the run is on the CPU."""
    is_cpu: bool
    has_bfloat16: bool
    """In its matrix units: what dtype = auto goes by."""
    threads: int = 2
    """Of a CPU's products; nothing on a card depends on it."""


def _card(name: str, gib: float, *, has_bfloat16: bool = True) -> Hardware:
    return Hardware(name=name, device_bytes=int(gib * GIB), is_cpu=False, has_bfloat16=has_bfloat16)


CARDS = {
    card.name: card
    for card in (
        _card("t4", 14.6, has_bfloat16=False),
        _card("l4", 22.0),
        _card("rtx3090", 23.6),
        _card("rtx4090", 23.5),
        _card("a100-40g", 39.4),
        _card("a100-80g", 79.2),
        _card("h100-80g", 79.1),
        _card("h200", 139.8),
    )
}
"""By name; the bytes are about what a driver leaves of the number on the box."""


def hardware_named(name: str) -> Hardware:
    """A card of `CARDS`, or cpu:GIB, a host with so much memory. Raises ConfigError for another name."""
    wanted = name.lower().replace(" ", "").replace("_", "-")
    if wanted in CARDS:
        return CARDS[wanted]
    if found := re.fullmatch(r"cpu:(\d+(?:\.\d+)?)(?:gi?b?)?", wanted):
        return Hardware(
            name=wanted,
            device_bytes=int(float(found[1]) * GIB),
            is_cpu=True,
            has_bfloat16=_cpu_bfloat16(),
            threads=num_threads(),
        )
    raise ConfigError(
        f"hardware {name!r} is not known; expected cpu:GIB, such as cpu:24, or one of {', '.join(CARDS)}."
    )


def num_threads() -> int:
    """As torch counts them: OMP_NUM_THREADS, else this machine's cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def _cpu_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16; a plan for another one names its dtype in the recipe."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


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

    @property
    def peak_bytes(self) -> int:
        """On the device."""
        return sum(self.held.values()) + self.transient_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The largest value of one recipe key that fits, everything else as it is."""

    key: str
    now: int
    largest: int | None
    """None: not even the smallest fits."""
    is_bounded: bool
    """It was not searched beyond this: memory is not what bounds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something else in the recipe, and the peak with it."""

    overrides: tuple[str, ...]
    """As `grpo train` takes them."""
    why: str
    peak_bytes: int
    fits: bool
    keeps_gradient: bool
    """The same gradient, in more and smaller parts."""
    packing: str = ""
    """How a step is cut then, as `MemoryPlan.packing`; empty where it is cut as now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a recipe will take."""

    hardware: Hardware
    shape: ModelShape
    dtype: str
    prompt_tokens: int
    """Assumed of the longest prompt."""
    phases: tuple[Phase, ...]
    reserve_bytes: int
    """What the run does not count: CUDA's context, or the process without a model."""
    micro_batch_tokens: int
    """Of the largest micro-batch, padding included."""
    packing: str = ""
    """How a step's completions are cut into micro-batches: "4 x 32", or "at most 5 x 26" where some are smaller."""
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
        prompt_tokens: of the longest prompt; completions are taken at rollout.max_new_tokens.
        shape: of the model; read from its config where None.
    Raises:
        ModelError: the model's config cannot be had, or its blocks are not known.
        ConfigError: trainable.modules match nothing in it.
    """
    shape = shape or read_shape(config.model, config.base_dir)
    found = _phases_of(config, hardware, prompt_tokens, shape)
    limits = tuple(_limits(config, hardware, prompt_tokens, shape))
    changes = () if found.fits else tuple(_changes(config, hardware, prompt_tokens, shape))
    return replace(found, packing=_packing(config, prompt_tokens), limits=limits, changes=changes)


def _packing(config: RunConfig, prompt_tokens: int) -> str:
    """Completions of the largest micro-batch, and how many of them a step has: their product is the effective batch."""
    rows, count = largest_micro_batch(config, prompt_tokens).rows, count_micro_batches(config, prompt_tokens)
    is_even = rows * count == config.prompts.per_step * config.rollout.group_size
    return f"{rows} x {count}" if is_even else f"at most {rows} x {count}"


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
    update = max(passes.update_pass(), moments_away)  # moments come back for the optimizer's step, after the pass
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
        phase("update", {**running, **asleep}, update, waiting),
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


def _limits(config: RunConfig, hardware: Hardware, prompt_tokens: int, shape: ModelShape) -> Iterable[Limit]:
    rollout, update = config.rollout, config.update
    whole = config.prompts.per_step * (prompt_tokens + rollout.group_size * rollout.max_new_tokens)
    searched = (
        ("update.micro_batch_tokens", "update__micro_batch_tokens", update.micro_batch_tokens, whole),
        ("rollout.group_size", "rollout__group_size", rollout.group_size, 256),
        ("rollout.max_new_tokens", "rollout__max_new_tokens", rollout.max_new_tokens, 2**17),
        ("prompts.per_step", "prompts__per_step", config.prompts.per_step, 4096),
    )
    for key, name, now, most in searched:

        def fits(value: int, name: str = name) -> bool:
            return _phases_of(changed(config, **{name: value}), hardware, prompt_tokens, shape).fits

        least = 2 if key == "rollout.group_size" else 1
        largest = _largest(fits, least, most)
        yield Limit(key=key, now=now, largest=largest, is_bounded=largest == most)


def _largest(fits: Any, least: int, most: int) -> int | None:
    """The largest value that fits, where memory grows with it; None where the least does not."""
    if not fits(least):
        return None
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _changes(config: RunConfig, hardware: Hardware, prompt_tokens: int, shape: ModelShape) -> Sequence[Change]:
    """Those that lower the peak: first what fits and keeps the gradient, then what fits, then by what they save."""
    now = _phases_of(config, hardware, prompt_tokens, shape)
    candidates = candidate_changes(
        config,
        is_cpu=hardware.is_cpu,
        gains_bfloat16=now.dtype == "float32" and hardware.has_bfloat16,
        micro_batch_tokens=now.micro_batch_tokens,
        prompt_tokens=prompt_tokens,
    )
    found: list[Change] = []
    for changes, text, why, keeps in candidates:
        then = _phases_of(changed(config, **changes), hardware, prompt_tokens, shape)
        if then.peak_bytes < now.peak_bytes:
            is_cut = any(name in changes for name in ("update__micro_batch_tokens", "rollout__max_new_tokens"))
            overrides = (text,) if text.startswith("trainable") else tuple(text.split())
            found.append(
                Change(
                    overrides=overrides,
                    why=why,
                    peak_bytes=then.peak_bytes,
                    fits=then.fits,
                    keeps_gradient=keeps,
                    packing=_packing(changed(config, **changes), prompt_tokens) if is_cut else "",
                )
            )
    # of those that fit and keep the gradient the one that gives up least, and first what costs no further arithmetic;
    # of the others the one that saves most
    ranked = sorted(
        found,
        key=lambda change: (
            not change.fits,
            not change.keeps_gradient if change.fits else False,
            any(text.startswith(_TAKES_TIME) for text in change.overrides) if change.fits else False,
            -change.peak_bytes if change.fits and change.keeps_gradient else change.peak_bytes,
        ),
    )
    return _some_of_each(ranked)[:5]


_TAKES_TIME = ("update.checkpointing", "update.offload", "optim.offload")
_SHOWN_OF_A_KIND = 2


def _some_of_each(ranked: Sequence[Change]) -> list[Change]:
    """Of those that change the same key alone, such as ever smaller micro-batches, the first few."""
    shown: dict[tuple[str, ...], int] = {}
    kept: list[Change] = []
    for change in ranked:
        keys = tuple(text.partition("=")[0] for text in change.overrides)
        shown[keys] = shown.get(keys, 0) + 1
        if shown[keys] <= _SHOWN_OF_A_KIND:
            kept.append(change)
    return kept
