"""FSDP2 with Accelerate and Trainer, which prepare, clip, save and resume."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from peft import PeftModel
from support.adapters import deltas_of, log_of, trainable
from support.ranks import launch, results_of, run_here
from support.runs import adamw, adapt, batch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from distributed.fsdp_on_cpu import allow_fsdp_on_cpu, reset_accelerate
from distributed.runs import FIELDS, assert_equal, assert_lockstep, mean_square, own_batch, snapshot
from spiel_peft import SM3, SpIELCallback

RANKS, STEPS = 2, 11
SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
# Between a proposal and its window, and in a window.
SAVED_AFTER = (4, 5)


class Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Net(nn.Module):
    """Two blocks that an auto wrap policy finds, and a layer outside blocks."""

    _no_split_modules = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(6, 10), Block(10, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.head(self.blocks(x))
        return out if labels is None else {"loss": (out - labels).square().mean(), "logits": out}


def adapted(**fields: Any) -> PeftModel:
    return adapt(Net(), **{**FIELDS, "target_modules": ["linear", "head"], **fields})


def sm3(model: nn.Module) -> torch.optim.Optimizer:
    return SM3(trainable(model), lr=0.01, momentum=0.9)


# A custom loop


def prepared(optimizer: Any = adamw, precision: str = "no", **plugin: Any) -> tuple[Accelerator, nn.Module, Any]:
    """Prepare a model with Accelerate: with FSDP2 if `plugin` is given, otherwise with DDP."""
    reset_accelerate()
    settings = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **plugin}
    fsdp = FullyShardedDataParallelPlugin(**settings) if plugin else None
    accelerator = Accelerator(cpu=True, fsdp_plugin=fsdp, mixed_precision=precision)
    model = adapted()
    return accelerator, *accelerator.prepare(model, optimizer(model))


def loop(
    rank: int, save_to: str | None = None, resume: int | None = None, folder: str = "", **settings: Any
) -> dict[str, Any]:
    """Train; save after some steps, or resume from one of these checkpoints."""
    accelerator, model, optimizer = prepared(**settings)
    place = Path(sys.argv[1]) / folder
    if resume is not None:
        accelerator.load_state(str(place / str(resume)))
    snapshots, norms = [], []
    for number in range((resume or 0) + 1, STEPS + 1):
        accelerator.backward(mean_square(model, own_batch(rank, number)))
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
        snapshots.append(snapshot(model, optimizer.optimizer))
        if folder and resume is None and number in SAVED_AFTER:
            accelerator.save_state(str(place / str(number)))
    if save_to is not None:
        unwrapped, tensors = accelerator.unwrap_model(model), accelerator.get_state_dict(model)
        unwrapped.save_pretrained(
            Path(sys.argv[1]) / save_to, state_dict=tensors, is_main_process=accelerator.is_main_process
        )
    kinds = {type(parameter).__name__ for parameter in model.parameters() if not parameter.requires_grad}
    with torch.no_grad():
        outputs = model.eval()(batch(7)[0])
    return {"snapshots": snapshots, "norms": norms, "outputs": outputs, "kinds": kinds}


# Trainer


def by_trainer(rank: int, folder: str, resume: int | None = None, **fsdp: Any) -> dict[str, Any]:
    """Train with Trainer: with FSDP2 if its settings are given, otherwise with DDP."""
    reset_accelerate()
    place = Path(sys.argv[1]) / folder
    settings: dict[str, Any] = {}
    if fsdp:
        policy = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        settings = {"fsdp": True, "fsdp_config": {**policy, "transformer_layer_cls_to_wrap": ["Block"], **fsdp}}
    arguments = TrainingArguments(
        output_dir=str(place if resume is None else place / "resumed"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        report_to=[],
        use_cpu=True,
        save_strategy="no" if resume is not None or not fsdp else "steps",
        save_steps=5,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    x, y = batch(0, size=64)
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    trainer = Trainer(model=adapted(), args=arguments, train_dataset=rows, callbacks=[SpIELCallback()])
    trainer.train(resume_from_checkpoint=str(place / f"checkpoint-{resume}") if resume is not None else None)
    trainer.save_model(str(place / "final"))
    return {
        "snapshot": snapshot(trainer.model, trainer.optimizer.optimizer),
        "closes": [report.step for report in log_of(trainer.model)],
        "class": type(trainer.model).__name__,
    }


LOOPS: dict[str, dict[str, Any]] = {
    "fsdp2": {"state_dict_type": SHARDED},
    "checkpointed": {"activation_checkpointing": True},
    "kept": {"reshard_after_forward": False},
    "ram-efficient": {"cpu_ram_efficient_loading": True},
}
RESUMED = {
    "sharded files": {"state_dict_type": SHARDED},
    "full files": {"state_dict_type": FULL},
    "sm3": {"state_dict_type": FULL, "optimizer": sm3},
}
SCENARIOS: dict[str, Any] = {
    "ddp": loop,
    **{name: partial(loop, save_to=f"{name} adapter", **plugin) for name, plugin in LOOPS.items()},
    "bfloat16": partial(loop, precision="bf16", state_dict_type=SHARDED),
    **{name: partial(loop, folder=name, **settings) for name, settings in RESUMED.items()},
    **{
        f"{name} from {step}": partial(loop, folder=name, resume=step, **settings)
        for name, settings in RESUMED.items()
        for step in SAVED_AFTER
    },
    "trainer, ddp": partial(by_trainer, folder="trainer, ddp"),
    **{f"trainer, {kind}": partial(by_trainer, folder=kind, state_dict_type=kind) for kind in (SHARDED, FULL)},
    **{
        f"trainer, {kind} from {step}": partial(by_trainer, folder=kind, resume=step, state_dict_type=kind)
        for kind in (SHARDED, FULL)
        for step in (5, 10)
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded trainers")


@pytest.fixture(scope="module")
def launched(folder: Path) -> dict[str, list[Any]]:
    return launch(__file__, folder, RANKS)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_that_of_ddp(launched: dict[str, list[Any]], name: str) -> None:
    expected = results_of(launched, "ddp")[0]
    for result in results_of(launched, name):
        assert result["kinds"] == {"DTensor"}
        assert_lockstep([result["snapshots"], expected["snapshots"]])
        assert result["norms"] == expected["norms"]
        assert torch.equal(result["outputs"], expected["outputs"])


@pytest.mark.parametrize("name", LOOPS)
def test_what_is_saved_is_a_normal_adapter(launched: dict[str, list[Any]], folder: Path, name: str) -> None:
    expected = results_of(launched, name)[0]["outputs"]
    loaded = PeftModel.from_pretrained(Net(), folder / f"{name} adapter", is_trainable=True).eval()
    torch.testing.assert_close(loaded(batch(7)[0]), expected, rtol=0, atol=0)
    # It carries the run, so that one process can go on with it.
    assert {delta.state.step for delta in deltas_of(loaded).values()} == {STEPS}


def test_mixed_precision_keeps_deltas_in_float32(launched: dict[str, list[Any]]) -> None:
    by_rank = results_of(launched, "bfloat16")
    assert_lockstep([result["snapshots"] for result in by_rank])
    end = by_rank[0]["snapshots"][-1]
    assert (end["replaced"] > 0).all()
    assert {tensor.dtype for name, tensor in end.items() if name.endswith(".values")} == {torch.float32}
    exact = results_of(launched, "ddp")[0]
    torch.testing.assert_close(by_rank[0]["norms"][:2], exact["norms"][:2], rtol=0.02, atol=0.0)
    assert by_rank[0]["norms"] != exact["norms"]


@pytest.mark.parametrize("step", SAVED_AFTER)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_loop_ends_the_same(launched: dict[str, list[Any]], name: str, step: int) -> None:
    whole = results_of(launched, name)[0]["snapshots"][step:]
    for result in results_of(launched, f"{name} from {step}"):
        for ours, theirs in zip(result["snapshots"], whole, strict=True):
            # The log begins anew.
            assert_equal([{**ours, "replaced": theirs["replaced"]}, theirs])


@pytest.mark.parametrize("kind", [SHARDED, FULL])
def test_trainer(launched: dict[str, list[Any]], kind: str) -> None:
    by_rank = results_of(launched, f"trainer, {kind}")
    assert {result["class"] for result in by_rank} == {"FSDPPeftModel"}
    assert_equal([*(result["snapshot"] for result in by_rank), results_of(launched, "trainer, ddp")[0]["snapshot"]])
    assert by_rank[0]["closes"] == [2, 6, 10]


@pytest.mark.parametrize("step", [5, 10])
@pytest.mark.parametrize("kind", [SHARDED, FULL])
def test_trainer_resumes(launched: dict[str, list[Any]], kind: str, step: int) -> None:
    whole = results_of(launched, f"trainer, {kind}")[0]["snapshot"]
    for result in results_of(launched, f"trainer, {kind} from {step}"):
        assert result["closes"] == [close for close in (2, 6, 10) if close > step]
        assert_equal([{**result["snapshot"], "replaced": whole["replaced"]}, whole])


def test_trainer_saves_a_normal_adapter(launched: dict[str, list[Any]], folder: Path) -> None:
    results = results_of(launched, f"trainer, {FULL}")
    loaded = PeftModel.from_pretrained(Net(), folder / FULL / "final")
    for name, delta in deltas_of(loaded).items():
        assert torch.equal(delta.indices, results[0]["snapshot"][f"{name}.indices"])
        assert torch.equal(delta.values, results[0]["snapshot"][f"{name}.values"])


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    run_here(SCENARIOS, RANKS)
