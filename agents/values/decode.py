"""JSON, as a model writes it, as values of a type."""

from functools import lru_cache
from typing import Any

import msgspec

from loom.agents.values.annotations import for_msgspec
from loom.agents.values.foreign import dec_hook


def from_json(kind: Any, raw: bytes | str) -> Any:
    """Return the JSON text `raw` as a `kind`.

    Every field is checked. One habit of models is tolerated: a number, true, false or null written as text, where
    the type leaves no other reading (`"3"` for an int, but not for `int | str`, nor for a field of a pydantic model,
    to which pydantic's own rules apply).

    Args:
        kind: Any type `json_schema` takes.
        raw: JSON alone; a `str` type wants a JSON string.

    Raises:
        ValueError: `raw` is not JSON, or not of that type; the message names the place as a path from `$`.

    Example:
        >>> from_json(dict[str, int], '{"a": 1}')
        {'a': 1}
    """
    try:
        strict, lax = _decoders(kind)
    except TypeError:  # metadata that has no hash, or a type JSON cannot carry: the second fails again, with words
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
