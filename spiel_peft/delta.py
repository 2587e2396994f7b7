"""`SparseDelta`: the indices and values with which one adapter changes one weight."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from spiel_kernels import Largest, check_index_set, index_dtype, sample_positions
from spiel_kernels.index_set import seeded_generator

from .adapter_format import check_cast, check_indices_and_values, check_training_state, check_values
from .call_stack import prepares_sharding
from .state import STATE_KEYS, RunSettings, TrainingState

if TYPE_CHECKING:
    from .config import SpIELConfig

# Every live delta of the process. Optimizer hooks look here for the deltas of the parameters that they step.
LIVE_DELTAS: weakref.WeakSet[SparseDelta] = weakref.WeakSet()


class WeightGradient(Protocol):
    """The gradient of a weight in one backward pass, computed only where it is asked for."""

    def gather_sets(self, index_sets: Sequence[Tensor]) -> list[Tensor]:
        """Gradient ``[k]`` at sorted flat positions ``[k]``, float32 or float64, for each set of them."""

    def largest(self, k: int, wait: bool) -> Largest:
        """The (at most) k largest absolute entries that are not zero.

        Args:
            wait: whether a GPU may be waited for. If not, a sample may mislead, which `Largest.found` tells.
        """


class Collector(Protocol):
    """Receives each gradient of a delta and may ask for gradients at more positions.

    A forward pass calls the first method, where the layer runs on a GPU. A backward pass calls the other three in this
    order, once for each use of the layer; it must not wait for a GPU.
    """

    def expect(self, delta: SparseDelta, dtype: torch.dtype) -> None:
        """Do what waits for the device before a backward pass gathers gradients.

        Args:
            delta: of a linear layer.
            dtype: of its inputs and output gradients.
        """

    def prepare(self, delta: SparseDelta, gradient: WeightGradient) -> None:
        """Do what has to be done before the delta's gradient is gathered.

        Args:
            delta: its values are about to get their gradient.
            gradient: the weight gradient, to be asked for its largest entries.
        """

    def wanted(self, delta: SparseDelta) -> Tensor | None:
        """Sorted positions ``[c]`` at which the weight gradient of this use is wanted as well, if any. No effects."""

    def collect(self, delta: SparseDelta, active: Tensor, candidates: Tensor | None) -> None:
        """Receive the gradient of the delta's values ``[k]`` and, if any positions were wanted, that there ``[c]``."""


@dataclass(eq=False)
class RunRecord:
    """What this process has found out about a run. It is neither copied nor pickled with the run.

    Attributes:
        trainer, trainer_state: the Hugging Face trainer of the run and its TrainerState, as weak references. Every
            `train()` makes a new TrainerState.
        length_from_trainer: whether the trainer told the length of the run; the next trainer is asked again.
        ranks: the process group that the user chose with `set_data_parallel_group`, None for this process alone;
            "auto" where the user chose nothing.
        averaging: id of the autograd pass at whose end the gradients of the run will be averaged over the ranks.
        ranks_compared: whether the ranks were found to start from the same deltas.
        engine_checked: whether DeepSpeed's engines were searched for the deltas of the run.
        warned_unheld: whether the user was warned that no optimizer steps the deltas.
        warned_unreached: whether deltas that got no gradient were looked for, and the user was warned of them.
        steps_without_gradient: optimizer steps for which no delta of the adapter had a gradient.
        unfinished: finishes the close that an exception has interrupted, if one has.
    """

    trainer: weakref.ref[Any] | None = None
    trainer_state: weakref.ref[Any] | None = None
    length_from_trainer: bool = False
    ranks: Any = "auto"
    averaging: int | None = None
    ranks_compared: bool = False
    engine_checked: bool = False
    warned_unheld: bool = False
    warned_unreached: bool = False
    steps_without_gradient: int = 0
    unfinished: Callable[[], None] | None = None


class AdapterRun:
    """What all deltas of one adapter in one model share.

    Attributes:
        config: the adapter's config.
        adapter_name: its name.
        total_steps: length of the run in optimizer steps, None while it is not known.
        log: one entry per close, see `spiel_peft.cycle.close.CycleReport`.
        refused: what was wrong with the file that the adapter was half loaded from; it cannot be used then.
        record: what holds in this process only.
    """

    def __init__(self, config: SpIELConfig, adapter_name: str) -> None:
        self.config = config
        self.adapter_name = adapter_name
        self.total_steps: int | None = config.total_steps
        self.log: list[Any] = []
        self.refused: str | None = None
        self.record = RunRecord()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "record"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.record = RunRecord()

    def settle(self) -> None:
        """Finish a close that an exception has interrupted, before deltas are used, stepped, saved or copied."""
        if self.record.unfinished is not None:
            self.record.unfinished()

    def deltas(self) -> list[SparseDelta]:
        """The adapter's deltas, ordered by module name."""
        return sorted((d for d in LIVE_DELTAS if d.run is self), key=lambda d: d.module_name)


class SparseDelta(nn.Module):
    """A sparse set of trained differences to one weight.

    Args:
        run: what the adapter's deltas share.
        module_name: full name of the adapted module; seeds are derived from it.
        weight_shape: shape of the weight as stored (for a quantized one, of the dequantized matrix).
        indices: ``[k]`` sorted, unique flat positions in that weight, int32 below 2**31 elements, else int64.
        values: ``[k]`` floating, the differences.

    `scale` is a factor of the deltas wherever they are used, 1 unless a user sets another one (diffusers'
    `set_adapters(..., weights)`). It is not saved.

    The parameter `values` and the persistent buffer `indices` keep their length for life; training changes both in
    place. Training state (see `TrainingState`) travels in adapter files under optional keys that start with ``spiel_``
    and is taken back by `load_state_dict`.
    """

    values: nn.Parameter
    indices: Tensor
    scale: float = 1.0

    def __init__(
        self,
        run: AdapterRun,
        module_name: str,
        weight_shape: tuple[int, ...],
        indices: Tensor,
        values: Tensor,
    ) -> None:
        super().__init__()
        self.run = run
        self.module_name = module_name
        self.weight_shape = tuple(weight_shape)
        self.values = nn.Parameter(values)
        self.register_buffer("indices", indices, persistent=True)
        self.keep_dtype: torch.dtype = values.dtype
        self._uncast: Tensor | None = None  # values from before a cast, while they are cast
        self.state = TrainingState()
        self.untouched = True  # neither loaded nor trained since it was created
        self.indices_assigned = False
        self.reindexed = False  # indices were loaded, and the optimizer's state may still be that of others
        self.collector: Collector | None = None
        self._checked: dict[str, Tensor] = {}  # tensors found sound, until they are loaded
        LIVE_DELTAS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        self.run.settle()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        LIVE_DELTAS.add(self)

    @property
    def rows(self) -> int:
        return self.weight_shape[0]

    @property
    def cols(self) -> int:
        return self.numel // self.rows

    @property
    def numel(self) -> int:
        return math.prod(self.weight_shape)

    @property
    def k(self) -> int:
        return self.indices.numel()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return `pair`. Layers call the module instead, so that accelerate's hooks load offloaded tensors first.

        Raises:
            ValueError: the adapter was half loaded from a damaged file.
            RuntimeError: DeepSpeed's ZeRO stage 3 has split the values.
        """
        if self.run.refused is not None:
            raise ValueError(self.run.refused)
        if "ds_id" in self.values.__dict__:
            raise RuntimeError(
                "SpIEL does not work under DeepSpeed's ZeRO stage 3, which splits the deltas themselves: use FSDP2 "
                "(Accelerate: fsdp_version=2, see examples/accelerate/fsdp2.yaml)"
            )
        return self.pair()

    def pair(self) -> tuple[Tensor, Tensor]:
        """Indices ``[k]`` and the values ``[k]`` times `scale`."""
        self.run.settle()
        return self.indices, self.values if self.scale == 1.0 else self.values * self.scale

    def extra_repr(self) -> str:
        return f"num_deltas={self.k}, density={self.k / self.numel:.4g}"

    # Precision: a delta of 0.02 in bfloat16 does not move under updates of 1e-5.

    def restore_dtype(self) -> None:
        """Undo a trainer's cast of the values, in place so that optimizers keep their reference.

        Without loss if the values from before the cast are known and the cast ones have not changed since.
        """
        if self._parameters["values"].dtype != self.keep_dtype:
            self.values.data = undo_cast(self.values.data, self.keep_dtype, self._values_before_cast())
            if self.values.grad is not None:
                self.values.grad = self.values.grad.to(self.keep_dtype)
        if self._uncast is not None:  # assigning to a module is slow, and this is every forward pass
            self._uncast = None

    def _values_before_cast(self) -> list[Tensor]:
        # A trainer that writes to `.data` leaves no trace, but TRL has copied the values to a reference adapter before.
        copies = [d for d in LIVE_DELTAS if d.run.config is self.run.config and d.module_name == self.module_name]
        kept = [self._uncast] if self._uncast is not None else []
        return kept + [delta.values.data for delta in copies if delta is not self]

    def train(self, mode: bool = True) -> SparseDelta:
        super().train(mode)
        if mode:
            self.restore_dtype()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseDelta:
        if prepares_sharding():
            return self
        before, keeps_contents = self.values.data, _keeps_contents(fn, self.indices)
        super()._apply(fn, recurse)
        device = self.values.device
        if device.type != "meta" and not keeps_contents:
            self._start_again()
            return self
        if device.type != "meta":
            self.state.move(lambda tensor: tensor.to(device))
        if self.values.dtype == before.dtype:
            # The model was moved, not cast by the user. So a cast that a trainer has made before can be undone now.
            self.restore_dtype()
        elif before.dtype == self.keep_dtype:
            self._uncast = before
        return self

    def _start_again(self) -> None:
        """Draw the positions anew, with values as at the start; `to_empty` has left tensors without contents."""
        positions = first_positions(self.run.config, self.module_name, self.numel, self.k)
        with torch.no_grad():
            self.indices.copy_(positions)
            self.values.copy_(first_values(self.run.config, self.k))
        self.state = TrainingState()
        self.untouched = True

    # State dict

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("values", "indices") and getattr(value, "_is_hf_initialized", False):
            self._check_assigned(name, value)
        super().__setattr__(name, value)

    def _check_assigned(self, name: str, tensor: Tensor) -> None:
        """Judge a tensor that transformers' `load_adapter` assigns: one by one, indices first, past PEFT's loaders."""
        if name == "indices":
            self.indices_assigned = True
            what = check_index_set(tensor, self.numel)
            if what is None and tensor.shape != self.indices.shape:
                what = f"must have shape ({self.k},), got {tuple(tensor.shape)}"
            problem = ("indices", what) if what is not None else None
        elif self.indices_assigned:
            problem = check_values(tensor.detach(), self.indices)
        else:
            problem = ("indices", "is missing, or of another length than its values")
        if problem is not None:
            self.run.refused = (
                f"The file of adapter {self.run.adapter_name!r} is refused: tensor "
                f"'{self.module_name}.spiel_delta.{problem[0]}' {problem[1]}"
            )
            raise ValueError(self.run.refused)
        self.untouched = False
        self.state = TrainingState()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not prepares_sharding():
            self.run.settle()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if prepares_sharding():
            self.note_checked({})
            return
        problems = self.problems_with(state_dict, prefix)
        self.note_checked({})
        training = {key: state_dict.pop(prefix + key) for key in STATE_KEYS if prefix + key in state_dict}
        # PEFT's loaders and `SpIELModel` check everything first; this guards a delta that is loaded by itself.
        if problems:
            error_msgs.extend(problems)
            return
        before = None if self.untouched or self.indices.is_meta else self.indices.clone()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "indices" in state_dict:
            self.reindexed |= before is not None and not torch.equal(before, self.indices.to(before.device))
            self.state = TrainingState.from_tensors(training, self.indices.device)
            self.untouched = False

    @property
    def settings(self) -> RunSettings:
        """What the training state depends on."""
        c = self.run.config
        return RunSettings(self.k, (self.rows, self.cols), c.growth, c.regrow_every, c.accumulation_steps)

    def problems_with(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """What keeps this delta from being loaded from `state_dict`, where its keys start with `prefix`."""
        names = ("indices", "values", *STATE_KEYS)
        incoming = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        checked = self._checked
        if incoming.keys() == checked.keys() and all(tensor is checked[name] for name, tensor in incoming.items()):
            return []
        wrong_sizes = [
            f"size mismatch for {prefix}{name}: the checkpoint has shape {tuple(incoming[name].shape)}, the model "
            f"({self.k},), another budget; set r, density or num_deltas as the checkpoint has it"
            for name in ("indices", "values")
            if name in incoming and incoming[name].shape != self.indices.shape
        ]
        if wrong_sizes:
            return wrong_sizes
        problem = (
            check_indices_and_values(incoming, self.numel)
            or check_cast(incoming, self.values.dtype)
            or check_training_state(incoming, self.settings)
        )
        if problem is not None:
            return [f"{prefix}{problem[0]} {problem[1]}"]
        self.note_checked(incoming)
        return []

    def note_checked(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember tensors, by name, that were found sound for this delta: `problems_with` does not check them again.

        The note lasts until the next load. Pass an empty dict to drop it.
        """
        self._checked = dict(tensors)

    def training_tensors(self) -> dict[str, Tensor]:
        """Training state as it is saved, with the settings it depends on; empty before the first step."""
        self.run.settle()
        tensors = self.state.tensors()
        return {**tensors, **self.settings.tensors()} if tensors else {}


def first_positions(config: SpIELConfig, module_name: str, numel: int, k: int) -> Tensor:
    """The positions of a new delta: int64 ``[k]`` on the CPU, sorted, drawn by the config's seed and the module."""
    with torch.device("cpu"):  # a model may be built under another default device, "meta" for one
        return sample_positions(numel, k, seeded_generator(config.seed, module_name, 0))


def first_values(config: SpIELConfig, k: int) -> Tensor:
    """The values of a new delta: float32 ``[k]``, zeros, or random with ``init_weights=False``.

    They come from the global generator, as for every PEFT method: two adapters of one config differ.
    """
    return torch.zeros(k) if config.init_weights else torch.randn(k) * 0.1


def _keeps_contents(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    """Whether `fn`, as given to `nn.Module._apply`, keeps what is in a tensor like this one; `to_empty` does not."""
    if tensor.is_meta:
        return fn(tensor[:0]).is_meta
    # Numbers that memory which was just freed is unlikely to hold: 2**31 - 1 downwards.
    probe = torch.arange(2**31 - 1, 2**31 - 17, -1, device=tensor.device)
    after = fn(probe)
    return after.is_meta or torch.equal(after.to(probe), probe)


def undo_cast(values: Tensor, dtype: torch.dtype, candidates: list[Tensor]) -> Tensor:
    """Undo a cast of values ``[k]`` to lower precision.

    Returns:
        A copy of the first of `candidates` ``[k]`` that has the wanted `dtype` and gives `values` when it is cast. If
        there is none, the cast has lost digits for good: `values` in that dtype.
    """
    for exact in candidates:
        plain = type(values) is type(exact) is Tensor and not (values.is_meta or exact.is_meta)
        if plain and exact.dtype == dtype and exact.shape == values.shape and torch.equal(exact.to(values), values):
            return exact.to(values.device, copy=True)
    return values.to(dtype)


def new_indices(positions: Tensor, numel: int, device: torch.device) -> Tensor:
    """int64 positions as an index buffer: the right width, on the right device."""
    return positions.to(device=device, dtype=index_dtype(numel))
