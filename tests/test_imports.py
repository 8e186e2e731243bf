"""Imports point one way, and importing fastlora stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from fastlora_kernels import native

import fastlora

PACKAGE = Path(str(files(fastlora)))
KERNELS = Path(native.__file__).parent
# Lowest first: a module imports only from its own layer or from those before it.
LAYERS = [
    ["linears", "bnb_format", "bnb_live", "quant", "quant_experts", "backends"],
    ["weight_checks", "dispatch", "checks", "expert_checks"],
    ["ops"],
    ["kron", "factors", "multi", "operands", "functional", "products", "grouped"],
    ["adapters"],
    ["config", "layers", "other_layers", "experts"],
    [
        "sharing",
        "fuse",
        "in_place",
        "expert_plan",
        "weight_reads",
        "layer_checks",
        "plan",
        "patch",
        "report",
    ],
    ["adapter_files", "expert_files", "checkpoint", "tune"],
    ["__init__"],
    ["integrations"],
    ["train", "nano"],
    ["cli", "__main__"],
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
ONLY_INTEGRATIONS = {"transformers", "peft", "trl"}


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(path: Path) -> set[str]:
    """Return the full names that a file imports anywhere, but for type checking."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if is_typing_only(node):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        todo.extend(ast.iter_child_nodes(node))
    return names


def part_of(name: str) -> str | None:
    """Return the module or folder of fastlora that a full name lies in."""
    parts = name.split(".")
    if parts[0] != "fastlora":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in RANK, f"{own} has no place in the order of imports"
    for name in imported(path):
        part = part_of(name)
        assert part is None or RANK[part] <= RANK[own], f"{own} imports {name}"
        if name.split(".")[0] in ONLY_INTEGRATIONS:
            assert RANK[own] >= RANK["integrations"], f"{own} imports {name}"


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.name)
def test_kernels_know_nothing_of_fastlora(path: Path) -> None:
    assert not [name for name in imported(path) if name.split(".")[0] == "fastlora"]


def test_import_is_light() -> None:
    code = (
        "import torch, sys, time; start = time.perf_counter(); import fastlora;"
        "print(time.perf_counter() - start,"
        " [m for m in ('transformers', 'peft', 'bitsandbytes', 'triton', 'trl', 'safetensors')"
        " if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, _, heavy = run.stdout.strip().partition(" ")
    assert heavy == "[]"
    assert float(seconds) < 1.0
