"""Limits on the sizes of folders, modules and functions, so that code is found and read quickly."""

import ast
import os
from pathlib import Path

import pytest
from support.prose import ROOT, SOURCE, modules

MODULES_OF_A_FOLDER, LINES_OF_A_MODULE, LINES_OF_A_FUNCTION = 16, 400, 50


def over(sizes: dict[str, int], limit: int) -> list[str]:
    return [f"{name}: {size}" for name, size in sizes.items() if size > limit]


def folder_sizes(folder: str) -> dict[str, int]:
    """folder -> number of its own modules, without `__init__`."""
    sizes: dict[str, int] = {}
    for parent, _, names in os.walk(ROOT / folder, followlinks=False):
        own = [name for name in names if name.endswith(".py") and name != "__init__.py"]
        sizes[str(Path(parent).relative_to(ROOT))] = len(own)
    return sizes


def function_sizes(path: Path) -> dict[str, int]:
    """path:function -> lines from `def` to the end."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {
        f"{path.relative_to(ROOT)}:{function.name}": (function.end_lineno or function.lineno) - function.lineno + 1
        for function in functions
    }


@pytest.mark.parametrize("folder", SOURCE)
def test_a_folder_has_at_most_16_modules(folder: str) -> None:
    crowded = over(folder_sizes(folder), MODULES_OF_A_FOLDER)

    assert not crowded, (
        f"a list of more than {MODULES_OF_A_FOLDER} names is not read at a glance; make a folder: {crowded}"
    )


@pytest.mark.parametrize("folder", SOURCE)
def test_a_module_has_at_most_400_lines(folder: str) -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules(folder)
    }
    long = over(sizes, LINES_OF_A_MODULE)

    assert not long, f"a module of more than {LINES_OF_A_MODULE} lines has more than one subject; split it: {long}"


@pytest.mark.parametrize("folder", SOURCE)
def test_a_function_has_at_most_50_lines(folder: str) -> None:
    sizes = {name: size for path in modules(folder) for name, size in function_sizes(path).items()}
    long = over(sizes, LINES_OF_A_FUNCTION)

    assert not long, f"a function of more than {LINES_OF_A_FUNCTION} lines does not fit on a screen; split it: {long}"
