"""A self-organising cluster of agents on NATS.

The public names are those of `loom/__init__.pyi`. Each is imported on first access, so that `import loom` stays fast.
"""

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


def __getattr__(name: str) -> Any:
    """Import a public name on first access.

    Raises:
        AttributeError: It is not a public name.
    """
    if name == "__all__":
        return sorted(_modules())
    if name == "__version__":
        return import_module("importlib.metadata").version("loom-nats")
    if name not in _modules():
        raise AttributeError(f"module 'loom' has no attribute {name!r}")
    value = getattr(import_module(_modules()[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*_modules(), "__version__"])


@cache
def _modules() -> dict[str, str]:
    """Return the module that defines each public name, as the stub lists them."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}
