"""Models, batches and training runs that the recorder and the tests share.

Weights and batches are computed, not drawn: PyTorch's random normal numbers differ between CPUs.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model
from support.adapters import layers_of, trainable
from support.layers import Single
from support.runs import everything
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spiel_peft import SM3, SpIELConfig

DATA = Path(__file__).parent / "data"


def filled(shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 numbers of `shape` between -1 and 1: multiples of 1/1024 in a scrambled order."""
    number = torch.arange(math.prod(shape), dtype=torch.int64) + 100_003 * seed
    for factor in (0x45D9F3B, 0x119DE1F3):
        number = ((number ^ (number >> 16)) * factor) % 2**32
    return (((number ^ (number >> 16)) % 2047 - 1023).float() / 1024).view(shape)


def fill(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to computed values."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(filled(tuple(parameter.shape), seed) / 2)
    return module


class Experts(nn.Module):
    """A module that multiplies with a parameter of its own, as mixtures of experts do."""

    def __init__(self, experts: int, rows: int, cols: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(experts, rows, cols))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eij->...j", x, self.matrix)


class Mixed(nn.Module):
    """A small network with a layer of every kind that is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.linear = nn.Linear(12, 16)
        self.turned = Conv1D(12, 16)
        self.experts = Experts(2, 12, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2).tanh()
        x = nn.functional.gelu(self.linear(x))
        return self.head(self.experts(self.turned(x).tanh()))


def batch_of_mixed(number: int) -> tuple[Tensor, Tensor]:
    """ids ``[4, 7]`` and targets ``[4, 7, 5]`` of a micro-batch."""
    ids = ((filled((4, 7), 1000 + number) + 1) * 512).long() % 24
    return ids, filled((4, 7, 5), 2000 + number)


def mean_square(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return (model(x).float() - y).square().mean()


# One layer of each kind, with an input for it.


def quantized(layer: nn.Module) -> nn.Module:
    return fill(layer).to("cpu")


LINEAR_INPUT = filled((5, 12), 50)
QUANTIZED_INPUT = filled((5, 64), 51)
KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: fill(nn.Linear(12, 10)), LINEAR_INPUT),
    "linear-bf16": (lambda: fill(nn.Linear(12, 10)).bfloat16(), LINEAR_INPUT.bfloat16()),
    "transposed": (lambda: fill(Conv1D(10, 12)), LINEAR_INPUT),
    "embedding": (lambda: fill(nn.Embedding(11, 6)), torch.arange(12).view(3, 4) * 5 % 11),
    "conv1d": (lambda: fill(nn.Conv1d(4, 6, 3, padding=1)), filled((2, 4, 7), 52)),
    "conv2d": (lambda: fill(nn.Conv2d(4, 6, 3, groups=2, stride=2)), filled((2, 4, 7, 6), 53)),
    "conv3d": (lambda: fill(nn.Conv3d(2, 4, (3, 2, 1))), filled((2, 2, 5, 4, 3), 54)),
    "parameter": (lambda: fill(Experts(2, 12, 6)), LINEAR_INPUT),
    "4bit": (
        lambda: quantized(bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")),
        QUANTIZED_INPUT,
    ),
    "8bit": (lambda: quantized(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)), QUANTIZED_INPUT),
}
CYCLE: dict[str, Any] = {"regrow_every": 10, "accumulation_steps": 3, "total_steps": 60}
MID_WINDOW = 12  # steps 11 to 13 are a window


def train_kind(kind: str) -> PeftModel:
    """A model of one layer whose adapter is in the middle of a window."""
    make, x = KINDS[kind]
    target = {"target_parameters": ["layer.matrix"]} if kind == "parameter" else {"target_modules": ["layer"]}
    model = get_peft_model(Single(make()), SpIELConfig(num_deltas=12, **target, **CYCLE)).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    for step in range(MID_WINDOW):
        out = model(x).float()
        (out - filled(tuple(out.shape), 3000 + step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def results_of_kind(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output of an adapted layer, and gradients of its deltas and its input."""
    x = x.clone().requires_grad_(x.is_floating_point())
    delta = layers_of(model)[0].spiel_delta["default"]
    out = model(x)
    (out * filled(tuple(out.shape), 60).to(out.dtype)).sum().backward()
    results = {"output": out.detach(), "grad_values": delta.values.grad}
    return {**results, "grad_input": x.grad} if x.grad is not None else results


# Runs

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    # Matrices of 8 values and more have 8-bit state; all are small here.
    "adamw_8bit": lambda parameters: bnb.optim.AdamW8bit(parameters, lr=0.02, min_8bit_size=8),
    "sm3": lambda parameters: SM3(parameters, lr=0.05, momentum=0.9),
}
RUNS = {
    f"{growth}-{str(dtype).removeprefix('torch.')}": (optimizer, growth, dtype)
    for growth, optimizer in (("accumulated_gradient", "adamw"), ("momentum", "sm3"))
    for dtype in (torch.float32, torch.bfloat16)
}
RUN_STEPS = 45
MICRO_BATCHES = 2


def mixed(dtype: torch.dtype = torch.float32) -> nn.Module:
    return fill(Mixed()).to(dtype)


def adapt_mixed(growth: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    config = SpIELConfig(
        density=0.1,
        growth=growth,
        target_modules=["embed", "conv", "linear", "turned"],
        target_parameters=["experts.matrix"],
        **CYCLE,
    )
    return get_peft_model(mixed(dtype), config).train()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, rank: int = 0) -> list[float]:
    """Optimizer steps number `first` to `last`, counted from 1; returns the loss of each, in seven digits."""
    losses = []
    for step in range(first, last + 1):
        total = 0.0
        for number in range(MICRO_BATCHES):
            loss = mean_square(model, batch_of_mixed(10_000 * rank + MICRO_BATCHES * step + number)) / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        losses.append(round(total, 7))
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run(name: str, rank: int = 0, wrap: Callable[[nn.Module], nn.Module] | None = None) -> dict[str, Any]:
    """Do one of `RUNS`, data-parallel if `wrap` is given; returns its losses and a digest of its final state."""
    optimizer_name, growth, dtype = RUNS[name]
    model = adapt_mixed(growth, dtype)
    originals = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".spiel_delta." not in key}
    optimizer = OPTIMIZERS[optimizer_name](trainable(model))
    losses = train(model if wrap is None else wrap(model), optimizer, 1, RUN_STEPS, rank)
    for key, tensor in model.state_dict().items():
        assert key not in originals or torch.equal(tensor, originals[key]), f"{key} was changed by training"
    return {"losses": losses, "digest": digest(everything(model, optimizer))}


# Digests


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bits."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The start of the digest of each tensor, so that a comparison can name those that differ."""
    return {name: digest({"": tensor})[:16] for name, tensor in tensors.items()}


def machine() -> dict[str, str]:
    """Describe everything besides the project's code that the last bits of a run depend on.

    Names alone do not tell: libraries choose their kernels by the exact CPU. So the arithmetic itself is part of it, as
    a digest of trainings of the same network without adapters.
    """
    trained: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = mixed(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        train(model, optimizer, 1, 5)
        trained |= {f"{dtype}.{name}": parameter for name, parameter in model.named_parameters()}
    return {
        "torch": torch.__version__,
        "bitsandbytes": bnb.__version__,
        "platform": platform.machine(),
        "vector_extension": torch.backends.cpu.get_cpu_capability(),
        "plain_training": digest(trained),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside the block: more threads split sums in other places."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
