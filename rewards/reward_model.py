"""A local sequence classifier as a reward: its score of the prompt with the completion. Imports torch late.

The model has a device and a number format of its own, is loaded by `check()` or by the first use, and is run by one
thread at a time.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from pydantic import Field

from rewards.base import RewardContext, describe_exception
from rewards.config import StrictModel
from rewards.errors import RewardConfigError, RewardUnavailable
from rewards.types import RewardInput, Score

if TYPE_CHECKING:
    import torch


class RewardModelConfig(StrictModel):
    """Parameters of the reward `reward_model`."""

    model: str = Field(min_length=1)
    """A folder (relative to the recipe's, or to where the run is started) or a name on the hub."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    label: int | str | None = None
    """For a model with several labels: the log-odds of this one, by number or name, are the score. A model with one
    label gives its logit, and needs none."""
    device: str = "auto"
    """"auto": the GPU if there is one; or "cpu", "cuda:1", ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto": bfloat16 on a GPU, float32 on a CPU."""
    batch_size: int = Field(8, gt=0)
    """Most completions in one pass; halved where the GPU's memory does not suffice."""
    max_tokens: int | None = Field(None, gt=0)
    """Longest prompt with completion; None: what the model allows. A longer one has no score: cut short, the model
    would judge another text."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run here."""


Row: TypeAlias = dict[str, list[int]]
"""A tokenizer's output for one text: "input_ids", "attention_mask", for some models "token_type_ids"; equally long."""


class Classifier(Protocol):
    """What scores texts; the seam for a double."""

    def encode(self, prompt: str, completion: str) -> Row:
        """The two as the model was trained to see them."""
        ...

    def scores(self, rows: Sequence[Row]) -> list[float]:
        """One number a row; may not be finite. Raises torch's OutOfMemoryError where the batch is too large."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Longest row; None where the model sets no limit."""
        ...


class RewardModel:
    """Scores completions with a classifier; missing where it gives no finite number."""

    def __init__(
        self, config: RewardModelConfig, *, load: Callable[[RewardModelConfig], Classifier] | None = None
    ) -> None:
        self._config = config
        self._load = load or load_classifier
        self._classifier: Classifier | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_params(cls, params: Mapping[str, Any], context: RewardContext) -> RewardModel:
        """Build from a recipe; loads nothing.

        Raises:
            RewardConfigError: one line per problem.
        """
        from rewards.registry import parse_params

        config = parse_params(RewardModelConfig, params, reward_name="reward_model")
        beside_recipe = Path(context.base_dir) / config.model
        return cls(config.model_copy(update={"model": str(beside_recipe)}) if beside_recipe.is_dir() else config)

    async def check(self) -> None:
        """Load the model.

        Raises:
            RewardConfigError: its labels do not fit `label`.
            RewardUnavailable: it cannot be loaded.
        """
        await asyncio.to_thread(self._loaded)

    async def score(self, inputs: list[RewardInput]) -> list[Score]:
        """One Score per completion; the model runs in a thread."""
        return await asyncio.to_thread(self._score, inputs)

    async def aclose(self) -> None:
        """Let go of the model."""
        self._classifier = None

    def _loaded(self) -> Classifier:
        with self._lock:
            if self._classifier is None:
                self._classifier = self._load(self._config)
            return self._classifier

    def _score(self, inputs: Sequence[RewardInput]) -> list[Score]:
        classifier = self._loaded()
        limits = [limit for limit in (self._config.max_tokens, classifier.max_tokens) if limit is not None]
        longest = min(limits, default=None)
        answers: list[Score | None] = [_unicode_problem(one) for one in inputs]
        rows = {
            index: classifier.encode(one.prompt, one.completion)
            for index, one in enumerate(inputs)
            if answers[index] is None
        }
        for index, row in rows.items():
            answers[index] = _length_problem(row, longest)
        fitting = [index for index in rows if answers[index] is None]
        fitting.sort(key=lambda index: _length(rows[index]))  # rows of like length together: less padding
        with self._lock:
            values = scores_in_batches([rows[index] for index in fitting], classifier.scores, self._config.batch_size)
        for index, value in zip(fitting, values, strict=True):
            answers[index] = value
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]


def _unicode_problem(one: RewardInput) -> Score | None:
    if any("\ud800" <= character <= "\udfff" for character in one.prompt + one.completion):
        return Score(value=None, reason="the text is no valid Unicode (a surrogate without its pair)")
    return None


def scores_in_batches(
    rows: Sequence[Row], forward: Callable[[Sequence[Row]], list[float]], batch_size: int
) -> list[Score]:
    """Score rows batch by batch; a batch that does not fit into memory is halved, down to one row, which is missing."""
    import torch

    answers: list[Score] = []
    while len(answers) < len(rows):
        batch = rows[len(answers) : len(answers) + batch_size]
        try:
            answers += [_score_of(value) for value in forward(batch)]
        except torch.OutOfMemoryError:
            # outside of this block the failed pass's tensors are gone
            if len(batch) == 1:
                answers.append(Score(value=None, reason=f"out of GPU memory on {_length(batch[0])} tokens alone"))
            batch_size = max(1, len(batch) // 2)
    return answers


def load_classifier(config: RewardModelConfig) -> Classifier:
    """Load the model and its tokenizer.

    Raises:
        RewardConfigError: its labels do not fit `config.label`.
        RewardUnavailable: it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device, dtype = _placed(config)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, **options)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            config.model, dtype=dtype, output_loading_info=True, **options
        )
        model = model.to(device).eval().requires_grad_(False)
    except Exception as exc:
        raise RewardUnavailable(
            f"reward 'reward_model': {config.model!r} cannot be loaded as a sequence classifier on {device} "
            f"({describe_exception(exc)})"
        ) from exc
    missing = sorted(report["missing_keys"])
    if missing:
        raise RewardConfigError(
            f"reward 'reward_model': {config.model!r} has no weights for {', '.join(missing[:3])}; it is not a trained "
            "reward model, and its scores would be random."
        )
    return _TransformersClassifier(model, tokenizer, _label_number(model.config, config))


class _TransformersClassifier:
    """A transformers classifier with its tokenizer, on its device."""

    def __init__(self, model: Any, tokenizer: Any, label: int | None) -> None:
        self._model, self._tokenizer, self._label = model, tokenizer, label
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        if model.config.pad_token_id is None and pad is not None and pad != eos:
            model.config.pad_token_id = pad
        # A decoder is read at its last token that is no padding. Padded with the end token, a row that ends in one
        # would be read too early; so where there is no padding token of its own, rows are not padded at all.
        self._can_pad = pad is not None and pad == model.config.pad_token_id

    @property
    def max_tokens(self) -> int | None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        by_tokenizer = self._tokenizer.model_max_length
        return min(limit or by_tokenizer, by_tokenizer)  # a tokenizer without a limit says 10^30

    def encode(self, prompt: str, completion: str) -> Row:
        if self._tokenizer.chat_template is None:
            return dict(self._tokenizer(prompt, completion))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return dict(self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True))

    def scores(self, rows: Sequence[Row]) -> list[float]:
        if self._can_pad or len(set(map(_length, rows))) == 1:
            return self._forward(rows)
        return [self._forward([row])[0] for row in rows]

    def _forward(self, rows: Sequence[Row]) -> list[float]:
        import torch

        longest = max(map(_length, rows))
        padding = {"input_ids": self._tokenizer.pad_token_id or 0}  # and 0 in the mask and the types
        batch = {
            name: torch.tensor([row[name] + [padding.get(name, 0)] * (longest - _length(row)) for row in rows])
            for name in rows[0]
        }  # [rows, longest] each
        with torch.inference_mode():
            logits = self._model(**{name: part.to(self._model.device) for name, part in batch.items()}).logits
        return _values(logits.float(), self._label).tolist()  # logits: [rows, labels]


def _values(logits: torch.Tensor, label: int | None) -> torch.Tensor:
    """[rows, labels] -> [rows]: the only logit, or the label's log-odds, log p - log(1 - p)."""
    if label is None:
        return logits[:, 0]
    others = [number for number in range(logits.shape[1]) if number != label]
    return logits[:, label] - logits[:, others].logsumexp(dim=1)


def _label_number(model_config: Any, config: RewardModelConfig) -> int | None:
    num_labels, names = model_config.num_labels, dict(model_config.id2label or {})
    if num_labels == 1:
        if config.label is not None:
            raise RewardConfigError(f"reward 'reward_model': {config.model!r} has one label; leave `label` out.")
        return None
    known = ", ".join(f"{number} ({name})" for number, name in sorted(names.items()))
    numbers = [number for number, name in names.items() if config.label in (number, name)]
    if len(numbers) != 1:
        found = "is not set" if config.label is None else f"is {config.label!r}"
        raise RewardConfigError(
            f"reward 'reward_model': {config.model!r} has {num_labels} labels and `label` {found}; it has: {known}."
        )
    return numbers[0]


def _placed(config: RewardModelConfig) -> tuple[str, torch.dtype]:
    import torch

    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    automatic = "float32" if device == "cpu" else "bfloat16"
    return device, getattr(torch, automatic if config.dtype == "auto" else config.dtype)


def _length(row: Row) -> int:
    return len(row["input_ids"])


def _length_problem(row: Row, longest: int | None) -> Score | None:
    if longest is None or _length(row) <= longest:
        return None
    return Score(value=None, reason=f"{_length(row)} tokens, the reward model takes at most {longest}")


def _score_of(value: float) -> Score:
    if not math.isfinite(value):
        return Score(value=None, reason=f"the reward model answered {value}")
    return Score(value=value, reason="reward model")
