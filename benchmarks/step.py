"""Time of training steps between windows: SpIEL, PEFT LoRA, the dense formula and the lower bound, interleaved.

The dense formula keeps W + scatter(delta) as an autograd expression: a clone, a scatter-add and a dense weight gradient
in every layer. The lower bound is a forward pass and input gradients through the frozen model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from spiel_peft import SM3, SpIELConfig, SpIELLayer

from .demo_task import load_task
from .environment import save

Step = Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--name", default=None, help="name of the result file")


class DenseLinear(nn.Module):
    """The plain formula: y = x (W + scatter(indices, values))^T."""

    def __init__(self, layer: SpIELLayer) -> None:
        super().__init__()
        self.base = layer.base_layer
        delta = layer.spiel_delta["default"]
        self.register_buffer("indices", delta.indices.to(torch.int64))
        self.values = nn.Parameter(torch.zeros(delta.k))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight
        adapted = weight.flatten().scatter_add(0, self.indices, self.values).view_as(weight)
        return nn.functional.linear(x, adapted, self.base.bias)


def dense_formula(base: nn.Module, r: int) -> nn.Module:
    """The model with every SpIEL layer replaced by the plain formula on the same positions."""
    model = get_peft_model(base, SpIELConfig(r=r, target_modules="all-linear")).get_base_model()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SpIELLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, DenseLinear(layer))
    return model


def training_step(model: Any, ids: Tensor, make_optimizer: Callable[[list[Any]], Any]) -> Step:
    model.train()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lower_bound_step(model: Any, ids: Tensor) -> Step:
    model.train().requires_grad_(False)
    embeddings = model.get_input_embeddings()(ids)

    def step() -> None:
        inputs = embeddings.clone().requires_grad_(True)
        model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()

    return step


def build_steps(base: Any, ids: Tensor, r: int) -> dict[str, Step]:
    def adamw(parameters: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-5)

    def sm3(parameters: list[Any]) -> torch.optim.Optimizer:
        return SM3(parameters, lr=1e-5)

    def adapted(config: Any) -> Any:
        return get_peft_model(copy.deepcopy(base), config)

    targets = {"r": r, "target_modules": "all-linear"}
    # 20 000 steps: the schedule stays at its start for the few that are measured.
    spiel = {**targets, "total_steps": 20_000}
    return {
        "lower bound": lower_bound_step(copy.deepcopy(base), ids),
        "LoRA": training_step(adapted(LoraConfig(lora_alpha=2 * r, **targets)), ids, adamw),
        "LoRA, dropout 0.05": training_step(
            adapted(LoraConfig(lora_alpha=2 * r, lora_dropout=0.05, **targets)), ids, adamw
        ),
        "SpIEL-AG": training_step(adapted(SpIELConfig(**spiel)), ids, adamw),
        "SpIEL-MA, SM3": training_step(adapted(SpIELConfig(growth="momentum", **spiel)), ids, sm3),
        "dense formula": training_step(dense_formula(copy.deepcopy(base), r), ids, adamw),
    }


def run(args: argparse.Namespace) -> None:
    base = load_task(max_held_out=1).model
    torch.manual_seed(0)
    ids = torch.randint(100, 40_000, (args.batch_size, args.tokens))
    steps = build_steps(base, ids, args.r)
    # Past the first window and close, so that the repetitions are the steps between windows: most of a run.
    for step in steps.values():
        for _ in range(6):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repetitions):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(
            f"{name:20} {median:7.3f} s  {median / medians['LoRA']:.2f} x LoRA  "
            f"{median / medians['lower bound']:.2f} x lower bound"
        )
    name = args.name or f"step_smollm2_r{args.r}_{args.batch_size}x{args.tokens}"
    settings = {"r": args.r, "batch_size": args.batch_size, "tokens": args.tokens, "dtype": "float32"}
    print(save(name, {"settings": settings, "median_seconds": medians, "seconds": seconds}))
