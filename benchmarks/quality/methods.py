"""Every method: which values of a model it trains, and what it does besides the optimizer's step.

Public API only: configs, `get_peft_model`, state dicts, `register_growth_criterion`, optimizer state.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn

from spiel_peft import PruneRequest, SpIELConfig, get_growth_criterion, register_growth_criterion

from .tasks import Task
from .training import Setup, train

# The smallest normal float32: added to a weight it changes nothing, but an adapter with such a delta is no fresh one,
# so that its first close takes the schedule's rate instead of replacing all deltas.
NOT_FRESH = torch.finfo(torch.float32).tiny
_CYCLE_FIELDS = ("regrow_every", "accumulation_steps", "initial_regrow_rate", "stop_regrowing_at", "regrow_schedule")
_KNOWN = {
    "kind",
    "start",
    "start_batches",
    "growth",
    "first_close_replaces_all",
    "prune",
    "protect_grown",
    "candidates_per_grown",
    "budget",
    "decay",
    "decay_left",
    "zero_moments",
    "micro_batches",
    "lottery_rate",
    *_CYCLE_FIELDS,
}


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse unknown settings: a misspelt one would be ignored, and the experiment would not take place."""
    unknown = settings.keys() - _KNOWN
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; there are {sorted(_KNOWN)}")


def lora_values(base: nn.Module, task: Task, r: int) -> int:
    """As many values as LoRA of this rank trains on the task's targets: the budget of every method that has one."""
    model = get_peft_model(copy.deepcopy(base), _lora(task, r))
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def set_up(base: Any, task: Task, settings: dict[str, Any], r: int, steps: int, rate: float, seed: int) -> Setup:
    """Set up a method on a base model, in place.

    Args:
        base: the base model.
        settings: of the method, as the plan gives them.
        r: the budget, as a rank of LoRA.
        steps: optimizer steps of the run.
        rate: the learning rate; only the lottery's dense training looks at its own instead.
        seed: of random choices and of the order of the batches.
    """
    check_settings(settings)
    kind = settings["kind"]
    if kind == "full":
        return _setup(base.requires_grad_(True))
    if kind == "bitfit":
        base.requires_grad_(False)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.endswith(".bias") or name.startswith("classifier."))
        return _setup(base)
    if kind == "lora":
        return _setup(get_peft_model(base, _lora(task, r)))
    if kind == "ia3":
        return _setup(get_peft_model(base, IA3Config(task_type=task.task_type)))
    if kind in ("sparse", "lora+sparse"):
        return _sparse(base, task, settings, r, steps, seed)
    raise ValueError(f"kind must be full, lora, ia3, bitfit, sparse or lora+sparse, got {kind!r}")


def _setup(model: Any) -> Setup:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = {name: p for name, p in trained.items() if "classifier." in name}
    return Setup(model.train(), {name: p for name, p in trained.items() if name not in head}, head)


def _lora(task: Task, r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=task.targets, task_type=task.task_type)


# Sparse deltas


def _sparse(base: Any, task: Task, settings: dict[str, Any], r: int, steps: int, seed: int) -> Setup:
    starts = _Starts(base, task, settings, seed, steps)
    growth = _registered_growth(settings)
    fields: dict[str, Any] = {name: settings[name] for name in _CYCLE_FIELDS if name in settings}
    fields |= {"growth": growth, "seed": seed, "total_steps": steps, "task_type": task.task_type}
    fields["candidates"] = settings.get("candidates_per_grown")
    fields |= _budget(base, task, settings, r)
    config = SpIELConfig(**fields)
    if settings["kind"] == "sparse":
        model = get_peft_model(base, config)
    else:  # LoRA is wrapped around the sparse layers, and half of the budget is its
        config.task_type = None
        low_rank = LoraConfig(r=r // 2, lora_alpha=r, target_modules=task.targets)
        base.add_adapter(config, "sparse")
        base.add_adapter(low_rank, "low_rank")
        base.set_adapter(["sparse", "low_rank"])
        model = base
    starts.write_into(model)
    setup = _setup(model)
    if settings.get("zero_moments"):
        setup.after_step = _ZeroMoments(model)
    return setup


def _budget(base: Any, task: Task, settings: dict[str, Any], r: int) -> dict[str, Any]:
    """Budget and targets of the sparse adapter, always as many values as LoRA of rank r has on all targets."""
    budget = settings.get("budget", "r")
    if settings["kind"] == "lora+sparse":
        if r % 2:
            raise ValueError(f"half a budget for each of two adapters needs an even r, got {r}")
        return {"r": r // 2, "target_modules": task.targets}
    if budget == "r":
        return {"r": r, "target_modules": task.targets}
    if budget in ("numel", "mlp"):
        targets = task.targets if budget == "numel" else task.mlp_targets
        return {"num_deltas": lora_values(base, task, r), "target_modules": targets}
    raise ValueError(f"budget must be r, numel or mlp, got {budget!r}")


def _registered_growth(settings: dict[str, Any]) -> str:
    """The name of a criterion that grows as `settings["growth"]` does and prunes as they say."""
    growth, prune = settings["growth"], settings.get("prune", "magnitude")
    protect = settings.get("protect_grown", False)
    if prune == "magnitude" and not protect:
        return growth
    builtin = get_growth_criterion(growth)
    name = f"{growth}_of_the_benchmark"
    register_growth_criterion(
        name,
        builtin.propose,
        gathers=builtin.gathers,
        accumulates=builtin.accumulates,
        prune_score=_PruneScore(prune, protect),
        override=True,
    )
    return name


class _PruneScore:
    """Prune score of a delta: |delta|, or |delta times its gradient at the closing step|.

    With `protect`, deltas grown at the close before are pruned last.
    """

    def __init__(self, prune: str, protect: bool) -> None:
        if prune not in ("magnitude", "saliency"):
            raise ValueError(f"prune must be magnitude or saliency, got {prune!r}")
        self.prune = prune
        self.protect = protect
        self._before: dict[str, Tensor] = {}

    def __call__(self, request: PruneRequest) -> Tensor:
        scores = request.values.abs()
        if self.prune == "saliency" and request.gradient is not None:
            scores = (request.values * request.gradient).abs()
        before = self._before.get(request.module_name)
        if self.protect and before is not None:
            scores = scores.masked_fill(~torch.isin(request.indices, before), torch.inf)
        self._before[request.module_name] = request.indices
        return scores


class _ZeroMoments:
    """After a close, set Adam's moments of grown deltas to zero instead of what the cycle seeds them with."""

    def __init__(self, model: nn.Module) -> None:
        self.indices = dict(_index_buffers(model))
        self.values = {name: p for name, p in model.named_parameters() if name.endswith(".values")}
        self.before = {name: indices.clone() for name, indices in self.indices.items()}

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        for name, indices in self.indices.items():
            if torch.equal(indices, self.before[name]):
                continue
            grown = ~torch.isin(indices, self.before[name])
            state = optimizer.state[self.values[name.removesuffix("indices") + "values"]]
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment][grown] = 0.0
            self.before[name] = indices.clone()


def _index_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".indices"))


# Where deltas start


class _Starts:
    """Index sets that are chosen by a score of the base model's weights, before it is wrapped.

    Scores of a weight W with gradient g (averaged over `start_batches` batches, before the first update): "gradient"
    |g|, "snip" |W g|, "magnitude" |W|, "lift" |W reduced to an eighth of its rank|, "lottery" |change of W in a dense
    training of the same length|.
    """

    def __init__(self, base: Any, task: Task, settings: dict[str, Any], seed: int, steps: int) -> None:
        self.start = settings.get("start", "random")
        self.fresh = settings.get("first_close_replaces_all", True)
        self.scores: dict[str, Tensor] = {}
        if self.start == "random":
            return
        weights = {name: m.weight.detach() for name, m in base.named_modules() if isinstance(m, nn.Linear)}
        if self.start == "magnitude":
            self.scores = {name: weight.abs() for name, weight in weights.items()}
        elif self.start == "lift":
            self.scores = {name: _rank_reduced(weight).abs() for name, weight in weights.items()}
        elif self.start in ("gradient", "snip"):
            gradients = _gradients(base, task, weights, seed, settings.get("start_batches", 4))
            scale = weights if self.start == "snip" else dict.fromkeys(weights, 1.0)
            self.scores = {name: (gradients[name] * scale[name]).abs() for name in weights}
        elif self.start == "lottery":
            changed = _densely_trained(base, task, seed, steps, settings["lottery_rate"])
            self.scores = {name: (changed[name] - weight).abs() for name, weight in weights.items()}
        else:
            raise ValueError(f"start must be random, magnitude, lift, gradient, snip or lottery, got {self.start!r}")

    def write_into(self, model: nn.Module) -> None:
        """Give every delta of a wrapped model the k positions with the highest scores of its weight."""
        state: dict[str, Tensor] = {}
        for key, indices in _index_buffers(model):
            module = key.partition(".spiel_delta.")[0].removeprefix("base_model.model.").removesuffix(".base_layer")
            values = torch.zeros(indices.shape, dtype=torch.float32)
            if self.scores:
                best = torch.topk(self.scores[module].flatten(), indices.numel()).indices
                indices = best.sort().values.to(indices.dtype)
            if not self.fresh:
                values[0] = NOT_FRESH
            state |= {key: indices.clone(), key.removesuffix("indices") + "values": values}
        if self.scores or not self.fresh:
            incompatible = model.load_state_dict(state, strict=False)
            assert not incompatible.unexpected_keys, incompatible.unexpected_keys
        self.scores = {}


def _rank_reduced(weight: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    rank = max(1, len(s) // 8)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def _gradients(base: Any, task: Task, weights: dict[str, Tensor], seed: int, batches: int) -> dict[str, Tensor]:
    """Gradients of linear weights, summed over the first training batches, without an update."""
    base.requires_grad_(False)
    parameters = {name: base.get_submodule(name).weight for name in weights}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for batch in itertools.islice(task.batches(seed), batches):
        task.loss(base, batch).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
        parameter.requires_grad_(False)
    return gradients


def _densely_trained(base: Any, task: Task, seed: int, steps: int, rate: float) -> dict[str, Tensor]:
    """Linear weights after a full fine-tuning of a copy."""
    setup = _setup(copy.deepcopy(base).requires_grad_(True))
    train(setup, task, seed=seed, steps=steps, rate=rate)
    return {name: m.weight.detach() for name, m in setup.model.named_modules() if isinstance(m, nn.Linear)}
