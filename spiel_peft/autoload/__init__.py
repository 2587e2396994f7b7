"""Opt-in: make every `import peft` of an environment import spiel_peft too.

For programs that load SpIEL adapters but that you cannot make import this package:

    python -m spiel_peft.autoload enable
    python -m spiel_peft.autoload status
    python -m spiel_peft.autoload disable

`enable` puts two small files into the environment's site-packages: a copy of `hook.py` and a `.pth` file that
makes Python run it at startup. Disable it before uninstalling spiel_peft; if you forget, they do nothing.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path

_NAME = "_spiel_peft_autoload"
# Python runs the lines of .pth files that begin with "import"; one that fails prints a traceback every time.
_GUARDED_IMPORT = f"try:\n    import {_NAME}\nexcept ImportError:\n    pass"
_PTH_LINE = f"import sys; exec({_GUARDED_IMPORT!r})\n"


def site_packages() -> Path:
    """The folder for pure Python packages of the running environment."""
    return Path(sysconfig.get_path("purelib"))


def is_enabled(target: Path | None = None) -> bool:
    """Whether both files are in place in `target` (default: this environment)."""
    return all(path.is_file() for path in _paths(target))


def enable(target: Path | None = None) -> list[Path]:
    """Write the two files into `target` (default: this environment), over older ones. Returns their paths."""
    hook, pth = _paths(target)
    hook.write_text(Path(__file__).with_name("hook.py").read_text(encoding="utf-8"), encoding="utf-8")
    pth.write_text(_PTH_LINE, encoding="utf-8")
    return [hook, pth]


def disable(target: Path | None = None) -> list[Path]:
    """Remove what `enable` wrote. Returns the paths that were there."""
    found = [path for path in reversed(_paths(target)) if path.is_file()]
    for path in found:
        path.unlink()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. `status` returns 0 if enabled, 1 if not."""
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


def _enable(target: Path) -> int:
    for path in enable(target):
        print(f"wrote {path}")
    return 0


def _disable(target: Path) -> int:
    removed = disable(target)
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print(f"nothing to remove in {target}")
    return 0


def _status(target: Path) -> int:
    enabled = is_enabled(target)
    print(f"autoload is {'enabled' if enabled else 'not enabled'} in {target}")
    return 0 if enabled else 1


_ACTIONS = {"enable": _enable, "disable": _disable, "status": _status}


def _paths(target: Path | None) -> tuple[Path, Path]:
    folder = site_packages() if target is None else target
    return folder / f"{_NAME}.py", folder / f"{_NAME}.pth"
