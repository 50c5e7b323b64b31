"""The interface of language models: questions, answers, and the protocols of providers."""

from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol, runtime_checkable

from msgspec import Struct
from msgspec.structs import force_setattr

from loom.schemas.base import CheckedMessage, Count, FreeJson

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(CheckedMessage, frozen=True, kw_only=True):
    """A model's call of a tool."""

    id: str
    name: str
    arguments: str = ""
    """JSON text of the model, not validated."""
    extra: FreeJson = {}
    """Further fields that the server requires back unchanged, such as a signature."""


class Message(CheckedMessage, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Assistant only."""
    tool_call_id: str = ""
    """Tool only: id of the call."""
    reasoning: str = ""
    """Assistant only: the model's reasoning, for servers that require it back."""


class ToolDefinition(CheckedMessage, frozen=True, kw_only=True):
    """A tool as the model receives it."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    """JSON Schema of the arguments, an object."""


class Usage(CheckedMessage, frozen=True, kw_only=True):
    """Tokens of one completion."""

    prompt_tokens: Count = 0
    completion_tokens: Count = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


class CompletionParams(CheckedMessage, frozen=True, kw_only=True):
    """One question to a model."""

    messages: tuple[Message, ...]
    tools: tuple[ToolDefinition, ...] = ()
    temperature: float | None = 0.7
    """None: the default of the server."""
    max_tokens: int | None = 4096
    """Most tokens of the answer; None: the limit of the server."""
    json_schema: dict[str, Any] | None = None
    """JSON Schema of the answer, for models that support one."""
    timeout_s: float | None = None
    """Seconds after which the answer is not needed; absent: the limit of the provider."""


class CompletionResult(CheckedMessage, frozen=True, kw_only=True):
    """A model's whole answer."""

    content: str = ""
    reasoning: str = ""
    refusal: str = ""
    """The model's sentence if it refuses."""
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage | None = None
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _fill_absent(self, content="", reasoning="", refusal="", tool_calls=())


class StreamChunk(CheckedMessage, frozen=True, kw_only=True):
    """A piece of a model's answer; the last one has `finish_reason` and `usage` if the server sends them.

    None instead of a text or of the calls counts as empty.
    """

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Complete calls."""
    usage: Usage | None = None
    finish_reason: str | None = None
    tool_call: ToolCall | None = None
    """Another way to give one complete call; it becomes the last of `tool_calls`."""
    tool_call_delta: Any = None
    """Ignored: agents need complete calls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _fill_absent(self, text="", reasoning="", refusal="", tool_calls=())
        if self.tool_call is not None and self.tool_call not in self.tool_calls:
            force_setattr(self, "tool_calls", (*self.tool_calls, self.tool_call))
        force_setattr(self, "tool_call_delta", None)


def _fill_absent(message: Struct, **defaults: Any) -> None:
    """Replace None by a field's default: other libraries use None for absent values."""
    for name, default in defaults.items():
        if getattr(message, name) is None:
            force_setattr(message, name, default)


@runtime_checkable
class LLMProvider(Protocol):
    """A provider with both methods; agents accept one with either, an `AnyProvider`."""

    async def complete(self, params: CompletionParams) -> CompletionResult:
        """Return the whole answer."""
        ...

    def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:
        """Yield the answer in pieces."""
        ...


class CompletionProvider(Protocol):
    """A provider of whole answers: a CompletionResult, a dict of its fields, or a text, from a sync or async method."""

    def complete(self, params: CompletionParams, /) -> Any:
        """Return the whole answer."""
        ...


class StreamProvider(Protocol):
    """A provider of answers in pieces: StreamChunks, dicts of their fields, or texts."""

    def stream(self, params: CompletionParams, /) -> Any:
        """Return an asynchronous iterator over the answer's pieces."""
        ...


AnyProvider = LLMProvider | CompletionProvider | StreamProvider
"""Providers that agents accept."""


class _Turn:
    """Factory of messages of one role, and their type: `isinstance(message, UserMessage)`."""

    def __init__(self, role: Role) -> None:
        self._role = role

    def __call__(self, content: str) -> Message:
        """Return a message of the role."""
        return Message(role=self._role, content=content)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Message) and value.role == self._role


UserMessage = _Turn("user")
"""Makes a turn of the user."""
SystemMessage = _Turn("system")
"""Makes a system prompt."""
AssistantMessage = _Turn("assistant")
"""Makes a turn of the model."""
