"""Reads the description and the parameters of a tool from its docstring."""

import inspect
import re
from typing import Any

_HEADER = re.compile(r"(Args|Arguments|Parameters):\s*")
_ENTRY = re.compile(r"(\*{0,2}\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def read_docstring(thing: Any) -> tuple[str, dict[str, str]]:
    """Return the docstring of an object without its `Args:` section, and the texts of that section by parameter.

    The section has Google style: a line `Args:`, then one indented `name: text` or `name (type): text` per parameter.
    """
    lines = (inspect.getdoc(thing) or "").splitlines()
    start = next((n for n, line in enumerate(lines) if _HEADER.fullmatch(line)), None)
    if start is None:
        return "\n".join(lines), {}
    end = next((n for n in range(start + 1, len(lines)) if lines[n][:1].strip()), len(lines))
    section = [line for line in lines[start + 1 : end] if line.strip()]
    rest = "\n".join([*lines[:start], *lines[end:]]).strip()
    return rest, _entries(section)


def _entries(section: list[str]) -> dict[str, str]:
    entries: dict[str, str] = {}
    indent = min((len(line) - len(line.lstrip()) for line in section), default=0)
    name = ""
    for line in section:
        entry = _ENTRY.fullmatch(line[indent:])
        if entry is not None:
            name = entry[1].lstrip("*")
            entries[name] = entry[2].strip()
        elif name:  # a continuation line
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return entries
