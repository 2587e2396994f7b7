"""Row and column profiles of SmolLM2's real weight gradients, from which benchmarks draw index sets.

For every linear layer and some batches of text, the 1% largest entries of the dense weight gradient are counted per row
and per column. The result has, for every type of module, the sorted counts over their mean, in bins, averaged over
layers and batches.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from .bases import load_task, packed_batches
from .environment import add_output_argument, save
from .index_sets import PROFILE, Profile, bin_edges, block_share, draw_positions, profile_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--density", type=float, default=0.01, help="share of entries that count as chosen")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    add_output_argument(parser)


class _Counter:
    """Collects profiles of weight gradients, by type of module."""

    def __init__(self, density: float) -> None:
        self.density = density
        self.rows: dict[str, list[Tensor]] = defaultdict(list)
        self.cols: dict[str, list[Tensor]] = defaultdict(list)
        self.shares: dict[str, list[float]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, int]] = {}

    def add(self, kind: str, gradient: Tensor) -> None:
        rows, cols = gradient.shape
        k = max(1, round(self.density * gradient.numel()))
        chosen = torch.topk(gradient.abs().flatten(), k, sorted=False).indices
        self.rows[kind].append(profile_of(torch.bincount(chosen // cols, minlength=rows)))
        self.cols[kind].append(profile_of(torch.bincount(chosen % cols, minlength=cols)))
        self.shares[kind].append(block_share(chosen, rows, cols))
        self.shapes[kind] = (rows, cols)

    def hook(self, name: str) -> Any:
        kind = name.rpartition(".")[2]

        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda grad: self.add(kind, grad.flatten(0, -2).T @ x))

        return forward

    def summary(self, kind: str) -> dict[str, Any]:
        rows, cols = self.shapes[kind]
        entry = {
            "shape": [rows, cols],
            "density": self.density,
            "samples": len(self.rows[kind]),
            "rows": [float(f"{value:.4g}") for value in torch.stack(self.rows[kind]).mean(0).tolist()],
            "cols": [float(f"{value:.4g}") for value in torch.stack(self.cols[kind]).mean(0).tolist()],
            "block_share": sum(self.shares[kind]) / len(self.shares[kind]),
        }
        k = max(1, round(self.density * rows * cols))
        drawn = draw_positions(Profile.from_json(entry), rows, cols, k, seed=0)
        return entry | {"block_share_drawn": block_share(drawn, rows, cols)}


def measure(model: Any, batches: list[Tensor], density: float) -> dict[str, Any]:
    """Measure the profiles of a causal LM's gradients on batches ``[batch, tokens]``, by type of module."""
    model.requires_grad_(False)
    counter = _Counter(density)
    head = model.get_output_embeddings()
    handles = [
        module.register_forward_hook(counter.hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    for ids in batches:
        inputs = model.get_input_embeddings()(ids).requires_grad_(True)
        model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return {kind: counter.summary(kind) for kind in sorted(counter.rows)}


def run(args: argparse.Namespace) -> None:
    task = load_task()
    batches = packed_batches(task.stream, args.batch_size, args.tokens)[: args.batches]
    modules = measure(task.model, batches, args.density)
    for kind, entry in modules.items():
        print(
            f"{kind:10} {entry['shape'][0]:5} x {entry['shape'][1]:5}: heaviest column {entry['cols'][0]:5.1f} times "
            f"the mean, share of the dense product in blocks of 64 rows {entry['block_share']:.3f} "
            f"({entry['block_share_drawn']:.3f} when drawn from the profile)"
        )
    settings = {"batches": len(batches), "batch_size": args.batch_size, "tokens": args.tokens}
    result = {"settings": settings, "bins": [float(f"{e:.4g}") for e in bin_edges().tolist()], "modules": modules}
    print(save(PROFILE, result, args.output))
