"""Writing a folder so that it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target` to write into, and rename it to `target` when the block is left.

    On any error, a full disk included, the temporary folder is removed and `target` is left as it was.

    Args:
        target: the folder to make. Its parents are created.
        overwrite: replace what is there; else only an empty folder may be there.

    Raises:
        FileExistsError: there is something at `target`. Raised before anything is written.
    """
    target = Path(target)
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        # mkdtemp makes it private; the result is to have the permissions of any new folder.
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)
        _put_in_place(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def refuse_existing(target: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise a FileExistsError if `target` is there and must not be replaced; for work that is long before it writes."""
    target = Path(target)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already: choose another folder, or allow overwriting")


def _put_in_place(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    # A folder cannot replace one that is not empty in one step; the old one is kept until the new one is there.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
        work.rename(target)
    except BaseException:
        (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
