"""A language whose words are counted in order, word-level tokenizers, and training data."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# As many tokens as the tiny models have.
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(37))]


def tokenizer(
    words: Sequence[str] = WORDS, eos: str = "<eos>", split_punctuation: bool = False, max_length: int | None = 32
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, made without any file.

    Args:
        words: the vocabulary, with "<pad>", "<unk>" and `eos`.
        eos: the token that ends a text.
        split_punctuation: whether punctuation marks are words of their own.
        max_length: longest text of the model, in tokens.
    """
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    splitter = pre_tokenizers.Whitespace if split_punctuation else pre_tokenizers.WhitespaceSplit
    vocabulary.pre_tokenizer = splitter()
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        pad_token="<pad>",
        eos_token=eos,
        unk_token="<unk>",
        **({} if max_length is None else {"model_max_length": max_length}),
    )


def sentences(count: int = 32) -> list[list[int]]:
    """Token ids that count in steps of one and two, which is easy to learn."""
    return [[3 + (start + step * n) % 37 for n in range(8)] for start in range(count // 2) for step in (1, 2)]


def rows(count: int = 32) -> list[dict[str, list[int]]]:
    """Training data for Trainer: `sentences` with labels."""
    return [{"input_ids": ids, "labels": ids} for ids in sentences(count)]


def words(ids: list[int]) -> str:
    """The text of token ids."""
    return " ".join(WORDS[i] for i in ids)


def texts(count: int = 32) -> Dataset:
    """Training data for SFTTrainer: the texts of `sentences`."""
    return Dataset.from_list([{"text": words(ids)} for ids in sentences(count)])
