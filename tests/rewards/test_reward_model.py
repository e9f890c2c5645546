"""A local classifier's score is the one of each row alone; NaN, too long and out of memory are missing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rewards import RewardConfigError, RewardContext, RewardInput, RewardSpec, RewardUnavailable, Score, build_reward
from rewards.reward_model import RewardModel, RewardModelConfig, Row
from rewards.testing import check_reward

COMPLETIONS = ["Paris.", "The capital of France is Paris, the quick brown fox.", "6", "It is the lazy dog.", ""]


def save_classifier(
    folder: Path, base: Path, *, num_labels: int = 1, pad: bool = True, template: bool = True, **config
) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(base)
    if not pad:
        tokenizer.pad_token = tokenizer.eos_token
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=96,
                num_labels=num_labels,
                pad_token_id=tokenizer.pad_token_id if pad else None,
                **shape,
                **config,
            )
        )
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    return folder


def rows(completions: Sequence[str]) -> list[RewardInput]:
    return [RewardInput(prompt_id="p", prompt="What is it?", completion=text) for text in completions]


def scores(reward: RewardModel, completions: Sequence[str] = COMPLETIONS) -> list[Score]:
    return asyncio.run(reward.score(rows(completions)))


def logits_one_by_one(folder: Path, completions: Sequence[str]) -> torch.Tensor:
    """[rows, labels], by the decoder's last hidden state and the head: no batches, no padding, no pooling."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    answers = []
    for text in completions:
        chat = f"<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
        ids = torch.tensor([tokenizer(chat, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
            answers.append(model.score.weight @ hidden)
    return torch.stack(answers)


@pytest.mark.parametrize("pad", [True, False], ids=["own padding token", "end token as padding"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_batch_scores_as_each_row_alone(tmp_path, tiny_model_dir, pad, batch_size):
    folder = save_classifier(tmp_path / "model", tiny_model_dir, pad=pad)
    values = [one.value for one in scores(RewardModel(RewardModelConfig(model=str(folder), batch_size=batch_size)))]
    assert values == pytest.approx(logits_one_by_one(folder, COMPLETIONS)[:, 0].tolist(), abs=1e-5)
    assert len(set(values)) == len(values)


def test_the_order_of_the_rows_does_not_matter(tmp_path, tiny_model_dir):
    reward = RewardModel(RewardModelConfig(model=str(save_classifier(tmp_path / "m", tiny_model_dir)), batch_size=2))
    forwards, backwards = scores(reward), scores(reward, COMPLETIONS[::-1])
    assert [one.value for one in forwards] == pytest.approx([one.value for one in backwards[::-1]], abs=1e-5)


def test_of_several_labels_the_chosen_ones_log_odds_count(tmp_path, tiny_model_dir):
    names = {0: "bad", 1: "fair", 2: "good"}
    folder = save_classifier(tmp_path / "model", tiny_model_dir, num_labels=3, id2label=names)
    logits = logits_one_by_one(folder, COMPLETIONS)
    probabilities = logits.softmax(dim=1)[:, 2]
    expected = (probabilities / (1 - probabilities)).log().tolist()
    for label in ("good", 2):
        values = [one.value for one in scores(RewardModel(RewardModelConfig(model=str(folder), label=label)))]
        assert values == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("num_labels", "label", "message"),
    [
        (3, None, "`label` is not set; it has: 0"),
        (3, "best", "`label` is 'best'"),
        (3, 3, "`label` is 3"),
        (1, 0, "one label"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_the_run(tmp_path, tiny_model_dir, num_labels, label, message):
    folder = save_classifier(tmp_path / "model", tiny_model_dir, num_labels=num_labels)
    with pytest.raises(RewardConfigError, match=message):
        asyncio.run(RewardModel(RewardModelConfig(model=str(folder), label=label)).check())


def test_a_model_without_a_trained_head_is_refused(tiny_model_dir):
    with pytest.raises(RewardConfigError, match=r"no weights for score\.weight"):
        asyncio.run(RewardModel(RewardModelConfig(model=str(tiny_model_dir), label=0)).check())


def test_a_model_that_is_not_there_is_unavailable(tmp_path):
    with pytest.raises(RewardUnavailable, match="cannot be loaded"):
        asyncio.run(RewardModel(RewardModelConfig(model=str(tmp_path / "nothing"))).check())


def test_a_text_too_long_is_missing_not_cut(tmp_path, tiny_model_dir):
    folder = save_classifier(tmp_path / "model", tiny_model_dir)
    short, long = scores(RewardModel(RewardModelConfig(model=str(folder))), ["Paris.", "Paris. " * 60])
    assert short.value is not None
    assert long.value is None
    assert "at most 96" in long.reason
    assert (
        "at most 20" in scores(RewardModel(RewardModelConfig(model=str(folder), max_tokens=20)), COMPLETIONS)[1].reason
    )


def test_without_a_chat_template_the_two_texts_are_a_pair(tmp_path, tiny_model_dir):
    folder = save_classifier(tmp_path / "model", tiny_model_dir, template=False)
    assert all(one.value is not None for one in scores(RewardModel(RewardModelConfig(model=str(folder)))))


def test_a_pair_encoder_sees_which_text_is_which(tmp_path):
    vocabulary = {
        word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "it", "?"])
    }
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertForSequenceClassification(BertConfig(vocab_size=8, num_labels=1, initializer_range=1.0, **shape))
    model.eval().save_pretrained(tmp_path)
    ids = torch.tensor([[2, 4, 5, 6, 7, 3, 6, 5, 3]])  # [CLS] what is it ? [SEP] it is [SEP]
    types = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1]])
    expected = model(input_ids=ids, token_type_ids=types).logits.item()
    values = [one.value for one in scores(RewardModel(RewardModelConfig(model=str(tmp_path))), ["it is", "it is it ?"])]
    assert values[0] == pytest.approx(expected, abs=1e-5)


class SmallMemory:
    """Scores a row by its length; takes no more than two rows, and none of over 50 tokens, at a time."""

    max_tokens = None

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode(self, prompt: str, completion: str) -> Row:
        return {"input_ids": list(range(len(completion)))}

    def scores(self, rows: Sequence[Row]) -> list[float]:
        self.sizes.append(len(rows))
        lengths = [len(row["input_ids"]) for row in rows]
        if len(rows) > 2 or max(lengths) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [{3: math.nan, 4: math.inf}.get(length, float(length)) for length in lengths]


def test_out_of_memory_halves_the_batch_and_misses_only_what_fits_nowhere():
    classifier = SmallMemory()
    reward = RewardModel(RewardModelConfig(model="none"), load=lambda config: classifier)
    answers = scores(reward, ["a" * length for length in (60, 1, 2, 5, 6)])
    assert [one.value for one in answers] == [None, 1.0, 2.0, 5.0, 6.0]
    assert "out of GPU memory on 60 tokens" in answers[0].reason
    assert classifier.sizes == [5, 2, 2, 1]


def test_nan_and_infinity_are_missing():
    answers = scores(
        RewardModel(RewardModelConfig(model="none"), load=lambda config: SmallMemory()), ["aaa", "aaaa", "a"]
    )
    assert [one.value for one in answers] == [None, None, 1.0]
    assert "nan" in answers[0].reason


def test_it_is_found_by_name_and_beside_the_recipe(tmp_path, tiny_model_dir):
    save_classifier(tmp_path / "judge_model", tiny_model_dir)
    spec = RewardSpec(name="reward_model", params={"model": "judge_model", "dtype": "float32", "device": "cpu"})
    reward = build_reward(spec, RewardContext(base_dir=tmp_path))
    assert isinstance(reward, RewardModel)
    assert scores(reward)[0].value is not None
    with pytest.raises(RewardConfigError, match="did you mean 'dtype'"):
        build_reward(
            RewardSpec(name="reward_model", params={"model": "m", "dtpye": "auto"}), RewardContext(base_dir=tmp_path)
        )


def test_it_keeps_the_contract_of_a_reward(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = save_classifier(tmp_path, tiny_model_dir)
    check_reward(RewardSpec(name="reward_model", params={"model": str(folder), "max_tokens": 90}))


def test_half_a_surrogate_pair_costs_its_own_score_only(tmp_path: Path, tiny_model_dir: Path) -> None:
    reward = RewardModel(RewardModelConfig(model=str(save_classifier(tmp_path, tiny_model_dir))))
    good, broken = scores(reward, ["Paris.", "half of a pair: \ud800"])
    assert good.value is not None
    assert (broken.value, broken.reason) == (None, "the text is no valid Unicode (a surrogate without its pair)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
@pytest.mark.parametrize("device", ["cuda:1", "no_such_device"])
def test_a_device_that_is_not_there_is_named_before_the_run(tmp_path: Path, tiny_model_dir: Path, device: str) -> None:
    folder = save_classifier(tmp_path, tiny_model_dir)
    reward = RewardModel(RewardModelConfig(model=str(folder), device=device))
    with pytest.raises(RewardUnavailable, match=f"cannot be loaded as a sequence classifier on {device}"):
        asyncio.run(reward.check())


def test_it_has_a_number_format_of_its_own(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = save_classifier(tmp_path, tiny_model_dir)
    whole, half = (
        [score.value for score in scores(RewardModel(RewardModelConfig(model=str(folder), device="cpu", dtype=dtype)))]
        for dtype in ("float32", "bfloat16")
    )
    assert whole != half
    assert half == pytest.approx(whole, abs=0.1)  # eight bits of mantissa
