"""Combines adapters into one, read from files or in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import SpIELConfig
from ..delta import SparseDelta
from ..files.adapter_file import AdapterFile, StoredDelta, config_of_deltas
from ..files.tensors import Progress
from ..targets import check_unmerged
from .active import adapters_in, check_existing, containers, deltas_by_module, modules_of_type
from .overlap import OverlapReport, overlap
from .rules import Combination, Pair, check_adapter_names, check_weight_count, combine_deltas


def combine_adapters(
    adapters: Sequence[AdapterFile],
    weights: Sequence[float],
    combination_type: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    seed: int = 0,
    drop_zeros: bool = False,
    names: Sequence[str] | None = None,
    check_base: bool = True,
    progress: Progress | None = None,
) -> AdapterFile:
    """Combine adapters that were read from files; `write_adapter` writes the result.

    Args:
        adapters: the adapters, as `read_adapter` returns them.
        weights: one number each, negative ones too.
        combination_type, density, majority_sign_method, seed, drop_zeros: see `Combination`.
        names: what messages call the adapters; by default their numbers in the list, from 1.
        check_base: refuse adapters that name different base models. Pass False if one model has two names.
        progress: called as ``progress(done, total, what)`` after every module.

    Raises:
        ValueError: the adapters do not go together, or the result is not finite or empty.
    """
    how = Combination(tuple(weights), combination_type, density, majority_sign_method, seed, drop_zeros)
    labels = [str(i + 1) for i in range(len(adapters))] if names is None else list(names)
    if len(labels) != len(adapters) or len(set(labels)) != len(labels):
        raise ValueError(f"names must be {len(adapters)} distinct names, got {labels}")
    if not adapters:
        raise ValueError("adapters is empty: give at least one adapter")
    check_weight_count(how.weights, adapters)
    files = dict(zip(labels, adapters, strict=True))
    configs = {name: file.config for name, file in files.items()}
    check_combinable(configs)
    if check_base:
        _check_bases(configs)
    others = _joined(files)
    pairs = [{name: (stored.indices, stored.values) for name, stored in file.deltas.items()} for file in adapters]
    deltas = combine_modules(pairs, how, progress)
    return AdapterFile(combined_config(configs, deltas), deltas, others)


def combine_modules(
    adapters: Sequence[Mapping[str, Pair]], how: Combination, progress: Progress | None = None
) -> dict[str, StoredDelta]:
    """Combine the deltas of adapters, each given as indices and values ``[k]`` by module name.

    Modules without deltas in the result are left out.

    Raises:
        ValueError: no module has deltas in the result, or a combined value is not finite.
    """
    combined = {}
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter))
    for done, module in enumerate(modules, start=1):
        indices, values = combine_deltas([adapter.get(module) for adapter in adapters], how, module)
        if indices.numel():
            combined[module] = StoredDelta(indices, values)
        if progress is not None:
            progress(done, len(modules), module)
    if not combined:
        raise ValueError(
            "nothing is left of these adapters: they hold no deltas, or density pruned all of them, or drop_zeros "
            "dropped all of them; raise density or pass drop_zeros=False"
        )
    return combined


def check_combinable(configs: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the adapter, if these (configs by adapter name) cannot be combined."""
    for name, config in configs.items():
        if not isinstance(config, SpIELConfig):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(f"Adapter {name!r} is not a SpIEL adapter: its peft_type is {kind!r}")
        if config.bias != "none":
            raise ValueError(
                f"Adapter {name!r} was trained with bias={config.bias!r}: it has changed biases of the base model "
                "itself, which have no weighted sum. Combine adapters with bias='none'."
            )
    tied = {name: config.ensure_weight_tying for name, config in configs.items()}
    if len(set(tied.values())) > 1:
        raise ValueError(
            f"ensure_weight_tying differs between the adapters ({tied}): a delta of one would apply to a module that "
            "the other leaves alone"
        )
    owners = [name for name, config in configs.items() if config.trainable_token_indices]
    if len(owners) > 1:
        raise ValueError(
            f"Adapters {owners} cannot be combined: each has trained tokens in full (trainable_token_indices), which "
            "have no weighted sum"
        )


def combined_config(configs: Mapping[str, SpIELConfig], deltas: Mapping[str, StoredDelta]) -> SpIELConfig:
    """The config of a combination: the first adapter's, with the counts of the result and all modules saved in full.

    Args:
        configs: by adapter name, in their order, after `check_combinable`.
        deltas: the result, by module name.
    """
    saved = [name for config in configs.values() for name in config.modules_to_save or ()]
    tokens = [config.trainable_token_indices for config in configs.values() if config.trainable_token_indices]
    return config_of_deltas(
        deltas,
        next(iter(configs.values())),
        # The first adapter's run is over: the result can be trained, and begins with the deltas it holds.
        inference_mode=False,
        init_weights=True,
        delta_dtype=_delta_dtype([config.delta_dtype for config in configs.values()]),
        modules_to_save=list(dict.fromkeys(saved)) or None,
        trainable_token_indices=tokens[0] if tokens else None,
    )


def _delta_dtype(names: Sequence[str | None]) -> str | None:
    dtypes = [getattr(torch, name) for name in names if name is not None]
    if len(dtypes) < len(names):
        return None
    return str(reduce(torch.promote_types, dtypes)).removeprefix("torch.")


def _check_bases(configs: Mapping[str, SpIELConfig]) -> None:
    named = {name: config.base_model_name_or_path for name, config in configs.items()}
    if len({base for base in named.values() if base}) > 1:
        raise ValueError(
            f"base_model_name_or_path differs between the adapters ({named}): deltas to different weights do not add "
            "up. Pass check_base=False if this is one model by several names."
        )


def _joined(files: Mapping[str, AdapterFile]) -> dict[str, Tensor]:
    """The tensors that the adapters saved in full. Raises ValueError if two adapters saved the same one."""
    owners: dict[str, str] = {}
    for name, file in files.items():
        for key in file.others:
            if key in owners:
                raise ValueError(
                    f"Adapters {owners[key]!r} and {name!r} cannot be combined: both have trained {key!r} in full "
                    "(modules_to_save), which has no weighted sum"
                )
            owners[key] = name
    return {key: files[name].others[key] for key, name in owners.items()}


def add_combination(tuner: BaseTuner, adapters: Sequence[str], adapter_name: str, how: Combination) -> OverlapReport:
    """Add a new adapter to a model, combined from others that it has: see `SpIELModel.add_weighted_adapter`."""
    names = check_adapter_names(adapters)
    check_weight_count(how.weights, names)
    _check_name(tuner, adapter_name)
    check_existing(tuner, names)
    check_unmerged(tuner, adapter_name, "combined")
    configs = {name: tuner.peft_config[name] for name in names}
    check_combinable(configs)
    donors = _donors(tuner, names)
    deltas = combine_modules([_pairs(tuner, name) for name in names], how)
    config = combined_config(configs, deltas)
    report = overlap(tuner, names)
    _inject(tuner, adapter_name, config)
    with torch.no_grad():
        _fill(deltas_by_module(tuner, adapter_name), deltas)
        for wrapper, donor in donors:
            _copy_extras(wrapper, donor, adapter_name)
    return report


def _check_name(tuner: BaseTuner, name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"adapter_name must be a non-empty string, got {name!r}")
    if name in tuner.peft_config:
        raise ValueError(f"adapter_name={name!r} exists already: pass another name, or delete_adapter({name!r}) first")


def _pairs(tuner: BaseTuner, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Indices and values ``[k]`` of an adapter by module name. Raises ValueError if they are not in memory."""
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
    """The modules trained in full, each with its adapter. Raises ValueError if two adapters trained one module."""
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
    """Add an adapter to a model; it does not require a gradient, and all other parameters do or do not as before."""
    # PEFT leaves other parameters alone, except in modules of the same name as the adapter.
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
    """Copy indices and values into the deltas of a model, by module name."""
    for module, stored in deltas.items():
        delta = into[module]
        delta.indices.copy_(stored.indices)
        delta.values.data.copy_(stored.values)
        delta.untouched = False


def _copy_extras(wrapper: AuxiliaryTrainingWrapper, donor: str, adapter_name: str) -> None:
    """Copy the parameters of one adapter in a module that PEFT wraps as a whole to another adapter."""
    for container in containers(wrapper):
        if donor not in container:
            continue
        source, target = container[donor], container[adapter_name]
        if isinstance(source, nn.Module):
            target.load_state_dict(source.state_dict())
        else:
            target.data.copy_(source)
