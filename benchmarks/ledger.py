"""Adds up the bytes of live tensors while a model trains: what they are for, and when most are alive.

Every storage that an operation returns is noted until it is freed. What it is for is often known only later (a tensor
made in a backward pass turns out to be a gradient), so births and deaths are written down, and peaks are found by going
through them in the end.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spiel_kernels import workspace
from spiel_peft import SparseDelta

BASE, VALUES, INDICES, GRADIENTS, OPTIMIZER = "base weights", "values", "indices", "gradients", "optimizer state"
WINDOW, WORKSPACE, ACTIVATIONS, TEMPORARY = "window", "workspace", "activations", "temporary"
PARTS = (BASE, VALUES, INDICES, GRADIENTS, OPTIMIZER, WINDOW, WORKSPACE, ACTIVATIONS, TEMPORARY)
FORWARD, BACKWARD, STEP = "forward", "backward", "step"


class Moment(NamedTuple):
    """When a peak was, so finely that it is higher by the same number of bytes for each further decoder layer.

    Attributes:
        step: number of the optimizer step; 0 before the first.
        phase: name of the kind of step.
        during: FORWARD, BACKWARD or STEP.
        place: the decoder layer (``first`` ...), in an update the function of ours that is at work; else empty.
    """

    step: int
    phase: str
    during: str
    place: str


class Ledger:
    """Births and deaths of all storages. `see` is to be called with every tensor that an operation returns."""

    def __init__(self) -> None:
        self.moment = Moment(0, "", "", "")
        self._bytes: list[int] = []
        self._part: list[str | None] = []
        self._alive: dict[int, int] = {}  # address of a storage -> its number
        self._references: dict[int, Any] = {}  # its number -> weak reference
        self._events: list[tuple[Moment, int]] = []  # a number is born; its complement dies

    def see(self, tensor: Tensor) -> int | None:
        """Note a tensor's storage, if it is new; returns its number."""
        if tensor.is_meta or type(tensor) is not Tensor and not isinstance(tensor, nn.Parameter):
            return None
        storage = tensor.untyped_storage()
        address = storage._cdata
        number = self._alive.get(address)
        if number is None:
            number = len(self._bytes)
            self._bytes.append(storage.nbytes())
            self._part.append(None)
            self._alive[address] = number
            self._references[number] = weakref.ref(storage, lambda _: self._dies(address, number))
            self._events.append((self._now(), number))
        return number

    def _now(self) -> Moment:
        return self.moment._replace(place=_our_function()) if self.moment.during == STEP else self.moment

    def _dies(self, address: int, number: int) -> None:
        del self._alive[address], self._references[number]
        self._events.append((self.moment, ~number))

    def name(self, part: str, tensors: Iterable[Any]) -> None:
        """Say what tensors are for; whatever is no tensor is left out."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                number = self.see(tensor)
                if number is not None:
                    self._part[number] = part

    def count(self) -> int:
        """The number of the next storage."""
        return len(self._bytes)

    def name_unnamed(self, part: str, first: int) -> None:
        """Say what all live storages are for that were born as number `first` or later and are not named yet."""
        for number in self._references:
            if number >= first and self._part[number] is None:
                self._part[number] = part

    def rename(self, before: str, after: str) -> None:
        """Say of the live storages of a part that they are of another one."""
        for number in self._references:
            if self._part[number] == before:
                self._part[number] = after

    def peaks(self) -> dict[Moment, dict[str, int]]:
        """Bytes by part, at the time when most were alive within each moment; empty parts are left out."""
        alive: dict[str, int] = defaultdict(int)
        total = 0
        most: dict[Moment, int] = {}
        found: dict[Moment, dict[str, int]] = {}
        for moment, event in self._events:
            number = event if event >= 0 else ~event
            size = self._bytes[number] if event >= 0 else -self._bytes[number]
            alive[self._part[number] or TEMPORARY] += size
            total += size
            if event >= 0 and total > most.get(moment, -1):
                most[moment], found[moment] = total, dict(alive)
        return {moment: {part: size for part, size in parts.items() if size} for moment, parts in found.items()}


class LayerWatch:
    """Tells a ledger which decoder layer is at work, and which tensors a layer keeps for its backward pass.

    With checkpointing, a layer runs again in the backward pass, and what that leaves behind is kept for it too.

    Args:
        layers: of a model of transformers, for which checkpointing has been switched on or off.
    """

    def __init__(self, ledger: Ledger, layers: nn.ModuleList) -> None:
        self._ledger = ledger
        self.backward = False
        for number, layer in enumerate(layers):
            place = _place(number, len(layers))
            layer.forward = self._watched(layer.forward, place)
            checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
            if checkpoint is not None:
                layer._gradient_checkpointing_func = self._checkpointed(checkpoint, place)

    def _watched(self, forward: Callable[..., Any], place: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._inside(place):
                result = forward(*args, **kwargs)
            hidden = result[0] if isinstance(result, tuple) else result
            if not self.backward and hidden.requires_grad:
                hidden.register_hook(lambda _: self._enter(place))
            return result

        return watched

    def _checkpointed(self, checkpoint: Callable[..., Any], place: str) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
            def recomputable(*args: Any) -> Any:
                with self._inside(place):
                    return function(*args)

            return checkpoint(recomputable, *args)

        return checkpointed

    @contextmanager
    def _inside(self, place: str) -> Iterator[None]:
        first = self._ledger.count()
        self._enter(place)
        try:
            yield
        finally:  # recomputing ends with an exception as soon as all is there
            if self.backward:
                self._ledger.name_unnamed(ACTIVATIONS, first)
            else:
                self._enter("")

    def _enter(self, place: str) -> None:
        self._ledger.moment = self._ledger.moment._replace(place=place)


def _our_function() -> str:
    """Name of the function of spiel_peft that has been called last and not returned yet."""
    frame = sys._getframe(3)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("spiel_peft"):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_name


def _place(number: int, layers: int) -> str:
    return {layers - 1: "last", 0: "first", 1: "second"}.get(number, "middle")


def name_base(ledger: Ledger, model: nn.Module) -> None:
    """Name everything that a frozen model consists of, the parts of quantized weights too."""
    ledger.name(BASE, [*model.parameters(), *model.buffers()])
    for module in model.modules():
        _name_quantization(ledger, getattr(getattr(module, "weight", None), "quant_state", None))


def _name_quantization(ledger: Ledger, state: Any) -> None:
    if state is not None:
        ledger.name(BASE, vars(state).values())
        _name_quantization(ledger, state.state2)


def name_training(ledger: Ledger, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Name what belongs to training a model with an adapter, as far as it exists now."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ledger.name(VALUES, trained)
    ledger.name(GRADIENTS, [parameter.grad for parameter in trained])
    for state in optimizer.state.values():
        ledger.name(OPTIMIZER, state.values())
    for delta in (module for module in model.modules() if isinstance(module, SparseDelta)):
        ledger.name(INDICES, [delta.indices])
        ledger.name(OPTIMIZER, [delta.state.row, delta.state.col])
        ledger.name(WINDOW, vars(delta.state.current).values())
        if delta.state.window is not None:
            ledger.name(WINDOW, vars(delta.state.window).values())
    for buffers in workspace._free.values():
        ledger.name(WORKSPACE, buffers)
