"""Gradients of deltas that are whole on every rank while FSDP2 spreads the base weights: averaged over the ranks.

`DistributedDataParallel` does that for the parameters it wraps, FSDP2 for those it shards; for these it is done here,
at the end of every backward pass, so that clipping sees the averages. There is no `no_sync` to heed: the average of
what is averaged already is itself, so micro-batches may be averaged one by one.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.autograd import Variable

from ..delta import AdapterRun, SparseDelta
from ..sharding import is_plain, sharding_group
from .agreement import check_same
from .data_parallel import averages_itself, ranks_of
from .ranks import Ranks

# The autograd pass at whose end the gradients of a run will be averaged.
_QUEUED: weakref.WeakKeyDictionary[AdapterRun, int] = weakref.WeakKeyDictionary()
# Runs whose ranks have been found to start from the same deltas.
_COMPARED: weakref.WeakSet[AdapterRun] = weakref.WeakSet()


def queue_average(delta: SparseDelta) -> None:
    """Called in a backward pass that reaches the delta: have the gradients of its run averaged when the pass is over.

    Does nothing unless FSDP2 shards the base weight, and nobody has said that gradients are averaged otherwise.
    """
    if not averages_itself(delta):
        return
    task = torch._C._current_graph_task_id()
    if _QUEUED.get(delta.run) == task:
        return
    _QUEUED[delta.run] = task
    run, ranks = delta.run, ranks_of(delta)
    if ranks is not None:
        Variable._execution_engine.queue_callback(lambda: _average_run(run, ranks))


def _average_run(run: AdapterRun, ranks: Ranks) -> None:
    _QUEUED.pop(run, None)
    # All of them, also those that this rank's data did not reach: others may have reached them.
    deltas = [d for d in run.deltas() if d.values.requires_grad and sharding_group(d) is ranks.group]
    for delta in deltas:
        _check_plain(delta)
    with torch.no_grad():
        if run not in _COMPARED:
            check_same(ranks, deltas)
            _COMPARED.add(run)
        average_gradients(deltas, ranks)


def refuse_mixed_groups(optimizer: torch.optim.Optimizer, deltas: list[SparseDelta]) -> None:
    """Refuse an optimizer that would hand whole and sharded parameters of one group to one kernel.

    Raises:
        TypeError: names the optimizer and the setting to change; called before it steps.
    """
    whole = {id(delta.values) for delta in deltas if sharding_group(delta) is not None}
    if not whole:
        return
    for group in optimizer.param_groups:
        at_once = [name for name in ("fused", "foreach") if group.get(name)]
        if not at_once or not any(id(p) in whole for p in group["params"]):
            continue
        if not all(is_plain(p) for p in group["params"]):
            raise TypeError(
                f"{type(optimizer).__name__} with {at_once[0]}=True steps all parameters of a group at once, but FSDP2 "
                "shards some of this group's (modules_to_save, biases) and deltas are whole: set fused=False and "
                "foreach=False (Trainer: optim='adamw_torch'), or put the deltas into a parameter group of their own"
            )


def average_gradients(deltas: list[SparseDelta], ranks: Ranks) -> None:
    """Replace the gradient of every delta, in place, by its mean over the ranks; one that no rank has stays None."""
    reached = torch.tensor([d.values.grad is not None for d in deltas], device=deltas[0].values.device).to(torch.int64)
    grads = [torch.zeros_like(d.values) if d.values.grad is None else d.values.grad.contiguous() for d in deltas]
    ranks.add_up([*grads, reached])
    torch._foreach_div_(grads, ranks.size)
    # Whoever has a gradient of its own need not wait for the device to know that there is one.
    anywhere = reached.tolist() if any(d.values.grad is None for d in deltas) else None
    for place, (delta, grad) in enumerate(zip(deltas, grads, strict=True)):
        if delta.values.grad is not None or (anywhere is not None and anywhere[place]):
            _give(delta.values, grad)


def _give(values: Tensor, grad: Tensor) -> None:
    if values.grad is not grad:
        values.grad = grad


def _check_plain(delta: SparseDelta) -> None:
    if not is_plain(delta.values):
        raise RuntimeError(
            f"{delta.module_name}: its deltas were sharded by FSDP2; this version of PyTorch needs to be told not to: "
            "pass ignored_params={p for n, p in model.named_parameters() if '.spiel_delta.' in n} to fully_shard"
        )
