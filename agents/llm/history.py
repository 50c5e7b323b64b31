"""Repairs the messages of a model before they are sent back to it.

Servers refuse a whole conversation for one tool call with an invalid name, id or arguments. Such a call is repaired
before it is added to the conversation; the result of the call describes the fault to the model.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import replace

from loom.agents.tools import legal_name
from loom.schemas.llm import Message, ToolCall


def arguments_object(arguments: str) -> dict[str, Any] | None:
    """Return the arguments of a call (empty: {}), or None if they are not a JSON object."""
    try:
        return msgspec.json.decode(arguments.strip() or "{}", type=dict[str, Any])
    except (ValueError, RecursionError):
        return None


def legal_call(call: ToolCall, call_id: str) -> ToolCall:
    """Return a call that a server accepts: with a legal name, and {} for arguments that are not a JSON object."""
    readable = call.arguments.strip() and arguments_object(call.arguments) is not None
    arguments = call.arguments if readable else "{}"
    return replace(call, id=call_id, name=legal_name(call.name), arguments=arguments)


class CallIds:
    """Gives every call of a conversation a unique id."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._made = 0

    def unique(self, requested: str) -> str:
        """Return `requested`, or a new id of nine letters and digits if it is empty or taken."""
        call_id = requested.strip()
        while not call_id or call_id in self._taken:
            self._made += 1
            call_id = f"call{self._made:05d}"
        self._taken.add(call_id)
        return call_id


def alternating(turns: Iterable[Message]) -> list[Message]:
    """Join consecutive messages of the same role, because many models expect alternating roles."""
    joined: list[Message] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role:
            joined[-1] = replace(joined[-1], content=f"{joined[-1].content}\n\n{turn.content}")
        else:
            joined.append(turn)
    return joined
