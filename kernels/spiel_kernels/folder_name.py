"""Keeps other packages from taking the folder kernels/ of a checkout for the package `kernels` of another project."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_NAME = "kernels"


def hide_folder() -> None:
    """Make ``import kernels`` fail in this process if it would find no package but the folder that this one is in.

    With the root of a checkout on the import path, as under ``python -m``, Python takes the folder for a namespace
    package, and bitsandbytes and transformers believe that the package of that name is installed. Where it really is
    installed, Python finds it before the folder, and nothing is changed.
    """
    folder = Path(__file__).parents[1]
    if folder.name != _NAME:
        return  # this package is installed, not a checkout
    if _NAME in sys.modules:
        spec = getattr(sys.modules[_NAME], "__spec__", None)
    else:
        spec = importlib.util.find_spec(_NAME)
    if spec is None or spec.origin is not None:
        return
    places = [place for place in spec.submodule_search_locations or () if os.path.isdir(place)]
    if places and all(os.path.samefile(place, folder) for place in places):
        sys.modules[_NAME] = None  # type: ignore[assignment]  # the import system's own way to say "not there"
