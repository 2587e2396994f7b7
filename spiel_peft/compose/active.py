"""Several adapters active at once, some of them in training and others frozen."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainerCallback

from ..layers import SpIELLayer
from .rules import check_adapter_names

if TYPE_CHECKING:
    from ..delta import SparseDelta


def activate(model: PeftModel | nn.Module, adapters: Sequence[str], train: Sequence[str] = ()) -> list[str]:
    """Make exactly these adapters active: their deltas add up. Those named in `train` get gradients, no other does.

    PEFT's `set_adapter` takes one name on a `PeftModel`, and makes what it activates trainable. Make the optimizer
    after this call, from the parameters that require a gradient. Adapters in training are put first: a Trainer that
    resumes a checkpoint takes the first one for the one it trains, and makes it the only active one (`KeepActive`
    undoes that).

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
        # Loaded for inference: checkpoints would leave out what a resumed run needs.
        tuner.peft_config[name].inference_mode = False
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        # PEFT looks up there which config applies.
        model.active_adapter = order[0]
    return order


class KeepActive(TrainerCallback):
    """Activates adapters again when a Trainer begins, which leaves a single one active when it resumes.

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
    unknown = [name for name in names if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"Adapters {unknown} do not exist; there are {sorted(tuner.peft_config)}")


def modules_of_type(model: nn.Module, kind: type[Any]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def containers(wrapper: AuxiliaryTrainingWrapper) -> list[nn.ModuleDict | nn.ParameterDict]:
    """What adapters keep in a module that PEFT wraps as a whole (a module saved in full, trained tokens)."""
    return [attrgetter(path)(wrapper) for path in wrapper.adapter_layer_names]


def adapters_in(wrapper: AuxiliaryTrainingWrapper) -> set[str]:
    """The adapters that keep something in such a module."""
    return {name for container in containers(wrapper) for name in container}


def deltas_by_module(tuner: nn.Module, adapter: str) -> dict[str, SparseDelta]:
    """An adapter's deltas by the name of the module they were made for; tied modules share one."""
    layers = modules_of_type(tuner, SpIELLayer)
    deltas = (layer.spiel_delta[adapter] for layer in layers if adapter in layer.spiel_delta)
    return {delta.module_name: delta for delta in deltas}
