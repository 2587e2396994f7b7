"""Several adapters active at once: some in training, others frozen, and frozen language adapters that take turns.

A task adapter that is trained over changing language adapters meets the languages that it will be combined with while
it learns (target-language-ready training; Parović et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainerCallback

from spiel_kernels.index_set import seeded_generator

from .. import checks as check
from ..layers import SpIELLayer
from ..targets import check_unmerged
from .rules import check_adapter_names

if TYPE_CHECKING:
    from ..delta import SparseDelta


ORDERS = ("shuffled", "in_order")


def activate(model: PeftModel | nn.Module, adapters: Sequence[str], train: Sequence[str] = ()) -> list[str]:
    """Make exactly these adapters active: their deltas add up. Only the adapters named in `train` get gradients.

    PEFT's `set_adapter` takes one name on a `PeftModel`, and makes what it activates trainable. Make the optimizer
    after this call, from the parameters that require a gradient. Adapters in training are put first: a Trainer that
    resumes a checkpoint takes the first adapter for the one in training, and makes it the only active one
    (`KeepActive` undoes that).

    Args:
        model: a `PeftModel`, or the tuner in it.
        adapters: names of adapters of the model. Several adapters that each saved a module in full cannot be active
            together.
        train: which of them to train.

    Returns:
        The active adapters in the order in which they add up.

    Raises:
        ValueError: an unknown or repeated name, or adapters that exclude each other; nothing has changed then.
    """
    names = check_adapter_names(adapters)
    trained = check_adapter_names(train, "train") if train else []
    tuner = tuner_of(model)
    check_existing(tuner, names)
    strange = [name for name in trained if name not in names]
    if strange:
        raise ValueError(f"train names {strange}, which are not in adapters={names}: add them there")
    order = [*trained, *(name for name in names if name not in trained)]
    for wrapper in modules_of_type(tuner, AuxiliaryTrainingWrapper):
        wrapper.check_set_adapter(order)
    tuner.set_adapter(order, inference_mode=True)
    tuner.set_requires_grad(trained, True)
    for name in trained:
        # With the config of an adapter for inference, checkpoints would lack the training state.
        tuner.peft_config[name].inference_mode = False
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        # PEFT uses the config of this adapter.
        model.active_adapter = order[0]
    return order


class KeepActive(TrainerCallback):
    """Activates adapters again when a Trainer begins to train, since resuming leaves only one of them active.

    Args:
        adapters, train: as for `activate`.
    """

    def __init__(self, adapters: Sequence[str], train: Sequence[str]) -> None:
        self.adapters = check_adapter_names(adapters)
        self.train = check_adapter_names(train, "train")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        activate(model, self.adapters, self.train)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of data parallelism and torch.compile."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def tuner_of(model: nn.Module) -> BaseTuner:
    """The tuner in a model that PEFT made."""
    model = unwrapped(model)
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, BaseTuner):
        raise ValueError(
            f"model must be a PeftModel with adapters (get_peft_model makes one), got {type(model).__name__}"
        )
    return tuner


def check_existing(tuner: BaseTuner, names: Sequence[str]) -> None:
    """Raise a ValueError if a model lacks one of these adapters."""
    unknown = [name for name in names if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"Adapters {unknown} do not exist; there are {sorted(tuner.peft_config)}")


def modules_of_type(model: nn.Module, kind: type[Any]) -> list[Any]:
    """All modules of a class in a model, in the model's order."""
    return [module for module in model.modules() if isinstance(module, kind)]


def containers(wrapper: AuxiliaryTrainingWrapper) -> list[nn.ModuleDict | nn.ParameterDict]:
    """The containers, by adapter name, in a module that PEFT wraps as a whole (saved in full, or trained tokens)."""
    return [attrgetter(path)(wrapper) for path in wrapper.adapter_layer_names]


def adapters_in(wrapper: AuxiliaryTrainingWrapper) -> set[str]:
    """Names of the adapters that have parameters in a module that PEFT wraps as a whole."""
    return {name for container in containers(wrapper) for name in container}


def deltas_by_module(tuner: nn.Module, adapter: str) -> dict[str, SparseDelta]:
    """An adapter's deltas by the name of the module they were made for; tied modules share one."""
    layers = modules_of_type(tuner, SpIELLayer)
    deltas = (layer.spiel_delta[adapter] for layer in layers if adapter in layer.spiel_delta)
    return {delta.module_name: delta for delta in deltas}


def language_of_batch(batch: int, languages: Sequence[str], order: str = "shuffled", seed: int = 0) -> str:
    """The language of a batch; it depends on the arguments and nothing else.

    So all processes that count batches alike choose the same language, and a resumed run does too.

    Args:
        batch: number of the batch, from 0.
        languages: names to choose from, at least one.
        order: "in_order": one after the other. "shuffled": every round of ``len(languages)`` batches has each of them
            once, in an order of its own.
        seed: determines these orders.
    """
    round_, place = divmod(batch, len(languages))
    if order == "shuffled":
        generator = seeded_generator(seed, "languages", round_)
        place = int(torch.randperm(len(languages), generator=generator)[place])
    return languages[place]


class LanguageCycler:
    """Keeps one of several frozen language adapters active under the adapters in training, another one for each batch.

    The constructor activates the task adapters for training and freezes the languages: make the optimizer after it.
    In a loop of your own call `advance` before the forward pass of every batch; with a Trainer use
    `LanguageCyclerCallback`. Switching touches neither gradients nor the optimizer's state: accumulated gradients of a
    task adapter are the sum over the languages of their batches.

    A backward pass uses the language of its forward pass even if another one is active by then. Layers that gradient
    checkpointing computes again use the active language: with checkpointing, finish each backward pass before the
    next `advance`. Violations raise a RuntimeError where they can be seen.

    Args:
        model: a `PeftModel`, or the `SpIELModel` in it, not merged.
        languages: names of SpIEL adapters, frozen from now on. They may not have modules saved in full.
        task: name or names of the adapters in training.
        order, seed: see `language_of_batch`.

    Attributes:
        batch: number of the batch whose language is active, from 0.

    Raises:
        ValueError: an unknown or repeated name, or adapters that cannot be used this way; nothing has changed then.
    """

    def __init__(
        self,
        model: PeftModel | nn.Module,
        languages: Sequence[str],
        task: str | Sequence[str],
        *,
        order: str = "shuffled",
        seed: int = 0,
    ) -> None:
        self.languages = check_adapter_names(languages, "languages")
        self.task = check_adapter_names([task] if isinstance(task, str) else task, "task")
        check.choice("order", order, ORDERS, 'Pass "shuffled" or "in_order".')
        self.order, self.seed = order, check.integer("seed", seed, 0, "Pass an int.")
        both = sorted(set(self.languages) & set(self.task))
        if both:
            raise ValueError(f"{both} are both in languages and in task: languages are frozen, the task is trained")
        self.model = model
        tuner = tuner_of(model)
        check_existing(tuner, [*self.languages, *self.task])
        check_unmerged(tuner, self.task[0], "trained")
        _check_switchable(tuner, self.languages)
        self._guard = _guard_of(tuner)
        self.batch = 0
        self._started = False
        self.restart()

    @property
    def language(self) -> str:
        """The language of the present batch."""
        return language_of_batch(self.batch, self.languages, self.order, self.seed)

    def restart(self) -> None:
        """Activate task and language again, after a Trainer that resumes, say, has changed the active adapters."""
        activate(self.model, [*self.task, self.language], train=self.task)

    def advance(self) -> str:
        """Switch to the language of the next batch, the first time to that of batch 0, and return its name."""
        return self.go_to(self.batch + 1 if self._started else self.batch)

    def go_to(self, batch: int) -> str:
        """Switch to the language of a batch, such as the one that a resumed run continues with; return its name."""
        batch = check.integer("batch", batch, 0, "Batches are counted from 0.")
        language = language_of_batch(batch, self.languages, self.order, self.seed)
        self.use(language)
        self.batch, self._started = batch, True
        return language

    def use(self, language: str | None) -> None:
        """Activate a language with the task, without counting a batch; to evaluate, for example. None: the task alone.

        Raises:
            ValueError: there is no such adapter, or it has saved whole modules.
            RuntimeError: a backward pass is under way, or adapters are merged.
        """
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError("the language cannot be switched while a backward pass is under way")
        tuner = tuner_of(self.model)
        names = list(self.task)
        if language is not None:
            check_existing(tuner, [language])
            _check_switchable(tuner, [language])
            names.append(language)
        layers: list[SpIELLayer] = modules_of_type(tuner, SpIELLayer)
        if any(layer.merged for layer in layers):
            raise RuntimeError(
                "the language cannot be switched while adapters are merged; call unmerge_adapter() first"
            )
        for layer in layers:
            layer.undo_interrupted()
            # PEFT's `set_adapter` would also change which adapters require a gradient.
            layer._active_adapter = list(names)
        tuner.active_adapter = list(names)
        self._guard.active = tuple(names)

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint of a loop of your own needs, besides the adapters."""
        return {
            "batch": self.batch,
            "started": self._started,
            "languages": list(self.languages),
            "order": self.order,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that `state_dict` was taken at.

        Raises:
            ValueError: the state is of a cycler with other languages, order or seed.
        """
        for name in ("languages", "order", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved state has {name}={state[name]!r}, this cycler {getattr(self, name)!r}: make it with "
                    "the same, or do not load the state"
                )
        self.batch, self._started = state["batch"], state["started"]
        self.restart()


class LanguageCyclerCallback(TrainerCallback):
    """Runs a `LanguageCycler` in transformers' Trainer: another language for every batch.

    With gradient accumulation every micro-batch is a batch. Batches are counted from the trainer's step, so resumed
    runs go on as they would have, and all ranks of a data-parallel run have the same language at the same time.

    Args:
        cycler: the cycler of the model that is trained.
        evaluate_with: adapter that is active in evaluations and after training, such as a language that training does
            not use. None: the language of the last batch.
    """

    def __init__(self, cycler: LanguageCycler, evaluate_with: str | None = None) -> None:
        self.cycler = cycler
        self.evaluate_with = evaluate_with
        if evaluate_with is not None:
            tuner = tuner_of(cycler.model)
            check_existing(tuner, [evaluate_with])
            _check_switchable(tuner, [evaluate_with])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.cycler.restart()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.cycler.go_to(state.global_step * args.gradient_accumulation_steps)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.cycler.advance()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.evaluate_with is not None:
            self.cycler.use(self.evaluate_with)


def _check_switchable(tuner: nn.Module, languages: Sequence[str]) -> None:
    """Refuse languages that have saved whole modules, which are not switched."""
    for wrapper in modules_of_type(tuner, AuxiliaryTrainingWrapper):
        full = [name for name in languages if name in adapters_in(wrapper)]
        if full:
            raise ValueError(
                f"Adapters {full} have saved whole modules or tokens (modules_to_save, trainable_token_indices), which "
                "are not switched from batch to batch: make their deltas sparse, with target_modules"
            )


class _Guard:
    """A forward hook that refuses gradient checkpointing under another language than that of the forward pass."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.seen: tuple[str, ...] = ()

    def __call__(self, layer: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:
            # An evaluation with another language may come before the backward pass.
            self.seen = self.active if layer.training else self.seen
        elif self.seen != self.active:
            raise RuntimeError(
                f"gradient checkpointing computes a forward pass again that ran with adapters {list(self.seen)}, but "
                f"{list(self.active)} are active now: call backward before switching to the next language"
            )


def _guard_of(tuner: nn.Module) -> _Guard:
    """The guard on one adapted layer of the model; a second cycler of a model uses the same one."""
    layers = modules_of_type(tuner, SpIELLayer)
    # Embeddings and the output layer, which are not checkpointed, come first or last.
    layer = layers[len(layers) // 2]
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _Guard):
            return hook
    guard = _Guard()
    layer.register_forward_pre_hook(guard)
    return guard
