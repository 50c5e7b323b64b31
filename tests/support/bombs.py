"""Acceptance criteria made to stop the process that reads, compiles or runs them."""

from typing import Any

from loom.schemas.task import Accept

OVERSIZED_PATTERNS = {
    "a repeat of a million": "a{1000000}",
    "a repeat of all memory": "a{1000000000}",
    "a repeat of 900 digits": "a{" + "9" * 900 + "}",
    "an optional repeat of a million": "(?:ab){,1000000}",
    "repeats in repeats": "(a{1000}){1000}",
    "small repeats in small repeats": "(((((a{10}){10}){10}){10}){10}){10}",
    "a repeat of a repeat": "a{1000}{1000}",
    "many repeats": "a{1000}" * 140,
    "grapheme clusters": r"(?:\X{30}){1000}",
    "a look behind of a million": "(?<=a{1000000})b",
    "499 brackets": "(" * 499 + ")" * 499,
    "200 groups": "(?:" * 200 + "x" + ")" * 200,
    "a repeat after white space": "(?x) (?:a b) {1000000}",
    "recursion": "(a(?R)?b)+",
    "a call of a group": "(a(?1)?b)+(?1)",
    "a call by name": "(?P<n>a(?&n)?)+",
    "a relative call": "(a(?-1)?b)",
    "fuzzy matching": "(?:abcdefghij){e<=9}",
    "fuzzy matching with costs": "(?:abcdefghij){2i+2d+1s<=40}",
    "best fuzzy matches": "(?b)abc",
    "version 1": "(?V1)[[a-z]--[aeiou]]",
    "full case folding": "(?fi)" + r"[\p{L}\d]" * 90,
    "POSIX matching": "(?p)(a|ab)(c|bcd)",
    "a named list": r"\L<words>",
}


def doubling(reference: str = "$ref", name: str = "#/$defs/a{}", **naming: str) -> dict[str, Any]:
    """A schema of 60 links, each of which refers twice to the one before: 2^60 parts."""
    links: dict[str, Any] = {"a0": {"type": "object"}}
    for n in range(1, 61):
        links[f"a{n}"] = {"allOf": [{reference: name.format(n - 1)}] * 2}
    for n in range(61):
        links[f"a{n}"] |= {keyword: value.format(n) for keyword, value in naming.items()}
    return {"$defs": links, "allOf": [{reference: name.format(60)}]}


def deep(levels: int) -> dict[str, Any]:
    """A schema nested so deep."""
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


OVERSIZED_SCHEMAS: dict[str, dict[str, Any]] = {
    "doubling references": doubling(),
    "doubling percent-encoded references": doubling(name="#/%24defs/a{}"),
    "doubling anchors": doubling(name="#a{}", **{"$anchor": "a{}"}),
    "doubling dynamic references": doubling("$dynamicRef", "#a{}", **{"$dynamicAnchor": "a{}"}),
    "doubling ids": doubling(name="http://x.y/z/a{}#", **{"$id": "http://x.y/z/a{}"}),
    "doubling branches": {
        "$defs": {f"a{n}": {"oneOf": [{"$ref": f"#/$defs/a{n - 1}"}] * 3} for n in range(1, 30)} | {"a0": {}},
        "dependentSchemas": {"x": {"$ref": "#/$defs/a29"}},
    },
    "doubling conditions": {
        "$defs": {"a0": {}}
        | {f"a{n}": {key: {"$ref": f"#/$defs/a{n - 1}"} for key in ("if", "then", "else")} for n in range(1, 30)},
        "not": {"$ref": "#/$defs/a29"},
    },
    "many alike": {"allOf": [{"$id": "x"} for _ in range(500)] + [{"$ref": "x"} for _ in range(400)]},
    "33 levels": deep(33),
    "499 levels": deep(499),
    "900 levels": deep(900),
    "an enum of 100,000": {"enum": list(range(100_000))},
    "an integer of 400 digits": {"maxLength": 10**400},
    "a divisor of next to nothing": {"multipleOf": 1e-300},
    "many patterns": {"patternProperties": {f"(?:a{{1000}}){{40}}{n}": {} for n in range(4)}},
}

COSTLY_PATTERNS = [
    r"(a|a|aa)+$",
    r"(a+)+$",
    r"(a*)*b",
    r"(a|aa)+\1\1b",
    r"(.*a){20}b",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(a?){50}a{50}b",
    r"(.*)(.*)(.*)(.*)(.*)b",
    r"(?=(a+))(?:a|\1)+b",
    r"(?<=(a+)+)b",
    r"(?i)(a|A|[aA])+$",
]
"""Well within the bounds, and next to endless on 64 KiB of `a` and an exclamation mark."""
COSTLY_CONTENT = "a" * 65_000 + "!"

_AGAIN: dict[str, Any] = {"items": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}}
_CHAIN: dict[str, Any] = {"a0": {"type": "string"}} | {
    f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n - 1}"}] * 2} for n in range(1, 12)
}
COSTLY_SCHEMAS: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", **_AGAIN}, "[" * 60 + "1" + "]" * 60),
    ({"$defs": _CHAIN, "items": {"$ref": "#/$defs/a11"}}, "[" + "1," * 30_000 + "1]"),
    ({"$defs": _CHAIN, "items": {"oneOf": [{"$ref": "#/$defs/a11"}] * 2}}, "[" + "1," * 30_000 + "1]"),
    (
        {"$defs": _CHAIN, "additionalProperties": {"not": {"not": {"$ref": "#/$defs/a11"}}}},
        "{" + ",".join(f'"{n}":1' for n in range(7_000)) + "}",
    ),
    (
        {"dependentSchemas": {"a": {"$ref": "#/$defs/a11"}}, "$defs": _CHAIN, "items": {"$ref": "#"}},
        "[" + ",".join(['{"a":1}'] * 8_000) + "]",
    ),
]
"""Within the bounds, with an answer on which they take longer than a check may."""
LARGE_CONTENTS: list[tuple[dict[str, Any], str]] = [
    ({"uniqueItems": True}, "[" + ",".join(f"[{n}]" for n in range(9_000)) + "]"),
    ({"uniqueItems": True}, "[" + ",".join(f'{{"a":{n}}}' for n in range(6_000)) + "]"),
    ({"patternProperties": {"^(a+)+$": {"type": "string"}}}, '{"' + "a" * 60_000 + '!":1}'),
    ({"items": {"pattern": "^(a|a|aa)+$"}}, '["' + "a" * 60_000 + '!"]'),
    ({"items": {"enum": [str(n) for n in range(2_000)]}}, "[" + "1," * 30_000 + "1]"),
    ({"multipleOf": 0.01}, "9" * 4_000),
    ({"items": {}}, "[" * 499 + "]" * 499),
    ({"items": {}}, "[" * 32_000 + "]" * 32_000),
]
"""Answers of up to 64 KiB that are large for a check."""

SLOW_TO_READ = [
    *(Accept(pattern=(part * 1000)[:1000]) for part in ("[[:", "{e ", "(?<a", r"\p{", "(?#", "(?x)[", "a*", "{1,")),
    Accept(json_schema={"allOf": [{} for _ in range(5_300)]}),
    Accept(json_schema={"enum": [[] for _ in range(5_300)]}),
    Accept(json_schema={"allOf": [{"$ref": "#"} for _ in range(1_200)]}),
    Accept(json_schema={"allOf": [{"$ref": "#" + "/allOf/0" * 100} for _ in range(18)]}),
    Accept(json_schema={"$id": "a/" * 1_000, "allOf": [{"$ref": "../" * 50} for _ in range(85)]}),
    Accept(json_schema={"allOf": [{"pattern": "a*" * 450 + str(n)} for n in range(17)]}),
    Accept(json_schema={"enum": [0] * 200_000}),
]
