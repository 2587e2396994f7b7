"""Makes peft_type "SPIEL" known to PEFT, in memory only. No other file of the package changes PEFT's enum.

PEFT has no entry point for methods of other packages: `register_peft_method` demands a member of the enum `PeftType`,
and PEFT and transformers use it as one (`PeftType(...)`, `.value`, `in list(PeftType)`). So this file adds a member.
"""

from __future__ import annotations

import threading
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

_TYPE = "SPIEL"
_PREFIX = "spiel_"
_LOCK = threading.RLock()


def spiel_type() -> PeftType:
    """PEFT's enum member for SpIEL, added on the first call."""
    member = PeftType.__members__.get(_TYPE)
    if member is None:
        with _LOCK:
            member = PeftType.__members__.get(_TYPE)
            if member is None:
                member = _add_member(PeftType, _TYPE)
                # By default the enum pickles a member as PeftType("SPIEL"), which fails in a process that has not
                # imported this package.
                member.__reduce_ex__ = lambda protocol: (spiel_type, ())
    return member


def register_classes(config_cls: type, model_cls: type) -> None:
    """Register the config and model of SpIEL with PEFT. Safe to call any number of times and from several threads.

    Raises:
        RuntimeError: another package has registered its own "SPIEL" or the prefix "spiel_".
    """
    with _LOCK:
        peft_type = spiel_type()
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type) is config_cls:
            return
        _forget_reloaded(peft_type, config_cls)
        _require_free(peft_type)
        register_peft_method(name=_TYPE.lower(), config_cls=config_cls, model_cls=model_cls, prefix=_PREFIX)


def _forget_reloaded(peft_type: PeftType, config_cls: type) -> None:
    """Remove what an earlier import of this package registered, before `importlib.reload` or a cleared sys.modules."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is not None and _full_name(known) == _full_name(config_cls):
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop(peft_type, None)


def _require_free(peft_type: PeftType) -> None:
    """Raise a RuntimeError if another package has registered the type or the prefix."""
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        if peft_type in mapping:
            raise RuntimeError(
                f"spiel_peft cannot register peft_type {_TYPE!r}: it already belongs to "
                f"{_full_name(mapping[peft_type])}. Uninstall or stop importing one of the two packages."
            )
    owners = [str(getattr(t, "value", t)) for t, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == _PREFIX]
    if owners:
        raise RuntimeError(
            f"spiel_peft cannot register the parameter prefix {_PREFIX!r}: it already belongs to peft_type "
            f"{owners[0]!r}. Uninstall or stop importing one of the two packages."
        )


def _full_name(cls: Any) -> str:
    return f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', cls)}"


def _add_member(enum_cls: Any, name: str) -> Any:
    """Add the member `name`, with `name` as its value, to an enum of strings. Works on Python 3.10 to 3.14.

    The table of names, which `__members__` reads, is written last, so that no other thread finds an unfinished member.
    """
    member = str.__new__(enum_cls, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_cls
    member._sort_order_ = len(enum_cls._member_names_)
    type.__setattr__(enum_cls, name, member)  # EnumMeta.__setattr__ refuses members
    enum_cls._value2member_map_[name] = member
    hashable_values = getattr(enum_cls, "_hashable_values_", None)  # Python 3.13 and later
    if hashable_values is not None:
        hashable_values.append(name)
    enum_cls._member_names_.append(name)
    enum_cls._member_map_[name] = member
    return member
