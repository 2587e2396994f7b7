"""`add_weighted_adapter`: a new adapter of a model, combined from others it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import SpIELConfig
from ..delta import SparseDelta
from ..files.adapter_file import StoredDelta
from ..structure import check_unmerged
from .active import adapters_in, check_existing, containers, deltas_by_module, modules_of_type
from .combined import check_combinable, combine_modules, combined_config
from .overlap import OverlapReport, overlap
from .weighted import Combination, check_adapter_names, check_weight_count


class WeightedAdapters(BaseTuner):
    """The part of `SpIELModel` that combines adapters."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        seed: int = 0,
        drop_zeros: bool = False,
    ) -> OverlapReport:
        """Add an adapter whose deltas are a weighted combination of those of other adapters.

        The new adapter is an ordinary SpIEL adapter: frozen and inactive until it is set, saved with the number of its
        deltas per module. Active adapters and what is in training stay as they are. A module that one of the adapters
        has saved in full, and its trained tokens, are taken over as they are, without a weight.

        Args:
            adapters: names of SpIEL adapters, distinct.
            weights: one number each, negative ones too.
            adapter_name: name of the new adapter.
            combination_type, density, majority_sign_method, seed, drop_zeros: see `Combination`.

        Returns:
            What the adapters have in common.

        Raises:
            ValueError: adapters that do not exist or do not go together, a name that is taken, merged adapters, or a
                result that is not finite or empty. Nothing has changed then.
        """
        how = Combination(tuple(weights), combination_type, density, majority_sign_method, seed, drop_zeros)
        names = check_adapter_names(adapters)
        check_weight_count(how.weights, names)
        _check_name(self, adapter_name)
        check_existing(self, names)
        check_unmerged(self, adapter_name, "combined")
        configs = {name: self.peft_config[name] for name in names}
        check_combinable(configs)
        donors = _donors(self, names)
        deltas = combine_modules([_pairs(self, name) for name in names], how)
        config = combined_config(configs, deltas)
        report = overlap(self, names)
        _inject(self, adapter_name, config)
        with torch.no_grad():
            _fill(deltas_by_module(self, adapter_name), deltas)
            for wrapper, donor in donors:
                _copy_extras(wrapper, donor, adapter_name)
        return report


def _check_name(tuner: BaseTuner, name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"adapter_name must be a non-empty string, got {name!r}")
    if name in tuner.peft_config:
        raise ValueError(f"adapter_name={name!r} exists already: pass another name, or delete_adapter({name!r}) first")


def _pairs(tuner: BaseTuner, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {}
    for module, delta in deltas_by_module(tuner, name).items():
        indices, values = delta()
        if values.is_meta or type(values) is not nn.Parameter:
            raise ValueError(
                f"{module}: adapter {name!r} is sharded or has no data yet; combine adapters outside of that"
            )
        pairs[module] = indices, values.detach()
    return pairs


def _donors(tuner: BaseTuner, names: Sequence[str]) -> list[tuple[AuxiliaryTrainingWrapper, str]]:
    """Which adapter brings what is trained in full; two cannot bring the same."""
    donors = []
    for wrapper in modules_of_type(tuner, AuxiliaryTrainingWrapper):
        owners = [name for name in names if name in adapters_in(wrapper)]
        if len(owners) > 1:
            raise ValueError(
                f"Adapters {owners} cannot be combined: each has trained the same module in full (modules_to_save or "
                "trainable_token_indices), which has no weighted sum"
            )
        donors += [(wrapper, name) for name in owners]
    return donors


def _inject(tuner: BaseTuner, adapter_name: str, config: SpIELConfig) -> None:
    # PEFT keeps what is trained when it injects an adapter, except in modules that are called as the adapter is.
    before = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        tuner.peft_config.pop(adapter_name, None)
        raise
    tuner.set_requires_grad(adapter_name, False)
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)


def _fill(into: dict[str, SparseDelta], deltas: dict[str, StoredDelta]) -> None:
    for module, stored in deltas.items():
        delta = into[module]
        delta.indices.copy_(stored.indices)
        delta.values.data.copy_(stored.values)
        delta.untouched = False


def _copy_extras(wrapper: AuxiliaryTrainingWrapper, donor: str, adapter_name: str) -> None:
    for container in containers(wrapper):
        if donor not in container:
            continue
        source, target = container[donor], container[adapter_name]
        if isinstance(source, nn.Module):
            target.load_state_dict(source.state_dict())
        else:
            target.data.copy_(source)
