"""A tiny language model, its tokenizer and data, and what has to be true of every training of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.helpers import tiny_llama
from cycle.helpers import assert_sound, deltas_of, indices_of, log_of, moved, trainable
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, TrainingArguments

from spiel_peft import SpIELConfig

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(37))]
TARGETS = ["q_proj", "v_proj", "down_proj"]
# What a run under a trainer has in common here; closes at 2, 6, 10, ...
CYCLE: dict[str, Any] = {"regrow_every": 4, "accumulation_steps": 2}
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


def config(**fields: Any) -> SpIELConfig:
    settings: dict[str, Any] = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": TARGETS, **CYCLE}
    return SpIELConfig(**{**settings, **fields})


def adapted(base: nn.Module | None = None, **fields: Any) -> PeftModel:
    return get_peft_model(tiny_llama() if base is None else base, config(**fields))


def save_llama(folder: Path) -> None:
    """A base of sizes that can be quantized."""
    tiny_llama(hidden_size=32, intermediate_size=64).save_pretrained(folder)


def quantized_llama(folder: Path, bits: int = 4) -> nn.Module:
    """A 4-bit or 8-bit base, saved to `folder` and loaded as a user would."""
    save_llama(folder / "base")
    return load_quantized(folder / "base", bits)


def load_quantized(folder: Path, bits: int = 4) -> nn.Module:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    settings = BitsAndBytesConfig(**(nf4 if bits == 4 else {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Twelve steps on the CPU, saving nothing."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.02,
        "logging_steps": 5,
        **QUIET,
    }
    return TrainingArguments(**{**defaults, **settings})


def sentences(count: int = 32) -> list[list[int]]:
    """Counting in steps of one and two: easy to learn."""
    return [[3 + (start + step * n) % 37 for n in range(8)] for start in range(count // 2) for step in (1, 2)]


def rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": ids} for ids in sentences()]


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, from nothing but code."""
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def texts() -> Dataset:
    return Dataset.from_list([{"text": words(ids)} for ids in sentences()])


def preferences(count: int = 32) -> Dataset:
    """Counting on is better than counting back."""
    rows = []
    for start in range(count):
        ids = [3 + (start + n) % 37 for n in range(8)]
        back = [3 + (start + 3 - n) % 37 for n in range(1, 5)]
        rows.append({"prompt": words(ids[:4]), "chosen": " " + words(ids[4:]), "rejected": " " + words(back)})
    return Dataset.from_list(rows)


def prompts(count: int = 16) -> Dataset:
    return Dataset.from_list([{"prompt": words(ids[:4])} for ids in sentences(count)])


def batches(epochs: int = 3, size: int = 8) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.tensor(sentences()).split(size)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=0.02)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(sentences(4))).logits


def evaluate(model: nn.Module) -> float:
    ids = torch.tensor(sentences())
    with torch.no_grad():
        return model.eval()(ids, labels=ids).loss.item()


class Watch:
    """What has to be true of every training: positions move, k stays, the loss falls, base weights do not change."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], float] = evaluate) -> None:
        self.model, self.loss = model, loss
        self.indices, self.before = indices_of(model), loss(model)
        self.base = {name: p.detach().clone() for name, p in self._frozen()}

    def _frozen(self) -> list[tuple[str, Tensor]]:
        # Reference adapters are frozen too, and may be added later.
        return [(n, p) for n, p in self.model.named_parameters() if not p.requires_grad and ".spiel_delta." not in n]

    def check(self, closes: list[int], total: int | None, margin: float = 0.02, fresh: bool = True) -> None:
        """Compare with the state before the run.

        Args:
            closes: steps after which cycles have closed.
            total: optimizer steps that the linear schedule went by; None if the learning rate's course decided.
            margin: by how much the loss must have fallen.
            fresh: whether the deltas were new, so that the first close replaced their random positions.
        """
        for name, delta in deltas_of(self.model).items():
            assert_sound(delta, self.indices[name].numel())
            assert delta.values.dtype == torch.float32
            assert moved(self.indices[name], delta.indices)
        log = log_of(self.model)
        assert [report.step for report in log] == closes
        assert sum(report.replaced for report in log[fresh:]) > 0
        if total is not None:
            rates = [0.2 * (1 - step / total) for step in closes]
            assert [r.rate for r in log] == pytest.approx([1.0, *rates[1:]] if fresh else rates)
        assert self.loss(self.model) < self.before - margin
        frozen = dict(self._frozen())
        assert frozen.keys() == self.base.keys()
        for name, tensor in frozen.items():
            assert torch.equal(tensor, self.base[name]), name


def assert_reloads(
    model: nn.Module,
    folder: Path,
    base: Callable[[], nn.Module] = tiny_llama,
    outputs: Callable[[nn.Module], Tensor] = outputs,
) -> None:
    """The adapter saved in `folder` gives a new base model the outputs of the trained model."""
    again = PeftModel.from_pretrained(base(), folder)
    assert torch.equal(outputs(model), outputs(again))
    with again.disable_adapter():
        assert not torch.equal(outputs(model), outputs(again))
