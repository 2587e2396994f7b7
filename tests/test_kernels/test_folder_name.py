"""No process takes the folder kernels/ of a checkout for the package of that name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Runs a module as `python -m` does, and says what is found then.
FIND = """
import importlib.util, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit:
    pass
print("found:", importlib.util.find_spec("kernels"))
try:
    import kernels
    print("imported")
except ImportError:
    print("not there")
"""


def run_at_root(*arguments: str, path: tuple[Path, ...] = ()) -> str:
    """The output of a Python process in the root of the checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_entry_points_do_not_find_the_folder() -> None:
    # The benchmarks import spiel_peft, as the other entry points do.
    output = run_at_root("-c", FIND, "benchmarks", "--help")
    assert "found: None\nnot there" in output and "gemm_4bit_forward" not in output


def test_a_package_of_that_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'")
    script = "import spiel_kernels, kernels; print(kernels.get_kernel)"
    assert "theirs" in run_at_root("-c", script, path=(tmp_path,))


def test_what_was_imported_already_is_taken_back() -> None:
    script = "import kernels; print(kernels.__path__); import spiel_kernels, sys; print(sys.modules['kernels'])"
    output = run_at_root("-c", script)
    assert "Namespace" in output and output.splitlines()[1] == "None"
