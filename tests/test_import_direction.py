"""Imports point one way: tensor operations <- layers <- model and cycle <- optimizers, callback <- command line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "spiel_kernels"
FILES_OF_KERNELS = sorted(path for path in KERNELS.rglob("*.py") if path.name != "__init__.py")
PLUGIN = ROOT / "spiel_peft"
COMMAND = ROOT / "spiel_peft_cli"
FILES = sorted([*KERNELS.rglob("*.py"), *PLUGIN.rglob("*.py"), *COMMAND.rglob("*.py")])

# What each part may import of this project, from the bottom to the top; a part may always import itself.
LAYERS_MAY = {
    "base_weight",
    "config",
    "delta",
    "folding",
    "functional",
    "layers",
    "merge_report",
    "module_weight",
    "operators",
    "quantized_weight",
    "seeding",
    "sharding",
    "training_state",
    "weight_ops",
    "weight_source",
}
FORBIDDEN = {
    "functional.py": {"base_weight", "config", "layers", "model", "cycle", "optim", "callback", "registration"},
    "module_weight.py": {"base_weight", "config", "layers", "model", "cycle", "optim", "callback", "registration"},
    "parameter_targets.py": {"model", "cycle", "optim", "callback", "registration", "autoload"},
    "weight_source.py": {"base_weight", "config", "functional", "operators", "layers", "model", "cycle", "optim"},
    "weight_ops.py": {"base_weight", "config", "delta", "functional", "operators", "layers", "model", "cycle", "optim"},
    "operators": {"base_weight", "config", "layers", "model", "cycle", "optim", "callback", "registration"},
    "base_weight.py": {"delta", "functional", "layers", "model", "cycle", "optim", "callback", "registration"},
    "delta.py": {"base_weight", "functional", "layers", "model", "cycle", "optim", "callback", "registration"},
    "folding.py": {"base_weight", "config", "delta", "functional", "layers", "model", "cycle", "optim", "callback"},
    "training_state.py": {"delta", "functional", "layers", "model", "cycle", "optim", "callback", "registration"},
    "budget.py": {"delta", "functional", "layers", "model", "cycle", "optim", "callback", "registration"},
    "compose": {"model", "cycle", "optim", "callback", "autoload"},
    "model.py": {"optim", "callback", "autoload"},
    "cycle": {"layers", "model", "optim", "callback", "autoload"},
    "card.py": {"layers", "model", "cycle", "optim", "callback", "files", "compose", "convert", "autoload"},
    "inspection": {"layers", "model", "cycle", "optim", "callback", "finetune", "autoload"},
    "convert": {"layers", "model", "cycle", "optim", "callback", "compose", "autoload"},
    "optim": {"layers", "model", "callback", "autoload"},
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def for_type_checking_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(path: Path, types_too: bool = True) -> set[str]:
    """Absolute names of everything a file imports; `from a import b` counts as a and as a.b."""
    package = [path.parts[len(ROOT.parts)], *path.relative_to(ROOT).parts[1:-1]]
    if path.is_relative_to(KERNELS):
        package = ["spiel_kernels", *path.relative_to(KERNELS).parts[:-1]]
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if not types_too and for_type_checking_only(node):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def uses(path: Path, package: str, types_too: bool = True) -> list[str]:
    """What a file imports of a package."""
    return sorted(n for n in imported(path, types_too) if n == package or n.startswith(package + "."))


def part_files(part: str) -> list[Path]:
    path = PLUGIN / part
    return [path] if path.suffix else sorted(path.rglob("*.py"))


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


@pytest.mark.parametrize("path", part_files("layers"), ids=name_of)
def test_layers_import_only_what_is_below_them(path: Path) -> None:
    parts = {name.split(".")[1] for name in uses(path, "spiel_peft", types_too=False) if "." in name}
    assert parts <= LAYERS_MAY


@pytest.mark.parametrize("part", FORBIDDEN)
def test_nothing_imports_what_is_above_it(part: str) -> None:
    for path in part_files(part):
        for above in FORBIDDEN[part]:
            assert not uses(path, f"spiel_peft.{above}", types_too=False), f"{name_of(path)} imports {above}"


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


def test_kernels_import_in_no_circle() -> None:
    """Counted over all imports: those in functions and under TYPE_CHECKING too."""
    files = {
        ".".join(["spiel_kernels", *path.relative_to(KERNELS).with_suffix("").parts]): path for path in FILES_OF_KERNELS
    }
    below = {name: {n for n in imported(path) if n in files} - {name} for name, path in files.items()}
    while below:
        leaves = [name for name, others in below.items() if not others & below.keys()]
        assert leaves, f"these import each other: {sorted(below)}"
        for name in leaves:
            del below[name]
