"""Checks of single config values.

Each check returns the value in plain Python types that JSON can hold, or raises a ValueError. For the error, `field` is
the name of the config field and `remedy` a sentence that says what to pass instead.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

_LIST_TYPES = (list, tuple, set, frozenset)


def refuse(field: str, rule: str, value: Any, remedy: str) -> NoReturn:
    """Raise a ValueError in the form of all errors of the config: field, rule, value received, remedy."""
    raise ValueError(f"`{field}` {rule}, got {short(value)}. {remedy}")


def integer(field: str, value: Any, minimum: int, remedy: str) -> int:
    """An integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        refuse(field, f"must be an integer of at least {minimum}", value, remedy)
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
    except re.error as error:
        refuse(field, f"must be a valid regular expression ({error})", value, remedy)
    return value


def names(field: str, value: Any, remedy: str) -> list[str]:
    """A list, tuple or set of non-empty strings, as a list (sorted if it was a set)."""
    if not isinstance(value, _LIST_TYPES):
        refuse(field, "must be a list of names", value, remedy)
    for name in value:
        if not isinstance(name, str) or not name:
            refuse(field, "must hold non-empty strings only", name, remedy)
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def integers(field: str, value: Any, remedy: str) -> list[int]:
    """A list, tuple, set or range of integers >= 0, as a list."""
    if not isinstance(value, (*_LIST_TYPES, range)):
        refuse(field, "must be a list of integers", value, remedy)
    return [integer(field, item, 0, remedy) for item in value]


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
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
