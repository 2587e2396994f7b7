"""Makes every `import peft` of an environment import spiel_peft too, for programs that you cannot change.

    python -m spiel_peft.autoload enable
    python -m spiel_peft.autoload status
    python -m spiel_peft.autoload disable

`enable` writes two small files into the environment's site-packages: a copy of this file, and a `.pth` file that
makes Python run the copy at startup. Disable it before you uninstall spiel_peft; without spiel_peft the two files do
nothing.

Every start of Python runs the copy. So this file imports nothing at the top that Python has not loaded by then, and
stays silent when spiel_peft or peft is not installed.
"""

import sys

TYPE_CHECKING = False  # importing `typing` would slow every start of Python down
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType
    from typing import Any

_NAME = "_spiel_peft_autoload"
# Python runs the lines of .pth files that begin with "import"; one that fails prints a traceback every time.
_GUARDED_IMPORT = f"try:\n    import {_NAME}\nexcept ImportError:\n    pass"
_PTH_LINE = f"import sys; exec({_GUARDED_IMPORT!r})\n"


# The command


def site_packages() -> "Path":
    """The folder for pure Python packages of the running environment."""
    import sysconfig
    from pathlib import Path

    return Path(sysconfig.get_path("purelib"))


def is_enabled(target: "Path | None" = None) -> bool:
    """Whether both files are in place in `target` (default: this environment)."""
    return all(path.is_file() for path in _paths(target))


def enable(target: "Path | None" = None) -> "list[Path]":
    """Write the two files into `target` (default: this environment), over older ones. Returns their paths."""
    from pathlib import Path

    hook, pth = _paths(target)
    hook.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    pth.write_text(_PTH_LINE, encoding="utf-8")
    return [hook, pth]


def disable(target: "Path | None" = None) -> "list[Path]":
    """Remove the files that `enable` wrote. Returns the paths of those that were there."""
    found = [path for path in reversed(_paths(target)) if path.is_file()]
    for path in found:
        path.unlink()
    return found


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command. `status` returns 0 if autoload is enabled, 1 if not."""
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(
        prog="python -m spiel_peft.autoload", description="Make every `import peft` import spiel_peft too."
    )
    parser.add_argument("action", choices=("enable", "disable", "status"))
    parser.add_argument(
        "--target", type=Path, default=site_packages(), help="site-packages folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not options.target.is_dir():
        parser.error(f"--target must be an existing folder, got {str(options.target)!r}")
    try:
        return _ACTIONS[options.action](options.target)
    except OSError as error:
        parser.error(f"cannot {options.action} autoload in {options.target}: {error}")


def _enable(target: "Path") -> int:
    for path in enable(target):
        print(f"wrote {path}")
    return 0


def _disable(target: "Path") -> int:
    removed = disable(target)
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print(f"nothing to remove in {target}")
    return 0


def _status(target: "Path") -> int:
    enabled = is_enabled(target)
    print(f"autoload is {'enabled' if enabled else 'not enabled'} in {target}")
    return 0 if enabled else 1


_ACTIONS = {"enable": _enable, "disable": _disable, "status": _status}


def _paths(target: "Path | None") -> "tuple[Path, Path]":
    folder = site_packages() if target is None else target
    return folder / f"{_NAME}.py", folder / f"{_NAME}.pth"


# The hook: what the copy in site-packages does when Python starts


class AfterPeft:
    """A finder that leaves finding peft to the other finders, and adds `import spiel_peft` to the end of its import."""

    @staticmethod
    def find_spec(name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
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


def _extend(loader: "Any") -> None:
    # On the instance: a wrapper would lose what else the loader offers, such as reading resources.
    exec_module = getattr(loader, "exec_module", None)
    if exec_module is None:
        return

    def exec_and_import(module: "ModuleType") -> None:
        exec_module(module)
        _import_spiel_peft()

    loader.exec_module = exec_and_import


def _import_spiel_peft() -> None:
    if "spiel_peft" in sys.modules:
        return  # also when spiel_peft itself is importing peft
    try:
        import spiel_peft  # noqa: F401
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "spiel_peft":
            return  # spiel_peft was uninstalled
        import warnings

        # peft itself works, so its import must not fail.
        warnings.warn(
            f"spiel_peft could not be imported after peft: {error!r}. Repair it, or delete {__file__} and "
            "the .pth file beside it.",
            stacklevel=2,
        )


if __name__ == _NAME and not any(getattr(finder, "__name__", "") == "AfterPeft" for finder in sys.meta_path):
    sys.meta_path.insert(0, AfterPeft)
elif __name__ == "__main__":
    sys.exit(main())
