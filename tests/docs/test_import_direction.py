"""Imports point one way, from the command line and the model down to tensor operations (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "spiel_kernels"
PLUGIN = ROOT / "spiel_peft"
COMMAND = ROOT / "spiel_peft_cli"
FILES = sorted([*KERNELS.rglob("*.py"), *PLUGIN.rglob("*.py"), *COMMAND.rglob("*.py")])

# Parts of the package from the bottom to the top: a part imports itself and lower floors, nothing else.
FLOORS = (
    "registration checks state call_stack",
    "adapter_format growth weights",
    "config",
    "delta budget",
    "autograd sharding card",
    "layers cycle files",
    "targets optimizers callback convert inspection",
    "saving compose finetune",
    "model",
    "__init__ autoload",
)
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts.split()}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Every import of a file, also in functions and under TYPE_CHECKING: a module, and a name that is taken from it."""
    package = list(path.relative_to(root_of(path)).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def root_of(path: Path) -> Path:
    """The folder from which a file is imported."""
    return KERNELS.parent if path.is_relative_to(KERNELS) else ROOT


def imported(path: Path) -> set[str]:
    """Absolute names of everything a file imports; `from a import b` counts as a and as a.b."""
    found = list(imports(path))
    return {module for module, _ in found} | {f"{module}.{name}" for module, name in found if name is not None}


def uses(path: Path, package: str) -> list[str]:
    """What a file imports of a package."""
    return sorted(n for n in imported(path) if n == package or n.startswith(package + "."))


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: a module of its root, or a folder."""
    return path.relative_to(PLUGIN).parts[0].removesuffix(".py")


def parts_used(path: Path) -> set[str]:
    """The parts of the package that a file imports from."""
    names = uses(path, "spiel_peft")
    parts = {name.split(".")[1] for name in names if "." in name}
    return parts & FLOOR_OF.keys()


def modules(root: Path) -> dict[str, Path]:
    """The files of a package by the names of their modules; an ``__init__.py`` has the name of its folder."""
    parts = {path: path.relative_to(root_of(path)).with_suffix("").parts for path in sorted(root.rglob("*.py"))}
    return {".".join(names[:-1] if names[-1] == "__init__" else names): path for path, names in parts.items()}


def test_the_files_are_found() -> None:
    names = {name_of(path) for path in FILES}
    assert {"kernels/spiel_kernels/gather.py", "spiel_peft/layers/base.py", "spiel_peft/cycle/engine.py"} <= names


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=name_of)
def test_kernels_know_nothing_of_peft(path: Path) -> None:
    for package in ("peft", "transformers", "spiel_peft", "accelerate", "bitsandbytes"):
        assert not uses(path, package)


@pytest.mark.parametrize("path", [path for path in FILES if not path.is_relative_to(COMMAND)], ids=name_of)
def test_nothing_imports_the_command_line(path: Path) -> None:
    assert not uses(path, "spiel_peft_cli")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_kernels_import_triton(path: Path) -> None:
    assert path.is_relative_to(KERNELS) or not uses(path, "triton")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_one_file_looks_at_the_call_stack(path: Path) -> None:
    looks = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    magic = {"_getframe", "f_back", "currentframe", "get_objects", "get_referrers", "getrefcount"}
    assert path.name == "call_stack.py" or not looks & magic


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in PLUGIN.rglob("*.py")} == FLOOR_OF.keys()
    assert len(list(PLUGIN.glob("*.py"))) <= 18
    assert len(list(PLUGIN.rglob("*.py"))) <= 78  # few files, each of them deep


@pytest.mark.parametrize("path", sorted(PLUGIN.rglob("*.py")), ids=name_of)
def test_imports_go_down(path: Path) -> None:
    own = part_of(path)
    above = {part for part in parts_used(path) - {own} if FLOOR_OF[part] >= FLOOR_OF[own]}
    assert not above


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "registration.py"], ids=name_of)
def test_only_registration_touches_the_enum_of_peft(path: Path) -> None:
    """Others may name `PeftType`, but not its tables of members."""
    inside = {
        "_member_map_",
        "_member_names_",
        "_value2member_map_",
        "__members__",
        "_sort_order_",
        "_hashable_values_",
    }
    tree = ast.parse(path.read_text())
    touched = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & inside
    assert not touched
    assert not {n for n in imported(path) if n.split(".")[-1].startswith("PEFT_TYPE_TO")}


@pytest.mark.parametrize("root", [KERNELS, PLUGIN, COMMAND, ROOT / "benchmarks"], ids=lambda root: root.name)
def test_nothing_imports_in_a_circle(root: Path) -> None:
    """Counted over all imports: those in functions and under TYPE_CHECKING too."""
    files = modules(root)
    below: dict[str, set[str]] = {}
    for name, path in files.items():
        used = {f"{module}.{own}" if f"{module}.{own}" in files else module for module, own in imports(path)}
        below[name] = used & files.keys() - {name}
    assert sum(map(len, below.values())) > len(files) / 2
    while below:
        leaves = [name for name, others in below.items() if not others & below.keys()]
        assert leaves, f"these import each other: {sorted(below)}"
        for name in leaves:
            del below[name]
