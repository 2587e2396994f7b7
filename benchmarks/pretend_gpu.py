"""Runs training on a CPU along the path that a GPU takes, with the sizes of large models and without their arithmetic.

Inside `pretend_gpu` our own code is told that its tensors are on a GPU, so that it takes its GPU branches and launches
its Triton kernels. Base weights are hollow: memory that is allocated and never written. So is whatever is computed from
hollow tensors, activations above all: it is allocated, with the size that the operation gives it, and not computed. A
kernel is replaced by a stand-in, which writes only what later decisions depend on: gradients of deltas, drawn from a
table. Index sets, windows and closes are thus real ones, and a step of a decoder layer of any size takes seconds and is
the same in every run.

Not seen: what libraries allocate inside an operation (buffers of sorting, workspaces of cuBLAS), and the rounding of
allocation sizes by PyTorch's allocator.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from spiel_kernels.momentum import top_outer
from spiel_kernels.workspace import release_workspaces

_OURS = ("spiel_kernels", "spiel_peft", "benchmarks")
_GPU, _CPU = torch.device("cuda", 0), torch.device("cpu")
_GEMM_4BIT = "bitsandbytes::gemm_4bit"
# Returns its operand in another shape, though the schema does not say so.
_VIEW_BY_ANOTHER_NAME = torch.ops.aten._unsafe_view.default
# Index sets chosen from such noise touch a fifth of a matrix's tiles at r=64, as the profile of real gradients does.
_LOG_SPREAD = 0.75
_READS_NUMBERS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor's memory was allocated without being computed."""
    return getattr(tensor.untyped_storage(), "hollow", False)


def make_hollow(tensor: Tensor) -> Tensor:
    """Say that the memory of a tensor holds no numbers."""
    tensor.untyped_storage().hollow = True  # kept for as long as the memory lives
    return tensor


@contextmanager
def _as_it_is() -> Iterator[None]:
    """Nothing pretends and nothing is seen in the block."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


class Noise:
    """Numbers to fill tensors with: a table of normal ones, of which every tensor gets another part."""

    _SIZE, _PART = 1 << 22, 1 << 21

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(self._SIZE, generator=generator)
        self._tables = {torch.float32: table}
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._offset = 0
        self.reached = torch.empty(0, dtype=torch.int64)  # slots that the last count of products found

    def fill(self, tensor: Tensor) -> Tensor:
        """Fill a floating tensor that lies dense in memory."""
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        with _as_it_is():
            table = self._tables.get(tensor.dtype)
            if table is None:
                table = self._tables[tensor.dtype] = self._tables[torch.float32].to(tensor.dtype)
            for part in tensor.detach().as_strided((tensor.numel(),), (1,)).split(self._PART):
                self._offset = (self._offset + 7919) % (self._SIZE - self._PART)
                part.copy_(table[self._offset : self._offset + part.numel()])
        return tensor

    def gradient_block(self, rows: int, cols: int) -> Tensor:
        """A block of a weight gradient ``[rows, cols]`` float32, whose largest entries concentrate as real ones do."""
        block = self._blocks.get((rows, cols))
        if block is None:
            table = self._tables[torch.float32]
            repeated = table.repeat(-(-rows * cols // table.numel()))  # the same numbers, whatever was filled before
            block = self._blocks[rows, cols] = repeated[: rows * cols].view(rows, cols).clone()
            block.mul_(_spread(rows)[:, None]).mul_(_spread(cols))
        return block.clone()


def _spread(size: int) -> Tensor:
    """Sizes of rows or columns: the quantiles of a log-normal distribution, in random order."""
    quantiles = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    return torch.special.ndtri(quantiles).mul(_LOG_SPREAD).exp().float()[order]


class _Dispatch(TorchDispatchMode):
    """Leaves operations on hollow tensors out, and shows the operands and results of all operations to `see`.

    Args:
        fill: fill hollow tensors with noise, for kernels that run.
    """

    def __init__(self, noise: Noise, see: Callable[[Tensor], Any], fill: bool) -> None:
        super().__init__()
        self._noise, self._see, self._fill = noise, see, fill

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func._schema.name == _GEMM_4BIT:
            # On a GPU, with more tokens than its own kernel is made for, bitsandbytes does the same.
            from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

            with self:
                return _gemm_4bit_default_impl(*args, **kwargs)
        if func is torch.ops.aten.mm.dtype:  # a block of a weight gradient, from which entries are selected
            result = self._noise.gradient_block(args[0].shape[0], args[1].shape[1])
        elif any(map(is_hollow, operands)):
            result = self._left_out(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        # Operands too: some are remembered from before, or were made without an operation.
        for tensor in (*operands, *(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))):
            self._see(tensor)
        return result

    def _left_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        schema = func._schema
        if schema.name in _READS_NUMBERS:
            raise RuntimeError(f"{schema.name} reads numbers that were not computed")
        written = [
            kwargs[argument.name] if argument.name in kwargs else args[place]
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            for tensor in tree_leaves(written):
                make_hollow(tensor)
            return written[0] if len(schema.returns) == 1 else tuple(written) if schema.returns else None
        if any(value.alias_info is not None for value in schema.returns) or func is _VIEW_BY_ANOTHER_NAME:
            return func(*args, **kwargs)
        return tree_map_only(Tensor, self._allocated, _on_meta(func, args, kwargs))

    def _allocated(self, meta: Tensor) -> Tensor:
        tensor = make_hollow(torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=_CPU))
        return self._noise.fill(tensor) if self._fill else tensor


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on tensors without memory."""
    args, kwargs = tree_map_only(Tensor, _without_memory, (args, kwargs))
    return func(*args, **{**kwargs, **({"device": torch.device("meta")} if kwargs.get("device") else {})})


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Claims(TorchFunctionMode):
    """Tells our own code that all tensors are on a GPU, and takes what it then asks for a GPU to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            ours = sys._getframe(1).f_globals.get("__name__", "").startswith(_OURS)
            return _QUESTIONS[func] if ours else func(*args)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is torch.Tensor.backward:
            # PyTorch's own function would run without this mode, and take everything in the backward pass out of it.
            with self:
                return _engine_run_backward(
                    args, (torch.ones_like(*args),), False, False, (), True, accumulate_grad=True
                )
        if _asks_for_gpu(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        return func(*(_CPU if _asks_for_gpu(arg) else arg for arg in args), **kwargs)


_QUESTIONS = {torch.Tensor.is_cuda.__get__: True, torch.Tensor.device.__get__: _GPU}


def _asks_for_gpu(argument: Any) -> bool:
    return isinstance(argument, torch.device) and argument.type == "cuda"


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the fused kernel that PyTorch takes on a GPU."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if attn_mask is None and query.dtype.itemsize == 2:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class _Autocast(torch.autocast):
    """Autocast for a GPU is the CPU's: the tensors are there."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


# Kernels. A stand-in gets the arguments of a launch by name and writes what later decisions depend on.


def _nothing(noise: Noise, launch: SimpleNamespace) -> None:
    """For kernels whose results only matrix products or other stand-ins would read."""


def _gathered(noise: Noise, launch: SimpleNamespace) -> None:
    noise.fill(launch.out)


def _counted(noise: Noise, launch: SimpleNamespace) -> None:
    # Slots of the products whose size reaches a bound; none of them is zero. The kernel that follows wants them too.
    noise.reached = (launch.product.flatten().abs() >= launch.bound).nonzero().flatten()
    launch.counts.copy_(torch.bincount(noise.reached // launch.BLOCK, minlength=launch.counts.numel()))


def _appended(noise: Noise, launch: SimpleNamespace) -> None:
    start = int(launch.starts[0])
    slots = noise.reached[: max(0, launch.capacity - start)]
    place = slice(start, start + slots.numel())
    launch.pool_values[place] = launch.product.flatten().index_select(0, slots)
    launch.pool_positions[place] = slots + launch.first


def _accumulated(noise: Noise, launch: SimpleNamespace) -> None:
    indices = launch.indices.long()
    rows, cols = indices // launch.cols, indices % launch.cols
    launch.nu.copy_(torch.minimum(launch.row[rows], launch.col[cols]) + launch.gradient.float().square())
    launch.col_bits.view(torch.float32).scatter_reduce_(0, cols, launch.nu, "amax")
    launch.row.scatter_reduce_(0, rows, launch.nu, "amax")


def _listed(noise: Noise, launch: SimpleNamespace) -> None:
    log_col = torch.empty_like(launch.log_col).index_copy_(0, launch.order, launch.log_col)
    best_first = top_outer(launch.log_row, log_col, launch.excluded, launch.room)
    # Only the order of the scores matters.
    launch.scores.fill_(-torch.inf)[: best_first.numel()] = -torch.arange(best_first.numel(), dtype=torch.float64)
    launch.positions.fill_(-1)[: best_first.numel()] = best_first


STAND_INS: dict[str, Callable[[Noise, SimpleNamespace], None]] = {
    "_fold_4bit_kernel": _nothing,
    "_fold_8bit_kernel": _nothing,
    "_write_adapted_kernel": _nothing,
    "token_major_kernel": _nothing,
    "tile_products_kernel": _nothing,
    "pick_entries_kernel": _gathered,
    "entry_dots_kernel": _gathered,
    "dense_entries_kernel": _gathered,
    "_count_kernel": _counted,
    "_append_kernel": _appended,
    "_accumulate_kernel": _accumulated,
    "_threshold_kernel": _nothing,
    "_list_kernel": _listed,
}


def _launcher(noise: Noise) -> Callable[..., None]:
    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = kernel.fn.__name__
        if name not in STAND_INS:
            raise NotImplementedError(f"kernel {name} has no stand-in in {__name__}.STAND_INS")
        parameters = inspect.signature(kernel.fn).parameters
        arguments = dict(zip(parameters, args, strict=False)) | {k: v for k, v in kwargs.items() if k in parameters}
        with _as_it_is():
            STAND_INS[name](noise, SimpleNamespace(**arguments))

    return run


def _unseen(run: Callable[..., None]) -> Callable[..., None]:
    """A launch by Triton's interpreter, whose own tensors are none of a GPU's."""
    gc.collect()
    gc.freeze()

    def quietly(kernel: Any, *args: Any, **kwargs: Any) -> None:
        with _as_it_is():
            run(kernel, *args, **kwargs)
        gc.collect()  # it leaves cycles behind that hold the arguments

    return quietly


def _forget() -> None:
    """Empty the caches of our functions: what they hold would be missing from a count, or be on another device."""
    for name, module in list(sys.modules.items()):
        if name.startswith(_OURS):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    release_workspaces()


@contextmanager
def pretend_gpu(see: Callable[[Tensor], Any] = lambda tensor: None, stand_ins: bool = True) -> Iterator[Noise]:
    """Take the path of a GPU for the length of a block.

    Args:
        see: is shown every tensor that an operation takes or returns.
        stand_ins: replace kernels by `STAND_INS`; otherwise Triton's interpreter runs them (TRITON_INTERPRET=1 has to
            be set before Triton is imported).

    Yields:
        What tensors are filled with.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    noise = Noise()
    patches: Sequence[tuple[Any, str, Any]] = (
        (torch, "autocast", _Autocast),
        (torch, "is_autocast_enabled", lambda device="cpu", real=torch.is_autocast_enabled: real("cpu")),
        (torch, "get_autocast_dtype", lambda device, real=torch.get_autocast_dtype: real("cpu")),
        (torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
        (JITFunction, "run", _launcher(noise)),
        (InterpretedFunction, "run", _launcher(noise) if stand_ins else _unseen(InterpretedFunction.run)),
    )
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Dispatch(noise, see, fill=not stand_ins))
        stack.enter_context(_Claims())
        _forget()
        stack.callback(_forget)
        yield noise
