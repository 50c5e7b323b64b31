"""Converts JSON written by a model into values of a type."""

from functools import lru_cache
from typing import Any

import msgspec

from loom.agents.values.annotations import for_msgspec
from loom.agents.values.foreign import dec_hook


def from_json(kind: Any, raw: bytes | str) -> Any:
    """Return JSON text as a value of type `kind`, with every field checked.

    Models sometimes write numbers, true, false and null as text. Such text is converted if the type is unambiguous:
    `"3"` for an int, but not for `int | str`. Fields of pydantic models follow the rules of pydantic.

    Args:
        kind: Any type that `json_schema` accepts.
        raw: JSON without other text; the type `str` requires a JSON string.

    Raises:
        ValueError: `raw` is not JSON, or not of that type; the message has the path from `$`.

    Example:
        >>> from_json(dict[str, int], '{"a": 1}')
        {'a': 1}
    """
    try:
        strict, lax = _decoders(kind)
    except TypeError:  # unhashable metadata, or an unsupported type, which raises again with a message
        strict, lax = _decoders.__wrapped__(kind)
    try:
        try:
            return strict.decode(raw)
        except msgspec.ValidationError:
            try:
                return lax.decode(raw)
            except msgspec.ValidationError:
                pass
            raise
    except RecursionError:
        raise ValueError("the JSON text is nested too deeply") from None


@lru_cache(maxsize=256)
def _decoders(kind: Any) -> tuple[msgspec.json.Decoder[Any], msgspec.json.Decoder[Any]]:
    shape = for_msgspec(kind)
    return (
        msgspec.json.Decoder(shape, dec_hook=dec_hook),
        msgspec.json.Decoder(shape, dec_hook=dec_hook, strict=False),
    )
