"""Outlines and reviews Python sources."""

import ast
import statistics
from collections.abc import Iterator

from analysis.input_files import read_input
from loom.schemas.errors import AgentFailed

Function = ast.FunctionDef | ast.AsyncFunctionDef

BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def read_source(file: str) -> ast.Module:
    """Return the syntax tree of a Python file.

    Raises:
        AgentFailed: The file cannot be read, or is not Python.
    """
    try:
        return ast.parse(read_input(file), filename=file)
    except SyntaxError as error:
        raise AgentFailed(f"{file}, line {error.lineno}: {error.msg}") from error


def code_outline(file: str) -> str:
    """List the imports, classes and functions of a Python file with their lines."""
    tree = read_source(file)
    functions = list(_functions(tree))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    lines = [
        f"{file}: {len(read_input(file).splitlines())} lines, {len(classes)} classes, {len(functions)} functions",
        f"imports: {', '.join(_imports(tree)) or 'nothing'}",
    ]
    lines += [f"  class {node.name} (line {node.lineno})" for node in classes]
    lines += [f"  def {name} (line {node.lineno}, {_length(node)} lines)" for name, node in functions]
    return "\n".join(lines)


def code_review(file: str) -> str:
    """Outline a Python file and review it: cyclomatic complexity, longest function, missing docstrings."""
    tree = read_source(file)
    functions = list(_functions(tree))
    lines = [code_outline(file)]
    if functions:
        ranked = sorted(functions, key=lambda item: -complexity(item[1]))
        longest, node = max(functions, key=lambda item: _length(item[1]))
        mean = statistics.fmean(complexity(function) for _, function in functions)
        lines += ["", f"cyclomatic complexity: {mean:.1f} on average; the highest:"]
        lines += [f"  {name}: {complexity(function)}" for name, function in ranked[:3]]
        lines.append(f"longest function: {longest}, {_length(node)} lines")
    bare = [name for name, function in functions if _is_public(name) and not ast.get_docstring(function)]
    bare += [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and not ast.get_docstring(node)]
    if not ast.get_docstring(tree):
        bare.insert(0, "the module")
    lines.append(f"without a docstring: {', '.join(bare) or 'nothing public'}")
    return "\n".join(lines)


def complexity(function: Function) -> int:
    """Return the number of independent paths through a function (McCabe), without those of nested functions."""
    paths = 1
    for node in _own_nodes(function):
        paths += isinstance(node, BRANCHES)
        paths += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        paths += len(node.ifs) if isinstance(node, ast.comprehension) else 0
    return paths


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, SCOPES):
            yield child
            yield from _own_nodes(child)


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield every function under `node` with its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, Function):
            yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.<locals>.")
        else:
            yield from _functions(child, prefix)


def _imports(tree: ast.Module) -> list[str]:
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."])
    }
    return sorted(names)


def _length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _is_public(name: str) -> bool:
    return "<locals>" not in name and not name.rpartition(".")[2].startswith("_")
