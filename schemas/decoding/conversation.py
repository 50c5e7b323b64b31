"""Earlier turns of a conversation in a task's context, in the form of any client."""

from collections.abc import Mapping
from typing import Any

from loom.schemas.llm import Message

CONVERSATION = "conversation"
"""Key of a task's context with the earlier turns: a list of {"role", "content"}, oldest first."""
MAX_TURNS = 256
"""Most earlier turns that are decoded: the newest."""


def earlier_turns(context: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the turns in `context["conversation"]`, oldest first, at most the newest 256.

    Turns without a text or of other roles than user, assistant and system are omitted. A text may be a string, or a
    list of parts like `{"type": "text", "text": "…"}`.
    """
    turns = context.get(CONVERSATION)
    if not isinstance(turns, list | tuple):
        return ()
    decoded = map(_turn, turns[-MAX_TURNS:])
    return tuple(turn for turn in decoded if turn is not None)


def _turn(value: Any) -> Message | None:
    if not isinstance(value, Mapping):
        return None
    role, content = value.get("role"), _text(value.get("content"))
    if role not in ("user", "assistant", "system") or not content.strip():
        return None
    return Message(role=role, content=content)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return ""
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))
