"""Claims about banned texts: which token sequences a recipe's texts become, and which texts are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import END
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grpo.errors import ConfigError
from grpo.rollout.banned_texts import banned_sequences


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Like SentencePiece's: puts a space before whatever it is given; a token a character or word, no bytes."""
    vocabulary = {
        token: place for place, token in enumerate(["<unk>", "</s>", "▁", "\n", "c", "a", "t", "cat", "▁cat"])
    }
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat")]
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "ca": 9}, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def test_a_text_is_banned_as_it_stands_and_after_a_space(tokenizer: PreTrainedTokenizerFast) -> None:
    found = banned_sequences(["Who"], tokenizer, end_token_ids=(END,))
    assert [tokenizer.decode(list(sequence)) for sequence in found] == ["Who", " Who"]
    assert found[0] == tuple(tokenizer.encode("Who", add_special_tokens=False))


def test_a_spelling_that_two_texts_share_is_banned_once(tokenizer: PreTrainedTokenizerFast) -> None:
    found = banned_sequences(["Who", " Who"], tokenizer, end_token_ids=(END,))
    assert [tokenizer.decode(list(sequence)) for sequence in found] == ["Who", " Who", "  Who"]
    assert banned_sequences([], tokenizer, end_token_ids=(END,)) == ()


def test_where_the_tokenizer_puts_a_space_before_all_the_text_without_one_is_banned_too() -> None:
    tokenizer = spaced_tokenizer()
    assert tokenizer.encode("cat") == [8]  # with its space: alone it would not be found at the start of a line
    # as it stands and after a space, which is the same here; and at the start of a line
    assert banned_sequences(["cat"], tokenizer, end_token_ids=(1,)) == ((8,), (7,))


def test_special_tokens_are_not_added_to_a_banned_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for sequence in banned_sequences(["Who"], tokenizer, end_token_ids=(END,)):
        assert not set(sequence) & set(tokenizer.all_special_ids)


def test_an_empty_text_is_refused_by_its_place(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.banned\[1\] is an empty text"):
        banned_sequences(["Who", ""], tokenizer, end_token_ids=(END,))


def test_a_text_that_is_an_end_token_alone_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.banned\[0\] '<\|im_end\|>' is the end token {END}"):
        banned_sequences(["<|im_end|>"], tokenizer, end_token_ids=(END,))
    banned_sequences(["Who<|im_end|>"], tokenizer, end_token_ids=(END,))  # no end right after Who: allowed


def test_a_text_that_the_tokenizer_cannot_write_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.banned\[0\] 'dog' cannot be written by this tokenizer"):
        banned_sequences(["dog"], spaced_tokenizer(), end_token_ids=(1,))
