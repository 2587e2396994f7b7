"""How much of the exact top k of a gradient ranks find together when they exchange only O(ranks * k) numbers.

Every rank has batches of its own from the demo's training text. The exact candidates are the k positions at which the
summed gradient of all ranks is largest in a window's first step. Compared with them are:

- ``together``: the candidates that the ranks choose together: each proposes positions in the step before the window,
  and of the union of proposals the k with the largest summed gradient are chosen;
- ``first_window``: the same if there is no step before the window; the sums are over the proposals;
- ``alone``: the candidates of the first rank without the others.

The exact candidates of one step are not those of the next, so this overlap alone does not say how good candidates are.
Therefore the absolute sums of gradients over the whole window are compared too, as a share of what the exact top k of
the window has.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from spiel_kernels import stable_topk
from spiel_peft.cycle.window import shortlist, unite

from .bases import load_task, packed_batches
from .environment import add_output_argument, save

NAME = "overlap_smollm2"
_KINDS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
_WINDOW = 5  # the default accumulation_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--density", type=float, default=0.01, help="k as a share of a matrix's entries")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks")
    parser.add_argument("--windows", type=int, default=1, help="windows with the highest number of ranks")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 14, 25])
    parser.add_argument("--batch-size", type=int, default=4, help="of one rank")
    parser.add_argument("--tokens", type=int, default=128)
    add_output_argument(parser)


def dense_gradients(model: Any, names: list[str], batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """The gradient of each named module's weight, flat, for each batch ``[batch, tokens]``."""
    model.requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in names}
    gradients: dict[str, list[Tensor]] = defaultdict(list)
    for ids in batches:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, weight in weights.items():
            gradients[name].append(weight.grad.flatten())
            weight.grad = None
    return gradients


def top(gradient: Tensor, k: int) -> Tensor:
    """Positions of the k entries of largest magnitude."""
    return torch.topk(gradient.abs(), k, sorted=False).indices


def proposals_of(gradients: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The shortlist of the ranks' proposed positions, and the sums of the proposed gradients."""
    positions = torch.stack([top(gradient, k) for gradient in gradients])
    return shortlist(*unite(positions, torch.stack([g[p] for g, p in zip(gradients, positions, strict=True)])), k)


def compare(steps: list[list[Tensor]], k: int) -> dict[str, dict[str, float]]:
    """Overlap and share of the window for every way to choose candidates.

    Args:
        steps: gradients ``[numel]`` by step and rank; the first step is the one before the window.
        k: number of candidates.
    """
    before, opening = steps[0], steps[1]
    exact_sum, window_sum = sum(opening), sum(sum(step) for step in steps[1:])
    union, _ = proposals_of(before, k)
    first_union, first_sums = proposals_of(opening, k)
    chosen = {
        "together": union[stable_topk(exact_sum[union].abs(), k)],
        "first_window": first_union[stable_topk(first_sums.abs(), k)],
        "alone": top(opening[0], k),
        "exact": top(exact_sum, k),
    }
    best = window_sum[top(window_sum, k)].abs().sum()
    return {
        name: {
            "overlap": float(torch.isin(positions, chosen["exact"]).float().mean()),
            "share_of_window": float(window_sum[positions].abs().sum() / best),
        }
        for name, positions in chosen.items()
    }


def measure(gradients: dict[str, list[Tensor]], ranks: int, density: float) -> dict[str, Any]:
    """Means over modules and windows for one number of ranks."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    unions = []
    per_window = ranks * (_WINDOW + 1)
    for of_module in gradients.values():
        k = max(1, round(density * of_module[0].numel()))
        for start in range(0, len(of_module) - per_window + 1, per_window):
            flat = of_module[start : start + per_window]
            steps = [flat[i : i + ranks] for i in range(0, per_window, ranks)]
            for name, values in compare(steps, k).items():
                found[name].append(values)
            unions.append(torch.unique(torch.cat([top(g, k) for g in steps[0]])).numel() / k)
    means = {
        name: {key: sum(v[key] for v in values) / len(values) for key in values[0]} for name, values in found.items()
    }
    return {"ranks": ranks, "samples": len(unions), "union_over_k": sum(unions) / len(unions), **means}


def run(args: argparse.Namespace) -> None:
    task = load_task()
    batches = packed_batches(task.stream, args.batch_size, args.tokens)
    needed = max(args.ranks) * (_WINDOW + 1) * args.windows
    if needed > len(batches):
        raise SystemExit(
            f"{needed} batches are needed, the text has {len(batches)}: fewer --ranks, --windows or tokens"
        )
    # Consecutive pairs of the text have the same topic, so shuffle the batches before the ranks get them.
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))[:needed].tolist()
    names = [f"model.layers.{layer}.{kind}" for layer in args.layers for kind in _KINDS]
    gradients = dense_gradients(task.model, names, [batches[i] for i in order])
    results = [measure(gradients, ranks, args.density) for ranks in args.ranks]
    for result in results:
        print(f"{result['ranks']} ranks, union of proposals {result['union_over_k']:.2f} k")
        for name in ("together", "first_window", "alone", "exact"):
            values = result[name]
            print(f"  {name:13} overlap {values['overlap']:.3f}, share of window {values['share_of_window']:.3f}")
    settings = {"density": args.density, "batch_size": args.batch_size, "tokens": args.tokens, "modules": names}
    print(save(NAME, {"settings": settings, "results": results}, args.output))
