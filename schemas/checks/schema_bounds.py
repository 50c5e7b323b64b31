"""Bounds of a submitter's JSON Schema, checked without compiling it."""

from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import unquote, urldefrag, urljoin

from loom.schemas.base import MAX_JSON_DEPTH
from loom.schemas.checks.pattern_bounds import MAX_STEPS, OutOfBounds, pattern_steps

MAX_EXPANSION: Final = 50_000
"""Objects and arrays of a schema with every `$ref` replaced by its target, a recursive one once."""
MAX_INTEGER: Final = 2**64
LEAST_MULTIPLE: Final = 1e-12
MAX_NAMESAKES: Final = 8

_REFERENCES: Final = ("$ref", "$dynamicRef", "$recursiveRef")
_ANCHORS: Final = ("$anchor", "$dynamicAnchor")

Container = dict[str, Any] | list[Any]


def check_schema(schema: Mapping[str, Any]) -> None:
    """Return if a schema is within the bounds: depth, numbers, patterns, and its size with all references expanded.

    An invalid schema is refused later, by the compiler. Values under `enum`, `const`, `default` and `examples`
    are treated like schemas: the names may be those of properties.

    Raises:
        OutOfBounds: It exceeds a bound.
    """
    document = _Document(schema)
    steps = 0
    for node in document.nodes:
        steps += sum(map(pattern_steps, _patterns(node)))
        _check_numbers(node)
        if steps > MAX_STEPS:
            raise OutOfBounds(f"has patterns of more than {MAX_STEPS} steps with their repeats written out")
    if _expansion(document) > MAX_EXPANSION:
        raise OutOfBounds(f"has more than {MAX_EXPANSION} parts with its references expanded")


class _Document:
    """The objects and arrays of a schema, and the targets of its references."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.root: Container = dict(schema)
        self.nodes: list[dict[str, Any]] = []
        """All objects, the root first."""
        self._parts: dict[int, list[Container]] = {}
        """Object or array -> its direct objects and arrays."""
        self._base: dict[int, str] = {}
        """Object -> the base URI of its references."""
        self._named: dict[str, list[Container]] = {}
        """Absolute URI, with the anchor as its fragment -> the nodes of that name."""
        self._walk()

    def _walk(self) -> None:
        stack: list[tuple[Container, int, str]] = [(self.root, 1, "")]
        while stack:
            node, depth, base = stack.pop()
            if depth > MAX_JSON_DEPTH:
                raise OutOfBounds(f"is nested more than {MAX_JSON_DEPTH} levels deep")
            values: Iterable[Any] = node
            if isinstance(node, dict):
                values = node.values()
                base = self._base[id(node)] = self._name(node, base)
                self.nodes.append(node)
            parts = self._parts[id(node)] = [part for part in values if isinstance(part, dict | list)]
            stack.extend([(part, depth + 1, base) for part in parts])

    def _name(self, node: dict[str, Any], base: str) -> str:
        own = node.get("$id")
        if isinstance(own, str):
            base = _joined(base, own)
            self._add_name(base.rstrip("#"), node)
        for anchor in _ANCHORS:
            if isinstance(node.get(anchor), str):
                self._add_name(f"{base.rstrip('#')}#{node[anchor]}", node)
        return base

    def _add_name(self, name: str, node: Container) -> None:
        nodes = self._named.setdefault(name, [])
        nodes.append(node)
        if len(nodes) > MAX_NAMESAKES:
            raise OutOfBounds(f"gives more than {MAX_NAMESAKES} parts the same $id or anchor")

    def edges(self, node: Container) -> list[Container]:
        """Return the parts of a node and the targets of its references."""
        parts = self._parts[id(node)]
        if isinstance(node, dict):
            for keyword in _REFERENCES:
                if keyword in node and isinstance(node[keyword], str):
                    parts = parts + self._targets(node[keyword], self._base[id(node)])
        return parts

    def _targets(self, reference: str, base: str) -> list[Container]:
        """Return the possible targets of a reference; none outside of the schema, which the compiler refuses."""
        uri = _joined(base, reference)
        if uri in self._named:
            return self._named[uri]
        document, fragment = urldefrag(uri)
        roots = self._named.get(document) or ([self.root] if document in {"", base.rstrip("#")} else [])
        targets = [_pointed(root, unquote(fragment)) for root in roots]
        return [target for target in targets if target is not None]


def _expansion(document: _Document) -> int:
    """Return the size of the schema with every reference replaced by its target, or more than the bound.

    A part inside of itself counts once: recursion is legal and ends with the answer. Sizes are cached, so a chain of
    doubling references takes time proportional to its length.
    """
    sizes: dict[int, int] = {}
    edges: dict[int, list[Container]] = {}
    stack = [document.root]
    while stack:
        node = stack[-1]
        key = id(node)
        if key in sizes:
            stack.pop()
        elif key in edges:
            stack.pop()
            sizes[key] = min(MAX_EXPANSION + 1, 1 + sum([sizes.get(id(part), 1) for part in edges[key]]))
        else:
            below = edges[key] = document.edges(node)
            if below:
                stack.extend([part for part in below if id(part) not in edges])
            else:
                sizes[key] = 1
    return sizes[id(document.root)]


def _patterns(node: dict[str, Any]) -> list[str]:
    """Return the regular expressions of a node."""
    own, of_names = node.get("pattern"), node.get("patternProperties")
    patterns = list(of_names) if isinstance(of_names, dict) else []
    return [*patterns, own] if isinstance(own, str) else patterns


def _check_numbers(node: dict[str, Any]) -> None:
    for keyword, value in node.items():
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise OutOfBounds(f"has an integer of more than 64 bits as {keyword[:40]}")
    multiple = node.get("multipleOf")
    if isinstance(multiple, int | float) and 0 < abs(multiple) < LEAST_MULTIPLE:
        raise OutOfBounds(f"has a multipleOf below {LEAST_MULTIPLE:g}")


def _pointed(root: Container, pointer: str) -> Container | None:
    """Return the object or array at a JSON Pointer."""
    node: Any = root
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list) and key.isascii() and key.isdigit() and len(key) <= 6:  # noqa: PLR2004 - an index
            node = node[int(key)] if int(key) < len(node) else None
        else:
            return None
    return node if isinstance(node, dict | list) else None


def _joined(base: str, reference: str) -> str:
    try:
        return urljoin(base, reference)
    except ValueError:  # not a URI, for example an unbalanced bracket: the compiler refuses it
        return reference
