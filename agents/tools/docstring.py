"""Docstrings of tools: the description, and what they have on each parameter."""

import inspect
import re
from typing import Any

_HEADER = re.compile(r"(Args|Arguments|Parameters):\s*")
_ENTRY = re.compile(r"(\*{0,2}\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def read_docstring(thing: Any) -> tuple[str, dict[str, str]]:
    """Return the docstring of `thing` without its section on arguments, and that section by parameter.

    The section has Google's form: a line `Args:`, then an indented `name: text` or `name (type): text` for each.
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
        elif name:  # a line that continues the one before
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return entries
