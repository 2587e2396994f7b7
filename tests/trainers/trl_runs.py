"""Each of TRL's trainers on the tiny model: its data, its settings, and a loss that its training must lower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from packaging.version import Version
from support.models import tiny_llama
from support.text import WORDS, sentences, texts, tokenizer, words
from support.trainer_runs import QUIET
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from .helpers import evaluate, outputs

WANTED = WORDS[3:20]

# TRL 1.0 keeps no reference adapter in KTO, and does not cast its deltas to bfloat16.
OLD_KTO = Version(trl.__version__) < Version("1.1")


def counting(start: int, step: int, count: int) -> list[int]:
    return [3 + (start + step * n) % 37 for n in range(count)]


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """Prompts that count, with the better continuation (counting on) and the worse one (counting back)."""
    return [(counting(n, 1, 4), counting(n + 4, 1, 4), counting(n + 2, -1, 4)) for n in range(32)]


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": words(prompt), "chosen": " " + words(good), "rejected": " " + words(bad)}
            for prompt, good, bad in pairs()
        ]
    )


def judged() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": words(prompt), "completion": " " + words(completion), "label": label}
            for prompt, good, bad in pairs()
            for completion, label in ((good, True), (bad, False))
        ]
    )


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": words(prompt)} for prompt, _, _ in pairs()])


def share_of_wanted(completions: list[str], **_: Any) -> list[float]:
    """A reward function: which share of the words is wanted."""
    return [sum(word in WANTED for word in text.split()) / max(1, len(text.split())) for text in completions]


def log_probability(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([prompt + completion])
    scores = model(ids).logits[0].log_softmax(-1)
    return scores[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum()


@torch.no_grad()
def preference_loss(model: nn.Module) -> float:
    """How much likelier the worse continuation is, in nats."""
    model.eval()
    return sum(
        float(log_probability(model, prompt, bad) - log_probability(model, prompt, good))
        for prompt, good, bad in pairs()[:8]
    ) / len(pairs()[:8])


@torch.no_grad()
def unwanted_probability(model: nn.Module) -> float:
    wanted = torch.tensor([WORDS.index(word) for word in WANTED])
    ids = torch.tensor([prompt for prompt, _, _ in pairs()])
    return 1 - float(model.eval()(ids).logits[:, -1].softmax(-1)[:, wanted].sum(-1).mean())


@torch.no_grad()
def scoring_loss(model: nn.Module) -> float:
    model.eval()
    good, bad = (torch.tensor([row[0] + row[n] + [1] for row in pairs()]) for n in (1, 2))
    return -float((model(good).logits - model(bad).logits).sigmoid().log().mean())


@torch.no_grad()
def scores(model: nn.Module) -> Tensor:
    return model.eval()(torch.tensor(sentences(4))).logits


def tiny_scorer(**shape: int) -> nn.Module:
    """The tiny Llama with a head that scores a whole text."""
    torch.manual_seed(0)
    settings = tiny_llama(**shape).config
    settings.num_labels, settings.pad_token_id = 1, 0
    return LlamaForSequenceClassification(settings).eval()


@dataclass(frozen=True)
class Kind:
    """One of TRL's trainers.

    Attributes:
        trainer, config: its classes.
        data: makes its training data.
        loss: what its training lowers.
        settings: arguments that it needs beyond those that all have.
        extra: arguments of the trainer itself.
        base: makes the model to adapt.
        outputs: of a model, to compare two of them.
    """

    trainer: type[Trainer]
    config: type[Any]
    data: Callable[[], Dataset]
    loss: Callable[[nn.Module], float]
    settings: dict[str, Any]
    extra: dict[str, Any]
    base: Callable[..., nn.Module] = tiny_llama
    outputs: Callable[[nn.Module], Tensor] = outputs
    task: str = "CAUSAL_LM"

    def build(self, model: nn.Module, folder: Path, peft_config: Any = None, **settings: Any) -> Any:
        """The trainer, for ten steps unless `settings` say otherwise."""
        defaults: dict[str, Any] = {
            "output_dir": str(folder),
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.02,
            "bf16": False,
            "logging_steps": 5,
            **QUIET,
            **self.settings,
        }
        return self.trainer(
            model=model,
            args=self.config(**{**defaults, **settings}),
            train_dataset=self.data(),
            peft_config=peft_config,
            processing_class=tokenizer(),
            **self.extra,
        )


_ROLLOUTS = {"num_generations": 4, "max_completion_length": 4, "per_device_train_batch_size": 16}
_REWARD = {"reward_funcs": share_of_wanted}

KINDS: dict[str, Kind] = {
    "SFT": Kind(SFTTrainer, SFTConfig, texts, evaluate, {"max_length": 16}, {}),
    "DPO": Kind(DPOTrainer, DPOConfig, preferences, preference_loss, {}, {}),
    "KTO": Kind(KTOTrainer, KTOConfig, judged, preference_loss, {}, {}),
    "GRPO": Kind(GRPOTrainer, GRPOConfig, prompts, unwanted_probability, _ROLLOUTS, _REWARD),
    "RLOO": Kind(RLOOTrainer, RLOOConfig, prompts, unwanted_probability, _ROLLOUTS, _REWARD),
    "Reward": Kind(RewardTrainer, RewardConfig, preferences, scoring_loss, {}, {}, tiny_scorer, scores, task="SEQ_CLS"),
}
