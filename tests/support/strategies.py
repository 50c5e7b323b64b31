"""Hypothesis strategies for every message, read from its declaration."""

import importlib
import math
import pkgutil
from functools import cache
from string import ascii_letters, digits
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as mi

import loom.schemas
from loom.schemas.auction import ScoredBid, bids_json
from loom.schemas.base import CheckedMessage, Message, encode

SMALL = 2
"""Most items of a collection: messages nest deep enough as they are."""

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
tokens = st.text(alphabet=f"{ascii_letters}{digits}_-", min_size=1, max_size=64)
"""Not from a regular expression: drawing those takes many times as long."""


def message_types() -> list[type[Message]]:
    """Every public Struct of loom.schemas."""
    modules = [
        importlib.import_module(f"loom.schemas.{one.name}") for one in pkgutil.iter_modules(loom.schemas.__path__)
    ]
    found = {name: value for module in modules for name, value in vars(module).items() if _is_message(name, value)}
    return list(found.values())


def _is_message(name: str, value: Any) -> bool:
    if not isinstance(value, type) or not issubclass(value, Message):
        return False
    return value not in (Message, CheckedMessage) and not name.startswith("_")


def messages(shape: type[Message]) -> st.SearchStrategy[Any]:
    """Any valid `shape`."""
    return _values(mi.type_info(shape))


def _values(kind: mi.Type) -> st.SearchStrategy[Any]:  # noqa: C901, PLR0911, PLR0912 - one case per kind of type
    match kind:
        case mi.StructType(cls=cls):
            return _structs(cls)
        case mi.StrType(pattern=str() as pattern):
            return st.tuples(tokens, tokens).map(".".join) if "\\." in pattern else tokens
        case mi.StrType(min_length=least, max_length=most):
            return st.text(min_size=least or 0, max_size=min(most or 20, 20))
        case mi.IntType(ge=least, le=most):
            return st.integers(-(2**53) if least is None else least, 2**53 if most is None else most)
        case mi.FloatType(ge=least, gt=above, le=most):
            return st.floats(
                min_value=above if least is None else least,
                exclude_min=least is None and above is not None,
                max_value=most,
                allow_nan=False,
                allow_infinity=False,
            )
        case mi.VarTupleType(item_type=item, min_length=least, max_length=most):
            size = min(SMALL if most is None else most, SMALL)
            return st.lists(_values(item), min_size=least or 0, max_size=size).map(tuple)
        case mi.DictType(key_type=key, value_type=value):
            return st.dictionaries(_values(key), _values(value), max_size=SMALL)
        case mi.UnionType(types=kinds):
            return st.one_of([_values(one) for one in kinds])
        case mi.LiteralType(values=values):
            return st.sampled_from(values)
        case mi.BoolType():
            return st.booleans()
        case mi.NoneType():
            return st.none()
        case mi.AnyType():
            return json_values
        case mi.RawType():  # the bids of an award
            return st.lists(_structs(ScoredBid), max_size=SMALL).map(lambda bids: bids_json(map(encode, bids)))
        case _:
            raise NotImplementedError(f"no strategy for {kind}")


@cache
def _structs(cls: type[Message]) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{field.name: _values(field.type) for field in _info(cls).fields})


def _info(cls: type[Message]) -> mi.StructType:
    info = mi.type_info(cls)
    assert isinstance(info, mi.StructType)
    return info


def float_fields() -> list[tuple[type[Message], str, list[float]]]:
    """Every field that is or may be a float, with values to refuse, of the messages that are checked when built."""
    return [
        (cls, field.name, _refused(kind))
        for cls in message_types()
        if issubclass(cls, CheckedMessage)
        for field in _info(cls).fields
        for kind in (field.type.types if isinstance(field.type, mi.UnionType) else (field.type,))
        if isinstance(kind, mi.FloatType)
    ]


def _refused(kind: mi.FloatType) -> list[float]:
    bad = [float("nan"), float("inf"), float("-inf")]
    if kind.ge is not None:
        bad.append(kind.ge - 0.001)
    if kind.gt is not None:
        bad.append(kind.gt)
    if kind.le is not None:
        bad.append(math.nextafter(kind.le, math.inf))
    return bad


def fields_of(message: Message) -> dict[str, Any]:
    """The fields of a message by name."""
    return {name: getattr(message, name) for name in message.__struct_fields__}


def with_unknown_field(message: Message) -> bytes:
    """The JSON of `message` as a newer peer might send it."""
    plain = msgspec.json.decode(msgspec.json.encode(message))
    return msgspec.json.encode({**plain, "field_of_the_future": [{"deep": 1}]})
