"""Imports spiel_peft as soon as peft has been imported.

`python -m spiel_peft.autoload enable` copies this file into site-packages, where every start of Python runs
it. So it stands alone, imports nothing but `sys`, and stays silent when spiel_peft or peft is not installed.
"""

import sys


def _import_spiel_peft():
    if "spiel_peft" in sys.modules:
        return  # also when it is the one importing peft
    try:
        import spiel_peft  # noqa: F401
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "spiel_peft":
            return  # uninstalled since
        import warnings

        # peft itself works, so its import must not fail.
        warnings.warn(
            f"spiel_peft could not be imported after peft: {error!r}. Repair it, or delete {__file__} and "
            "the .pth file beside it.",
            stacklevel=2,
        )


class AfterPeft:
    """A finder that finds peft where the others find it, and adds a step to the end of its import."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "peft":
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if find_spec is None or finder is AfterPeft:
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                _extend(spec.loader)
                return spec
        return None


def _extend(loader):
    # On the instance: a wrapped loader would lose what else the original offers, such as reading resources.
    exec_module = getattr(loader, "exec_module", None)
    if exec_module is None:
        return

    def exec_and_import(module):
        exec_module(module)
        _import_spiel_peft()

    loader.exec_module = exec_and_import


if not any(getattr(finder, "__name__", "") == "AfterPeft" for finder in sys.meta_path):
    sys.meta_path.insert(0, AfterPeft)
