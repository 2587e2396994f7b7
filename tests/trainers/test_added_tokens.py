"""SFT with a chat template that adds tokens: TRL asks the config to train their embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support.models import tiny_llama
from support.text import sentences, tokenizer, words
from support.trainer_runs import QUIET
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from .helpers import TARGETS, Watch, assert_reloads, config

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|> ' }}{% endfor %}"
)
ADDED = ["<|user|>", "<|assistant|>", "<|end|>"]
# TRL fills the vocabulary up to a multiple of 64 with tokens of its own.
FIRST_ADDED, ROWS = 40, 64
NEW_ROWS = list(range(FIRST_ADDED, ROWS))


def chats() -> Dataset:
    turns = [(words(ids[:4]), words(ids[4:])) for ids in sentences()]
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
            for asked, answer in turns
        ]
    )


def chat_tokenizer(folder: Path) -> str:
    source = tokenizer()
    source.add_tokens(ADDED, special_tokens=True)
    source.chat_template = TEMPLATE
    source.save_pretrained(folder / "chat")
    return str(folder / "chat")


def trainer(folder: Path, **fields: Any) -> SFTTrainer:
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        bf16=False,
        chat_template_path=chat_tokenizer(folder),
        **QUIET,
    )
    return SFTTrainer(
        model=tiny_llama(), args=args, train_dataset=chats(), processing_class=tokenizer(), peft_config=config(**fields)
    )


def chat_ids() -> Tensor:
    rows = [[FIRST_ADDED, *ids[:4], FIRST_ADDED + 2, FIRST_ADDED + 1, *ids[4:], FIRST_ADDED + 2] for ids in sentences()]
    return torch.tensor(rows)


@torch.no_grad()
def chat_loss(model: nn.Module) -> float:
    return model.eval()(chat_ids(), labels=chat_ids()).loss.item()


@torch.no_grad()
def chat_logits(model: nn.Module) -> Tensor:
    return model.eval()(chat_ids()).logits


@pytest.mark.parametrize("own", [None, {"embed_tokens": [3]}], ids=str)
def test_the_config_takes_what_trl_adds_to_it(own: dict[str, list[int]] | None, tmp_path: Path) -> None:
    used = trainer(tmp_path, trainable_token_indices=own).model.peft_config["default"]
    assert used.trainable_token_indices == {"embed_tokens": ([3] if own else []) + NEW_ROWS}
    assert used.modules_to_save == ["lm_head"]


def test_added_tokens_are_trained_beside_the_deltas(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    # Rows for added tokens are drawn at random.
    embedding = training.model.get_submodule("base_model.model.model.embed_tokens.token_adapter.base_layer").weight

    def base() -> nn.Module:
        model = tiny_llama()
        model.resize_token_embeddings(ROWS)
        model.model.embed_tokens.weight.data.copy_(embedding)
        return model

    watch = Watch(training.model, chat_loss)
    training.train()
    watch.check([2, 6, 10], 10)
    (tokens,) = (p for name, p in training.model.named_parameters() if "trainable_tokens_delta" in name)
    assert embedding.shape[0] == ROWS
    changed = (tokens != embedding[NEW_ROWS]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == list(range(len(ADDED)))
    training.save_model(str(tmp_path / "adapter"))
    assert_reloads(training.model, tmp_path / "adapter", base, chat_logits)
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").peft_config["default"]
    assert again.trainable_token_indices == {"embed_tokens": NEW_ROWS}
    assert again.target_modules == set(TARGETS)
