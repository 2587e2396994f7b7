"""Checks of single config values.

Each check returns the value in plain Python types that JSON can hold, or raises a ValueError. For the error, `field` is
the name of the config field and `remedy` a sentence that says what to pass instead.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_LIST_TYPES = (list, tuple, set, frozenset)
# The largest integer that files can hold: tensors and other programs' JSON readers have 64 bits.
LARGEST = 2**63 - 1
# Larger JSON files are refused unread. An index of 100,000 tensors has about a quarter of this.
JSON_BYTES = 32 << 20
# An adapter's config that counts the deltas of 30,000 modules has about half of this.
CONFIG_BYTES = 4 << 20
# More names or patterns in one field of a config would take minutes to compare with a model's.
_MOST_NAMES, _MOST_PATTERNS = 100_000, 1000
# Seconds of computing that a pattern may take on one name, and on all names of a model for each of them.
_MATCH_SECONDS, _MATCHES_SECONDS = 0.2, 2e-5
_TOO_LONG = 9
# Run in a process of its own, which a timer ends: nothing can interrupt a match in a thread. Prints what it is at.
_MATCHER = f"""
import json, re, signal, sys, time
patterns, names = json.load(sys.stdin)
limit = {_MATCH_SECONDS} + {_MATCHES_SECONDS} * len(names)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    match = re.compile(pattern).match
    began = time.process_time()
    for name in names:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_VIRTUAL, {_MATCH_SECONDS})
        match(name)
        if time.process_time() - began > limit:
            sys.exit({_TOO_LONG})
"""


def refuse(field: str, rule: str, value: Any, remedy: str) -> NoReturn:
    """Raise a ValueError in the form of all errors of the config: field, rule, value received, remedy."""
    raise ValueError(f"`{field}` {rule}, got {short(value)}. {remedy}")


def integer(field: str, value: Any, minimum: int, remedy: str) -> int:
    """An integer of at least `minimum` that a file can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        refuse(field, f"must be an integer of at least {minimum}", value, remedy)
    if value > LARGEST:
        refuse(field, "must be at most 2**63 - 1, the largest integer that can be saved", value, remedy)
    return int(value)


def density(field: str, value: Any, remedy: str) -> float:
    """A number above 0 and at most 1."""
    if not _is_number(value) or not 0 < value <= 1:
        refuse(field, "must be a number above 0 and at most 1", value, remedy)
    return float(value)


def fraction(field: str, value: Any, remedy: str) -> float:
    """A number from 0 to 1."""
    if not _is_number(value) or not 0 <= value <= 1:
        refuse(field, "must be a number from 0 to 1", value, remedy)
    return float(value)


def multiple(field: str, value: Any, remedy: str) -> float:
    """A finite number of at least 1."""
    if not _is_number(value) or not 1 <= value < math.inf:
        refuse(field, "must be a number of at least 1", value, remedy)
    return float(value)


def boolean(field: str, value: Any, remedy: str) -> bool:
    """True or False, nothing that only counts as such."""
    if not isinstance(value, bool):
        refuse(field, "must be True or False", value, remedy)
    return value


def choice(field: str, value: Any, choices: tuple[str | None, ...], remedy: str) -> str | None:
    """One of the given strings, or None if that is among them."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        refuse(field, f"must be one of {', '.join(map(repr, choices))}", value, remedy)
    return value


def regex(field: str, value: str, remedy: str) -> str:
    """A valid regular expression."""
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        refuse(field, f"must be a valid regular expression ({error})", value, remedy)
    return value


def regexes(field: str, values: Collection[str], remedy: str) -> None:
    """Refuse regular expressions that are not valid, or too many."""
    if len(values) > _MOST_PATTERNS:
        refuse(field, f"must hold at most {_MOST_PATTERNS} patterns", len(values), remedy)
    for value in values:
        regex(field, value, remedy)


def patterns_in_time(patterns: Iterable[tuple[str, str]], names: Iterable[str]) -> None:
    """Refuse regular expressions that would take for ever on these names; they come from a file.

    Args:
        patterns: names of config fields and the expressions as they will be matched.
        names: the names that they will be matched against.

    Raises:
        ValueError: names the field.
    """
    # With one choice, the work grows with the square of a name's length at most.
    risky = [(field, pattern) for field, pattern in patterns if sum(map(pattern.count, "*+?{|")) > 1]
    if not risky:
        return
    work = json.dumps([[pattern for _, pattern in risky], list(names)])
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    timed = hasattr(signal, "setitimer")  # by the computing time; else by the clock, which other programs slow down
    try:
        done = subprocess.run(command, input=work, capture_output=True, text=True, timeout=20 if timed else 2)
        ended, shown = done.returncode == _TOO_LONG or (timed and done.returncode == -signal.SIGVTALRM), done.stdout
    except subprocess.TimeoutExpired as error:
        ended, shown = True, error.stdout or ""
        shown = shown.decode() if isinstance(shown, bytes) else shown
    except (OSError, ValueError):
        return  # a program that is no Python interpreter, or that must not start others
    if ended:
        field, pattern = risky[int((shown.split() or ["0"])[-1])]
        refuse(
            field,
            "must be a regular expression that can be matched on module names in a moment",
            pattern,
            "Take out repetitions within repetitions, or list the names.",
        )


def json_object(path: Path, most_bytes: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises a ValueError that names the file if it is damaged, too large or too deep."""
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise ValueError(f"it has {size} bytes, more than the {most_bytes} that are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: its lists or objects are nested too deep") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {short(str(error))}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} cannot be read: it is not a JSON object")
    return value


def config_object(path: Path) -> dict[str, Any]:
    """The object in an ``adapter_config.json``. Raises a ValueError as `json_object` does, and for odd fields."""
    value = json_object(path, CONFIG_BYTES)
    for name in {"self", "cls"} & value.keys():  # PEFT would pass them on as arguments of methods
        raise ValueError(f"{path} cannot be read: it has the field {name!r}, which no config has")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean `x`?``, to be put after a sentence about an unknown name; empty if no known name is like it."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean `{found[0]}`?" if found else ""


def names(field: str, value: Any, remedy: str) -> list[str]:
    """A list, tuple or set of non-empty strings, as a list (sorted if it was a set)."""
    if not isinstance(value, _LIST_TYPES):
        refuse(field, "must be a list of names", value, remedy)
    if len(value) > _MOST_NAMES:
        refuse(field, f"must hold at most {_MOST_NAMES} names", len(value), remedy)
    for name in value:
        if not isinstance(name, str) or not name:
            refuse(field, "must hold non-empty strings only", name, remedy)
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def integers(field: str, value: Any, remedy: str) -> list[int]:
    """A list, tuple, set or range of integers >= 0, as a list."""
    if not isinstance(value, (*_LIST_TYPES, range)):
        refuse(field, "must be a list of integers", value, remedy)
    # Most are plain integers, of which there can be very many.
    plain = all(type(item) is int and 0 <= item <= LARGEST for item in value)
    return list(value) if plain else [integer(field, item, 0, remedy) for item in value]


def mapping(field: str, value: Any, remedy: str) -> dict[str, Any]:
    """A dict with non-empty strings as keys."""
    if not isinstance(value, Mapping):
        refuse(field, "must be a dict", value, remedy)
    for key in value:
        if not isinstance(key, str) or not key:
            refuse(field, "must have non-empty strings as keys", key, remedy)
    return dict(value)


def listed(items: Collection[str], limit: int = 5) -> str:
    """The first names of a collection in alphabetical order and quoted, for a message."""
    return first_of([repr(item) for item in sorted(items)], limit)


def first_of(items: Sequence[str], limit: int = 5) -> str:
    """The first names of a list and the number of the others, for a message."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def short(value: Any, limit: int = 200) -> str:
    """The `repr` of a value, cut after `limit` characters, for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list of lists of lists ...
        text = f"{type(value).__name__} that is too large to show"
    return text if len(text) <= limit else f"{text[:limit]}..."


def counts(field: str, value: dict[str, int], remedy: str) -> dict[str, int]:
    """A dict from module names to positive integers that is not empty."""
    if not value:
        refuse(field, "must name at least one module when it is a dict", value, remedy)
    named = mapping(field, value, remedy)
    return {name: integer(f"{field}[{short(name)}]", count, 1, remedy) for name, count in named.items()}


def token_indices(field: str, value: Any) -> list[int] | dict[str, list[int]]:
    """Rows of the input embedding, or a dict from names of embeddings to rows."""
    remedy = "Pass token ids, such as [0, 1], or a dict such as {'embed_tokens': [0, 1]}."
    if not isinstance(value, dict):
        return integers(field, value, remedy)
    named = mapping(field, value, remedy)
    return {name: integers(f"{field}[{short(name)}]", indices, remedy) for name, indices in named.items()}


def targets_of_counts(counts: dict[str, int], targets: Collection[str] | None) -> set[str]:
    """The module names in `counts`. Refuses `targets` that name other modules or leave some out.

    Args:
        counts: full module names and their numbers of deltas.
        targets: `target_modules`. Suffixes are accepted too, because PEFT replaces 20 names or more by suffixes that
            tell them from other modules, and saves those.
    """
    remedy = "Leave `target_modules` out: the dict selects the targets."
    if targets is None:
        return set(counts)
    if isinstance(targets, str):
        refuse("target_modules", "must name the keys of `num_deltas` when that is a dict", targets, remedy)
    suffixes = {name: _suffixes(name) for name in counts}
    used: set[str] = set().union(*suffixes.values())
    foreign = set(targets) - used
    missing = [name for name in counts if suffixes[name].isdisjoint(targets)]
    if foreign or missing:
        differences = [
            f"{listed(which)} only in {where}"
            for which, where in ((foreign, "`target_modules`"), (missing, "`num_deltas`"))
            if which
        ]
        rule = f"must name the keys of `num_deltas` when that is a dict ({'; '.join(differences)})"
        refuse("target_modules", rule, sorted(targets), remedy)
    return set(counts)


def _suffixes(name: str) -> set[str]:
    """All suffixes of a module's name, the full name included: {"a.b", "b"} for "a.b"."""
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


_NO_SCALING = "SpIEL's deltas are added to the weight as they are: drop it, and tune the learning rate instead."
_NO_FACTORS = "It configures a variant of LoRA's two factors, which SpIEL does not have: drop it."
_INIT = "Drop it. Deltas start at zero; `init_weights=False` starts them at random values, for tests."
_MEGATRON = "SpIEL does not adapt Megatron's parallel layers: drop it."

# Fields of PEFT's LoraConfig that SpIEL does not have, and what to do instead of passing them.
LORA_ONLY_FIELDS: dict[str, str] = {
    "lora_alpha": _NO_SCALING,
    "alpha_pattern": _NO_SCALING,
    "use_rslora": _NO_SCALING,
    "lora_dropout": "SpIEL has no adapter branch: drop it. Use the model's own dropout, or weight decay.",
    "lora_bias": 'Drop it. To train biases, use `bias="all"` or `bias="spiel_only"`.',
    "init_lora_weights": _INIT,
    "loftq_config": _INIT,
    "eva_config": _INIT,
    "corda_config": _INIT,
    "lora_ga_config": _INIT,
    "use_dora": _NO_FACTORS,
    "use_qalora": _NO_FACTORS,
    "qalora_group_size": _NO_FACTORS,
    "use_bdlora": _NO_FACTORS,
    "velora_config": _NO_FACTORS,
    "kasa_config": _NO_FACTORS,
    "monteclora_config": _NO_FACTORS,
    "arrow_config": _NO_FACTORS,
    "alora_invocation_tokens": "SpIEL changes the weights for every token: drop it.",
    "layer_replication": "SpIEL adapts the layers the model has: drop it.",
    "runtime_config": "SpIEL moves nothing between devices at run time: drop it.",
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
}
