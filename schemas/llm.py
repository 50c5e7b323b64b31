"""The port to a language model: what any provider is asked, and what it answers."""

from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol, runtime_checkable

from msgspec import Struct
from msgspec.structs import force_setattr

from loom.schemas.base import CheckedMessage, Count, FreeJson

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(CheckedMessage, frozen=True, kw_only=True):
    """A model's wish to call a tool."""

    id: str
    name: str
    arguments: str = ""
    """JSON text as the model wrote it: unchecked."""
    extra: FreeJson = {}
    """Fields beside the call that its server wants back unchanged, such as a signature."""


class Message(CheckedMessage, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Assistant only."""
    tool_call_id: str = ""
    """Tool only: the call this answers."""
    reasoning: str = ""
    """Assistant only: the model's reasoning, for servers that want it back."""


class ToolDefinition(CheckedMessage, frozen=True, kw_only=True):
    """A tool as the model sees it."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    """JSON Schema of the arguments, an object."""


class Usage(CheckedMessage, frozen=True, kw_only=True):
    """Tokens one completion took."""

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
    """None: the server's own."""
    max_tokens: int | None = 4096
    """Most tokens of the answer; None: the server's own limit."""
    json_schema: dict[str, Any] | None = None
    """The answer must be JSON of this schema, where the model can be held to it."""
    timeout_s: float | None = None
    """Seconds until the answer is worthless; absent: the provider's own limit."""


class CompletionResult(CheckedMessage, frozen=True, kw_only=True):
    """A model's whole answer."""

    content: str = ""
    reasoning: str = ""
    refusal: str = ""
    """The model's sentence, where it refuses."""
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage | None = None
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _fill_absent(self, content="", reasoning="", refusal="", tool_calls=())


class StreamChunk(CheckedMessage, frozen=True, kw_only=True):
    """A piece of a model's answer; the last one carries `finish_reason` and `usage`, where they are known.

    None in place of a text or of the calls means that there is none.
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
    """Ignored: fragments of a call mean nothing to an agent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _fill_absent(self, text="", reasoning="", refusal="", tool_calls=())
        if self.tool_call is not None and self.tool_call not in self.tool_calls:
            force_setattr(self, "tool_calls", (*self.tool_calls, self.tool_call))
        force_setattr(self, "tool_call_delta", None)


def _fill_absent(message: Struct, **defaults: Any) -> None:
    """Put a field's default where its value is None, as other libraries give what is absent."""
    for name, default in defaults.items():
        if getattr(message, name) is None:
            force_setattr(message, name, default)


@runtime_checkable
class LLMProvider(Protocol):
    """A provider with both methods; agents take one with either, an `AnyProvider`."""

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
"""What agents take as a provider."""


class _Turn:
    """Makes messages of one role, and knows them: `isinstance(message, UserMessage)`."""

    def __init__(self, role: Role) -> None:
        self._role = role

    def __call__(self, content: str) -> Message:
        """Return a message of the role."""
        return Message(role=self._role, content=content)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Message) and value.role == self._role


UserMessage = _Turn("user")
"""Returns a user's turn."""
SystemMessage = _Turn("system")
"""Returns a system prompt."""
AssistantMessage = _Turn("assistant")
"""Returns a model's turn."""
