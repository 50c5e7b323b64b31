"""Collects the answer of a model, and explains an empty one."""

from collections.abc import Iterable

from loom.agents.llm.openai.thinking import ThinkBlock
from loom.agents.protocol import MAX_TEXT_CHARS
from loom.agents.yielded_values import deltas
from loom.schemas.events import ReasoningDelta, TextDelta
from loom.schemas.llm import CompletionResult, StreamChunk, ToolCall, Usage

MAX_REFUSAL_CHARS = 1000
CHARS_PER_TOKEN = 32
"""More characters than a token of any model has."""


class ModelAnswer:
    """Collects the pieces of one answer and returns the deltas to show for each piece."""

    def __init__(self) -> None:
        self.pieces = 0
        """Number of pieces so far."""
        self.size = 0
        """Characters so far, including reasoning and tool calls."""
        self.refusal = ""
        self.tool_calls: list[ToolCall] = []
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self._think = ThinkBlock()
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._thoughts: list[str] = []

    @property
    def is_refused_or_cut(self) -> bool:
        """Whether the model refused, or reached its token limit, before it wrote any text."""
        return not self.content.strip() and not self.tool_calls and (bool(self.refusal.strip()) or self.cut)

    @property
    def cut(self) -> bool:
        """Whether the answer ended at its token limit."""
        return self.finish_reason == "length"

    @property
    def content(self) -> str:
        """The text without reasoning."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        """The reasoning in a separate field."""
        return "".join(self._reasoning)

    @property
    def thoughts(self) -> str:
        """The reasoning within the text."""
        return "".join(self._thoughts)

    def add(self, chunk: StreamChunk) -> list[ReasoningDelta | TextDelta]:
        """Add a piece and return its deltas."""
        self.pieces += 1
        self.size += len(chunk.text) + len(chunk.reasoning) + len(chunk.refusal)
        self.size += sum(len(call.id) + len(call.name) + len(call.arguments) for call in chunk.tool_calls)
        self.refusal += chunk.refusal
        self.tool_calls.extend(chunk.tool_calls)
        self.usage = chunk.usage or self.usage
        self.finish_reason = chunk.finish_reason or self.finish_reason
        thoughts, text = self._think.split(chunk.text) if chunk.text else ("", "")
        return self._shown(chunk.reasoning, thoughts, text)

    def end(self) -> list[ReasoningDelta | TextDelta]:
        """Return the remaining deltas after the last piece."""
        return self._shown("", *self._think.rest())

    def result(self) -> CompletionResult:
        """Return the answer as a whole."""
        return CompletionResult(
            content=self.content,
            reasoning=self.reasoning,
            refusal=self.refusal,
            tool_calls=tuple(self.tool_calls),
            usage=self.usage,
            finish_reason=self.finish_reason,
        )

    def _shown(self, reasoning: str, thoughts: str, text: str) -> list[ReasoningDelta | TextDelta]:
        for kept, piece in ((self._reasoning, reasoning), (self._thoughts, thoughts), (self._texts, text)):
            if piece:
                kept.append(piece)
        return [*(ReasoningDelta(text=piece.text) for piece in _pieces(reasoning + thoughts)), *_pieces(text)]


def _pieces(text: str) -> Iterable[TextDelta]:
    return deltas(text) if text else ()


def max_chars(max_tokens: int | None) -> int:
    """Return the number of characters beyond which a stream of at most `max_tokens` tokens counts as endless."""
    return MAX_TEXT_CHARS if max_tokens is None else max_tokens * CHARS_PER_TOKEN


def why_empty(answer: ModelAnswer, *, limit: int | None, by_budget: bool) -> str:
    """Return why an answer has no text, as a clause for a message.

    Args:
        answer: An answer without text.
        limit: Token limit of the answer.
        by_budget: Whether the limit follows from the task's token budget, and not from the agent's config.
    """
    if answer.refusal.strip():
        return f"it refused: {' '.join(answer.refusal.split())[:MAX_REFUSAL_CHARS]}"
    reasoned = bool(answer.reasoning or answer.thoughts)
    if not answer.cut:
        return "it wrote only reasoning" if reasoned else ""
    what = "went into reasoning" if reasoned else "ended before any text (hidden reasoning counts as well)"
    if limit is None:
        return f"the most tokens its server allows {what}: set AgentConfig(max_tokens=…)"
    if by_budget:
        return f"the {limit} tokens that the task's token_budget left {what}: raise token_budget"
    return f"its max_tokens ({limit}) {what}: raise AgentConfig(max_tokens=…)"
