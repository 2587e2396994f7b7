"""Splits the budget of an adapter: how many deltas each targeted weight gets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from peft.utils.other import get_pattern_key

from .checks import first_of
from .config import SpIELConfig
from .weights.base_weight import BaseInfo


def allocate_deltas(config: SpIELConfig, targets: Mapping[str, BaseInfo]) -> dict[str, int]:
    """Split the config's budget over the targeted modules.

    Args:
        config: the config, with exactly one budget; its patterns override the budget of single modules.
        targets: full module names and the descriptions of their base layers.

    Returns:
        Full module names and their numbers of deltas, each at least 1 and at most the size of the weight.

    Raises:
        ValueError: a `num_deltas` dict names a module that is not targeted, or a total is too small to give every
            module one value.
    """
    fixed = _pattern_counts(config, targets)
    if isinstance(config.num_deltas, dict):
        wanted = _listed_counts(config.num_deltas, targets)
    elif config.num_deltas is not None:
        rest = {name: info.numel for name, info in targets.items() if name not in fixed}
        wanted = _split_total(config.num_deltas - sum(fixed.values()), rest, config.num_deltas)
    elif config.density is not None:
        wanted = {name: density_count(config.density, info.numel) for name, info in targets.items()}
    else:
        wanted = {name: config.r * info.values_per_rank for name, info in targets.items()}
    wanted.update(fixed)
    return _clamp(wanted, targets)


def density_count(density: float, numel: int) -> int:
    """Number of values at a density: rounded half up, at least one."""
    return max(1, math.floor(density * numel + 0.5))


def _pattern_counts(config: SpIELConfig, targets: Mapping[str, BaseInfo]) -> dict[str, int]:
    """The counts of the modules that `rank_pattern` or `density_pattern` matches; warns about unused density keys."""
    counts: dict[str, int] = {}
    for name, info in targets.items():
        key = get_pattern_key(config.rank_pattern.keys(), name)
        if key in config.rank_pattern:
            counts[name] = config.rank_pattern[key] * info.values_per_rank
        key = get_pattern_key(config.density_pattern.keys(), name)
        if key in config.density_pattern:
            if name in counts:
                raise ValueError(
                    f"rank_pattern and density_pattern both match module {name!r}; let one of them match it"
                )
            counts[name] = density_count(config.density_pattern[key], info.numel)
    # PEFT itself warns about unused keys of rank_pattern.
    used = {get_pattern_key(config.density_pattern.keys(), name) for name in targets}
    unused = sorted(set(config.density_pattern) - used)
    if unused:
        warnings.warn(
            f"The following density_pattern keys did not match any targeted module and were ignored: {unused}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return counts


def _listed_counts(listed: dict[str, int], targets: Mapping[str, BaseInfo]) -> dict[str, int]:
    """The counts of a `num_deltas` dict, which must name exactly the targets."""
    unknown = sorted(set(listed) - set(targets))
    missing = sorted(set(targets) - set(listed))
    if unknown:
        raise ValueError(
            f"num_deltas names modules that are not targeted: {unknown[:5]}; use full module names of supported layers"
        )
    if missing:
        raise ValueError(f"num_deltas has no entry for the targeted modules {missing[:5]}; add one for each")
    return dict(listed)


def _split_total(total: int, sizes: dict[str, int], given: int) -> dict[str, int]:
    """Split a total in proportion to size by largest remainders, with an exact sum and at least one for each module.

    Args:
        total: number of deltas to split.
        sizes: module names and the numbers of entries of their weights.
        given: the `num_deltas` of the config, for errors.
    """
    if total < len(sizes) or (total and not sizes):
        what = f"{len(sizes)} modules share {total} of it and need at least one each"
        if not sizes:
            what = f"rank_pattern and density_pattern, which match every module, leave {total} of it over"
        raise ValueError(f"num_deltas={given} does not fit: {what}; change it, the patterns or the targets")
    counts: dict[str, int] = {}
    rest = dict(sizes)
    # A module whose share is below one gets one. That lowers the shares of the others, so the test is repeated.
    while small := [name for name, size in rest.items() if (total - len(counts)) * size < sum(rest.values())]:
        counts.update(dict.fromkeys(small, 1))
        rest = {name: size for name, size in rest.items() if name not in counts}
    left, whole = total - len(counts), sum(rest.values())
    counts.update({name: left * size // whole for name, size in rest.items()})
    by_remainder = sorted(rest, key=lambda name: (-(left * rest[name] % whole), name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _clamp(wanted: dict[str, int], targets: Mapping[str, BaseInfo]) -> dict[str, int]:
    """Lower counts above the size of the weight to that size, with a warning."""
    too_many = [name for name, count in wanted.items() if count > targets[name].numel]
    if too_many:
        warnings.warn(
            "The budget asks for more deltas than some weights have elements; they are trained whole: "
            f"{first_of(too_many)}.",
            stacklevel=2,
        )
    return {name: min(count, targets[name].numel) for name, count in wanted.items()}
