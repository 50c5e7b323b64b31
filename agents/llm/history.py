"""What goes back to a model: whatever it wrote, in a form that every server accepts.

Servers refuse a conversation as a whole for one tool call with a broken name, id or arguments. So such a call is mended
before it becomes a part of the conversation; the call's result names the fault to the model.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import replace

from loom.agents.tools import legal_name
from loom.schemas.llm import Message, ToolCall


def arguments_object(arguments: str) -> dict[str, Any] | None:
    """Return a call's arguments, empty ones as {}; None where they are not a JSON object."""
    try:
        return msgspec.json.decode(arguments.strip() or "{}", type=dict[str, Any])
    except (ValueError, RecursionError):
        return None


def legal_call(call: ToolCall, call_id: str) -> ToolCall:
    """Return `call` as it may go back to its server: its arguments are {} where they are not a JSON object."""
    readable = call.arguments.strip() and arguments_object(call.arguments) is not None
    arguments = call.arguments if readable else "{}"
    return replace(call, id=call_id, name=legal_name(call.name), arguments=arguments)


class CallIds:
    """The ids of one conversation's calls: every call has one, and no two the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._made = 0

    def unique(self, wanted: str) -> str:
        """Return `wanted`, or an id made of nine letters and digits where it is empty or taken."""
        call_id = wanted.strip()
        while not call_id or call_id in self._taken:
            self._made += 1
            call_id = f"call{self._made:05d}"
        self._taken.add(call_id)
        return call_id


def alternating(turns: Iterable[Message]) -> list[Message]:
    """Return `turns` with neighbours of one role joined, since many models expect the roles to alternate."""
    joined: list[Message] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role:
            joined[-1] = replace(joined[-1], content=f"{joined[-1].content}\n\n{turn.content}")
        else:
            joined.append(turn)
    return joined
