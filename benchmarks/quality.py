"""Held-out loss of SpIEL and LoRA over learning rates, on the demo's model and data.

Every run trains the same number of values on the same batches in the same order, with AdamW, a short warm-up and a
linear decay. The best learning rate of each method is what the README's advice is read off.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

from spiel_peft import SpIELConfig

from .demo_task import DemoTask, held_out_loss, load_task
from .environment import save

METHODS = ("lora", "spiel-ag", "spiel-ma")
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--name", default="quality_smollm2", help="name of the result file")


def config_of(method: str, args: argparse.Namespace, seed: int) -> Any:
    common = {"r": args.r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "lora":
        return LoraConfig(lora_alpha=2 * args.r, **common)
    growth = {"spiel-ag": "accumulated_gradient", "spiel-ma": "momentum"}[method]
    return SpIELConfig(growth=growth, regrow_every=10, total_steps=args.steps, seed=seed, **common)


def train(task: DemoTask, method: str, learning_rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run; the base model is handed back as it was."""
    torch.manual_seed(seed)
    model = get_peft_model(task.model, config_of(method, args, seed)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, 5, args.steps)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
    began = time.perf_counter()
    losses = []
    for step in range(args.steps):
        chosen = [order[(step * args.batch_size + i) % len(order)] for i in range(args.batch_size)]
        loss = model(**task.collator([task.train[i] for i in chosen]), use_cache=False).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    seconds = time.perf_counter() - began
    result = {
        "method": method,
        "learning_rate": learning_rate,
        "seed": seed,
        "trainable": sum(p.numel() for p in parameters),
        "held_out_loss": held_out_loss(model, task.held_out, task.collator, 8),
        "train_losses": losses,
        "seconds": seconds,
    }
    model.unload()
    return result


def run(args: argparse.Namespace) -> None:
    task = load_task()
    before = held_out_loss(task.model, task.held_out, task.collator, 8)
    print(f"held-out loss before: {before:.4f}", flush=True)
    runs = []
    for seed in args.seeds:
        for learning_rate in args.learning_rates:
            for method in args.methods:
                runs.append(train(task, method, learning_rate, seed, args))
                print(
                    f"{method:9} lr {learning_rate:.0e} seed {seed}: held-out {runs[-1]['held_out_loss']:.4f} "
                    f"({runs[-1]['seconds']:.0f} s)",
                    flush=True,
                )
                settings = {"r": args.r, "steps": args.steps, "batch_size": args.batch_size}
                save(args.name, {"settings": settings, "held_out_loss_before": before, "runs": runs})
