"""A tiny Llama under real trainers: Trainer, TRL's SFTTrainer (also on a 4-bit base), Accelerate, and resuming."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from adapters.helpers import tiny_llama
from cycle.helpers import assert_same_run, assert_sound, deltas_of, indices_of, log_of, moved
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from trainer_helpers import arguments
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from spiel_peft import SpIELCallback, SpIELConfig

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(37))]


def config(**fields: Any) -> SpIELConfig:
    settings: dict[str, Any] = {"r": 2, "regrow_every": 4, "accumulation_steps": 2, "task_type": "CAUSAL_LM"}
    return SpIELConfig(**{**settings, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields})


def sentences(count: int = 32) -> list[list[int]]:
    """Counting in steps of one to three: easy to learn."""
    return [[3 + (start + step * n) % 37 for n in range(8)] for start in range(count // 2) for step in (1, 2)]


def rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": ids} for ids in sentences()]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )


def texts() -> Dataset:
    return Dataset.from_list([{"text": " ".join(WORDS[i] for i in ids)} for ids in sentences()])


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(sentences(4))).logits


def evaluate(model: nn.Module) -> float:
    ids = torch.tensor(sentences())
    with torch.no_grad():
        return model.eval()(ids, labels=ids).loss.item()


class Watch:
    """What has to be true of every training: positions move, k stays, the loss falls, base weights do not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.indices, self.loss = indices_of(model), evaluate(model)
        self.base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}

    def check(self, closes: list[int], total: int) -> None:
        for name, delta in deltas_of(self.model).items():
            assert_sound(delta, self.indices[name].numel())
            assert delta.values.dtype == torch.float32
            assert moved(self.indices[name], delta.indices)
        log = log_of(self.model)
        assert [report.step for report in log] == closes
        assert [r.rate for r in log] == pytest.approx([1.0, *(0.2 * (1 - step / total) for step in closes[1:])])
        assert evaluate(self.model) < self.loss - 0.02
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                assert torch.equal(p, self.base[name]), name


def adapted() -> PeftModel:
    return get_peft_model(tiny_llama(), config())


def trainer(model: nn.Module, folder: Path, callbacks: Any = None, **settings: Any) -> Trainer:
    args = arguments(folder, learning_rate=0.02, **settings)
    return Trainer(model=model, args=args, train_dataset=rows(), callbacks=callbacks)


def sft(model: nn.Module, folder: Path, **fields: Any) -> SFTTrainer:
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        logging_steps=5,
        max_length=16,
        dataloader_pin_memory=False,
    )
    return SFTTrainer(
        model=model, args=args, train_dataset=texts(), peft_config=config(**fields), processing_class=tokenizer()
    )


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_trainer_without_callback(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The length of the run is found out: the rates follow the linear schedule over max_steps."""
    model = adapted()
    watch = Watch(model)
    trainer(model, tmp_path, **settings).train()
    watch.check([2, 6, 10], 12)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(outputs(model), outputs(again))


def test_epochs_tell_the_length_too(tmp_path: Path) -> None:
    model = adapted()
    trainer(model, tmp_path, max_steps=-1, num_train_epochs=3).train()
    assert [report.rate for report in log_of(model)] == pytest.approx([1.0, 0.2 * (1 - 6 / 12), 0.2 * (1 - 10 / 12)])


def test_sft_trainer(tmp_path: Path) -> None:
    """The six-line swap: SpIELConfig where LoraConfig was, no callback."""
    training = sft(tiny_llama(), tmp_path)
    watch = Watch(training.model)
    training.train()
    watch.check([2, 6, 10], 10)
    training.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(outputs(training.model), outputs(again))


def test_sft_trainer_on_a_4_bit_base(tmp_path: Path) -> None:
    """TRL casts what is trainable to bfloat16 on quantized bases; the deltas stay float32."""
    tiny_llama(hidden_size=32, intermediate_size=64).save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantized, device_map={"": "cpu"}, dtype=torch.float32
        )

    training = sft(load(), tmp_path, target_modules="all-linear")
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in training.model.modules()) == 14
    watch = Watch(training.model)
    training.train()
    watch.check([2, 6, 10], 10)
    training.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(outputs(again), outputs(training.model))


def test_accelerate_loop(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(total_steps=12))
    watch = Watch(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
    loader = torch.utils.data.DataLoader(torch.tensor(sentences()), batch_size=4)
    wrapped, stepper, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    wrapped.train()
    for _ in range(3):
        for ids in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(ids, labels=ids).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                stepper.step()
                schedule.step()
                stepper.zero_grad()
    watch.check([2, 6, 10], 12)
    accelerator.unwrap_model(wrapped).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(outputs(model), outputs(again))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, PeftModel]]:
    """A training of 12 steps with a checkpoint after each, and its end."""
    folder = tmp_path_factory.mktemp("run")
    model = adapted()
    trainer(model, folder, save_strategy="steps", save_steps=1).train()
    yield folder, model
    shutil.rmtree(folder)


# Windows: steps 1-2, 5-6, 9-10. Checkpoints in one, at a close and between them.
@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 9])
@pytest.mark.parametrize("with_callback", [False, True])
def test_resumed_equals_uninterrupted(
    checkpoints: tuple[Path, PeftModel], tmp_path: Path, step: int, with_callback: bool
) -> None:
    folder, whole = checkpoints
    model = adapted()
    callbacks = [SpIELCallback()] if with_callback else []
    trainer(model, tmp_path, callbacks).train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same_run(model, whole)
    assert [report.step for report in log_of(model)] == [close for close in (2, 6, 10) if close > step]


def test_resuming_in_the_same_process_with_the_same_model(checkpoints: tuple[Path, PeftModel], tmp_path: Path) -> None:
    """The state that was loaded counts, not what the model did before."""
    folder, whole = checkpoints
    model = adapted()
    trainer(model, tmp_path, max_steps=7, seed=3).train()
    trainer(model, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert_same_run(model, whole)


def test_a_checkpoint_in_a_window_holds_it(checkpoints: tuple[Path, PeftModel]) -> None:
    folder, _ = checkpoints
    for step, steps_in_window in [(1, 1), (2, 0), (3, 0), (5, 1)]:
        loaded = PeftModel.from_pretrained(tiny_llama(), folder / f"checkpoint-{step}", is_trainable=True)
        for delta in deltas_of(loaded).values():
            assert delta.state.step == step
            assert (delta.state.window.steps if delta.state.window else 0) == steps_in_window


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "rmsprop", "lion_8bit", "adamw_bnb_8bit"])
def test_optimizers_of_the_trainer(tmp_path: Path, optim: str) -> None:
    model = adapted()
    before = indices_of(model)
    trainer(model, tmp_path, optim=optim, max_steps=7).train()
    assert [report.step for report in log_of(model)] == [2, 6]
    for name, delta in deltas_of(model).items():
        assert_sound(delta, before[name].numel())
        assert moved(before[name], delta.indices)


def test_a_checkpoint_trained_further_begins_a_new_run(checkpoints: tuple[Path, PeftModel], tmp_path: Path) -> None:
    """Loaded without resuming: steps count from 1, and the deltas are kept but for the schedule's share."""
    for callbacks in ([], [SpIELCallback()]):
        model = PeftModel.from_pretrained(tiny_llama(), checkpoints[0] / "checkpoint-12", is_trainable=True)
        before = indices_of(model)
        trainer(model, tmp_path, callbacks, max_steps=3).train()
        (report,) = log_of(model)
        assert (report.step, report.rate) == (2, pytest.approx(0.2 * (1 - 2 / 3)))
        for name, delta in deltas_of(model).items():
            assert moved(before[name], delta.indices) <= int(report.rate * delta.k)
